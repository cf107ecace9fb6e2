"""Help for tests of schedules: slow and failing runners, drafters of any quality, a plain loop."""

import time

import numpy as np

from forerun.runtime import sampling
from forerun.runtime.drafting.model import ModelDrafter
from forerun.runtime.drafting.vocab import identity
from forerun.runtime.prefix import PrefixCache


class Slowed:
    """A runner that takes a set time more per step, and fails when told."""

    def __init__(self, runner, delay=0.0, fail_at=None, late=False):
        self.manifest, self.arena = runner.manifest, runner.arena
        self.delay, self.fail_at, self.late = delay, fail_at, late
        self.steps = 0
        self.before = lambda: None
        self._runner = runner

    @property
    def session_time(self):
        return self._runner.session_time

    def step(self, ids, **options):
        self.steps += 1
        self.before()
        if self.delay:
            time.sleep(self.delay)
        fails = self.steps - 1 == self.fail_at
        if fails and not self.late:
            raise RuntimeError("the device went away")
        logits = self._runner.step(ids, **options)
        if fails:
            raise RuntimeError("the device went away late")
        return logits

    def features(self):
        return self._runner.features()

    def close(self):
        self._runner.close()


class Doubtful(ModelDrafter):
    """A model drafter that is wrong at some positions; `wrong` 1 makes it an adversary.

    At a wrong position the second best token comes first, so a fork can still save the draft. An
    adversary never guesses the model's token.
    """

    def __init__(self, runner, wrong=0.0, name="doubtful"):
        super().__init__(runner, identity(runner.manifest.model.vocab), name)
        self.wrong = wrong
        self.calls = 0

    def next_tokens(self, ahead, count):
        self.calls += 1
        tokens, values = super().next_tokens(ahead, max(count, 2))
        position = len(self._ids) + len(ahead)
        if self.wrong == 1.0:
            return [token ^ 1 for token in tokens[:1]], values[:1]
        if tokens and np.random.default_rng(position).random() < self.wrong:
            tokens, values = tokens[::-1], [0.5] * len(values)
        return tokens[:count], values[:count]


def speak(rounds, cache, prompt, params, count):
    """Generate `count` tokens with a schedule, as `Generation` does; returns the answer."""
    tokens = list(prompt)
    answer = []
    logits = read(cache, tokens)

    def pick(row, path):
        position = len(tokens) + len(path)
        history = tokens + list(path)
        return sampling.pick(row, params, position, history, len(prompt))

    tokens.append(pick(logits, ()))
    answer.append(tokens[-1])
    try:
        while len(answer) < count:
            said = rounds.round(list(tokens), pick, count - len(answer))
            if not said:
                break
            for token, row in said:
                assert row.shape == (cache.runner.manifest.model.vocab,)
                tokens.append(token)
                answer.append(token)
    finally:
        cache.settle()
        rounds.finish(len(tokens))
    return answer


def read(cache, ids):
    """Logits float32 [V] behind `ids`."""
    start = cache.keep_common(ids)
    return cache.feed(ids[start:])[0]


def plain(runner, prompt, params, count):
    """The answer without drafting."""
    cache = PrefixCache(runner)
    tokens = list(prompt)
    for _ in range(count):
        logits = read(cache, tokens)
        tokens.append(sampling.pick(logits, params, len(tokens), tokens, len(prompt)))
    return tokens[len(prompt) :]


def same_cache(runner, ids, fresh):
    """The KV rows of `runner` are those of a fresh prefill of `ids`, as near as kernels are."""
    fresh.arena.rewind(0)
    if ids:
        fresh.step(ids, want="none")
    assert runner.arena.length == len(ids)
    for role, array in runner.arena.arrays.items():
        expected = fresh.arena.arrays[role][:, :, : len(ids)]
        np.testing.assert_allclose(array[:, :, : len(ids)], expected, atol=2e-4, rtol=1e-3)


def in_step(target, rounds):
    """Let no step of the target end before the drafter is idle, however busy the machine is."""

    def wait():
        if rounds._worker is not None and rounds._worker._latest is not None:
            rounds._worker._latest.wait()

    target.before = wait
