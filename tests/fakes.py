"""Stand-ins for real weights: a scripted runner and tiny tokenizers, all deterministic."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from forerun.errors import ContextLimitError, OptionError
from forerun.runtime.manifest import (
    KVLayout,
    Lowering,
    Manifest,
    ModelSizes,
    Source,
    TokenizerInfo,
    file_sha256,
)
from forerun.runtime.prefix import PlainRows
from forerun.runtime.tokenizer import Tokenizer

BOS, EOS, TURN, END = 0, 1, 2, 3
SPECIALS = ("<bos>", "<eos>", "<turn>", "<end>")
CHATML = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def make_manifest(
    vocab: int = 64,
    capacity: int = 64,
    *,
    eos: tuple[int, ...] = (EOS,),
    bos: int | None = BOS,
    add_bos: bool = False,
    tokenizer: str = "tokenizer.json",
    sha256: str = "",
    generation: dict[str, float] | None = None,
) -> Manifest:
    """A manifest of a text model that has no graph."""
    return Manifest(
        format_version=1,
        kind="text",
        name="fake",
        source=Source("test", "Apache-2.0"),
        model=ModelSizes(vocab=vocab, hidden=4, layers=1, context=capacity, parameters=1),
        kv=KVLayout(layers=1, heads=1, head_dim=4, capacity=capacity),
        lowerings={"cpu": Lowering(graph="model.onnx", inputs={}, outputs={})},
        tokenizer=TokenizerInfo(tokenizer, sha256, bos=bos, eos=eos, add_bos=add_bos),
        generation=generation or {},
    )


class FakeArena(PlainRows):
    """A KV arena whose rows are the ids themselves."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[int] = []
        self.pending: list[int] = []

    @property
    def length(self) -> int:
        return len(self.rows)

    def rewind(self, length: int) -> None:
        if not 0 <= length <= len(self.rows):
            raise OptionError(f"cannot rewind to {length}: {len(self.rows)} tokens are cached")
        del self.rows[length:]
        self.pending = []

    def commit(self, rows) -> None:
        assert list(rows) == sorted(set(rows)), rows
        self.rows += [self.pending[row] for row in rows]
        self.pending = []


class FakeRunner:
    """Logits are a pure function of the ids in the arena, so a stale row changes the text.

    Args:
        manifest: sizes.
        script: ids to favour, by position; beyond it logits are pseudo-random.
        fail_at: number of the step (from 0) that raises.
        fail_late: raise after the rows were written, as an interrupt may.
        delay: seconds a step takes.
        never: ids that are never likely.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        script: dict[int, int] | None = None,
        fail_at: int | None = None,
        fail_late: bool = False,
        delay: float = 0.0,
        never: tuple[int, ...] = (),
    ) -> None:
        self.manifest = manifest
        self.arena = FakeArena(manifest.kv.capacity)
        self.session_time = 0.0
        self.script = script or {}
        self.fail_late = fail_late
        self.fail_at, self.delay, self.never = fail_at, delay, list(never)
        self.steps: list[int] = []
        self.parents: list[list[int] | None] = []
        self.closed = False
        self._logits = np.zeros((1, manifest.model.vocab), np.float32)

    def step(self, ids, *, want="last", parents=None):
        ids = [int(token) for token in ids]
        if len(self.steps) == self.fail_at:
            self.fail_at = None
            if self.fail_late:
                self.arena.rows.extend(ids)
            raise RuntimeError("the device went away")
        if self.arena.length + len(ids) > self.arena.capacity:
            raise ContextLimitError("too long")
        started = time.perf_counter()
        if self.delay:
            time.sleep(self.delay)
        self.steps.append(len(ids))
        self.parents.append(parents)
        past = list(self.arena.rows)
        if parents is None:
            self.arena.rows.extend(ids)
        else:
            self.arena.pending = ids
        if want == "none":
            return self._logits[:0]
        rows = range(len(ids)) if want == "all" else [len(ids) - 1]
        if len(rows) > len(self._logits):
            self._logits = np.zeros((len(rows), self.manifest.model.vocab), np.float32)
        # In place: what an earlier step returned is overwritten, as in the real runner.
        for out, row in zip(self._logits, rows, strict=False):
            out[:] = self.logits_after(past + self._path(ids, row, parents))
        self.session_time += time.perf_counter() - started
        return self._logits[: len(rows)]

    def features(self):
        return None

    def _path(self, ids, row, parents):
        """The ids that a row sees, itself the last."""
        if parents is None:
            return ids[: row + 1]
        path = []
        while row >= 0:
            assert parents[row] < row
            path.append(ids[row])
            row = parents[row]
        return path[::-1]

    def logits_after(self, ids: list[int]) -> np.ndarray:
        """float32 [V], a function of the ids."""
        seed = 0
        for token in ids:
            seed = (seed * 1_000_003 + token + 1) % (2**61 - 1)
        logits = np.random.default_rng(seed).normal(0, 2, self.manifest.model.vocab)
        logits[self.never] -= 100
        if len(ids) in self.script:
            logits[self.script[len(ids)]] += 1000
        return logits.astype(np.float32)

    def close(self) -> None:
        self.closed = True


def byte_level_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: 4 special tokens, 256 bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "he", "ll", "hell", "Ġw", "Ã©", "ðŁ", "ðŁĺ"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©"), ("ð", "Ł")]
    merges.append(("ðŁ", "ĺ"))
    vocab = {piece: i + len(SPECIALS) for i, piece in enumerate(pieces)}
    for i, special in enumerate(SPECIALS):
        vocab[special] = i
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    backend.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    return backend


def spm_backend(decoder: decoders.Decoder | None = None) -> tokenizers.Tokenizer:
    """An SPM-like BPE tokenizer: metaspace and byte fallback."""
    letters = ["▁", *"abcdehlo .,\n", "é", "▁h", "ll", "▁hell"]
    pieces = [*(f"<0x{b:02X}>" for b in range(256)), *letters, "<unk>"]
    vocab = {piece: i + len(SPECIALS) for i, piece in enumerate(pieces)}
    for i, special in enumerate(SPECIALS):
        vocab[special] = i
    merges = [("▁", "h"), ("l", "l")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return backend


def make_tokenizer(
    folder: Path, backend: tokenizers.Tokenizer | None = None, **manifest_options
) -> tuple[Manifest, Tokenizer]:
    """Write a tokenizer file and load it the way a bundle's is loaded."""
    backend = backend or byte_level_backend()
    path = folder / "tokenizer.json"
    backend.save(str(path))
    manifest_options.setdefault("vocab", backend.get_vocab_size())
    manifest = make_manifest(sha256=file_sha256(path), **manifest_options)
    return manifest, Tokenizer(manifest, folder)
