"""The static graph on Qualcomm's NPU, or on its simulator: all of it there, and the same text."""

import numpy as np
import pytest
from tiny import tiny_bundle

from forerun.devices.session import SessionOptions, open_session
from forerun.errors import DeviceError
from forerun.runtime.drafting.accept import MatchWalk
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.model import ModelDrafter
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.schedules import SCHEDULES
from forerun.runtime.drafting.vocab import identity
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner
from forerun.runtime.static_runner import StaticRunner

pytestmark = pytest.mark.npu
pytest.importorskip("onnxruntime_qnn", reason="the NPU's plugin: pip install onnxruntime-qnn")

CAPACITY = 64
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]
ANSWER = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("qnn"), capacity=CAPACITY, static=True)


@pytest.fixture(scope="module")
def npu(bundle):
    """A runner whose sessions refuse to leave a single node to the CPU."""
    runner = StaticRunner(*bundle, device="qnn", threads=1)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def plain(npu):
    """The greedy answer on the NPU, row by row."""
    npu.arena.rewind(0)
    row, tokens = npu.step(PROMPT)[-1], []
    while len(tokens) < ANSWER:
        tokens.append(int(row.argmax()))
        row = npu.step(tokens[-1:])[-1]
    return tokens


def answer(runner, drafter, schedule):
    """The same with a drafter; returns (tokens, what the rounds tell of themselves)."""
    cache = PrefixCache(runner)
    make = SCHEDULES[schedule].make
    rounds = make(cache, drafter, FixedPolicy(4), MatchWalk(), trees=drafter.proposes_trees)
    tokens = list(PROMPT)
    tokens.append(int(cache.feed(tokens, "last")[-1].argmax()))
    while len(tokens) < len(PROMPT) + ANSWER:
        room = len(PROMPT) + ANSWER - len(tokens)
        said = rounds.round(tokens, lambda row, path: int(row.argmax()), room)
        tokens += [token for token, _ in said]
    rounds.finish(len(tokens) - 1)
    return tokens[len(PROMPT) :], rounds.tally


def test_every_node_of_every_width_runs_there(bundle):
    manifest, folder = bundle
    form = manifest.lowerings["npu"]
    for width in form.query_widths:
        axes = {"S": width, "U": width * manifest.kv.heads}
        session = open_session(folder / form.graph, SessionOptions(device="qnn", axes=axes))
        parts = session.get_provider_graph_assignment_info()
        assert [part.ep_name for part in parts] == ["QNNExecutionProvider"]
        assert len(parts[0].get_nodes()) > 100


def test_a_graph_it_cannot_run_is_refused_instead_of_run_on_the_cpu(bundle):
    _, folder = bundle
    with pytest.raises(DeviceError, match="qnn"):
        open_session(folder / "model.onnx", SessionOptions(device="qnn", axes={"S": 1, "R": 1}))


def test_it_equals_the_cpu_up_to_half_precision(bundle, npu):
    cpu = StaticRunner(*bundle, threads=1)
    ids = np.arange(13) * 17 % 250
    tree, parents = [1, 2, 3, 4, 5], [-1, 0, 0, 1, -1]
    for runner in (cpu, npu):
        runner.arena.rewind(0)
    expected = cpu.step(ids, want="all")
    bound = 0.02 * expected.std()
    assert np.abs(npu.step(ids, want="all") - expected).max() < bound
    expected = cpu.step(tree, parents=parents, want="all")
    assert np.abs(npu.step(tree, parents=parents, want="all") - expected).max() < bound
    for runner in (cpu, npu):
        runner.arena.commit([0, 1, 3])
    assert np.abs(npu.step([9]) - cpu.step([9])).max() < bound


def test_rows_do_not_depend_on_the_width_they_ran_in(npu):
    """Which is what makes verifying chains exact."""
    ids = list(np.arange(13) * 17 % 250)
    npu.arena.rewind(0)
    alone = np.concatenate([npu.step([token]).copy() for token in ids])
    npu.arena.rewind(0)
    together = np.concatenate([npu.step(part, want="all") for part in (ids[:3], ids[3:11])])
    assert np.array_equal(alone[:11], together)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_drafter_on_the_cpu_does_not_change_the_text(npu, plain, branches):
    said, tally = answer(npu, NgramDrafter(branches=branches), "serial")
    assert said == plain
    assert tally.accepted > 0 and len(tally.rounds) < ANSWER - 1
    assert tally.draft_seconds > 0 and tally.verify_seconds > 0


@pytest.mark.parametrize("schedule", ["serial", "pearl"])
def test_a_draft_model_on_the_cpu_does_not_change_the_text(bundle, npu, plain, schedule):
    manifest, folder = bundle
    small = Runner(manifest, folder, threads=1, spin=False)
    drafter = ModelDrafter(small, identity(manifest.model.vocab))
    said, tally = answer(npu, drafter, schedule)
    drafter.close()
    assert said == plain
    # It is the same model, so most of what it drafts must be right.
    assert tally.accepted > tally.proposed / 2 > 0
