"""The driver of membership, without a network: who is no member, and is asked for a push-pull."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import trio
from toy_gossip import QUIET, Clock, One, Person, Virtual, eventually, run, table

from node.claim import hash_of, id_of
from node.gossip import STRANGER_FAILED_S_MAX, STRANGERS_MAX
from node.identity import Identity
from node.message import Ping
from protos.errors import PeerLost, WrongPeer

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.ids import PeerId


class Wishes:
    """Stands for the queue of push-pulls."""

    def __init__(self, one: One) -> None:
        self.peers: list[PeerId] = []
        one.gossip._syncs = one.gossip._stranger = self

    def put(self, peer: bytes) -> None:
        self.peers.append(id_of(peer))


def test_a_stranger_is_answered_by_a_push_pull_alone_where_its_datagram_came_from(
    known: One, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    wishes = Wishes(known)
    stranger = Person.create()
    clock.now += 5
    known.hears(stranger, Ping(1, (stranger.claim(),)), "10.7.7.7", 4567)
    assert known.sent() == []
    assert wishes.peers == [stranger.peer]
    assert known.state(stranger.peer) is None
    assert known.gossip.counts["refused: a message of a node that is no member"] == 1
    dialled = []

    def connect(_: object, address: str, **__: object) -> None:
        dialled.append(address)
        raise WrongPeer("another answers there")

    monkeypatch.setattr("node.gossip.connect", connect)
    known.gossip._guarded(lambda: known.gossip._sync_with(stranger.hash))
    assert dialled == [f"10.7.7.7:4567#{stranger.peer}"], "and Hello must prove who is there"
    assert known.gossip.counts["push-pulls failed"] == 1
    known.gossip._sync_with(stranger.hash)
    assert len(dialled) == 1, "once for each datagram"


def test_an_ipv6_stranger_is_asked_at_an_address_with_brackets(known: One, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = []
    monkeypatch.setattr("node.gossip.connect", lambda _, address, **__: dialled.append(address))
    stranger = Person.create()
    known.hears(stranger, Ping(1), "fe80::1", 4567)
    with pytest.raises(AttributeError):
        known.gossip._sync_with(stranger.hash)  # what stands for a link here is none
    assert dialled == [f"[fe80::1]:4567#{stranger.peer}"]


def test_invented_identities_take_a_bounded_room_and_make_one_push_pull_a_second(known: One, clock: Clock) -> None:
    wishes = Wishes(known)
    before = table(known)
    clock.now += 5
    strangers = [Person.create() for _ in range(STRANGERS_MAX + 20)]
    for person in strangers:
        known.hears(person, Ping(1, (person.claim(),)), "6.6.6.6", 666)
    assert len(known.gossip._strangers) == STRANGERS_MAX
    assert strangers[0].hash not in known.gossip._strangers, "the oldest is forgotten"
    assert strangers[-1].hash in known.gossip._strangers
    assert len(wishes.peers) == 1
    assert (known.sent(), table(known)) == ([], before)
    clock.now += QUIET.sync_gap_s
    known.hears(strangers[0], Ping(2))
    assert len(wishes.peers) == 2


def test_a_stranger_that_is_admitted_is_asked_at_its_records_address(
    known: One, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled = []

    def connect(_: object, address: str, **__: object) -> None:
        dialled.append(address)
        raise PeerLost("nobody")

    monkeypatch.setattr("node.gossip.connect", connect)
    stranger = Person.create("10.3.3.3:3")
    known.hears(stranger, Ping(1), "6.6.6.6", 666)
    known.knows(stranger)
    with pytest.raises(PeerLost):
        known.gossip._sync_with(stranger.hash)
    assert dialled == [f"10.3.3.3:3#{stranger.peer}"]
    known.gossip._sync_with(hash_of(Identity.create().peer))
    assert len(dialled) == 1, "nobody asks for what he does not know"


def test_strangers_that_are_asked_in_vain_keep_no_member_waiting_and_are_asked_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(work: Callable[[], object], *, abandon: bool = False) -> object:
        """No thread: virtual seconds would pass while it works."""
        return work()

    monkeypatch.setattr("node.gossip.in_thread", at_once)

    async def main() -> None:
        one = One(Virtual())
        member = Person.create()
        one.knows(member)
        asked: list[tuple[PeerId, int]] = []
        second = 0
        one.gossip._sync_with = lambda peer: asked.append((id_of(peer), second))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            for second in range(300):  # noqa: B007  (for who is asked)
                one.hears(Person.create(), Ping(1), "6.6.6.6", 666)
                await trio.sleep(1.0)
            strangers = [at for peer, at in asked if peer != member.peer]
            assert 5 <= len(strangers) <= 10
            gaps = [after - before for before, after in itertools.pairwise(strangers)]
            assert gaps[0] < 8
            assert max(gaps) <= STRANGER_FAILED_S_MAX + 4
            assert one.gossip._syncs is not None
            one.gossip._syncs.put(member.hash)
            await eventually(lambda: asked[-1] == (member.peer, second))
            nursery.cancel_scope.cancel()

    run(main)
