"""Values that a field may be sent and does not want."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

SECRET = "a value that no error may repeat"


def odd(words: Sequence[str], names: Sequence[str]) -> st.SearchStrategy[Any]:
    """JSON of any shape; its strings and its objects' names are now and then a dialect's own."""
    return st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**70), 2**70),
            st.floats(),
            st.text(max_size=5),
            st.sampled_from([SECRET, *words]),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(names), inner)
        ),
        max_leaves=8,
    )
