"""Names on a LAN: when they are looked at, when they are gone, and what a flood of them costs."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from node import sightings
from node.sightings import Sightings

TTL_S = 60.0
HERE = ("10.0.0.1:7645#peer",)


def made() -> Sightings:
    return Sightings(TTL_S, Random(1))


def found(name: str, core: Sightings, now: float = 0.0) -> Sightings:
    core.noticed(name, now)
    assert core.due(now) == [name]
    assert core.read(name, HERE, now) is False
    return core


def test_a_name_is_read_at_once_and_looked_at_again_when_its_time_is_over() -> None:
    core = found("a", made())
    assert list(core.addresses) == list(HERE)
    assert TTL_S <= core.deadline <= 1.3 * TTL_S
    assert core.due(TTL_S - 1) == []
    assert core.due(core.deadline) == ["a"]


def test_a_name_that_nobody_answers_for_is_gone_after_three_questions() -> None:
    core = found("a", made())
    asked, now = 0, 0.0
    while core.addresses:
        now = core.deadline
        asked += core.read("a", None, now)
    assert asked == sightings.ASKS_MAX
    assert now <= 1.3 * (TTL_S + sightings.ASKS_MAX * sightings.ASK_S)
    assert core.deadline >= now + sightings.GIVEN_UP_S  # its pointer still lives


def test_an_answer_in_time_keeps_it() -> None:
    core = found("a", made())
    now = core.deadline
    assert core.read("a", None, now)
    now = core.deadline
    core.read("a", HERE, now)
    assert list(core.addresses) == list(HERE)
    assert core.deadline >= now + TTL_S


def test_what_is_new_about_a_name_is_read_at_once() -> None:
    core = found("a", made())
    core.noticed("a", 5.0)
    assert core.due(5.0) == ["a"]
    core.read("a", ("10.0.0.1:7700#peer",), 5.0)
    assert list(core.addresses) == ["10.0.0.1:7700#peer"]


def test_a_farewell_ends_it_and_what_was_never_seen_cannot_be_read() -> None:
    core = found("a", made())
    core.withdrawn("a")
    core.withdrawn("b")
    assert core.read("a", HERE, 1.0) is False
    assert not core.addresses
    assert core.deadline == math.inf


def test_a_name_of_no_use_costs_no_question_until_something_is_new() -> None:
    core = made()
    core.noticed("a", 0.0)
    core.read("a", (), 0.0)
    assert core.deadline == math.inf
    core.noticed("a", 9.0)
    assert core.due(9.0) == ["a"]


def test_a_flood_of_names_pushes_out_no_node_and_stays_bounded() -> None:
    core = found("a", made())
    asked = 0
    for n in range(1000):
        core.noticed(f"junk {n}", 1.0)
        asked += core.read(f"junk {n}", None, 1.0)
    assert asked == sightings.ASKS_A_SECOND_MAX
    assert len(core.due(math.inf)) == sightings.NAMES_MAX
    assert list(core.addresses) == list(HERE)


def test_a_name_longer_than_dns_allows_is_not_noticed() -> None:
    core, longest = made(), "x" * sightings.NAME_CHARS_MAX
    core.noticed(longest, 0.0)
    core.noticed(longest + "x", 0.0)
    assert core.due(math.inf) == [longest]


def test_where_every_name_is_a_node_a_new_one_waits() -> None:
    core = made()
    for n in range(sightings.NAMES_MAX):
        core.noticed(f"{n}", 0.0)
        core.read(f"{n}", (f"10.0.0.1:{n + 1}#peer",), 0.0)
    core.noticed("late", 0.0)
    assert "late" not in core.due(math.inf)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.sampled_from(["noticed", "withdrawn", "read", "missing"]),
            st.floats(0, 400),
        ),
        max_size=80,
    )
)
def test_questions_for_one_name_are_a_second_apart_and_at_most_three_in_a_row(
    steps: list[tuple[str, str, float]],
) -> None:
    core, now = made(), 0.0
    for name, what, wait_s in steps:
        now += wait_s
        if what == "noticed":
            core.noticed(name, now)
        elif what == "withdrawn":
            core.withdrawn(name)
        else:
            for due in core.due(now):
                if core.read(due, HERE if what == "read" else None, now):
                    assert due not in core.due(now + sightings.ASK_S * 0.99)
        assert len(core.addresses) <= 1
