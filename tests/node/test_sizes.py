"""How many bytes peers hold, as far as their word can be counted."""

from __future__ import annotations

import pytest
from toy_node import manifest

from node.record import Held
from node.sizes import SIZES_MAX, Sizes

TOY = manifest()  # two layers with two experts each; nine units of 1000 bytes
ID = TOY.model_id


@pytest.mark.parametrize(
    ("held", "units"),
    [
        (Held(ID), 0),
        (Held(ID, text=True), 1),
        (Held(ID, True, range(2), True, True, {0: 3, 1: 3}), 9),
        (Held(ID, True, range(1), True, False, {1: 2}), 4),
        (Held(ID, False, range(1, 2), False, True), 2),
        (Held(ID, experts={0: 1 << 200, 7: 1}), 0),
        (Held(ID, False, range(1, 900)), 2),
        (Held(ID, False, range(5, 9)), 0),
        (Held("another", True, range(2)), 0),
    ],
)
def test_what_is_held_is_counted_and_what_the_model_has_not_is_nothing(held: Held, units: int) -> None:
    sizes = Sizes(TOY)
    assert [sizes.of(held), sizes.of(held)] == [1000 * units] * 2


def test_no_more_holdings_are_remembered_than_allowed() -> None:
    sizes = Sizes(TOY)
    for n in range(SIZES_MAX + 1):
        sizes.of(Held(ID, experts={0: n}))
    assert len(sizes._known) == 1
