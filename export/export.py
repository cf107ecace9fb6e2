"""Source weights in, checked float32 bundle out."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from forerun.errors import OptionError, UnsupportedError
from forerun.export.arch import ArchSpec, arch_of
from forerun.export.bundle import new_bundle, require_space
from forerun.export.card import write_card
from forerun.export.check import RUNNERS, check_export
from forerun.export.graph import DecoderGraph, cpu_lowering, default_taps, kv_layout, rotary_of
from forerun.export.npu import write_static_graph
from forerun.export.recipe import RECIPE
from forerun.export.tokenizer import write_tokenizer
from forerun.export.tree import takes_trees, tree_lowering, write_tree_graph
from forerun.export.webgpu import with_webgpu
from forerun.runtime.manifest import (
    FORMAT_VERSION,
    Manifest,
    ModelSizes,
    Source,
    TokenizerInfo,
    file_sha256,
    seal,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from forerun.export.sources import ModelConfig, WeightSource

    Progress = Callable[[str, int, int | None], None]

GRAPH_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"
DEFAULT_CAPACITY = 8192


def export_model(
    source: WeightSource,
    out: Path,
    *,
    name: str,
    capacity: int | None = None,
    hidden_states: bool = False,
    static: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Export a model in float32 and check it against the numpy reference.

    Args:
        source: from `forerun.export.sources.open_source`.
        out: folder of the new bundle; appears only when everything succeeded.
        name: name of the model in the manifest.
        capacity: length of the static KV cache; None takes the model's context, up to 8192.
        hidden_states: also give the graph an output with hidden states.
        static: also write the form with static shapes that NPUs need.
        progress: called with (stage, done, total).

    Raises:
        UnsupportedError: the architecture has no row, or does something its row does not know.
        OptionError: the capacity is not within the model's context.
        ExportMismatch: the graph computes something else than the source.
        SpaceError: the disk is too small.
    """
    config, arch = source.config, arch_of(source.config)
    capacity = _capacity(config, capacity)
    _check_sizes(config)
    require_space(Path(out).parent, parameter_count(config) * 4, "the export")
    report = progress or (lambda stage, done, total: None)
    with new_bundle(Path(out)) as folder:
        taps = default_taps(config.layers)
        graph = DecoderGraph(source, arch, folder, capacity, hidden_states, taps=taps)
        graph.write(GRAPH_NAME, lambda done, total: report("export", done, total))
        if takes_trees(config):
            write_tree_graph(folder, GRAPH_NAME)
        manifest = with_webgpu(folder, _manifest(source, folder, name, capacity, hidden_states))
        if static:
            forms = write_static_graph(folder, manifest.lowerings["cpu"])
            manifest = dataclasses.replace(manifest, lowerings=manifest.lowerings | forms)
        manifest = _checked(source, arch, manifest, folder, report)
        write_card(folder, manifest)
        return seal(folder, manifest)


def _checked(
    source: WeightSource, arch: ArchSpec, manifest: Manifest, folder: Path, report: Progress
) -> Manifest:
    checks = tuple(
        check_export(source, arch, manifest, folder, partial(report, "check"), form)
        for form in RUNNERS
        if form in manifest.lowerings
    )
    return dataclasses.replace(manifest, checks=checks)


def _manifest(
    source: WeightSource, folder: Path, name: str, capacity: int, hidden_states: bool
) -> Manifest:
    c = source.config
    write_tokenizer(source.tokenizer_files(), folder / TOKENIZER_NAME)
    taps = default_taps(c.layers)
    forms = {"cpu": cpu_lowering(c, hidden_states, GRAPH_NAME, taps)}
    if takes_trees(c):
        forms["cpu-tree"] = tree_lowering(forms["cpu"])
    if c.chat_template:
        (folder / TEMPLATE_NAME).write_text(c.chat_template, encoding="utf-8")
    return Manifest(
        format_version=FORMAT_VERSION,
        kind="text",
        name=name,
        source=Source(source.origin, c.licence, source.sha256),
        model=ModelSizes(c.vocab, c.hidden, c.layers, c.context, parameter_count(c)),
        kv=kv_layout(c, capacity),
        lowerings=forms,
        tokenizer=TokenizerInfo(
            file=TOKENIZER_NAME,
            sha256=file_sha256(folder / TOKENIZER_NAME),
            bos=c.bos,
            eos=c.eos,
            add_bos=c.add_bos,
            chat_template=TEMPLATE_NAME if c.chat_template else None,
        ),
        generation=c.generation,
        taps=taps,
        recipe=RECIPE,
        rotary=rotary_of(c),
    )


def parameter_count(config: ModelConfig) -> int:
    """Weights of the matrices of a model; norms and biases are left out."""
    c = config
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    layer = attention + 3 * c.hidden * c.ffn
    return c.layers * layer + c.vocab * c.hidden * (1 if c.tied else 2)


def _capacity(config: ModelConfig, capacity: int | None) -> int:
    if capacity is None:
        return min(config.context, DEFAULT_CAPACITY)
    if not 16 <= capacity <= config.context:
        raise OptionError(
            f"the capacity must be in 16..{config.context} (the model's context), got {capacity}"
        )
    return capacity


def _check_sizes(config: ModelConfig) -> None:
    if config.heads % config.kv_heads:
        raise UnsupportedError(
            f"{config.heads} query heads cannot share {config.kv_heads} key-value heads evenly"
        )
    if config.head_dim % 16:
        raise UnsupportedError(f"head size {config.head_dim} is not a multiple of 16")
