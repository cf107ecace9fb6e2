"""Training data: the target answers prompts, and what it computes on the way is stored."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from forerun.errors import UnsupportedError
from forerun.export.training.data import TOP, TokenStore
from forerun.export.training.prompts import Prompt, prompt_batches
from forerun.export.training.target import KVCache, TorchTarget
from forerun.runtime.manifest import inside
from forerun.runtime.template import render_chat
from forerun.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

_MESSAGE = "<the user's message>"
_CANDIDATES = 32
_COMPACT_BELOW = 0.7


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        new_tokens: longest answer.
        temperature: of the rows that are not greedy.
        top_p: of the rows that are not greedy, within the 32 most probable tokens.
    """

    new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95


def write_data(
    target: TorchTarget,
    bundle: Path,
    folder: Path,
    *,
    tokens: int,
    seed: int = 0,
    batch: int = 128,
    workers: int = 2,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
    until: float = float("inf"),
) -> TokenStore:
    """Let a target answer prompts until there are enough tokens; goes on where it stopped.

    Args:
        target: the model.
        bundle: folder with its tokenizer and chat template.
        folder: of the `TokenStore`.
        tokens: answer tokens wanted.
        seed: of prompts and sampling.
        batch: sequences at a time.
        workers: batches at a time, each on one thread; that bears a busy machine better than
            threads within a batch, which wait for each other.
        sampling: how answers are drawn.
        progress: called with (answer tokens so far, `tokens`).
        until: `time.monotonic` after which no further batch is begun.
    """
    sampling = sampling or Sampling()
    store = TokenStore(folder, len(target.taps), target.hidden)
    limit = target.manifest.kv.capacity - sampling.new_tokens
    encode = prompt_encoder(target, bundle)
    numbered = enumerate(prompt_batches(seed, batch, encode, limit))
    todo = itertools.islice(numbered, store.batches, None)

    def answer(number: int, prompts: list[Prompt]) -> list[tuple[dict[str, np.ndarray], Any]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return _Batch(target, prompts, sampling, generator).run()

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        running: deque[Future[Any]] = deque()
        while store.answer_tokens < tokens and time.monotonic() < until:
            while len(running) < workers:
                running.append(pool.submit(answer, *next(todo)))
            # In the order of their numbers, so that what is stored depends on the seed alone.
            store.append(running.popleft().result())
            if progress:
                progress(store.answer_tokens, tokens)
        for future in running:
            future.cancel()
    return store


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread for an operation, and as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prompt_encoder(target: TorchTarget, bundle: Path) -> Callable[[str], list[int]]:
    """Return what turns a user's message into the ids of a whole prompt.

    The chat template is rendered once, for all messages; thousands of times would take minutes.

    Raises:
        UnsupportedError: the template does something to a message, so that this cannot be done.
    """
    manifest = target.manifest
    tokenizer = Tokenizer(manifest, bundle)
    name = manifest.tokenizer.chat_template
    template = inside(Path(bundle), name).read_text() if name else "{{messages[0]['content']}}"
    parts = render_chat(template, [{"role": "user", "content": _MESSAGE}]).split(_MESSAGE)
    if len(parts) != 2:
        raise UnsupportedError(f"the chat template of {manifest.name} changes messages")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text.join(parts))

    return encode


class _Batch:
    """Decodes one batch of prompts, padded at the left."""

    def __init__(
        self,
        target: TorchTarget,
        prompts: list[Prompt],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        self.target, self.prompts = target, prompts
        self.sampling, self.generator = sampling, generator
        count, width = len(prompts), max(len(p.ids) for p in prompts)
        self.width, self.length = width, width + sampling.new_tokens
        self.pads = torch.tensor([width - len(p.ids) for p in prompts])
        self.greedy = torch.tensor([p.greedy for p in prompts])
        self.ids = torch.zeros(count, self.length, dtype=torch.int32)
        for row, prompt in enumerate(prompts):
            self.ids[row, self.pads[row] : width] = torch.tensor(prompt.ids)
        shape = (count, self.length, len(target.taps), target.hidden)
        self.states = torch.zeros(shape, dtype=torch.float16)
        self.top_ids = torch.full((count, self.length, TOP), -1, dtype=torch.int32)
        self.top_logps = torch.zeros((count, self.length, TOP), dtype=torch.float16)
        self.ends = torch.full((count,), self.length)
        self.eos = torch.tensor(target.manifest.tokenizer.eos)

    @torch.inference_mode()
    def run(self) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Return the entries for `TokenStore.append`."""
        cache = self.target.cache(len(self.prompts), self.length)
        rows = torch.arange(len(self.prompts))
        states = self.target.forward(self.ids[:, : self.width].long(), 0, self.pads, cache)
        self.states[:, : self.width] = states.half()
        chosen = self._choose(rows, self.width - 1, states[:, -1, -1])
        for column in range(self.width, self.length):
            stopped = torch.isin(chosen, self.eos)
            self.ends[rows[stopped]] = torch.minimum(self.ends[rows[stopped]], torch.tensor(column))
            rows, chosen = self._compact(rows, chosen, cache)
            if not len(rows):
                break
            self.ids[rows, column] = chosen.int()
            states = self.target.forward(chosen[:, None], column, self.pads[rows], cache)
            self.states[rows, column] = states[:, 0].half()
            chosen = self._choose(rows, column, states[:, 0, -1])
        return self._entries()

    def _choose(self, rows: torch.Tensor, column: int, final: torch.Tensor) -> torch.Tensor:
        """Note the distribution after a column and draw the next token of each row."""
        logits = self.target.logits(final)
        values, ids = logits.topk(_CANDIDATES, -1)
        total = logits.float().logsumexp(-1, keepdim=True)
        self.top_ids[rows, column] = ids[:, :TOP].int()
        self.top_logps[rows, column] = (values[:, :TOP].float() - total).half()
        probs = torch.softmax(values.float() / self.sampling.temperature, -1)
        probs = probs * (probs.cumsum(-1) - probs < self.sampling.top_p)
        drawn = torch.multinomial(probs, 1, generator=self.generator)
        drawn = drawn.masked_fill(self.greedy[rows, None], 0)
        return ids.gather(1, drawn)[:, 0]

    def _compact(
        self, rows: torch.Tensor, chosen: torch.Tensor, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop finished rows once they are worth the copying of the cache."""
        alive = self.ends[rows] == self.length
        if alive.sum() >= _COMPACT_BELOW * len(rows):
            return rows, chosen
        kept = alive.nonzero()[:, 0]
        cache.select(kept)
        return rows[kept], chosen[kept]

    def _entries(self) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        entries = []
        for row, prompt in enumerate(self.prompts):
            used = slice(int(self.pads[row]), int(self.ends[row]))
            names = ("ids", "states", "top_ids", "top_logps")
            arrays = {name: getattr(self, name)[row, used].numpy() for name in names}
            facts = dataclasses.asdict(prompt)
            facts["prompt"] = len(facts.pop("ids"))
            entries.append((arrays, facts))
        return entries
