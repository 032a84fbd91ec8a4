"""The texts of all tokens together are the answer's text."""

from hypothesis import given, settings
from hypothesis import strategies as st
from toy_node import WORDS, text_files

from node.text import Text
from node.wording import Wording

TEXT = Text(text_files())
TOKENS = st.lists(st.integers(0, 59), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.lists(st.sampled_from(["w1", "w1 w2", "2 w", "zzz"]), max_size=3))
def test_what_is_shown_is_the_text_up_to_the_first_stop_string(tokens: list[int], stops: list[str]) -> None:
    wording = Wording(TEXT, tuple(stops))
    shown = ""
    for at, token in enumerate(tokens):
        shown += wording.add(token, is_last=at == len(tokens) - 1)
        if wording.stopped:
            break
    whole = "".join(WORDS[token] for token in tokens)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert wording.stopped == bool(ends)
    if ends:
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == whole


def test_a_tokens_own_text_needs_no_context() -> None:
    assert Wording(TEXT, ()).of(7) == "w7 "
    assert Wording(Text({}), ()).of(7) == ""
