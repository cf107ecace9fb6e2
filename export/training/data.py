"""Training data on disk: flat files that grow batch by batch and are read through memmap.

`index.jsonl` has one line per batch of answers. It is written after the arrays, so what stands
beyond its last entry is the remainder of an interrupted batch and is cut off on reopening.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import BundleError

INDEX_NAME = "index.jsonl"
META_NAME = "meta.json"
TOP = 8


@dataclass(frozen=True)
class Answer:
    """One prompt with its answer.

    Attributes:
        start: number of its first token in the flat files.
        length: tokens, prompt included.
        prompt: tokens of the prompt.
        template: number of the prompt's template.
        category: kind of prompt.
        greedy: the answer is the target's argmax at every position.
        held_out: only for evaluation.
    """

    start: int
    length: int
    prompt: int
    template: int
    category: str
    greedy: bool
    held_out: bool


class TokenStore:
    """Per-token arrays of many answers.

    `ids` int32 [N]; `states` float16 [N, taps, hidden], hidden states of the target; `top_ids`
    int32 [N, 8] and `top_logps` float16 [N, 8], its most probable next tokens, best first (id -1
    where no distribution was computed: inside prompts).

    Args:
        folder: of the files.
        taps: states per token; needed when the store is new.
        hidden: width of a state; needed when the store is new.

    Raises:
        BundleError: the store does not exist and no sizes are given, or they differ.
    """

    def __init__(self, folder: Path, taps: int = 0, hidden: int = 0) -> None:
        self.folder = Path(folder)
        meta = self.folder / META_NAME
        if not meta.exists():
            if not (taps and hidden):
                raise BundleError(f"{folder} holds no training data")
            self.folder.mkdir(parents=True, exist_ok=True)
            meta.write_text(json.dumps({"taps": taps, "hidden": hidden}))
        self.meta = json.loads(meta.read_text())
        if taps and (self.meta["taps"], self.meta["hidden"]) != (taps, hidden):
            raise BundleError(f"{folder} holds data of another model; choose another folder")
        self.answers: list[Answer] = []
        self.batches = self._index_bytes = 0
        self.refresh()

    @property
    def tokens(self) -> int:
        """Tokens stored, prompts included."""
        return self.answers[-1].start + self.answers[-1].length if self.answers else 0

    @property
    def answer_tokens(self) -> int:
        """Tokens of answers."""
        return sum(a.length - a.prompt for a in self.answers)

    def refresh(self) -> None:
        """Take note of batches that were appended since, by this process or another."""
        index = self.folder / INDEX_NAME
        # What stands behind the last line break is a line that is being written.
        lines = index.read_bytes().split(b"\n")[:-1] if index.exists() else []
        for line in lines[self.batches :]:
            self.answers += [Answer(**entry) for entry in json.loads(line)]
        self.batches = len(lines)
        self._index_bytes = sum(len(line) + 1 for line in lines)

    def append(self, entries: list[tuple[dict[str, np.ndarray], dict[str, Any]]]) -> None:
        """Append one batch.

        Args:
            entries: for each answer its arrays (by the names of `_fields`) and the attributes of
                its `Answer` except `start` and `length`.
        """
        start, answers = self.tokens, []
        for arrays, facts in entries:
            answers.append(Answer(start=start, length=len(arrays["ids"]), **facts))
            start += answers[-1].length
        for name, (dtype, shape) in self._fields().items():
            with open(self.folder / name, "ab") as stream:
                # Also removes what an interrupted batch left behind.
                stream.truncate(self.tokens * int(np.prod(shape)) * np.dtype(dtype).itemsize)
                for arrays, _ in entries:
                    stream.write(np.ascontiguousarray(arrays[name], dtype).tobytes())
        line = json.dumps([asdict(a) for a in answers]).encode() + b"\n"
        with open(self.folder / INDEX_NAME, "ab") as stream:
            stream.truncate(self._index_bytes)
            stream.write(line)
        self.answers += answers
        self.batches += 1
        self._index_bytes += len(line)

    def array(self, name: str) -> np.ndarray:
        """Read-only map of one field, over all tokens the index knows."""
        dtype, shape = self._fields()[name]
        return np.memmap(self.folder / name, dtype, "r", 0, (self.tokens, *shape))

    def _fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "ids": ("<i4", ()),
            "states": ("<f2", (self.meta["taps"], self.meta["hidden"])),
            "top_ids": ("<i4", (TOP,)),
            "top_logps": ("<f2", (TOP,)),
        }
