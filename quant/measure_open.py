"""What is judged, and the one place where it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.runtime.kv_request import KVRequest
from forerun.runtime.layouts import choose_layout
from forerun.runtime.manifest import load_manifest
from forerun.runtime.open import open_runner
from forerun.runtime.skipping import NO_SKIPPING, parse_skipping

if TYPE_CHECKING:
    from forerun.runtime.manifest import Manifest

_PLAIN = "none"


@dataclass(frozen=True)
class Judged:
    """One row of a comparison: a bundle, and how it is run.

    Attributes:
        bundle: folder.
        kv: name of a KV layout of the bundle; None takes its default.
        ffn_skip: which feed-forward blocks decoding leaves out, as `parse_skipping` reads it;
            None runs all of them.
        window: rows of a cache of sinks and newest tokens (StreamingLLM); None keeps all.
        threads: of the sessions; None takes one per core, up to eight.
    """

    bundle: Path
    kv: str | None = None
    ffn_skip: str | None = None
    window: int | None = None
    threads: int | None = None

    @property
    def cache(self) -> KVRequest:
        """What is asked of the KV cache."""
        return KVRequest(self.kv, window=self.window)

    @property
    def rows_per_step(self) -> int | None:
        """1 if only steps of a single row show what this costs, None if any step does."""
        return 1 if self.ffn_skip else None


def view(judged: Judged, manifest: Manifest | None = None) -> Manifest:
    """Return the manifest with the chosen KV layout as its default.

    Args:
        judged: what to open.
        manifest: of the bundle, where it is not written yet; None reads it.

    Raises:
        BundleError: the folder is not a bundle.
        OptionError: the bundle has no such layout.
    """
    return choose_layout(manifest or load_manifest(judged.bundle), judged.kv)


def check_judged(judged: Judged) -> Manifest:
    """Refuse what could not be opened, before anything else is; returns `view`.

    Raises:
        BundleError: the folder is not a bundle, or its graphs have no such window.
        OptionError: it has no such layout or window, or cannot skip that share.
    """
    manifest = load_manifest(judged.bundle)
    judged.cache.apply(manifest)
    if judged.ffn_skip:
        parse_skipping(judged.ffn_skip, manifest)
    return view(judged, manifest)


def open_judged(judged: Judged, manifest: Manifest | None = None) -> Any:
    """Open what is judged on the CPU; returns a runner, which the caller closes.

    Args:
        judged: what to open.
        manifest: of the bundle, where it is not written yet; None reads it.

    Raises:
        BundleError: the bundle cannot be loaded.
        OptionError: it has no such layout or window, or cannot skip that share.
    """
    manifest, _ = judged.cache.apply(manifest or load_manifest(judged.bundle))
    return open_runner(
        manifest,
        judged.bundle,
        threads=judged.threads,
        arena=judged.cache.arena(manifest),
        skipping=judged.ffn_skip or NO_SKIPPING,
    )


def label(judged: Judged, manifest: Manifest) -> str:
    """Short name of a row, e.g. ``int4, KV int8, skip 0.1``."""
    method = manifest.quantization.method
    parts = ["fp32" if method == _PLAIN else method]
    if judged.kv:
        parts.append(f"KV {judged.kv}")
    if judged.window:
        parts.append(f"window {judged.window}")
    if judged.ffn_skip:
        parts.append(f"skip {judged.ffn_skip}")
    return ", ".join(parts)


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of the weights and of the graph that runs on the CPU."""
    graph = manifest.lowerings["cpu"].graph if "cpu" in manifest.lowerings else None
    return sum(
        entry.bytes
        for name, entry in manifest.files.items()
        if name.endswith(".bin") or name == graph
    )
