"""The feature head on a tiny network whose every step numpy computes as well."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from draft_toys import plain
from fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from forerun.errors import BundleError, OptionError, UnsupportedError
from forerun.runtime import sampling
from forerun.runtime.drafting.auto import AutoDrafter
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.folder import load_draft_model
from forerun.runtime.drafting.registry import DrafterContext, open_drafter
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.types import SamplingParams

SHA = "ab" * 32
VOCAB, SIZE, HIDDEN, TAPS = 64, 10, 4, (1, 2)
IDS = np.array([3, 5, 9, 12, 20, 21, 30, 40, 50, 63], np.int32)
rng = np.random.default_rng(0)
FUSE = rng.normal(0, 1, (HIDDEN * len(TAPS), HIDDEN)).astype(np.float32)
STEP = rng.normal(0, 1, (HIDDEN, HIDDEN)).astype(np.float32)
EMBED = rng.normal(0, 1, (SIZE + 1, HIDDEN)).astype(np.float32)
BEFORE = rng.normal(0, 1, (SIZE + 1, HIDDEN)).astype(np.float32)
HEAD = rng.normal(0, 2, (HIDDEN, SIZE)).astype(np.float32)
FEATURES = st.integers(0, 9).map(lambda n: np.random.default_rng(n).normal(0, 1, (3, 8)))


def graph(nodes, inputs, outputs, weights):
    kinds = {"ids": TensorProto.INT64}

    def info(shapes):
        return [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s)
            for n, s in shapes.items()
        ]

    initializers = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    body = helper.make_graph(nodes, "g", info(inputs), info(outputs), initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 8
    return model.SerializeToString()


def step_graph():
    nodes = [
        helper.make_node("Split", ["ids"], ["before", "last"], axis=1, num_outputs=2),
        helper.make_node("Gather", ["embed", "last"], ["e"]),
        helper.make_node("Gather", ["past", "before"], ["b"]),
        helper.make_node("ReduceSum", ["e", "axis"], ["e1"], keepdims=0),
        helper.make_node("ReduceSum", ["b", "axis"], ["b1"], keepdims=0),
        helper.make_node("MatMul", ["features", "fuse"], ["f"]),
        helper.make_node("Sum", ["f", "state"], ["x0"]),
        helper.make_node("MatMul", ["x0", "w"], ["s"]),
        helper.make_node("Sum", ["s", "e1", "b1"], ["x"]),
        helper.make_node("Tanh", ["x"], ["new_state"]),
        helper.make_node("MatMul", ["new_state", "head"], ["logits"]),
    ]
    weights = {"fuse": FUSE, "w": STEP, "embed": EMBED, "past": BEFORE, "head": HEAD}
    return graph(
        nodes,
        {"features": ["R", 8], "state": ["R", HIDDEN], "ids": ["R", 2]},
        {"new_state": ["R", HIDDEN], "logits": ["R", SIZE]},
        {**weights, "axis": np.array([1])},
    )


def spec(name, *shape):
    dtype = "int64" if name == "ids" else "float32"
    return {"name": name, "dtype": dtype, "shape": ["R", *shape]}


def describe(folder, change=lambda data: None):
    """Write the head's folder; `change` edits drafter.json before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"step.onnx": step_graph(), "vocab.i32": IDS.astype("<i4").tobytes()}
    data = {
        "format_version": 1,
        "kind": "head",
        "name": "toy-head",
        "target": {
            "name": "fake", "tokenizer_sha256": SHA, "vocab": VOCAB, "hidden": HIDDEN,
            "taps": list(TAPS),
        },
        "vocab": {"file": "vocab.i32", "size": SIZE, "unknown": SIZE},
        "graphs": {
            "step": {
                "graph": "step.onnx",
                "inputs": {
                    "features": spec("features", 8),
                    "state": spec("state", HIDDEN),
                    "ids": spec("ids", 2),
                },
                "outputs": {
                    "logits": spec("logits", SIZE), "state": spec("new_state", HIDDEN),
                },
            },
        },
        "files": {
            n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in files.items()
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    change(data)
    (folder / "drafter.json").write_text(json.dumps(data))


def target():
    return replace(make_manifest(vocab=VOCAB, sha256=SHA), taps=TAPS)


def context(folder, **options):
    return DrafterContext(target(), folder.parent / "bundle", folder, threads=1, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "head"
    describe(folder)
    return folder


@pytest.fixture
def head(folder):
    head = open_drafter("head", context(folder))
    yield head
    head.close()


def to_draft(token):
    found = np.flatnonzero(np.equal(IDS, token))
    return int(found[0]) if len(found) else SIZE


def expected(ids, features, count, choose=lambda logits, position: int(logits.argmax())):
    """Tokens and logits as numpy computes them."""
    state, ids, rows = features[None].astype(np.float32) @ FUSE, list(ids), []
    for _ in range(count):
        last, before = to_draft(ids[-1]), to_draft(ids[-2])
        state = np.tanh(state @ STEP + EMBED[last] + BEFORE[before])
        rows.append((state @ HEAD)[0])
        ids.append(int(IDS[choose(rows[-1], len(ids))]))
    return tuple(ids[-count:]), rows


def outcome(path, new, features):
    tokens = tuple(new[:-1]) or (1,)
    tree = TokenTree.chain(tokens, [0.5] * len(tokens), "head")
    return Outcome(tree, path, tuple(new), (0, *tokens), None, features.astype(np.float32))


@given(FEATURES, st.lists(st.integers(0, 63), min_size=2, max_size=6), st.integers(1, 5))
@settings(max_examples=30)
def test_it_drafts_what_the_network_says(folder, features, ids, budget):
    head = open_drafter("head", context(folder))
    head.begin(ids, features)
    tree = head.propose(budget)
    tokens, rows = expected(ids, features[-1], budget)
    assert tree.tokens == tokens and tree.is_chain and set(tree.sources) == {"head"}
    shares = [1 / np.exp(row - row.max()).sum() for row in rows]
    assert np.allclose(tree.confidences, shares, atol=1e-5)


def test_the_row_before_the_new_anchor_counts(head):
    features = np.random.default_rng(5).normal(0, 1, (4, 8))
    head.begin([1, 2], features)
    for path, new, row in (((0, 1), [9, 5, 12], 2), ((), [20], 0), ((0,), [3, 21], 1)):
        ids = [*head._ids, *new]
        head.observe(outcome(path, new, features))
        assert head.propose(3).tokens == expected(ids, features[row], 3)[0]


def test_it_copies_what_is_valid_only_during_a_call(head):
    features = np.ones((1, 8), np.float32)
    head.begin([3, 5], features)
    first = head.propose(2)
    features[:] = 7
    assert head.propose(2) == first


def test_without_features_it_waits_for_a_round(head):
    head.begin([3, 5, 9], None)
    assert len(head.propose(3)) == 0
    features = np.ones((1, 8))
    head.observe(outcome((), [12], features))
    assert head.propose(2).tokens == expected([9, 12], features[0], 2)[0]
    head.rewind(4)
    assert len(head.propose(2)) == 2
    head.rewind(3)
    assert len(head.propose(2)) == 0
    head.observe(plain(5))
    assert len(head.propose(2)) == 0
    head.begin([3], features)
    assert len(head.propose(2)) == 0
    assert len(head.propose(0)) == 0


def test_it_stops_when_told(head):
    head.begin([3, 5], np.ones((1, 8)))
    seen = []
    tree = head.propose(6, lambda value: seen.append(value) or len(seen) < 3)
    assert len(tree) == 3 and np.allclose(seen, np.cumprod(tree.confidences))


def test_it_draws_with_the_targets_noise(head):
    params = SamplingParams(temperature=0.9, seed=5)
    head.configure(params, 7)
    features = np.ones((2, 8))

    def choose(logits, position):
        full = np.full(VOCAB, -1e4, np.float32)
        full[IDS] = logits
        return to_draft(sampling.pick(full, params, position + 7))

    head.begin([3, 5], features)
    assert head.propose(6).tokens == expected([3, 5], features[-1], 6, choose)[0]


def test_auto_takes_the_head_where_it_fits(folder, tmp_path):
    (tmp_path / "drafters").mkdir()
    (tmp_path / "drafters" / "head").symlink_to(folder)
    beside = DrafterContext(target(), tmp_path / "int4", threads=1)
    auto = open_drafter("auto", beside)
    assert isinstance(auto, AutoDrafter) and auto.needs_features
    auto.close()
    without = replace(beside, target_manifest=make_manifest(vocab=VOCAB, sha256=SHA))
    assert "gives none" in without.obstacle("head") and beside.obstacle("head") is None
    auto = open_drafter("auto", without)
    assert not auto.needs_features
    auto.close()


def test_wrong_targets_and_devices_are_named(folder):
    wrong = replace(context(folder), target_manifest=make_manifest(vocab=VOCAB, sha256=SHA))
    with pytest.raises(UnsupportedError, match="this bundle of fake gives none"):
        open_drafter("head", wrong)
    with pytest.raises(OptionError, match="runs on the cpu, not on webgpu"):
        open_drafter("head", context(folder, device="webgpu"))
    with pytest.raises(BundleError, match="not a bundle"):
        load_draft_model(folder, target())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["graphs"].pop("step"), "no graph 'step'"),
        (lambda d: d["graphs"]["step"]["inputs"].pop("ids"), "graph has no 'ids'"),
        (lambda d: d["graphs"]["step"]["outputs"]["logits"].update(name="x"), "no 'logits'"),
        (lambda d: d["graphs"]["step"]["outputs"]["state"].update(shape=[1, "D"]), r"\[R, 4\]"),
        (lambda d: d["graphs"]["step"]["inputs"]["features"].update(shape=["R", 9]), r"\[R, 8\]"),
        (lambda d: d["graphs"]["step"]["inputs"]["ids"].update(dtype="int32"), "ids is int32"),
        (lambda d: d["graphs"]["step"].update(graph="other.onnx"), "not listed under files"),
    ],
)
def test_wrong_graphs_are_named(tmp_path, change, message):
    describe(tmp_path / "head", change)
    with pytest.raises(BundleError, match=message):
        open_drafter("head", context(tmp_path / "head"))


def test_a_broken_graph_is_named(tmp_path):
    describe(tmp_path / "head")
    path = tmp_path / "head" / "step.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:50] + bytes([data[50] ^ 255]) + data[51:])
    with pytest.raises(BundleError, match="another SHA-256"):
        open_drafter("head", context(tmp_path / "head"))
