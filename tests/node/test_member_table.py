"""The table over a census: counts, tombstones, the order of probes, and whom a node picks."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_membership import census, claim, peer

from node.census import EMPTY, Census
from node.claim import hash_of, id_of, peer_hash
from node.identity import Identity
from node.member import Member, State
from node.member_table import MemberTable
from node.probe_order import ProbeOrder


def table(known: Census = EMPTY, seed: int = 0) -> MemberTable:
    return MemberTable(peer(0), known, random.Random(seed))


def put(rows: MemberTable, number: int, state: State = State.ALIVE, forget_at: float = 9.0) -> None:
    rows.put(peer(number), Member(claim(number), state), forget_at)


@given(st.integers(1, 300), st.integers(0, 1000))
def test_a_probe_order_visits_each_once(n: int, seed: int) -> None:
    order = ProbeOrder(n, random.Random(seed))
    assert sorted(order[place] for place in range(n)) == list(range(n))


@pytest.mark.parametrize("place", [-1, 5])
def test_a_place_beyond_the_order_is_an_error(place: int) -> None:
    with pytest.raises(IndexError):
        ProbeOrder(5, random.Random(0))[place]


def test_orders_of_two_rounds_differ() -> None:
    luck = random.Random(0)
    first, second = ProbeOrder(50, luck), ProbeOrder(50, luck)
    assert [first[n] for n in range(50)] != [second[n] for n in range(50)]


def test_a_round_visits_all_that_were_there_and_whoever_comes_late() -> None:
    rows = table(census(6))
    seen = [rows.next_to_probe() for _ in range(3)]
    for number in (10, 11):
        put(rows, number)
    seen += [rows.next_to_probe() for _ in range(4)]
    assert sorted(seen) == sorted(map(peer, (1, 2, 3, 4, 5, 10, 11)))
    assert sorted(rows.next_to_probe() for _ in range(7)) == sorted(seen)


def test_the_dead_and_the_left_are_not_probed_and_not_picked() -> None:
    rows = table(census(6))
    put(rows, 1, State.DEAD)
    put(rows, 2, State.LEFT)
    put(rows, 3, State.SUSPECT)
    assert {rows.next_to_probe() for _ in range(12)} == set(map(peer, (3, 4, 5)))
    assert sorted(rows.pick(9)) == sorted(map(peer, (3, 4, 5)))
    assert rows.random_dead() == peer(1)
    assert (rows.active, rows.tombstones, rows.size) == (3, 2, 5)


def test_where_nobody_lives_nobody_is_probed() -> None:
    rows = table(census(2))
    put(rows, 1, State.DEAD)
    assert rows.next_to_probe() is None
    assert rows.pick(3) == []
    assert table().random_dead() is None


def test_of_many_the_picked_are_different_and_the_avoided_are_not_among_them() -> None:
    rows = table(census(200))
    for _ in range(100):
        picked = rows.pick(3, peer(7))
        assert len(set(picked)) == 3
        assert not {peer(0), peer(7)} & set(picked)


@pytest.mark.parametrize("known", [EMPTY, census(1021)])
def test_among_a_thousand_tombstones_the_twenty_who_live_are_found_each_time(known: Census) -> None:
    rows = table(known)
    for number in range(1, 1021):
        put(rows, number, State.ALIVE if number <= 20 else State.DEAD)
    once = Counter(rows.pick(1)[0] for _ in range(2000))
    assert set(once) == {peer(number) for number in range(1, 21)}
    assert 50 < min(once.values()) <= max(once.values()) < 170, "each as often as another"
    assert all(len(rows.pick(3, peer(1))) == 3 for _ in range(200))
    assert len(rows.pick(99)) == 20


def test_whom_a_census_still_calls_alive_is_picked_as_often_as_a_newcomer() -> None:
    rows = table(census(101))
    for number in range(1, 81):
        put(rows, number, State.DEAD)
    for number in range(200, 220):
        put(rows, number)
    picked = Counter(each for _ in range(2000) for each in rows.pick(1))
    assert sum(picked.values()) == 2000
    assert 900 < sum(picked[peer(number)] for number in range(200, 220)) < 1100


def test_places_of_those_who_are_gone_are_used_again() -> None:
    rows = table()
    for number in range(1, 1000):
        put(rows, number)
        if number > 3:
            rows.remove(peer(number - 3))
    assert sorted({rows.next_to_probe() for _ in range(12)}) == sorted(map(peer, (997, 998, 999)))
    rows.remove(peer(999))
    assert sorted({rows.next_to_probe() for _ in range(12)}) == sorted(map(peer, (997, 998)))
    put(rows, 5)
    assert sorted({rows.next_to_probe() for _ in range(12)}) == sorted(map(peer, (5, 997, 998)))


def test_tombstones_are_in_the_order_of_their_deaths_and_the_raised_leave_it() -> None:
    rows = table(census(6))
    for number in (3, 1, 2):
        put(rows, number, State.DEAD, 10.0 - number)
    put(rows, 3, State.LEFT, 99.0)
    assert rows.oldest_tombstone() == (peer(3), 7.0)
    put(rows, 3)
    assert rows.oldest_tombstone() == (peer(1), 9.0)


def test_rows_are_the_census_with_what_changed() -> None:
    rows = table(census(4))
    put(rows, 1, State.SUSPECT)
    put(rows, 9)
    rows.remove(peer(2))
    assert {member.claim.peer: member.state for member in rows.rows()} == {
        peer(1): State.SUSPECT,
        peer(3): State.ALIVE,
        peer(9): State.ALIVE,
    }
    assert rows.get(peer(0)) is None
    assert dict(rows.differences()).keys() == {peer(1), peer(2), peer(9)}


def test_a_node_without_differences_takes_the_memory_of_none() -> None:
    """Ten thousand of them are to fit one process: nothing in a fresh table grows with the census."""
    assert not list(table(census(500)).differences())


def test_a_census_names_each_peer_once_and_nobody_who_left() -> None:
    assert peer(1) in census(2)
    assert census(2).get(peer(5)) is None
    for wrong in ((claim(1), claim(1, 5)), (claim(1, left=True),)):
        with pytest.raises(ValueError, match="census"):
            Census(wrong)


def test_a_peers_hash_and_its_id_are_the_same_name() -> None:
    me = Identity.create()
    assert id_of(peer_hash(me.public_key)) == me.peer
    assert hash_of(me.peer) == peer_hash(me.public_key)
