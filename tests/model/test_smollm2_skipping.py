"""Skipping feed-forward blocks of SmolLM2-135M: nothing changes unasked, and time really goes."""

import dataclasses
import shutil

import numpy as np
import pytest

from forerun.quant.skip_graph import find_blocks, skipping_lowering, with_skipping
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner
from forerun.runtime.skipping import Fixed, Skip

pytestmark = pytest.mark.model

PROMPT = [504, 3575, 282, 4649, 314, 7042, 30] * 4


ACTS = ["Split", "QuickGelu", "Mul"]


@pytest.fixture(scope="module")
def runners(folder, tmp_path_factory):
    """The bundle as it is, and one whose blocks can be skipped."""
    manifest = load_manifest(folder)
    changed = tmp_path_factory.mktemp("skipping") / "bundle"
    changed.mkdir()
    for name in (manifest.lowerings["cpu"].graph, "weights.bin"):
        shutil.copyfile(folder / name, changed / name)
    form = manifest.lowerings["cpu"]
    form = skipping_lowering(form, with_skipping(changed, form.graph))
    gated = dataclasses.replace(manifest, lowerings={"cpu": form})
    made = [Runner(manifest, folder, threads=1), Runner(gated, changed, threads=1)]
    yield made
    for runner in made:
        runner.close()


def test_nothing_changes_by_a_bit_when_nothing_is_skipped(runners):
    rows = []
    for runner in runners:
        runner.arena.rewind(0)
        logits = [runner.step(PROMPT, want="all").copy()]
        logits += [runner.step([token]).copy() for token in PROMPT[:8]]
        rows.append(np.concatenate(logits))
    np.testing.assert_array_equal(*rows)


def test_what_is_skipped_is_not_run(runners):
    _, runner = runners
    layers = runner.manifest.model.layers
    rule = Fixed("none", Skip(np.zeros(layers, bool)), 0)
    for skipping, ran in ((None, layers), (rule, 2), (None, layers)):
        runner.arena.rewind(0)
        runner.skipping = None
        runner.step(PROMPT, want="none")
        runner.skipping = skipping
        before = runner.ffn_counts[0]
        runner.step([5])
        assert runner.ffn_counts[0] - before == ran
    runner.skipping = None


def test_every_layer_has_its_block(folder):
    import onnx

    manifest = load_manifest(folder)
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    blocks = find_blocks(graph)
    assert len(blocks) == manifest.model.layers
    for layer, block in enumerate(blocks):
        kinds = [node.op_type for node in block.nodes]
        assert [kind for kind in kinds if kind in ACTS] == ACTS
        assert kinds[-1] == "MatMulNBits"
        assert block.nodes[-1].input[1] == f"down.{layer}"
