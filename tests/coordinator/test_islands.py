"""coordinator.islands: who is near whom, from one node's round-trip times and everybody's zones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.islands import NEAR_S, STAY_FACTOR, Place, island_of, islands
from protos.ids import PeerId

ME, A, B, C, D = (PeerId(name) for name in ("me", "a", "b", "c", "d"))


def test_whoever_is_near_this_node_is_on_its_island_whatever_the_zones_say() -> None:
    found = islands({ME: Place(0.0, "x"), A: Place(0.001, "y"), B: Place(0.002), C: Place(0.040)})
    assert island_of(ME, found) == {ME, A, B}
    assert island_of(C, found) == {C}


def test_peers_far_away_are_together_where_their_zone_says_so_and_no_distance_contradicts_it() -> None:
    far = {A: Place(0.040, "paris"), B: Place(0.042, "paris"), C: Place(0.090, "paris"), D: Place(0.041, "tokyo")}
    found = islands({ME: Place(0.0)} | far)
    assert island_of(A, found) == {A, B}, "C is 50 ms farther: it cannot be near them"
    assert island_of(C, found) == {C}
    assert island_of(D, found) == {D}


def test_a_peer_of_unknown_distance_is_where_its_zone_is_and_without_a_zone_alone() -> None:
    found = islands({ME: Place(0.0, "paris"), A: Place(0.04, "tokyo"), B: Place(None, "tokyo"), C: Place(), D: Place()})
    assert island_of(B, found) == {A, B}
    assert island_of(C, found) == {C}
    assert island_of(D, found) == {D}
    assert island_of(B, islands({B: Place(None, "tokyo"), A: Place(None, "tokyo")})) == {A, B}


def test_without_a_zone_of_one_name_strangers_far_away_are_not_taken_together() -> None:
    assert len(islands({A: Place(0.040), B: Place(0.040)})) == 2


def test_one_slow_sample_moves_nobody() -> None:
    before = islands({ME: Place(0.0), A: Place(0.004), B: Place(0.040, "z"), C: Place(0.041, "z")})
    wider = NEAR_S * (STAY_FACTOR - 0.1)
    now = {ME: Place(0.0), A: Place(wider), B: Place(0.040, "z"), C: Place(0.040 + wider, "z")}
    assert island_of(A, islands(now)) == {A}
    assert island_of(A, islands(now, before)) == {ME, A}
    assert island_of(C, islands(now)) == {C}
    assert island_of(C, islands(now, before)) == {B, C}
    assert island_of(A, islands(now | {A: Place(NEAR_S * STAY_FACTOR * 1.01)}, before)) == {A}


def test_the_largest_island_comes_first() -> None:
    places = {ME: Place(0.0), A: Place(0.04, "z"), B: Place(0.04, "z")}
    assert islands(places) == [frozenset({A, B}), frozenset({ME})]
    assert island_of(D, islands(places)) == {D}


peers = st.dictionaries(
    st.sampled_from([PeerId(f"p{n}") for n in range(12)]),
    st.builds(Place, st.none() | st.floats(0, 0.2), st.sampled_from(["", "x", "y"])),
)


@given(peers, peers)
def test_every_peer_is_on_exactly_one_island_and_equal_inputs_give_equal_islands(
    places: dict[PeerId, Place], earlier: dict[PeerId, Place]
) -> None:
    before = islands(earlier)
    found = islands(places, before)
    assert sorted(peer for island in found for peer in island) == sorted(places)
    assert found == islands(dict(reversed(places.items())), before)
    for island in found:
        known = [places[peer].rtt_s for peer in island if places[peer].rtt_s is not None]
        assert not known or max(known) - min(known) <= NEAR_S * STAY_FACTOR
