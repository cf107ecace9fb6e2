"""Runs workers by turns, and makes rows and ratios of what they measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from forerun.apps.bench import machine, plan
from forerun.apps.bench.spread import Spread, ratio, spread
from forerun.apps.bench.worker import Worker, WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from forerun.apps.bench.peers import Runtime
    from forerun.apps.bench.prepare import Prepared

FOREIGN_LIMIT = 0.10
OURS = "forerun"
_WARMUP_TOKENS = 8
_TOUCH = list(range(100, 116))

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """What one turn of one runtime gave: rates in tokens per second, None if not measured."""

    prefill: float | None = None
    decode: float | None = None
    first_token_ms: float | None = None
    session_share: float | None = None


@dataclass
class Opened:
    """A runtime that takes part, and its worker."""

    runtime: Runtime
    prepared: Prepared
    worker: Worker
    version: str
    cold_start_s: float
    peak_rss_mb: dict[int, float | None]


Samples = dict[tuple[str, int], list[Sample]]


class Bench:
    """All workers of one benchmark; only one of them runs at any time.

    Args:
        say: told the progress.
        logs: folder for what the workers write to stderr.
        threads: of each runtime.
        context: tokens that runtimes which ask for it make room for.

    Attributes:
        opened: runtimes that take part.
        failed: title to reason of those that dropped out.
        disturbed: turns during which other processes used more than `FOREIGN_LIMIT` of a core.
        taken: turns in all.
    """

    def __init__(self, say: Callable[[str], None], logs: Path, threads: int, context: int) -> None:
        self._say, self._logs = say, logs
        self._threads, self._context = threads, context
        self._workers: list[Opened] = []
        self.failed: dict[str, str] = {}
        self.disturbed = self.taken = 0

    @property
    def workers(self) -> list[Opened]:
        """Runtimes that take part, with their workers; a copy."""
        return list(self._workers)

    @property
    def opened(self) -> list[Runtime]:
        """Runtimes that take part."""
        return [item.runtime for item in self._workers]

    def open(self, chosen: Sequence[tuple[Runtime, Prepared, str]]) -> None:
        """Start and load one worker after another; each is paused when it has answered a prompt.

        Raises:
            WorkerError: forerun itself does not load.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        for runtime, prepared, python in chosen:
            runtime = replace(runtime, weights=prepared.weights)
            self._say(f"loading {runtime.title}")
            start = time.monotonic()
            command = [python, "-m", runtime.module]
            worker = Worker(runtime.title, command, self._logs / f"{runtime.key}.log")
            item = Opened(runtime, prepared, worker, "", 0.0, {})
            self._workers.append(item)
            try:
                loaded = self._load(worker, runtime, prepared)
            except WorkerError as error:
                self.drop(item, error)
                continue
            item.version = str(loaded.get("version") or "")
            item.cold_start_s = time.monotonic() - start
            worker.pause()

    def measure(self, measures: dict[tuple[int, int], list[plan.Measure]], runs: int) -> Samples:
        """Give every runtime its turns: A B C A B C, depth by depth, after a warm-up of each.

        Raises:
            WorkerError: forerun itself failed; a peer that fails is dropped.
        """
        samples: Samples = {}
        for depth in sorted({depth for depth, _ in measures}):
            for run in range(-1, runs):
                for item in list(self._workers):
                    try:
                        sample = self._turn(item, measures[depth, run], warm_up=run < 0)
                    except WorkerError as error:
                        self.drop(item, error)
                        continue
                    if run >= 0:
                        samples.setdefault((item.runtime.key, depth), []).append(sample)
                        self._tell(item.runtime, depth, run, runs, sample)
        return samples

    def runtimes(self) -> list[dict[str, Any]]:
        """Version, start-up time and peak memory of each runtime."""
        return [
            {
                "runtime": item.runtime.name,
                "weights": item.runtime.weights,
                "version": item.version,
                "cold_start_s": round(item.cold_start_s, 2),
                "peak_rss_mb": max(filter(None, item.peak_rss_mb.values()), default=None),
            }
            for item in self._workers
        ]

    def peak_rss_mb(self, key: str, depth: int) -> float | None:
        """Peak memory of a runtime when a depth was done."""
        return next(i.peak_rss_mb.get(depth) for i in self._workers if i.runtime.key == key)

    def close(self) -> None:
        """End all workers."""
        for item in self._workers:
            item.worker.close()

    def turn(self, item: Opened, work: Callable[[Worker], T]) -> T:
        """Let one worker run while `work` talks to it; all others stand still.

        Raises:
            WorkerError: it failed; see `drop`.
        """
        worker = item.worker
        worker.resume()
        # While it was stopped, the kernel may have dropped weights that are mapped from a file.
        worker.call("measure", prompt=_TOUCH, tokens=2)
        busy, own = machine.busy_seconds(), worker.cpu_seconds()
        start = time.monotonic()
        result = work(worker)
        self._count_disturbance(busy, own, worker, time.monotonic() - start)
        worker.pause()
        return result

    def reload(self, item: Opened) -> None:
        """Load the model of a worker anew, so that it remembers no text.

        Raises:
            WorkerError: it failed; see `drop`.
        """
        item.worker.resume()
        self._load(item.worker, item.runtime, item.prepared)
        item.worker.pause()

    def _load(self, worker: Worker, runtime: Runtime, prepared: Prepared) -> dict[str, Any]:
        answer = worker.call(
            "load",
            model=str(prepared.path),
            threads=self._threads,
            context=self._context,
            **runtime.options,
        )
        worker.call("measure", prompt=_TOUCH, tokens=1)
        return answer

    def _turn(self, item: Opened, measures: Sequence[plan.Measure], warm_up: bool) -> Sample:
        def work(worker: Worker) -> Sample:
            sample = Sample()
            for part in measures:
                tokens = min(part.tokens, _WARMUP_TOKENS) if warm_up else part.tokens
                answer = worker.call("measure", prompt=list(part.prompt), tokens=tokens)
                sample = _merge(sample, part, answer)
            item.peak_rss_mb[measures[0].depth] = worker.call("memory").get("peak_rss_mb")
            return sample

        return self.turn(item, work)

    def _count_disturbance(
        self, busy: float | None, own: float, worker: Worker, seconds: float
    ) -> None:
        now = machine.busy_seconds()
        self.taken += 1
        if busy is None or now is None:
            return
        foreign = (now - busy) - (worker.cpu_seconds() - own)
        # The clocks of both sides tick in hundredths of a second.
        self.disturbed += foreign > max(FOREIGN_LIMIT * seconds, 0.05)

    def _tell(self, runtime: Runtime, depth: int, run: int, runs: int, sample: Sample) -> None:
        parts = [f"depth {depth}", f"run {run + 1}/{runs}", f"{runtime.title}:"]
        if sample.decode is not None:
            parts.append(f"decode {sample.decode:.1f}")
        if sample.prefill is not None:
            parts.append(f"prefill {sample.prefill:.0f}")
        self._say(" ".join(parts) + " tok/s")

    def drop(self, item: Opened, error: WorkerError) -> None:
        """Go on without a peer that failed.

        Raises:
            WorkerError: it was forerun itself.
        """
        item.worker.close()
        self._workers.remove(item)
        if item.runtime.name == OURS:
            raise error
        self._say(f"left out: {error}")
        self.failed[item.runtime.title] = str(error)


def _merge(sample: Sample, part: plan.Measure, answer: dict[str, Any]) -> Sample:
    """Add what one answer measured to the sample of its turn."""
    new: dict[str, float | None] = {}
    if "prefill" in part.gives:
        new["prefill"] = len(part.prompt) / answer["prefill_s"]
    if "first_token" in part.gives:
        new["first_token_ms"] = 1e3 * answer["first_token_s"]
    if "decode" in part.gives:
        if answer["steps"] < 1:
            raise WorkerError("a runtime stopped after its first token; nothing to measure")
        new["decode"] = answer["steps"] / answer["decode_s"]
        new["session_share"] = answer.get("session_share")
    return replace(sample, **new)


def _figures(samples: Samples, key: str, depth: int) -> dict[str, Spread | None]:
    """Spreads of all figures of a row; the prefill of depth 0 is that of `PREFILL_TOKENS`."""
    here = samples.get((key, depth), [])
    reading = here
    if depth == 0 and all(sample.prefill is None for sample in here):
        reading = samples.get((key, plan.PREFILL_TOKENS), [])
    return {
        "prefill_tok_s": spread([sample.prefill for sample in reading]),
        "decode_tok_s": spread([sample.decode for sample in here]),
        "ttft_ms": spread([sample.first_token_ms for sample in here]),
        "session_share": spread([sample.session_share for sample in here]),
    }


def rows(
    opened: Sequence[Runtime],
    samples: Samples,
    depths: Sequence[int],
    memory: Callable[[str, int], float | None] = lambda key, depth: None,
) -> list[dict[str, Any]]:
    """One row per runtime and depth, as in the JSON output."""
    found = []
    for depth in depths:
        for runtime in opened:
            figures = _figures(samples, runtime.key, depth)
            digits = {"session_share": 4}
            found.append(
                {
                    "runtime": runtime.name,
                    "weights": runtime.weights,
                    "depth": depth,
                    "prefill_tokens": plan.prefill_tokens(depth),
                    "ttft_tokens": depth or plan.FIRST_TOKEN_PROMPT,
                    **{
                        name: value.to_json(digits.get(name, 2)) if value else None
                        for name, value in figures.items()
                    },
                    "peak_rss_mb": memory(runtime.key, depth),
                }
            )
    return found


def ratios(
    opened: Sequence[Runtime], samples: Samples, depths: Sequence[int]
) -> list[dict[str, Any]]:
    """How many times faster forerun is than each peer, for decoding and prefill."""
    found = []
    for depth in depths:
        ours = _figures(samples, OURS, depth)
        for peer in opened:
            if peer.key == OURS:
                continue
            theirs = _figures(samples, peer.key, depth)
            for what in ("decode_tok_s", "prefill_tok_s"):
                if what == "prefill_tok_s" and depth == 0 and plan.PREFILL_TOKENS in depths:
                    continue  # it is the one of that depth
                a, b = ours[what], theirs[what]
                made = ratio(a, b) if a and b else None
                if made:
                    row = {"what": what, "depth": depth, "peer": peer.name}
                    found.append({**row, "weights": peer.weights, **made.to_json()})
    return found
