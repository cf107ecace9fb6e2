"""What a bundle is worth: perplexity on fixed text, and divergence from another bundle."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import OptionError
from forerun.runtime.manifest import inside, load_manifest
from forerun.runtime.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forerun.runtime.manifest import Manifest

    Progress = Callable[[str, int, int | None], None]

CORPUS = ("corpus_prose.txt", "corpus_reference.txt")
_ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """How one model's next-token distributions differ from another's, over many positions.

    Attributes:
        perplexity: of the model that is judged.
        perplexity_against: of the reference.
        kl_mean: mean of KL(reference || judged) in nats.
        kl_p99: its 99th percentile.
        top1_agreement: share of positions with the same most probable token.
        tokens: positions that were compared.
    """

    perplexity: float
    perplexity_against: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    tokens: int


def evaluate(
    bundle: Path,
    against: Path | None = None,
    *,
    context: int = 512,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a bundle on the built-in public-domain text.

    Args:
        bundle: what to judge.
        against: the bundle to compare with, usually the float32 one; it must have the same
            tokenizer.
        context: the text is cut into pieces of this many tokens, each read from an empty cache.
        max_tokens: how much text, half of it prose and half reference text.
        progress: called with (stage, done, total).

    Returns:
        A JSON object: bundle, against, the fields of `Divergence`, bytes_per_weight,
        kv_bytes_per_token.

    Raises:
        OptionError: the context or the amount of text is out of range, or the tokenizers differ.
    """
    manifest = load_manifest(Path(bundle))
    reference = load_manifest(Path(against)) if against else None
    if reference and reference.tokenizer.sha256 != manifest.tokenizer.sha256:
        raise OptionError("the two bundles have different tokenizers, so they cannot be compared")
    if not 16 <= context <= manifest.kv.capacity:
        raise OptionError(f"context must be in 16..{manifest.kv.capacity}, got {context}")
    if max_tokens < context:
        raise OptionError(f"tokens must be at least the context of {context}, got {max_tokens}")
    pieces = corpus_pieces(manifest, Path(bundle), context, max_tokens)
    pair = (reference, Path(against)) if reference and against else None
    measured = compare((manifest, Path(bundle)), pair, pieces, progress)
    return {
        "bundle": str(bundle),
        "against": str(against) if against else None,
        **measured.__dict__,
        "context": context,
        "bytes_per_weight": weight_bytes(manifest) / manifest.model.parameters,
        "kv_bytes_per_token": manifest.kv.nbytes_per_token,
    }


def compare(
    judged: tuple[Manifest, Path],
    reference: tuple[Manifest, Path] | None,
    pieces: list[np.ndarray],
    progress: Progress | None = None,
) -> Divergence:
    """Run the pieces through one or two bundles and compare position by position.

    Args:
        judged: manifest and folder.
        reference: likewise, or None for perplexity alone.
        pieces: token ids, each int64 [T].
        progress: called with (stage, done, total).
    """
    runner = Runner(*judged)
    other = Runner(*reference) if reference else None
    tally = _Tally()
    total, done = sum(len(p) for p in pieces), 0
    try:
        for piece in pieces:
            streams = [_log_probabilities(r, piece) for r in (runner, other) if r]
            for rows in zip(*streams, strict=True):
                tally.add(piece, *rows)
                done += len(rows[0][1])
                if progress:
                    progress("evaluate", done, total)
    finally:
        runner.close()
        if other:
            other.close()
    return tally.result()


def corpus_pieces(
    manifest: Manifest, folder: Path, context: int, max_tokens: int, from_end: bool = False
) -> list[np.ndarray]:
    """Cut the built-in text into pieces of `context` tokens, beginning with the BOS if used.

    Args:
        manifest: of the bundle whose tokenizer is used.
        folder: of that bundle.
        context: tokens of a piece.
        max_tokens: of all pieces, half of them prose and half reference text.
        from_end: take the ends of the texts, for calibration, not their beginnings.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(inside(folder, manifest.tokenizer.file)))
    bos = [manifest.tokenizer.bos] if manifest.tokenizer.add_bos else []
    width = context - len(bos)
    pieces: list[np.ndarray] = []
    for name in CORPUS:
        text = resources.files("forerun.quant").joinpath(name).read_text(encoding="utf-8")
        budget = max(1, max_tokens // context // len(CORPUS))
        # Eight characters a token is more than any text here needs.
        room = budget * width * 8
        text = text[-room:] if from_end else text[:room]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids = ids[-budget * width :] if from_end else ids
        cuts = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)][:budget]
        pieces += [np.array(bos + cut, np.int64) for cut in cuts]
    if not pieces:
        raise OptionError(f"the built-in text has fewer than {context} tokens in this tokenizer")
    return pieces


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of the graph and its weights."""
    return sum(
        entry.bytes for name, entry in manifest.files.items() if name.endswith((".bin", ".onnx"))
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _log_probabilities(runner: Runner, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    runner.arena.rewind(0)
    for start in range(0, len(ids), _ROWS):
        yield start, log_softmax(runner.step(ids[start : start + _ROWS], want="all"))


class _Tally:
    def __init__(self) -> None:
        self.nll: list[np.ndarray] = []
        self.nll_against: list[np.ndarray] = []
        self.kl: list[np.ndarray] = []
        self.same: list[np.ndarray] = []

    def add(self, ids: np.ndarray, judged, reference=None) -> None:
        start, p = judged
        following = ids[start + 1 : start + 1 + len(p)]
        rows = np.arange(len(following))
        self.nll.append(-p[rows, following])
        if reference is not None:
            q = reference[1]
            self.nll_against.append(-q[rows, following])
            self.kl.append((np.exp(q) * (q - p)).sum(-1))
            self.same.append(p.argmax(-1) == q.argmax(-1))

    def result(self) -> Divergence:
        nll = np.concatenate(self.nll)
        if not self.kl:
            return Divergence(float(np.exp(nll.mean())), None, None, None, None, len(nll))
        kl = np.concatenate(self.kl)
        return Divergence(
            perplexity=float(np.exp(nll.mean())),
            perplexity_against=float(np.exp(np.concatenate(self.nll_against).mean())),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=float(np.concatenate(self.same).mean()),
            tokens=len(kl),
        )
