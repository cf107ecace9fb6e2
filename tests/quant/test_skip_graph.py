"""The graph with skippable feed-forward blocks against one without, and against zeroed blocks."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tiny import tiny_bundle

from forerun.errors import OptionError, UnsupportedError
from forerun.export.tree import tree_lowering, write_tree_graph
from forerun.quant.quantize import quantize
from forerun.quant.skip_graph import find_blocks, skipping_lowering, with_skipping
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner
from forerun.runtime.skipping import Fixed, Skip

LAYERS = 6
IDS = [5, 9, 200, 31, 7, 7, 80]
KINDS = [("llama", "fp32"), ("llama", "int4"), ("llama", "int4-exact"), ("llama", "int8"),
         ("gemma3", "fp32"), ("gemma3", "int4")]  # fmt: skip
CHANGES = {"layers": LAYERS, "ffn": 128}


def skippable(folder, manifest, band=None, trees=False):
    """Make the graph in `folder` skippable; the manifest for it."""
    chain = manifest.lowerings["cpu"]
    form = skipping_lowering(chain, with_skipping(folder, chain.graph, band))
    forms = {"cpu": form}
    if trees:
        write_tree_graph(folder, chain.graph)
        forms["cpu-tree"] = tree_lowering(form)
    return dataclasses.replace(manifest, lowerings=manifest.lowerings | forms)


def make(tmp_path_factory, kind):
    """A tiny bundle of a kind, and a copy of it whose blocks can be skipped."""
    arch, weights = kind
    folder = tmp_path_factory.mktemp("skip")
    windows = {"layer_window": (True,) * (LAYERS - 1) + (False,)} if arch == "gemma3" else {}
    if arch == "llama":
        windows = {"layer_window": (False,) * LAYERS}
    manifest, plain = tiny_bundle(arch, folder, **CHANGES, **windows)
    if weights != "fp32":
        quantize(plain, folder / weights, weights=weights)
        plain = folder / weights
        manifest = load_manifest(plain)
    other = folder / "skippable"
    shutil.copytree(plain, other)
    changed = skippable(other, manifest, trees=arch == "llama")
    return (manifest, plain), (changed, other)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request, tmp_path_factory):
    plain, changed = make(tmp_path_factory, request.param)
    return Runner(*plain, threads=1), Runner(*changed, threads=1), plain


def skip(flags, tau=np.inf, run=0):
    return Fixed("test", Skip(np.asarray(flags), tau, run), 0)


def decode(runner, ids, rule=None):
    """Logits of rows that run one by one behind a prompt of two, and the blocks that ran."""
    runner.arena.rewind(0)
    runner.skipping = None
    rows = [runner.step(ids[:2])[0].copy()]
    if rule:
        runner.skipping = rule
    before = runner.ffn_counts[0]
    rows += [runner.step([token])[0].copy() for token in ids[2:]]
    return np.array(rows), runner.ffn_counts[0] - before


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 257), min_size=3, max_size=12), st.data())
def test_all_running_is_bit_equal_to_the_graph_without_gates(pair, ids, data):
    plain, gated, _ = pair
    np.testing.assert_array_equal(decode(gated, ids)[0], decode(plain, ids)[0])
    rule = skip([True] * LAYERS, tau=1.5, run=data.draw(st.integers(0, 9)))
    rows, ran = decode(gated, ids, rule)
    np.testing.assert_array_equal(rows, decode(plain, ids)[0])
    assert ran == LAYERS * (len(ids) - 2)
    for runner in (plain, gated):
        runner.skipping = None
        runner.arena.rewind(0)
    whole = gated.step(ids, want="all").copy()
    np.testing.assert_array_equal(whole, plain.step(ids, want="all"))


def zeroed(source, folder, layers):
    """A copy of a float32 bundle in which some blocks' last matrices are zeros."""
    shutil.copytree(source, folder)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in {f"down.{layer}" for layer in layers}:
            zero = np.zeros(tuple(tensor.dims), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(zero, tensor.name))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("layers", [(1,), (2, 3), (1, 2, 3, 4), (2, 4)])
def test_a_skipped_set_equals_zeroed_blocks(tmp_path_factory, tmp_path, arch, layers):
    (manifest, plain), changed = make(tmp_path_factory, (arch, "fp32"))
    gated = Runner(*changed, threads=1)
    flags = np.ones(LAYERS, bool)
    flags[list(layers)] = False
    full = Runner(manifest, plain, threads=1)
    less = Runner(manifest, zeroed(plain, tmp_path / "zero", layers), threads=1)
    rows, ran = decode(gated, IDS, skip(flags))
    assert ran == (LAYERS - len(layers)) * (len(IDS) - 2)
    # The prompt is read in full, so the reference takes over the cache behind it.
    full.step(IDS[:2])
    less.step(IDS[:2])
    for role, array in full.arena.arrays.items():
        less.arena.arrays[role][...] = array
    expected = [less.step([token])[0].copy() for token in IDS[2:]]
    np.testing.assert_allclose(rows[1:], expected, atol=2e-5)
    assert not np.allclose(rows[1:], decode(full, IDS)[0][1:], atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_adaptive_rule_is_that_of_the_paper(adaptive, data):
    """Walk the layers by hand, with the cosines of the blocks that ran."""
    runner, reference = adaptive
    tau, run = data.draw(st.floats(0.2, 1.0)), data.draw(st.integers(0, 4))
    flags = [data.draw(st.booleans()) for _ in range(LAYERS)]
    token = data.draw(st.integers(0, 257))
    _, ran = decode(runner, [1, 2, token], skip(flags, tau, run))
    expected, until = LAYERS, 0
    allowed = np.ones(LAYERS, bool)
    cosines = reference([1, 2, token], allowed)
    for layer in range(1, LAYERS - 1):
        if not flags[layer] or until > layer:
            expected, allowed[layer] = expected - 1, False
            cosines = reference([1, 2, token], allowed)
        elif cosines[layer] >= tau:
            until = layer + 1 + run
        # A cosine this close may fall on either side.
        if abs(cosines[layer] - tau) < 1e-5:
            return
    assert ran == expected


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    """A runner, and what gives the cosine at each block when a set of them runs."""
    plain, changed = make(tmp_path_factory, ("llama", "fp32"))
    folder = changed[1]
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    # Of the last block only the wanted rows are computed, which cannot be joined to the others.
    blocks = find_blocks(onnx.load(str(plain[1] / "model.onnx")).graph)[:-1]
    names = [name for block in blocks for name in (block.stream, block.out)]
    model.graph.node.append(onnx.helper.make_node("Concat", names, ["streams"], axis=-1))
    width = 64 * len(names)
    model.graph.output.append(onnx.helper.make_tensor_value_info("streams", 1, [1, "S", width]))
    (folder / "watched.onnx").write_bytes(model.SerializeToString())
    form = changed[0].lowerings["cpu"]
    spec = dataclasses.replace(form.outputs["logits"], name="streams", shape=(1, "S", width))
    outputs = form.outputs | {"features": spec}
    form = dataclasses.replace(form, graph="watched.onnx", outputs=outputs)
    watched = dataclasses.replace(changed[0], lowerings={"cpu": form})
    seeing = Runner(watched, folder, threads=1)

    def reference(ids, allowed):
        decode(seeing, ids, skip(allowed))
        rows = seeing.features()[0].reshape(LAYERS - 1, 2, 64).astype(np.float64)
        before, after = rows[:, 0], rows[:, 0] + rows[:, 1]
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        return (before * after).sum(1) / norms

    return Runner(*changed, threads=1), reference


def test_trees_run_every_block(pair):
    plain, gated, _ = pair
    if "cpu-tree" not in plain.manifest.lowerings:
        pytest.skip("a model with a sliding window runs no trees")
    got = []
    for runner in (plain, gated):
        runner.arena.rewind(0)
        runner.skipping = None
        runner.step([1, 2, 3])
        if runner is gated:
            runner.skipping = skip([True] + [False] * (LAYERS - 2) + [True])
        got.append(runner.step([5, 6, 7], parents=[-1, 0, 0], want="all").copy())
    np.testing.assert_array_equal(*got)
    gated.skipping = None


def test_weights_are_not_copied_and_nothing_is_left_behind(tmp_path_factory):
    (_, plain), (_, changed) = make(tmp_path_factory, ("llama", "int4"))
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in changed.iterdir()} == names
    assert (changed / "weights.bin").read_bytes() == (plain / "weights.bin").read_bytes()
    grown = (changed / "model.onnx").stat().st_size - (plain / "model.onnx").stat().st_size
    assert grown < 20_000


def test_only_a_band_can_be_skipped(tmp_path_factory):
    (manifest, plain), _ = make(tmp_path_factory, ("llama", "fp32"))
    runner = Runner(skippable(plain, manifest, (2, 4)), plain, threads=1)
    _, ran = decode(runner, [1, 2, 3], skip([False] * LAYERS))
    assert ran == LAYERS - 2
    _, ran = decode(runner, [1, 2, 3], skip([True] * LAYERS, tau=-2.0, run=9))
    assert ran == LAYERS - 1


@pytest.mark.parametrize("band", [(0, 3), (1, LAYERS), (3, 3), (4, 2)])
def test_the_first_and_last_layer_always_run(tmp_path_factory, band):
    (manifest, plain), _ = make(tmp_path_factory, ("llama", "fp32"))
    before = (plain / "model.onnx").read_bytes()
    with pytest.raises(OptionError, match=r"1\.\.4"):
        with_skipping(plain, manifest.lowerings["cpu"].graph, band)
    assert (plain / "model.onnx").read_bytes() == before


def test_graphs_of_another_form_are_refused(tmp_path_factory, tmp_path):
    (_, plain), (_, changed) = make(tmp_path_factory, ("llama", "fp32"))
    with pytest.raises(UnsupportedError, match="already"):
        with_skipping(changed, "model.onnx")
    model = onnx.load(str(plain / "model.onnx"), load_external_data=False)
    inner = find_blocks(model.graph)[2].nodes[0].output[0]
    model.graph.output.append(onnx.ValueInfoProto(name=inner))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="read outside"):
        with_skipping(tmp_path, "a.onnx")
    del model.graph.node[-3:]
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError):
        with_skipping(tmp_path, "a.onnx")
