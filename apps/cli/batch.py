"""Many prompts from a JSONL file, answered into another one, over as many runs as it takes.

A result is one line, appended whole. A line that a killed process left unfinished is cut off when
the job goes on. Every result carries a key of what it was made from (model, options, prompt), so
that results of different settings are never mixed in one file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.apps.cli.answers import answer_json
from forerun.apps.cli.generate import Request, answer
from forerun.apps.cli.interrupt import cancel_on_interrupt
from forerun.apps.cli.options import checked_text
from forerun.apps.cli.output import to_json
from forerun.apps.cli.progress import reporter
from forerun.apps.cli.report import Interrupted, note, one_line
from forerun.errors import ContextLimitError, OptionError, PromptError, SpaceError, UserError

if TYPE_CHECKING:
    from forerun.runtime.text import Text

_FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "id": (str, int),
    "system": (str,),
    "max_tokens": (int,),
    "seed": (int,),
}
# What every result line begins with; a torn line must begin so too before it may be cut off.
_LINE_START = b'{"id": '


class BatchError(UserError):
    """A batch is over, but some of its prompts have an error instead of an answer."""


@dataclass(frozen=True)
class Item:
    """One prompt of the file.

    Attributes:
        id: text or number that names the result.
        prompt: the prompt.
        request: the options of the command with those of the line put in.
    """

    id: str | int
    prompt: str
    request: Request

    def key(self, model: str) -> str:
        """Return 16 hex digits for everything the answer depends on."""
        request = dataclasses.asdict(self.request)
        del request["allow_fallback"]
        # With an exact rule the drafter does not change the answer.
        if request.pop("accept") == "match":
            del request["drafter"]
        made_from = [model, self.prompt, request]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def read_prompts(path: Path, request: Request) -> list[Item]:
    """Read and check the whole file of prompts before anything is computed.

    Raises:
        PromptError: a line is not valid; the message names it.
        OSError: the file cannot be read.
    """
    items: list[Item] = []
    seen: set[str | int] = set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        item = _item(line, number, f"{path}, line {number}", request)
        if item.id in seen:
            raise PromptError(f"{path}, line {number}: the id {item.id!r} was used before")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise PromptError(f"{path} holds no prompts; each line is an object with a prompt")
    return items


def _item(line: bytes, number: int, where: str, request: Request) -> Item:
    try:
        data = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON in UTF-8 ({error})") from None
    if not isinstance(data, dict) or "prompt" not in data:
        raise PromptError(f'{where} must be an object with "prompt"')
    for name, value in data.items():
        if name not in _FIELDS:
            raise PromptError(f"{where} has the unknown key {name!r}; known: {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in _FIELDS[name])
            raise PromptError(f"{where}: {name} must be {kinds}, got {type(value).__name__}")
    if data.get("max_tokens", 1) < 1:
        raise PromptError(f"{where}: max_tokens must be at least 1")
    if request.raw and "system" in data:
        raise PromptError(f"{where}: system needs the chat template, which --raw leaves out")
    checked_text(data["prompt"], f"{where}: the prompt")
    return Item(data.get("id", number), data["prompt"], _with_line(request, data))


def _with_line(request: Request, data: dict[str, Any]) -> Request:
    changed = {name: data[name] for name in ("system", "max_tokens") if name in data}
    if "seed" in data:
        changed["sampling"] = dataclasses.replace(request.sampling, seed=data["seed"])
    return dataclasses.replace(request, **changed)


@dataclass(frozen=True)
class Finished:
    """A result that is in the file.

    Attributes:
        key: what it was made from, see `Item.key`.
        failed: whether it is an error instead of an answer.
    """

    key: str
    failed: bool


class Results:
    """The file of results, open for appending and locked against a second process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(self._fd, path)
            self.done = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, fields: dict[str, Any]) -> None:
        """Append one line, or leave the file as it was.

        Raises:
            SpaceError: the disk is full.
        """
        size = os.fstat(self._fd).st_size
        data = (to_json(fields) + "\n").encode()
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written")
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise SpaceError(
                f"{self._path} cannot take another result ({error.strerror or error}); free space "
                "and run the same command again"
            ) from None
        self.done[fields["id"]] = Finished(fields["key"], "error" in fields)

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        os.close(self._fd)

    def _recover(self) -> dict[str | int, Finished]:
        """Check the lines that are there and cut off an unfinished last one."""
        data = self._path.read_bytes()
        lines = data.split(b"\n")
        tail = lines.pop()
        done: dict[str | int, Finished] = {}
        start = 0
        for number, line in enumerate(lines, start=1):
            entry = _result(line)
            if entry is None:
                # A crash of the machine can leave a line whose end reached the disk first.
                if number == len(lines) and not tail and done and _is_torn(line):
                    tail = line
                    break
                raise OptionError(
                    f"{self._path}, line {number} is not a result of forerun; name another --out"
                )
            done[entry[0]] = entry[1]
            start += len(line) + 1
        self._cut(tail, start)
        return done

    def _cut(self, tail: bytes, start: int) -> None:
        if not tail:
            return
        if not _is_torn(tail):
            raise OptionError(f"{self._path} is not a file of results; name another --out")
        os.ftruncate(self._fd, start)
        note(f"{self._path}: cut off an unfinished last line of {len(tail)} bytes")


def _result(line: bytes) -> tuple[str | int, Finished] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("key"), str):
        return None
    if not isinstance(data.get("id"), (str, int)):
        return None
    return data["id"], Finished(data["key"], "error" in data)


def _is_torn(line: bytes) -> bool:
    text = line.rstrip(b"\0")
    return text.startswith(_LINE_START) or _LINE_START.startswith(text)


def _lock(fd: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        # Windows has no flock; there two jobs on one file are the user's own care.
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OptionError(
            f"{path} is being written by another forerun; wait for it or name another --out"
        ) from None


def run_batch(
    file: Path, out: Path, model: str, threads: int | None, request: Request
) -> dict[str, Any]:
    """Answer every prompt of `file` that has no result in `out` yet.

    Returns:
        prompts, skipped (finished by earlier runs), answered and failed (by all runs), and of this
        run new_tokens and seconds.

    Raises:
        Interrupted: Ctrl-C; what was finished is in the file.
        OptionError: `out` holds something else, or results of other settings.
        PromptError: a line of `file` is not valid; nothing was computed.
    """
    items = read_prompts(file, request)
    if out.exists() and out.samefile(file):
        raise OptionError(f"--out is the same file as --file ({file}); name another one")
    with _results(out) as results:
        todo = _remaining(items, results.done, model, out)
        skipped = len(items) - len(todo)
        if skipped:
            note(f"{skipped} of {len(items)} prompts are finished in {out} already")
        new_tokens, seconds = (
            _answer_all(todo, results, model, threads, request) if todo else (0, 0.0)
        )
        failed = sum(results.done[item.id].failed for item in items)
    return {
        "prompts": len(items),
        "skipped": skipped,
        "answered": len(items) - failed,
        "failed": failed,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 3),
    }


@contextmanager
def _results(out: Path) -> Iterator[Results]:
    results = Results(out)
    try:
        yield results
    finally:
        results.close()


def _remaining(
    items: Sequence[Item], done: dict[str | int, Finished], model: str, out: Path
) -> list[Item]:
    for item in items:
        if item.id in done and done[item.id].key != item.key(model):
            raise OptionError(
                f"{out} has the result {item.id!r} of another prompt, model or option; "
                "name another --out"
            )
    return [item for item in items if item.id not in done]


def _answer_all(
    todo: Sequence[Item], results: Results, model: str, threads: int | None, request: Request
) -> tuple[int, float]:
    from forerun.runtime.load import load

    new_tokens, begin = 0, time.monotonic()
    with reporter() as show, load(model, threads=threads, **request.how_to_load()) as text:
        # Ctrl-C may come while a line is written, too; then the line is finished first.
        with cancel_on_interrupt(text.cancel) as outside:
            for number, item in enumerate(todo):
                show("generate", number, len(todo))
                fields, inside = _answer_item(text, item, model)
                if not inside:
                    results.append(fields)
                    new_tokens += len(fields.get("tokens", ()))
                if inside or outside.fired:
                    raise _interrupted(number + (not inside), len(todo))
        show("generate", len(todo), len(todo))
    return new_tokens, time.monotonic() - begin


def _interrupted(answered: int, total: int) -> Interrupted:
    return Interrupted(
        f"interrupted; {answered} of {total} prompts were answered, the same command goes on from "
        "there"
    )


def _answer_item(text: Text, item: Item, model: str) -> tuple[dict[str, Any], bool]:
    head = {"id": item.id, "key": item.key(model), "model": model}
    try:
        with reporter(quiet_for=float("inf")) as silent:
            done, interrupted = answer(text, item.prompt, item.request, silent)
    except (PromptError, ContextLimitError) as error:
        # What lies in one prompt is a result; anything else would fail for all and stops the job.
        return {**head, "error": one_line(str(error))}, False
    seed, logprobs = item.request.sampling.seed, item.request.logprobs
    return {**head, **answer_json(done, seed, logprobs)}, interrupted
