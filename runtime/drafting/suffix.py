"""A growing text with an index of its n-grams, for drafters that copy from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.errors import OptionError
from forerun.runtime.prefix import common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class SuffixIndex:
    """The committed ids, and for each n-gram where it ended, newest first.

    Hash chains as in LZ77 compressors: a dict holds the newest end of every n-gram, a list the end
    before it. A token costs one dict entry to append and one to take back, so that a rewound index
    is the very index of the shorter text.

    Args:
        order: length n of the n-grams.

    Raises:
        OptionError: the order is not positive.

    Attributes:
        ids: the text; change it only through the methods.
    """

    def __init__(self, order: int = 2) -> None:
        if order < 1:
            raise OptionError(f"the order of an n-gram index must be at least 1, got {order}")
        self.order = order
        self.ids: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}
        self._older: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        ids, newest, older, order = self.ids, self._newest, self._older, self.order
        start = len(ids)
        ids.extend(tokens)
        for end in range(start, len(ids)):
            if end < order - 1:
                older.append(-1)
                continue
            key = tuple(ids[end - order + 1 : end + 1])
            older.append(newest.get(key, -1))
            newest[key] = end

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on.

        Raises:
            OptionError: the text is shorter than that.
        """
        if not 0 <= length <= len(self.ids):
            raise OptionError(f"cannot cut to {length} tokens: there are {len(self.ids)}")
        ids, order = self.ids, self.order
        for end in range(len(ids) - 1, max(length, order - 1) - 1, -1):
            key, before = tuple(ids[end - order + 1 : end + 1]), self._older[end]
            if before < 0:
                del self._newest[key]
            else:
                self._newest[key] = before
        del ids[length:], self._older[length:]

    def replace(self, ids: Sequence[int]) -> None:
        """Make `ids` the text; what they share with the old one is kept."""
        kept = common_prefix(self.ids, ids)
        self.truncate(kept)
        self.extend(ids[kept:])

    def ends(self, gram: Sequence[int], limit: int) -> Iterator[int]:
        """Positions where the n-gram ends, newest first, at most `limit`."""
        end = self._newest.get(tuple(gram), -1)
        while end >= 0 and limit > 0:
            yield end
            end, limit = self._older[end], limit - 1
