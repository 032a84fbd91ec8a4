"""PROTOCOL.md, "Discovery": which address is tried when.  No clock, no network: times are what the tests say."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node import contacts
from node.contact import (
    Alone,
    Contact,
    Failed,
    Failing,
    Found,
    Known,
    Reached,
    Resolve,
    Resolved,
    Source,
    Tick,
    Try,
    Unresolved,
    Withdrawn,
)
from node.contacts import Contacts
from node.identity import peer_id
from protos.errors import BrokenInvariant, InvalidRequest

if TYPE_CHECKING:
    from node.contact import Effect, Event

PEERS = [peer_id(n.to_bytes(32, "big")) for n in range(400)]
ME, ANNA, BERT, CARL = PEERS[:4]
SEED = Contact(Source.SEED, "10.0.0.1:7645")


def made(searching: bool = False, seed: int = 1) -> Contacts:
    return Contacts(ME, Random(seed), 0.0, searching=searching)


def lan(n: int) -> str:
    return f"10.0.{n // 250}.{n % 250 + 1}:7645#{PEERS[n + 4]}"


def known(*peers: str) -> Known:
    return Known(frozenset(peers))  # type: ignore[arg-type]


def tried(effects: list[Effect]) -> list[str]:
    return [effect.contact.address for effect in effects if isinstance(effect, Try)]


def test_a_seed_is_tried_at_once_and_left_alone_once_its_peer_is_known() -> None:
    core = made()
    assert core.handle(Found(Source.SEED, SEED.address), 0.0) == [Try(SEED)]
    assert core.handle(Reached(SEED, ANNA), 0.1) == []
    assert core.handle(known(ANNA), 0.2) == []
    assert core.deadline is None
    assert core.handle(Tick(), 1e6) == []
    assert [(each.state, each.peer) for each in core.status(1.0)] == [("known", ANNA)]


def test_a_seed_whose_peer_is_lost_is_tried_again_soon_and_not_at_the_same_moment_everywhere() -> None:
    delays = set()
    for seed in range(20):
        core = made(seed=seed)
        core.handle(Found(Source.SEED, SEED.address), 0.0)
        core.handle(Reached(SEED, ANNA), 0.1)
        core.handle(known(ANNA, BERT), 0.2)
        core.handle(known(BERT), 100.0)
        assert core.deadline is not None
        assert 100.0 <= core.deadline <= 100.0 + contacts.RETRY_S_FIRST
        delays.add(core.deadline)
        assert tried(core.handle(Tick(), core.deadline)) == [SEED.address]
    assert len(delays) == 20


def test_a_seed_that_fails_is_tried_for_ever_and_its_reason_told_once() -> None:
    core = made()
    core.handle(Found(Source.SEED, SEED.address), 0.0)
    now, told, waits = 0.0, [], []
    for _ in range(200):
        told += [effect for effect in core.handle(Failed(SEED, "nobody"), now) if isinstance(effect, Failing)]
        retry_s = core.status(now)[0].retry_s
        assert retry_s is not None
        waits.append(retry_s)
        now += retry_s
        assert tried(core.handle(Tick(), now)) == [SEED.address]
    assert told == [Failing(Source.SEED, SEED.address, "nobody")]
    assert waits[0] <= contacts.RETRY_S_FIRST
    assert max(waits) <= contacts.RETRY_S_MAX[Source.SEED]
    assert min(waits[10:]) >= contacts.RETRY_S_MAX[Source.SEED] / 2
    assert core.status(now)[0].why == "nobody"


def test_what_people_must_put_right_waits_as_long_as_it_may() -> None:
    core = made()
    core.handle(Found(Source.SEED, SEED.address), 0.0)
    core.handle(Failed(SEED, "another peer", lasting=True), 0.0)
    retry_s = core.status(0.0)[0].retry_s
    assert retry_s is not None
    assert retry_s >= contacts.RETRY_S_MAX[Source.SEED] / 2


def test_an_own_address_is_tried_once() -> None:
    core = made()
    core.handle(Found(Source.SEED, SEED.address), 0.0)
    core.handle(Reached(SEED, ME), 0.1)
    core.handle(known(ME), 0.2)
    assert not tried(core.handle(Tick(), 1e6))
    assert core.status(1.0)[0].state == "known"


def test_who_answers_without_becoming_known_is_not_asked_at_once_again() -> None:
    core = made()
    core.handle(Found(Source.SEED, SEED.address), 0.0)
    assert core.handle(Reached(SEED, ANNA), 0.0) == []
    assert core.status(0.0)[0].retry_s >= contacts.RETRY_S_FIRST / 2  # type: ignore[operator]


def test_what_is_no_address_is_refused_and_changes_nothing() -> None:
    core = made()
    with pytest.raises(InvalidRequest):
        core.handle(Found(Source.SEED, "nonsense"), 0.0)
    assert core.status(0.0) == []
    with pytest.raises(BrokenInvariant, match="int"):
        core.handle(7, 0.0)  # type: ignore[arg-type]


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_with_several_addresses_is_several_seeds() -> None:
    core = made()
    seed = f"shoal.example:7645#{ANNA}"
    assert core.handle(Found(Source.SEED, seed), 0.0) == [Resolve(seed)]
    assert core.status(0.0)[0].state == "trying"
    found = [f"10.0.0.{n}:7645#{ANNA}" for n in range(1, 12)]
    effects = core.handle(Resolved(seed, [*found, found[0], "junk"]), 0.1)
    assert tried(effects) == found[: contacts.SEED_ADDRESSES_MAX]


def test_a_name_is_looked_up_anew_for_each_retry() -> None:
    core = made()
    core.handle(Found(Source.SEED, "shoal.example:7645"), 0.0)
    old, new = (Contact(Source.SEED, f"10.0.0.{n}:7645", "shoal.example:7645") for n in (1, 2))
    core.handle(Resolved("shoal.example:7645", [old.address]), 0.1)
    core.handle(Failed(old, "nobody"), 0.2)
    effects = core.handle(Tick(), 5.0)
    assert effects == [Resolve("shoal.example:7645")]  # and the old address is not tried by itself
    assert tried(core.handle(Resolved("shoal.example:7645", [new.address]), 5.1)) == [new.address]
    assert [each.address for each in core.status(5.2)] == [new.address]


def test_one_address_of_a_name_is_enough() -> None:
    core = made()
    core.handle(Found(Source.SEED, "shoal.example:7645"), 0.0)
    good, bad = (Contact(Source.SEED, f"10.0.0.{n}:7645", "shoal.example:7645") for n in (1, 2))
    core.handle(Resolved("shoal.example:7645", [good.address, bad.address]), 0.1)
    core.handle(Reached(good, ANNA), 0.2)
    core.handle(Failed(bad, "nobody"), 0.2)
    core.handle(known(ANNA), 0.3)
    assert core.deadline is None
    assert core.handle(Tick(), 1e6) == []
    core.handle(known(BERT), 1e6)
    assert core.handle(Tick(), 1e6 + 1.0) == [Resolve("shoal.example:7645")]


def test_a_name_whose_peer_is_known_already_is_not_looked_up() -> None:
    core = made()
    core.handle(known(ANNA), 0.0)
    seed = f"shoal.example:7645#{ANNA}"
    assert core.handle(Found(Source.SEED, seed), 0.0) == []
    core.handle(known(BERT), 1.0)
    assert core.handle(Tick(), 2.0) == [Resolve(seed)]


def test_a_name_without_addresses_says_why_once_and_is_looked_up_again() -> None:
    core = made()
    core.handle(Found(Source.SEED, "shoal.example:7645"), 0.0)
    assert core.handle(Unresolved("shoal.example:7645", "no DNS"), 0.1) == [
        Failing(Source.SEED, "shoal.example:7645", "no DNS")
    ]
    status = core.status(0.1)[0]
    assert (status.state, status.why) == ("waiting", "no DNS")
    assert core.handle(Tick(), 2.0) == [Resolve("shoal.example:7645")]
    assert [type(effect) for effect in core.handle(Resolved("shoal.example:7645", ["junk"]), 2.1)] == [Failing]


def test_an_address_that_a_name_loses_while_it_is_tried_goes_when_the_try_ends() -> None:
    core = made()
    core.handle(Found(Source.SEED, "shoal.example:7645"), 0.0)
    old = Contact(Source.SEED, "10.0.0.1:7645", "shoal.example:7645")
    core.handle(Resolved("shoal.example:7645", [old.address]), 0.1)
    core.handle(Tick(), 5.0)
    core.handle(Resolved("shoal.example:7645", ["10.0.0.2:7645"]), 5.1)
    assert {each.address for each in core.status(5.1)} == {old.address, "10.0.0.2:7645"}
    core.handle(Reached(old, ANNA), 5.2)
    assert {each.address for each in core.status(5.2)} == {"10.0.0.2:7645"}


def test_what_is_said_about_names_and_contacts_that_nobody_knows_is_ignored() -> None:
    core = made()
    ghost = Contact(Source.LAN, lan(0))
    for event in (Resolved("x:1", ["10.0.0.1:1"]), Unresolved("x:1", "y"), Reached(ghost, ANNA), Failed(ghost, "y")):
        assert core.handle(event, 0.0) == []
    core.handle(Withdrawn(Source.LAN, lan(0)), 0.0)
    assert core.status(0.0) == []


def test_look_ups_under_way_and_names_are_bounded() -> None:
    core = made()
    effects = [core.handle(Found(Source.SEED, f"n{n}.example:1"), 0.0) for n in range(contacts.SEEDS_MAX + 10)]
    assert sum(len(each) for each in effects) == contacts.RESOLVES_AT_ONCE_MAX
    assert len(core.status(0.0)) == contacts.SEEDS_MAX
    assert core.deadline == contacts.ALONE_S_FIRST  # what is next comes with the end of a look-up
    assert Resolve("n4.example:1") in core.handle(Unresolved("n0.example:1", "no DNS"), 0.1)


# --- the LAN and memory -----------------------------------------------------------------------------------------------


def test_who_is_known_is_not_dialled_because_the_lan_names_him() -> None:
    core = made()
    core.handle(known(PEERS[4]), 0.0)
    assert core.handle(Found(Source.LAN, lan(0)), 0.0) == []
    assert tried(core.handle(Found(Source.LAN, lan(1)), 0.0)) == [lan(1)]


def test_what_the_lan_withdraws_is_tried_no_more_and_a_running_try_still_counts() -> None:
    core = made()
    for n in range(contacts.LAN_TRIES_AT_ONCE_MAX):
        core.handle(Found(Source.LAN, lan(n)), 0.0)
        core.handle(Withdrawn(Source.LAN, lan(n)), 0.0)
    assert core.handle(Found(Source.LAN, lan(50)), 0.0) == []
    effects = core.handle(Failed(Contact(Source.LAN, lan(0)), "nobody"), 1.0)
    assert tried(effects) == [lan(50)]
    core.handle(Found(Source.LAN, lan(1)), 1.0)  # there again before its try has ended
    core.handle(Failed(Contact(Source.LAN, lan(1)), "nobody"), 1.0)
    assert lan(1) in {each.address for each in core.status(1.0)}
    assert lan(0) not in {each.address for each in core.status(1.0)}
    core.handle(Withdrawn(Source.LAN, lan(1)), 1.0)
    assert lan(1) not in {each.address for each in core.status(1.0)}


def test_a_flood_on_the_lan_takes_no_turn_of_a_seed() -> None:
    core = made()
    for n in range(300):
        core.handle(Found(Source.LAN, lan(n)), 0.0)
    effects = core.handle(Found(Source.SEED, SEED.address), 0.0)
    assert tried(effects) == [SEED.address]
    assert sum(each.source is Source.LAN for each in core.status(0.0)) == contacts.LAN_MAX
    assert sum(each.state == "trying" for each in core.status(0.0)) == contacts.LAN_TRIES_AT_ONCE_MAX + 1


def test_where_there_is_no_room_who_failed_most_often_goes_first() -> None:
    core = made()
    for n in range(contacts.LAN_MAX):
        core.handle(Found(Source.LAN, lan(n)), 0.0)
    for _ in range(3):
        core.handle(Failed(Contact(Source.LAN, lan(2)), "nobody"), 0.0)
    core.handle(Failed(Contact(Source.LAN, lan(3)), "nobody"), 0.0)
    core.handle(Found(Source.LAN, lan(200)), 0.0)
    left = {each.address for each in core.status(0.0)}
    assert lan(2) not in left
    assert {lan(3), lan(200)} <= left


def test_remembered_peers_are_looked_for_until_three_of_them_are_known_whatever_a_seed_says() -> None:
    core = made()
    core.handle(known(*PEERS[300:350]), 0.0)  # a seed that has many friends, and hides all others
    first: list[str] = []
    for n in range(20):
        first += tried(core.handle(Found(Source.REMEMBERED, lan(n)), 0.0))
    assert first == [lan(n) for n in range(contacts.TRIES_AT_ONCE_MAX)]
    core.handle(known(*PEERS[300:350], *PEERS[4:7]), 0.1)
    for n in range(contacts.TRIES_AT_ONCE_MAX):
        assert not tried(core.handle(Failed(Contact(Source.REMEMBERED, lan(n)), "nobody"), 0.2))
    states = [each.state for each in core.status(0.3)]
    assert states == ["known"] * 3 + ["spare"] * 17
    assert core.deadline is None


def test_a_node_that_knows_nobody_waits_shorter() -> None:
    for others, bound in (((), contacts.RETRY_S_MAX_ALONE), ((BERT,), contacts.RETRY_S_MAX[Source.REMEMBERED])):
        core = made()
        core.handle(known(*others), 0.0)
        core.handle(Found(Source.REMEMBERED, lan(0)), 0.0)
        for _ in range(20):
            core.handle(Failed(Contact(Source.REMEMBERED, lan(0)), "nobody"), 0.0)
        retry_s = core.status(0.0)[0].retry_s
        assert retry_s is not None
        assert bound / 2 <= retry_s <= bound


# --- alone -----------------------------------------------------------------------------------------------------------


def test_who_is_alone_says_so_once_and_then_rarely() -> None:
    core = made(searching=True)
    said, now = [], 0.0
    while now < 86_400:
        assert core.deadline is not None
        now = core.deadline
        said += [effect for effect in core.handle(Tick(), now) if isinstance(effect, Alone)]
    assert said[0] == Alone(contacts.ALONE_S_FIRST, 0)
    assert [effect.for_s for effect in said[:4]] == [10.0, 70.0, 430.0, 2590.0]
    gaps = [after.for_s - before.for_s for before, after in pairwise(said)]
    assert max(gaps) == contacts.ALONE_S_MAX
    assert set(gaps[3:]) == {contacts.ALONE_S_MAX}
    assert len(said) <= 28


def test_who_has_nowhere_to_look_says_nothing() -> None:
    core = made()
    assert core.deadline is None
    assert core.handle(Tick(), 1e6) == []


def test_who_was_in_company_and_is_alone_again_says_so_anew() -> None:
    core = made(searching=True)
    core.handle(Tick(), 10.0)
    core.handle(known(ANNA), 20.0)
    assert core.deadline is None
    core.handle(known(), 100.0)
    assert core.handle(Tick(), 109.0) == []
    assert core.handle(Tick(), 110.0) == [Alone(10.0, 0)]


# --- bounds, whatever happens -----------------------------------------------------------------------------------------

_addresses = st.integers(0, 300).map(lan)
_seeds = st.sampled_from(["a.example:1", "b.example:1", f"c.example:2#{ANNA}"])
_events = st.one_of(
    st.builds(Found, st.sampled_from(Source), _addresses | _seeds),
    st.builds(Withdrawn, st.sampled_from(Source), _addresses),
    st.builds(Resolved, _seeds, st.lists(_addresses, max_size=12)),
    st.builds(Unresolved, _seeds, st.just("no DNS")),
    st.builds(Known, st.frozensets(st.sampled_from(PEERS[:40]), max_size=20)),
    st.just(Tick()),
)


@settings(max_examples=80, deadline=None)
@given(st.integers(), st.lists(st.tuples(_events, st.floats(0, 100), st.integers(0, 3)), max_size=120))
def test_whatever_happens_tries_are_bounded_and_none_is_begun_twice(
    seed: int, steps: list[tuple[Event, float, int]]
) -> None:
    core, now = made(seed=seed), 0.0
    trying: list[Contact] = []
    resolving: list[str] = []
    for event, wait_s, choice in steps:
        now += wait_s
        if trying and choice:
            contact = trying.pop(choice % len(trying))
            event = Reached(contact, PEERS[choice]) if choice == 1 else Failed(contact, "why", choice == 3)
        if isinstance(event, Resolved | Unresolved):
            if event.seed not in resolving:
                continue
            resolving.remove(event.seed)
        for effect in core.handle(event, now):
            if isinstance(effect, Try):
                assert effect.contact not in trying
                trying.append(effect.contact)
            if isinstance(effect, Resolve):
                assert effect.seed not in resolving
                resolving.append(effect.seed)
        assert len(trying) <= contacts.TRIES_AT_ONCE_MAX
        assert sum(each.source is Source.LAN for each in trying) <= contacts.LAN_TRIES_AT_ONCE_MAX
        assert len(resolving) <= contacts.RESOLVES_AT_ONCE_MAX
        counts = [each.source for each in core.status(now)]
        assert counts.count(Source.LAN) <= contacts.LAN_MAX
        assert counts.count(Source.REMEMBERED) <= contacts.REMEMBERED_MAX
        assert counts == sorted(counts)
        assert all(each.retry_s is None or each.retry_s <= 300.0 for each in core.status(now))
        # Nothing is due that was not done: a deadline is ahead, or something else must happen first.
        assert core.deadline is None or core.deadline > now


@settings(max_examples=50, deadline=None)
@given(st.integers(), st.lists(st.tuples(_events, st.floats(0, 100)), max_size=60))
def test_equal_inputs_give_equal_effects(seed: int, steps: list[tuple[Event, float]]) -> None:
    one, other, now = made(seed=seed), made(seed=seed), 0.0
    for event, wait_s in steps:
        now += wait_s
        assert one.handle(event, now) == other.handle(event, now)
        assert one.status(now) == other.status(now)
