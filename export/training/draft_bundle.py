"""A trained draft model as a bundle of its own, which any runner can open."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from forerun.export.arch import arch_of
from forerun.export.check import check_export
from forerun.export.graph import EMBEDDING, FINAL_NORM, DecoderGraph, cpu_lowering, kv_layout
from forerun.export.sources import ModelConfig
from forerun.export.tokenizer import TokenizerSource
from forerun.export.tree import tree_lowering, write_tree_graph
from forerun.quant.rewrite import GraphRewriter
from forerun.quant.rounding import quantize_blocks
from forerun.runtime.manifest import (
    FORMAT_VERSION,
    Manifest,
    ModelSizes,
    Quantization,
    Source,
    inside,
)

if TYPE_CHECKING:
    from forerun.export.training.draft import DraftModel, DraftSizes
    from forerun.quant.blocks import Blocks

GRAPH_NAME = "model.onnx"
_BLOCK = 32
# What has most effect on the logits per byte keeps 8 bits.
_WIDE = ("qkv.", EMBEDDING)
_ARCHITECTURE = "llama"


@dataclass
class DraftWeights:
    """The weights of a draft model as an exporter reads them (`sources.WeightSource`).

    Attributes:
        config: sizes.
        origin: for people.
        tensors: float32 arrays by Hugging Face's names.
        tokenizer: file of the target's tokenizer.
    """

    config: ModelConfig
    origin: str
    tensors: dict[str, np.ndarray]
    tokenizer: Path

    @property
    def sha256(self) -> str:
        """Hash of all weights."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(np.ascontiguousarray(self.tensors[name]).tobytes())
        return digest.hexdigest()

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self.tensors)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.tensors[name]

    def tokenizer_files(self) -> TokenizerSource:
        """The target's tokenizer."""
        return TokenizerSource(json_path=self.tokenizer)


def draft_weights(model: DraftModel, target: Manifest, bundle: Path, capacity: int) -> DraftWeights:
    """Take the weights out of a torch module.

    Args:
        model: the draft model.
        target: manifest of the target.
        bundle: folder of the target.
        capacity: longest sequence the bundle will be for.
    """
    values = {k: v.detach().float().numpy() for k, v in model.state_dict().items()}
    s = model.sizes
    tensors = {EMBEDDING: values["embedding"], FINAL_NORM: values["norm"]}
    widths = np.cumsum([s.heads * s.head_dim, s.kv_heads * s.head_dim])
    for i in range(s.layers):
        old, new = f"layers.{i}", f"model.layers.{i}"
        parts = np.split(values[f"{old}.qkv.weight"], widths)
        for letter, part in zip("qkv", parts, strict=True):
            tensors[f"{new}.self_attn.{letter}_proj.weight"] = part
        gate, up = np.split(values[f"{old}.gate_up.weight"], 2)
        tensors |= {
            f"{new}.self_attn.o_proj.weight": values[f"{old}.o.weight"],
            f"{new}.mlp.gate_proj.weight": gate,
            f"{new}.mlp.up_proj.weight": up,
            f"{new}.mlp.down_proj.weight": values[f"{old}.down.weight"],
            f"{new}.input_layernorm.weight": values[f"{old}.input_layernorm"],
            f"{new}.post_attention_layernorm.weight": values[f"{old}.post_attention_layernorm"],
        }
    tokenizer = inside(bundle, target.tokenizer.file)
    origin = f"made from layers of {target.name} and trained on its answers"
    return DraftWeights(_config(s, target, capacity), origin, tensors, tokenizer)


def _config(sizes: DraftSizes, target: Manifest, capacity: int) -> ModelConfig:
    return ModelConfig(
        architecture=_ARCHITECTURE,
        vocab=sizes.vocab,
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn=sizes.ffn,
        context=capacity,
        rope_theta=sizes.rope_theta,
        norm_eps=sizes.norm_eps,
        tied=True,
        activation="silu",
        layer_window=(False,) * sizes.layers,
        licence=target.source.licence,
    )


def write_draft_bundle(source: DraftWeights, target: Manifest, folder: Path, name: str) -> Manifest:
    """Export, check against the reference, quantize.

    Args:
        source: the weights.
        target: whose tokenizer the bundle has; special ids are left to the target.
        folder: of the bundle, which exists and is empty.
        name: of the bundle.

    Returns:
        The manifest, which is not written yet.

    Raises:
        ExportMismatch: the float32 graph computes something else than the weights say.
    """
    arch, c = arch_of(source.config), source.config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        exact = Path(temporary)
        DecoderGraph(source, arch, exact, c.context).write(GRAPH_NAME)
        manifest = _manifest(source, target, name)
        check = check_export(source, arch, manifest, exact)
        model = onnx.load(str(exact / GRAPH_NAME), load_external_data=False)
        GraphRewriter(model, exact, folder, _to_blocks).write(GRAPH_NAME, lambda done, total: None)
    write_tree_graph(folder, GRAPH_NAME)
    shutil.copyfile(source.tokenizer, folder / manifest.tokenizer.file)
    quant = Quantization("int4-exact", 4, _BLOCK, "4 bits (qkv, embedding 8), blocks of 32")
    return replace(manifest, quantization=quant, checks=(check,))


def _to_blocks(name: str, weight: np.ndarray) -> Blocks:
    return quantize_blocks(weight, 8 if name.startswith(_WIDE) else 4, _BLOCK)


def _manifest(source: DraftWeights, target: Manifest, name: str) -> Manifest:
    c = source.config
    form = cpu_lowering(c, False, GRAPH_NAME)
    return Manifest(
        format_version=FORMAT_VERSION,
        kind="text",
        name=name,
        source=Source(source.origin, c.licence, source.sha256),
        model=ModelSizes(
            c.vocab, c.hidden, c.layers, c.context, sum(t.size for t in source.tensors.values())
        ),
        kv=kv_layout(c, c.context),
        lowerings={"cpu": form, "cpu-tree": tree_lowering(form)},
        tokenizer=replace(target.tokenizer, chat_template=None),
    )
