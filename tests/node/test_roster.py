"""What a node knows of its peers, and the views that it makes of it.  No network; the clock is an argument."""

from __future__ import annotations

import threading
from random import Random
from typing import TYPE_CHECKING

import pytest

from coordinator.health import PeerHealth
from coordinator.view import Health
from node import roster
from node.hello import Caller
from node.identity import Identity
from node.link import Links
from node.reach import TRIES_MAX
from node.record import Held, Record, read
from node.roster import RECORD_S, About, Roster
from protos import peers_pb2 as pb
from protos.errors import InvalidRecord, InvalidRequest, InvalidSignature, Overloaded, PeerLost, PermissionDenied
from protos.limits import PEERS_MESSAGE_BYTES_MAX, RECORD_BYTES_MAX, RECORDS_MAX

if TYPE_CHECKING:
    from protos.ids import PeerId

MODEL, ANOTHER = "a" * 64, "b" * 64
NOW = 1_800_000_000.0
LOST = PeerLost("gone")


class Clock:
    """Both clocks: they go together here."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class One:
    def __init__(self, clock: Clock, identity: Identity | None = None, held: tuple[Held, ...] = ()) -> None:
        self.identity = identity or Identity.create()
        self.links = Links(self.identity)
        self.health = PeerHealth()
        about = About(f"h:{1 + hash(self.identity.peer) % 1000}", b"c" * 32, zone="z")
        self.roster = Roster(
            self.identity, self.links, self.health, about, load=lambda: pb.Load(queue=3), clock=clock, wall=clock
        )
        self.roster.publish(held or (Held(MODEL, True, range(2), True, False, {0: 0b101}),))

    @property
    def peer(self) -> PeerId:
        return self.roster.me

    def learns(self, other: One, *, reached: bool = True) -> None:
        self.roster.merge(other.roster.request(Random(0)).records, sender=other.peer)
        if reached:
            self.roster.answered(other.peer, 0.02)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pair(clock: Clock) -> tuple[One, One]:
    one, two = One(clock), One(clock)
    one.learns(two)
    return one, two


def test_a_view_has_who_holds_some_of_the_model_and_answered(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    three, four = One(clock, held=(Held(ANOTHER),)), One(clock)
    one.learns(three)
    one.learns(four, reached=False)
    view = one.roster.view(MODEL)
    assert set(view.records) == {one.peer, two.peer}
    got = view.records[two.peer]
    assert (got.address, got.zone, got.layers, got.embed, got.head, got.text) == (
        two.roster.address, "z", range(2), True, False, True,
    )  # fmt: skip
    assert got.experts == {0: 0b101}
    assert view.rtt_of(two.peer) == 0.02
    assert set(one.roster.view(ANOTHER).records) == {three.peer}


def test_the_status_has_everybody_this_node_first(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    one.learns(One(clock), reached=False)
    one.roster.loaded(two.peer, pb.Load(queue=9))
    clock.now += 1.5
    me, *others = one.roster.status()
    assert (me.peer_id, me.state, me.queue, me.layers, me.experts) == (one.peer, "self", 3, 2, 2)
    states = {other.peer_id: other.state for other in others}
    assert sorted(states.values()) == ["alive", "suspect"]
    (seen,) = [other for other in others if other.peer_id == two.peer]
    assert (seen.state, seen.queue, seen.age_s, seen.rtt_s, seen.model_id) == ("alive", 9, 1.5, 0.02, MODEL)


def test_a_peer_that_misses_its_tries_is_dead_until_it_answers(pair: tuple[One, One]) -> None:
    one, two = pair
    for _ in range(TRIES_MAX):
        one.roster.missed(two.peer, LOST)
    assert one.roster.view(MODEL).health_of(two.peer) is Health.DEAD
    assert one.roster.status()[1].last_error == "peer_lost: gone"
    one.roster.heard(two.peer)
    assert one.roster.view(MODEL).health_of(two.peer) is Health.DEAD
    one.roster.answered(two.peer, 0.02)
    assert one.roster.view(MODEL).health_of(two.peer) is Health.ALIVE


def test_failed_calls_count_too_and_bring_a_try(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    assert one.roster.due(Random(0), set(), 0) == []
    one.roster.failed(two.peer, LOST)
    assert one.roster.view(MODEL).health_of(two.peer) is Health.DEAD  # the breaker is open
    assert one.roster.due(Random(0), set(), 8) == [two.peer]
    assert one.roster.due(Random(0), {two.peer}, 8) == []
    assert one.roster.status()[1].calls_failed == 1
    clock.now += 0.01
    one.roster.answered(two.peer, 0.02)  # began before the call failed
    assert one.roster.view(MODEL).health_of(two.peer) is Health.DEAD
    clock.now += 0.03
    one.roster.answered(two.peer, 0.02)
    assert one.roster.view(MODEL).health_of(two.peer) is Health.ALIVE


def test_a_breaker_closes_by_time(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    for _ in range(2):
        one.roster.failed(two.peer, Overloaded("full"))
    one.roster.tick()
    assert one.roster.view(MODEL).health_of(two.peer) is Health.SUSPECT  # late, not gone
    clock.now += 100
    one.roster.tick()
    assert one.roster.view(MODEL).health_of(two.peer) is Health.ALIVE


def test_what_is_known_is_no_news(pair: tuple[One, One]) -> None:
    one, two = pair
    assert not one.roster.merge(two.roster.request(Random(0)).records, two.peer)


def test_the_own_record_is_renewed_at_half_its_life_and_others_expire(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    first = one.roster.record_of(one.peer)
    clock.now += RECORD_S / 2 - 1
    one.roster.tick()
    assert one.roster.record_of(one.peer) == first
    clock.now += 2
    one.roster.tick()
    renewed = one.roster.record_of(one.peer)
    assert renewed.sequence > first.sequence
    assert renewed.held == first.held
    clock.now += RECORD_S / 2
    one.roster.tick()
    assert one.roster.record_of(two.peer) is None
    assert list(one.roster.view(MODEL).records) == [one.peer]
    with pytest.raises(PeerLost, match="no address"):
        one.links.to(two.peer)
    one.roster.missed(two.peer, LOST)
    one.roster.answered(two.peer, 1.0)
    one.roster.heard(two.peer)
    assert len(one.roster.status()) == 1


def test_a_new_holding_is_published_in_a_newer_record(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    two.roster.publish([Held(ANOTHER, text=True)])
    one.learns(two)
    assert list(one.roster.view(MODEL).records) == [one.peer]
    assert list(one.roster.view(ANOTHER).records) == [two.peer]


def test_a_node_whose_clock_went_back_overtakes_its_own_last_record(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    clock.now -= 100
    again = One(clock, identity=two.identity)
    old = one.roster.record_of(two.peer)
    again.learns(one)
    assert again.roster.record_of(two.peer).sequence > old.sequence
    one.learns(again)
    assert one.roster.record_of(two.peer) == again.roster.record_of(two.peer)


def test_an_exchange_must_bring_the_callers_own_record(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    stranger = One(clock)
    with pytest.raises(InvalidRecord, match="no record of its own"):
        one.roster.admit(stranger.peer, pb.ExchangeRequest(records=two.roster.request(Random(0)).records))
    (signed,) = stranger.roster.request(Random(0)).records
    signed.signature = b"x" * 64
    with pytest.raises(InvalidSignature):
        one.roster.admit(stranger.peer, pb.ExchangeRequest(records=[signed]))


def test_one_bad_record_does_not_keep_the_others_out(clock: Clock) -> None:
    one, two, three = One(clock), One(clock), One(clock)
    bad = pb.SignedRecord(record=b"?", signature=b"x" * 64)
    records = [bad, *three.roster.request(Random(0)).records, bad, *two.roster.request(Random(0)).records]
    one.roster.admit(two.peer, pb.ExchangeRequest(records=records))
    assert one.roster.record_of(two.peer) is not None
    assert one.roster.record_of(three.peer) is not None


def test_what_nodes_ask_of_each_other_needs_a_record(clock: Clock, pair: tuple[One, One]) -> None:
    one, two = pair
    stranger = Caller(Identity.create().peer, b"")
    for method in ("/shoal.v1.Stage/Open", "/shoal.v1.Door/Deliver", "/shoal.v1.Expert/Compute"):
        one.roster.permit(Caller(two.peer, b""), method)
        one.roster.permit(Caller(one.peer, b""), method)
        with pytest.raises(PermissionDenied):
            one.roster.permit(stranger, method)
    for method in ("/shoal.v1.Inference/Generate", "/shoal.v1.Peers/Exchange"):
        one.roster.permit(stranger, method)


def test_a_message_has_as_many_records_as_it_takes_and_the_own_one_always(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = One(clock)
    for n in range(80):
        masks = {layer: (1 << 4095) + layer for layer in range(RECORD_BYTES_MAX // 540)}
        other = One(clock, held=(Held(f"{n:064}", experts=masks),))
        one.learns(other)
    sent = [one.roster.request(Random(n)) for n in range(3)]
    for request in sent:
        assert PEERS_MESSAGE_BYTES_MAX - 2 * RECORD_BYTES_MAX < request.ByteSize() <= PEERS_MESSAGE_BYTES_MAX
        assert read(request.records[0], int(NOW * 1000)).peer == one.peer
    assert len({record.signature for request in sent for record in request.records}) > len(sent[0].records)


def test_more_is_held_than_a_record_takes(clock: Clock) -> None:
    one = One(clock)
    before = one.roster.record_of(one.peer)
    with pytest.raises(InvalidRecord):
        one.roster.publish([Held(MODEL, experts={layer: (1 << 4095) + layer for layer in range(200)})])
    assert one.roster.record_of(one.peer) == before


def test_more_records_than_a_table_holds_are_refused_before_one_is_looked_at(pair: tuple[One, One]) -> None:
    one, two = pair
    own = next(iter(two.roster.request(Random(0)).records))
    assert not one.roster.merge([own] + [pb.SignedRecord()] * (RECORDS_MAX - 1), two.peer)
    with pytest.raises(InvalidRequest, match=str(RECORDS_MAX + 1)):
        one.roster.merge([own] + [pb.SignedRecord()] * RECORDS_MAX, two.peer)


def test_signatures_are_verified_while_others_may_look(
    clock: Clock, pair: tuple[One, One], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, three = pair[0], One(clock)
    seen: list[bool] = []

    def verified(signed: pb.SignedRecord, now_ms: int) -> Record:
        looking = threading.Thread(target=lambda: seen.append(one.roster.record_of(three.peer) is None))
        looking.start()
        looking.join(20)
        return read(signed, now_ms)

    monkeypatch.setattr(roster, "read", verified)
    one.learns(three)
    assert seen[0]
    assert one.roster.record_of(three.peer) is not None


def test_a_record_that_comes_twice_at_once_is_taken_once(
    clock: Clock, pair: tuple[One, One], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, three = pair[0], One(clock)
    records = three.roster.request(Random(0)).records

    def overtaken(signed: pb.SignedRecord, now_ms: int) -> Record:
        monkeypatch.setattr(roster, "read", read)
        assert one.roster.merge(records, three.peer)
        return read(signed, now_ms)

    monkeypatch.setattr(roster, "read", overtaken)
    assert not one.roster.merge(records, three.peer)
