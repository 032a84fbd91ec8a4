"""node.urn: a set with places."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from node.urn import Urn


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "take"]), st.integers(0, 12))))
def test_an_urn_is_a_set_whose_places_have_no_hole(deeds: list[tuple[str, int]]) -> None:
    urn: Urn[int] = Urn()
    held: set[int] = set()
    luck = random.Random(0)
    for deed, thing in deeds:
        if deed == "add":
            urn.add(thing)
            held.add(thing)
        elif deed == "discard":
            urn.discard(thing)
            held.discard(thing)
        elif held:
            held.remove(urn.take(luck.randrange(len(urn))))
        assert sorted(urn[place] for place in range(len(urn))) == sorted(held)


def test_an_urn_that_is_cleared_takes_all_anew() -> None:
    urn: Urn[int] = Urn()
    urn.add(0)
    urn.clear()
    assert len(urn) == 0
    urn.add(0)
    assert urn[0] == 0
