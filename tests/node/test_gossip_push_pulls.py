"""The driver of membership, without a network: push-pulls, and what this node says of itself in them."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing
from toy_gossip import MODEL, NOW, WAIT_S, Clock, One, Person, eventually, exchange

from node.claim import hash_of
from node.gossip import SYNCS_AT_ONCE_MAX, SYNCS_WAITING_MAX
from node.identity import Identity
from node.member import State
from node.membership_event import Forget, RecordIssued
from protos import peers_pb2 as pb
from protos.errors import RecordFromFuture
from protos.limits import ERROR_MESSAGE_CHARS_MAX


def test_this_nodes_newest_claim_is_in_its_digests_at_once(known: One, clock: Clock) -> None:
    other = One(clock)
    exchange(other, known)
    before = known.gossip.claim_digests()
    known.gossip.handle(RecordIssued(known.roster.sequence + 1))
    assert known.gossip._claims.rank_of(known.hash) == known.gossip.own_claim().rank
    assert known.gossip.claim_digests() == before, "a newer record is told by records"


def test_who_is_forgotten_is_in_no_digest(known: One, people: list[Person]) -> None:
    before = known.gossip.claim_digests()
    known.gossip.handle(Forget(people[0].hash))
    assert known.gossip.claim_digests() != before
    assert known.roster.alive().keys() == {person.peer for person in people[1:]}


class Wire:
    """A link to another node, which answers in this thread."""

    def __init__(self, asker: One, answerer: One, address: str, reached: bool = True) -> None:
        self.peer, self.address = answerer.peer, address
        self.closed = False
        self.calls: list[str] = []
        self._asker, self._answerer, self._reached = asker, answerer, reached

    def call(self, _: object, request: object, *, timeout_s: float) -> object:
        assert timeout_s > 0
        self.calls.append(type(request).__name__)
        if isinstance(request, pb.SyncRequest):
            return self._answerer.gossip.push_pull.answer(self._asker.peer, "asker", request)
        if not self._reached:
            return pb.DialBackReply(reached=False, why="x" * 10**6)
        return pb.DialBackReply(reached=True)

    def close(self) -> None:
        self.closed = True


def wired(monkeypatch: pytest.MonkeyPatch, wire: Wire) -> Wire:
    monkeypatch.setattr("node.gossip.connect", lambda *_, **__: wire)
    return wire


def test_a_push_pull_makes_members_of_both_and_an_address_that_answered_counts(
    one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = One(clock)
    wire = wired(monkeypatch, Wire(one, other, other.address))
    assert one.gossip._join(other.address) == other.peer
    assert wire.closed
    assert (one.state(other.peer), other.state(one.peer)) == (State.ALIVE, State.ALIVE)
    assert set(one.roster.view(MODEL).records) == {one.peer, other.peer}
    assert set(other.roster.view(MODEL).records) == {other.peer}, "it has not called this one"
    assert wire.calls == ["SyncRequest", "DialBackRequest"], "each brought its own record"
    assert one.gossip.counts["push-pulls"] == 1
    assert one.gossip.reachable.refuted(clock.now) is None
    one.gossip._join(other.address)
    assert wire.calls[2:] == ["SyncRequest"], "equal ones ask once, and nobody is asked twice to call back"


def test_an_address_that_is_not_the_records_proves_nothing_about_the_records(
    one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = One(clock)
    wired(monkeypatch, Wire(one, other, "10.6.6.6:1"))
    one.gossip._join("10.6.6.6:1")
    assert list(one.roster.view(MODEL).records) == [one.peer]


def test_who_says_that_this_node_cannot_be_called_is_believed_and_cut_short(
    one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = One(clock)
    wired(monkeypatch, Wire(one, other, other.address, reached=False))
    one.gossip._join(other.address)
    assert one.gossip.reachable.refuted(clock.now) == "x" * ERROR_MESSAGE_CHARS_MAX


def test_a_node_that_meets_itself_says_nothing_to_itself(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wired(monkeypatch, Wire(one, one, one.address))
    assert one.gossip._join(one.address) == one.peer
    assert (wire.calls, wire.closed) == ([], True)


def test_a_node_whose_clock_is_an_hour_off_is_joined_by_nobody_and_told_why(
    one: One, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = Clock()
    ahead.now = NOW + 3600
    other = One(ahead)
    wire = wired(monkeypatch, Wire(other, one, one.address))
    with pytest.raises(RecordFromFuture):
        other.gossip._join(one.address)
    assert wire.closed
    assert (one.state(other.peer), one.roster.record_of(other.peer)) == (None, None)


def test_a_bug_in_a_push_pull_is_told_and_ends_nothing(
    one: One, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one.gossip._guarded(lambda: 1 / 0)
    assert "a push-pull failed here" in "".join(capsys.readouterr())
    assert one.gossip.counts["push-pulls failed"] == 0


def test_so_many_push_pulls_are_under_way_at_once_so_many_wait_and_no_more() -> None:
    async def main() -> None:
        one = One(Clock())
        may_end, under_way, done = threading.Event(), [], []

        def sync(peer: bytes) -> None:
            under_way.append(peer)
            assert may_end.wait(WAIT_S)
            done.append(peer)

        one.gossip._sync_with = sync
        peers = [hash_of(Identity.create().peer) for _ in range(SYNCS_AT_ONCE_MAX + SYNCS_WAITING_MAX + 5)]
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            for peer in peers[:SYNCS_AT_ONCE_MAX]:
                one.gossip._syncs.put(peers[0])  # asked for again and again, done once
                one.gossip._syncs.put(peer)
                await eventually(lambda wanted=peer: wanted in under_way)
            for peer in peers[SYNCS_AT_ONCE_MAX:]:
                one.gossip._syncs.put(peer)
            await trio.testing.wait_all_tasks_blocked()
            assert len(under_way) == len(one.gossip._syncing) == SYNCS_AT_ONCE_MAX
            assert len(one.gossip._syncs) == SYNCS_WAITING_MAX
            may_end.set()
            await eventually(lambda: not one.gossip._syncing and not len(one.gossip._syncs))
            nursery.cancel_scope.cancel()
        assert len(done) == len(set(done))
        assert SYNCS_WAITING_MAX <= len(done) <= SYNCS_AT_ONCE_MAX + SYNCS_WAITING_MAX

    trio.run(main)


def test_join_is_a_push_pull_in_a_thread_of_its_own(one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    other = One(clock)
    wired(monkeypatch, Wire(one, other, other.address))
    assert trio.run(one.gossip.join, other.address) == other.peer
    assert one.state(other.peer) is State.ALIVE
