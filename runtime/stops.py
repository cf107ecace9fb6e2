"""Stop strings in streamed text: found however the text is split, never shown even in part."""

from __future__ import annotations

from collections.abc import Iterable

from forerun.errors import OptionError

MAX_STOPS = 64
MAX_STOP_CHARS = 1024


class StopStrings:
    """Watch a stream of text for the first stop string that completes.

    Where several complete at the same character, the longest counts, so the outcome does not
    depend on how the text was split.

    Args:
        stops: the strings; a single string is taken as one.

    Raises:
        OptionError: a stop string is empty, not text or over 1,024 characters, or they are over 64.
    """

    def __init__(self, stops: str | Iterable[str] = ()) -> None:
        self._stops = check_stops(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            Text that is certain to precede any stop string, and whether a stop string was found.
        """
        if not self._stops or not text:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return what is still held back; the stream has ended."""
        held, self._held = self._held, ""
        return held


def check_stops(stops: str | Iterable[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple.

    Raises:
        OptionError: see `StopStrings`.
    """
    try:
        values = (stops,) if isinstance(stops, str) else tuple(stops)
    except TypeError:
        raise OptionError(f"stop must be text or a list of texts, got {stops!r}") from None
    if len(values) > MAX_STOPS:
        raise OptionError(f"{len(values)} stop strings were given; at most {MAX_STOPS} are allowed")
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_STOP_CHARS:
            shown = repr(value)[:40]
            raise OptionError(
                f"the stop string {shown} must be text of 1 to {MAX_STOP_CHARS} characters"
            )
    return values


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
