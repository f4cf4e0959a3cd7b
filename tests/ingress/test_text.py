"""Stop strings in a text that comes in pieces."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from serving.ingress.text import StopStrings

TEXT = st.text("abAB \n", max_size=40)
STOPS = st.lists(st.text("abAB \n", min_size=1, max_size=4), min_size=1, max_size=4)


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def before_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Where a reader who sees the text grow by one character would stop."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)], True
    return text, False


@given(TEXT, STOPS, st.lists(st.integers(0, 40), max_size=10))
def test_what_is_shown_never_holds_a_stop_string(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    watcher, shown, stopped = StopStrings(stops), "", False
    for piece in split(text, cuts):
        part, stopped = watcher.push(piece)
        shown += part
        if stopped:
            break
    if not stopped:
        shown += watcher.flush()
        assert shown == text
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)


@example("xabc", ["ab", "xabc"], [])
@given(TEXT, STOPS, st.lists(st.integers(0, 40), max_size=10))
def test_it_does_not_matter_where_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    for pieces in (split(text, cuts), list(text)):
        watcher, shown, stopped = StopStrings(stops), "", False
        for piece in pieces:
            part, stopped = watcher.push(piece)
            shown += part
            if stopped:
                break
        assert (shown + watcher.flush(), stopped) == before_first_stop(text, stops)
        assert watcher.flush() == ""


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    watcher = StopStrings(["\n\ndef"])
    assert watcher.push("x = 1\n") == ("x = 1", False)
    assert watcher.push("y") == ("\ny", False)
    assert watcher.push("\n\nde") == ("", False)
    assert watcher.push("f f()") == ("", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("abc") == ("abc", False)
