import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import OptionError
from forerun.runtime.stops import StopStrings

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def run(stops, pieces):
    watch, out = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = watch.push(piece)
        out += text
        if stopped:
            return out, True
    return out + watch.finish(), False


@settings(max_examples=500)
@given(TEXT, STOPS, st.data())
def test_found_however_the_text_is_split(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(stops, pieces) == reference(stops, text)


def reference(stops, text):
    """Add one character at a time; the first time the text ends with stops, cut the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


def test_holds_back_only_what_could_be_a_stop():
    watch = StopStrings(["\n\nUser"])
    assert watch.push("Hi\n") == ("Hi", False)
    assert watch.push("there\n\nUs") == ("\nthere", False)
    assert StopStrings("END").push("the EN") == ("the ", False)


def test_a_false_alarm_is_given_back():
    watch = StopStrings(["END"])
    assert watch.push("EN") == ("", False)
    assert watch.push("X") == ("ENX", False)
    assert watch.push("E") == ("", False)
    assert watch.finish() == "E"
    assert watch.finish() == ""


@pytest.mark.parametrize("bad", [[""], [1], 5, ["x" * 2000], ["a"] * 65, [None]])
def test_bad_stop_strings_are_refused(bad):
    with pytest.raises(OptionError, match="stop"):
        StopStrings(bad)
