"""What a node knows of its peers, and the views that it makes of it.  No network; the clock is an argument."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
import structlog
from toy_gossip import ANOTHER, HOLDS, MODEL, NOW, Clock, One, Person

from coordinator.islands import NEAR_S
from coordinator.view import Health, Load
from node import grant as grants
from node import record, revocations
from node.grant import Grant
from node.hello import Caller
from node.identity import Identity
from node.issuer import RECORD_GAP_S, RECORD_S
from node.load_report import LoadReport
from node.load_report import sign as sign_load
from node.member import State
from node.network import Network, open_network, permissioned
from node.record import Held
from node.revocations import Revocations
from node.roster import LOAD_S
from protos.errors import (
    DeadlineExceeded,
    GrantExpired,
    GrantMissing,
    GrantRevoked,
    Overloaded,
    PeerLost,
    PermissionDenied,
    RecordTooLarge,
)
from protos.limits import LOAD_S_MAX

if TYPE_CHECKING:
    from node.roster import Roster
    from protos.ids import PeerId

LOST = PeerLost("gone")
NETWORK = open_network().id


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def one(clock: Clock) -> One:
    return One(clock)


@pytest.fixture
def other() -> Person:
    return Person.create("10.0.0.7:7645")


@pytest.fixture
def roster(one: One, other: Person) -> Roster:
    """Of a node that knows one peer, which is alive and has answered."""
    learn(one, other)
    return one.roster


def learn(one: One, *people: Person, rtt_s: float = 0.02, answered: bool = True, **changed: object) -> None:
    for person in people:
        one.roster.merge(person.record(**changed), "there")
        one.roster.believe(person.peer, State.ALIVE)
        if answered:
            one.roster.answered(person.peer, rtt_s)


def states(roster: Roster) -> dict[PeerId, str]:
    return {status.peer_id: status.state for status in roster.status()}


def health(roster: Roster, person: Person) -> Health:
    return roster.view(MODEL).health_of(person.peer)


# --- views ---------------------------------------------------------------------------------------------------------


def test_a_view_has_who_holds_some_of_the_model_is_a_member_and_answered(one: One, other: Person) -> None:
    elsewhere, silent, no_member = (Person.create() for _ in range(3))
    learn(one, other)
    learn(one, elsewhere, held=(Held(ANOTHER),))
    learn(one, silent, answered=False)
    one.roster.merge(no_member.record(), "there")
    one.roster.answered(no_member.peer)
    view = one.roster.view(MODEL)
    assert set(view.records) == {one.peer, other.peer}
    got = view.records[other.peer]
    assert (got.address, got.layers, got.embed, got.head, got.text) == ("10.0.0.7:7645", range(2), True, False, True)
    assert got.experts == {0: 0b101}
    assert view.rtt_of(other.peer) == 0.02
    assert set(one.roster.view(ANOTHER).records) == {elsewhere.peer}


def test_a_peer_that_moved_is_in_no_view_until_it_answers_there(one: One, roster: Roster, other: Person) -> None:
    roster.merge(other.record(2, addresses=("10.0.0.8:7645",)), "there")
    assert list(roster.view(MODEL).records) == [one.peer]
    assert states(roster)[other.peer] == "new"
    assert list(roster.unanswered()) == [other.peer]
    roster.answered(other.peer, 0.02)
    assert roster.view(MODEL).records[other.peer].address == "10.0.0.8:7645"
    assert one.links._places[other.peer].address == "10.0.0.8:7645"


def test_who_left_is_in_no_view_and_who_died_is_dead_in_it(one: One, roster: Roster, other: Person) -> None:
    roster.believe(other.peer, State.SUSPECT)
    assert (health(roster, other), states(roster)[other.peer]) == (Health.SUSPECT, "suspect")
    roster.believe(other.peer, State.DEAD)
    assert (health(roster, other), states(roster)[other.peer]) == (Health.DEAD, "dead")
    roster.believe(other.peer, State.LEFT)
    assert list(roster.view(MODEL).records) == [one.peer]
    assert states(roster)[other.peer] == "left"


def test_a_view_stays_as_it_was(roster: Roster, other: Person) -> None:
    view = roster.view(MODEL)
    roster.merge(other.record(2, held=()), "there")
    assert other.peer in view.records
    assert other.peer not in roster.view(MODEL).records


def test_a_node_that_offers_nothing_serves_itself_and_calls_others(one: One, roster: Roster, other: Person) -> None:
    roster.offer(False)
    one.clock.now += RECORD_GAP_S
    assert roster.tick() == (True, [])
    assert roster.record_of(one.peer).held == ()
    view = roster.view(MODEL)
    assert view.records[one.peer].layers == range(2)
    assert (view.records[other.peer].layers, view.records[other.peer].experts) == (range(2), {0: 0b101})
    roster.offer(True)
    one.clock.now += RECORD_GAP_S
    assert roster.tick() == (True, [])
    assert roster.record_of(one.peer).held == HOLDS
    assert roster.view(MODEL).records[other.peer].layers == range(2)


def test_a_node_that_offers_nothing_is_no_later_stage_of_its_own_answers(roster: Roster, one: One) -> None:
    later = replace(HOLDS[0], span=range(1, 2), embed=False)
    roster.publish([later])
    assert roster.view(MODEL).records[one.peer].layers == range(1, 2)
    roster.offer(False)
    assert len(roster.view(MODEL).records[one.peer].layers) == 0


# --- states, health and distance -----------------------------------------------------------------------------------


def test_the_status_has_everybody_this_node_first(one: One, roster: Roster, other: Person) -> None:
    new, unknown_state = Person.create(), Person.create()
    learn(one, new, answered=False)
    roster.merge(unknown_state.record(), "there")
    one.clock.now += 1.5
    me, *_ = roster.status()
    assert (me.peer_id, me.state, me.queue, me.layers, me.experts, me.age_s) == (one.peer, "self", 3, 2, 2, 0.0)
    assert me.zone == "z"
    assert states(roster) == {
        one.peer: "self", other.peer: "alive", new.peer: "new", unknown_state.peer: "new",
    }  # fmt: skip
    (seen,) = [status for status in roster.status() if status.peer_id == other.peer]
    assert (seen.age_s, seen.rtt_s, seen.model_id, seen.address) == (1.5, 0.02, MODEL, "10.0.0.7:7645")
    (unheard,) = [status for status in roster.status() if status.peer_id == new.peer]
    assert not unheard.HasField("age_s")
    assert not unheard.HasField("rtt_s")


def test_failed_calls_count_and_an_answer_heals_what_failed_before_it_was_asked(
    one: One, roster: Roster, other: Person
) -> None:
    roster.failed(other.peer, LOST)
    assert health(roster, other) is Health.DEAD
    assert states(roster)[other.peer] == "dead"
    (seen,) = [status for status in roster.status() if status.peer_id == other.peer]
    assert (seen.calls_failed, seen.last_error) == (1, "peer_lost: gone")
    one.clock.now += 0.01
    roster.answered(other.peer, 0.02)  # its ping was sent before the call failed
    assert health(roster, other) is Health.DEAD
    one.clock.now += 0.03
    roster.answered(other.peer, 0.02)
    assert health(roster, other) is Health.ALIVE


def test_a_late_peer_is_suspect_for_a_while_and_a_sign_of_life_heals_no_lateness(
    one: One, roster: Roster, other: Person
) -> None:
    for error in (Overloaded("full"), DeadlineExceeded("late")):
        roster.failed(other.peer, error)
    roster.heard(other.peer)
    assert health(roster, other) is Health.SUSPECT
    one.clock.now += 100
    assert health(roster, other) is Health.ALIVE


def test_what_membership_knows_goes_before_what_calls_say(roster: Roster, other: Person) -> None:
    roster.believe(other.peer, State.DEAD)
    roster.heard(other.peer)
    assert health(roster, other) is Health.DEAD


@pytest.mark.parametrize("before", [State.DEAD, State.LEFT])
def test_a_peer_that_comes_back_begins_with_a_clean_slate(roster: Roster, other: Person, before: State) -> None:
    roster.failed(other.peer, LOST)
    roster.believe(other.peer, before)
    roster.believe(other.peer, State.ALIVE)
    assert health(roster, other) is Health.ALIVE
    roster.failed(other.peer, LOST)
    roster.believe(other.peer, State.SUSPECT)
    roster.believe(other.peer, State.ALIVE)
    assert health(roster, other) is Health.DEAD, "who only was suspected is the same process"


def test_who_is_no_member_any_more_is_in_no_view(one: One, roster: Roster, other: Person) -> None:
    roster.believe(other.peer, None)
    assert list(roster.view(MODEL).records) == [one.peer]
    assert (states(roster)[other.peer], roster.alive()) == ("new", {})


def test_near_peers_are_home_and_zones_decide_about_the_others(one: One) -> None:
    near, zone_mate, far = (Person.create() for _ in range(3))
    learn(one, near, rtt_s=NEAR_S / 2, zone="elsewhere")
    learn(one, zone_mate, rtt_s=0.08, zone="far")
    learn(one, far, rtt_s=0.08, zone="far")
    home, away = one.roster.islands()
    assert {home, away} == {frozenset({one.peer, near.peer}), frozenset({zone_mate.peer, far.peer})}
    islands = {status.peer_id: status.island for status in one.roster.status()}
    assert islands == {one.peer: "home", near.peer: "home", zone_mate.peer: "", far.peer: ""}
    silent = Person.create()
    learn(one, silent, answered=False)
    assert silent.peer not in {peer for island in one.roster.islands() for peer in island}


def test_signs_of_life_and_answers_of_strangers_leave_nothing_behind(one: One, roster: Roster) -> None:
    stranger = Person.create()
    roster.heard(stranger.peer)
    roster.answered(stranger.peer, 0.01)
    roster.heard(one.peer)
    roster.answered(one.peer, 0.01)
    assert set(states(roster)) == {one.peer, *roster.alive()}
    assert (stranger.peer in roster._heard_at, one.peer in roster._heard_at) == (False, False)
    assert roster._distances.least_s(stranger.peer) is None


def test_those_that_did_not_answer_and_hold_something_are_to_be_asked(one: One, other: Person) -> None:
    silent = [Person.create() for _ in range(5)]
    learn(one, *silent, answered=False)
    learn(one, Person.create(), answered=False, held=())
    learn(one, other)
    assert one.roster.unanswered() == {person.peer: person.address for person in silent}
    one.roster.believe(silent[0].peer, State.SUSPECT)
    assert len(one.roster.unanswered()) == 4


def test_who_is_suspected_is_not_dead_yet_and_no_discovery_looks_for_it(one: One, other: Person) -> None:
    learn(one, other)
    for state, is_there in ((State.ALIVE, True), (State.SUSPECT, True), (State.DEAD, False), (State.LEFT, False)):
        one.roster.believe(other.peer, state)
        assert (other.peer in one.roster.not_dead()) is is_there
        assert (other.peer in one.roster.alive()) is (state is State.ALIVE)


# --- load ----------------------------------------------------------------------------------------------------------


def load(of: Person, queue: int, at: float = NOW) -> bytes:
    report = LoadReport(NETWORK, of.identity.public_key, int(at * 1000), queue=queue, kv_bytes_free=5, tokens_per_s=2.0)
    return sign_load(report, of.identity)


def test_a_load_is_what_its_peer_signed_and_holds_for_seconds(one: One, roster: Roster, other: Person) -> None:
    roster.merge_load(load(other, 9))
    assert roster.view(MODEL).loads == {one.peer: Load(3), other.peer: Load(9, 5, 2.0)}
    roster.merge_load(load(other, 1, NOW - 1))
    forged = sign_load(LoadReport(NETWORK, other.identity.public_key, int(NOW * 1000) + 1, queue=1), Identity.create())
    roster.merge_load(forged)
    assert roster.view(MODEL).loads[other.peer].queue == 9
    one.clock.now += LOAD_S_MAX
    assert set(roster.view(MODEL).loads) == {one.peer}


def test_the_load_of_an_unknown_peer_is_not_kept(roster: Roster, one: One) -> None:
    stranger = Person.create()
    roster.merge_load(load(stranger, 9))
    learn(one, stranger)
    assert stranger.peer not in roster.view(MODEL).loads


def test_this_nodes_report_is_signed_and_made_anew_now_and_then(one: One, clock: Clock) -> None:
    reader = One(clock)
    reader.roster.merge(one.roster.signed_of(one.peer), "there")
    first = one.roster.load_report()
    one.load = Load(queue=8)
    assert one.roster.load_report() == first
    clock.now += LOAD_S
    assert one.roster.load_report() != first
    reader.roster.merge_load(one.roster.load_report())
    (status,) = [status for status in reader.roster.status() if status.peer_id == one.peer]
    assert status.queue == 8


# --- records -------------------------------------------------------------------------------------------------------


def test_the_own_record_is_renewed_at_half_its_life_and_others_expire_with_all_that_is_known_of_them(
    one: One, roster: Roster, other: Person
) -> None:
    roster.merge_load(load(other, 9))
    roster.failed(other.peer, LOST)
    first = roster.record_of(one.peer)
    one.clock.now += RECORD_S / 2 - 1
    assert roster.tick() == (False, [])
    assert roster.record_of(one.peer) == first
    one.clock.now += 1
    assert roster.tick() == (True, [])
    renewed = roster.record_of(one.peer)
    assert renewed.sequence > first.sequence
    assert (renewed.held, roster.sequence) == (first.held, renewed.sequence)
    assert one.links._places[other.peer]
    one.clock.now += RECORD_S / 2
    assert roster.tick() == (True, [other.peer])
    assert roster.tick() == (False, [other.peer]), "until membership has forgotten it"
    roster.believe(other.peer, None)
    assert roster.tick() == (False, [])
    assert set(states(roster)) == {one.peer}
    with pytest.raises(PeerLost, match="no address"):
        one.links.to(other.peer)
    assert one.health.score(other.peer).calls_failed == 0
    assert roster._distances.least_s(other.peer) is None
    assert roster._loads.get(other.peer, NOW) is None
    assert other.peer not in roster._heard_at
    assert other.peer not in roster._answered


@pytest.mark.parametrize("jump_s", [-100.0, 100.0])
def test_a_load_ages_by_no_wall_clock_that_is_set(one: One, other: Person, jump_s: float) -> None:
    learn(one, other)
    walls = [NOW]
    one.roster._wall = lambda: walls[-1]
    one.roster.merge_load(load(other, 9))
    walls.append(NOW + jump_s)
    one.clock.now += LOAD_S_MAX - 0.1
    assert one.roster.view(MODEL).loads[other.peer].queue == 9
    one.clock.now += 0.1
    assert other.peer not in one.roster.view(MODEL).loads


def test_a_newcomer_that_gave_way_to_another_is_forgotten_too(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Person.create(), Person.create()
    monkeypatch.setattr(one.roster._table, "_newcomers_max", 1)
    learn(one, first, answered=False)
    one.roster.merge(second.record(), "another host")
    assert one.roster.record_of(first.peer) is None
    assert first.peer not in one.links._places, "at once: it may be no member yet, of which time would tell"
    assert one.roster.tick() == (False, [first.peer])
    assert first.peer not in one.roster.alive()


def test_who_never_answered_is_alive_by_hearsay_and_answers_nothing(one: One, other: Person, clock: Clock) -> None:
    learn(one, other, answered=False)
    one.roster.believe(other.peer, State.ALIVE)
    assert one.roster.alive() == {other.peer: other.address}
    assert one.roster.answering() == {}
    one.roster.answered(other.peer)
    assert one.roster.answering() == {other.peer: other.address}
    one.roster.believe(other.peer, State.DEAD)
    assert one.roster.answering() == {}


def test_a_flood_of_identities_leaves_nothing_behind(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from all addresses of one IPv6 network, which is one sender."""
    monkeypatch.setattr(one.roster._table, "_newcomers_max", 4)
    monkeypatch.setattr(one.roster._table, "_records_max", 5)
    for n in range(60):
        with contextlib.suppress(Overloaded):
            one.roster.merge(Person.create().record(), f"2001:db8::{n:x}" if n % 2 else f"10.0.0.{n}")
    assert len(one.links._places) <= 4
    assert set(one.links._places) | {one.peer} == set(one.roster._table.records())


def test_who_asks_from_many_addresses_of_one_network_is_one_sender(one: One) -> None:
    for n in range(3):
        one.roster.merge(Person.create().record(), f"2001:db8::{n}")
    assert list(one.roster._table._newcomers._of_sender) == ["2001:db8::/64"]


def test_a_new_holding_is_published_in_a_newer_record(one: One, roster: Roster) -> None:
    roster.publish([Held(ANOTHER, text=True)])
    assert roster.tick() == (False, []), "not within the gap"
    assert list(roster.view(ANOTHER).records) == [one.peer], "but this node knows at once"
    one.clock.now += RECORD_GAP_S
    assert roster.tick() == (True, [])
    assert roster.record_of(one.peer).held == (Held(ANOTHER, text=True),)
    assert one.peer not in roster.view(MODEL).records


def test_more_is_held_than_a_record_takes(one: One, roster: Roster, capsys: pytest.CaptureFixture[str]) -> None:
    before = roster.record_of(one.peer)
    masks = {layer: int.from_bytes(Random(layer).randbytes(512), "little") for layer in range(20)}
    roster.publish([Held(MODEL, experts=masks)])
    one.clock.now += RECORD_GAP_S
    assert roster.tick() == (False, [])
    assert roster.record_of(one.peer) == before
    said = capsys.readouterr()
    assert "others refuse what this node says of itself" in said.out + said.err
    with pytest.raises(RecordTooLarge):
        One(one.clock, held=[Held(MODEL, experts=masks)])


def test_the_same_record_again_and_an_older_one_are_no_news(roster: Roster, other: Person) -> None:
    assert roster.merge(other.record(3), "there")
    assert not roster.merge(other.record(3), "there")
    assert not roster.merge(other.record(2), "there")


def test_a_node_whose_clock_went_back_overtakes_its_own_last_record(one: One, roster: Roster, clock: Clock) -> None:
    last = roster.signed_of(one.peer)
    before = Clock()
    before.now = NOW - 100
    again = One(before, identity=one.identity)
    assert again.roster.sequence < roster.sequence
    assert again.roster.merge(last, "there")
    before.now += RECORD_GAP_S
    assert again.roster.tick() == (True, [])
    assert again.roster.sequence > roster.sequence
    reader = One(clock)
    for data in (last, again.roster.signed_of(one.peer)):
        assert reader.roster.merge(data, "there")
    assert reader.roster.record_of(one.peer).sequence == again.roster.sequence


def test_sequences_of_others_and_its_own_outlive_a_restart(
    one: One, roster: Roster, other: Person, clock: Clock
) -> None:
    roster.merge(other.record(8), "there")
    marks = roster.marks()
    assert set(marks) == {one.peer, other.peer}
    earlier = Clock()
    earlier.now = NOW - 50
    again = One(earlier, identity=one.identity, marks=marks)
    assert again.roster.sequence == roster.sequence + 1
    assert again.roster.record_of(other.peer) is None
    with pytest.raises(Exception, match="has signed 8 since"):
        again.roster.merge(other.record(7), "there")


def test_a_peer_that_was_never_reached_leaves_no_mark(one: One) -> None:
    person = Person.create()
    learn(one, person, answered=False)
    assert person.peer not in one.roster.marks()
    one.roster.answered(person.peer)
    assert person.peer in one.roster.marks()


# --- who may call --------------------------------------------------------------------------------------------------


def test_what_nodes_ask_of_each_other_needs_a_record(one: One, roster: Roster, other: Person) -> None:
    stranger = Caller(Identity.create().peer, b"")
    for method in ("Stage/Open", "Door/Deliver", "Expert/Compute", "Peers/DialBack"):
        roster.permit(Caller(other.peer, b""), f"/shoal.v1.{method}")
        roster.permit(Caller(one.peer, b""), f"/shoal.v1.{method}")
        with pytest.raises(PermissionDenied):
            roster.permit(stranger, f"/shoal.v1.{method}")
    for method in ("Inference/Generate", "Peers/Sync", "Peers/Record"):
        roster.permit(stranger, f"/shoal.v1.{method}")


# --- permissioned networks -----------------------------------------------------------------------------------------


class Operated:
    def __init__(self) -> None:
        self.operator = Identity.create()
        self.network: Network = permissioned(self.operator.public_key)

    def grant(self, peer: PeerId, hours: float = 2.0) -> bytes:
        now_ms = int(NOW * 1000)
        return grants.sign(Grant(peer, now_ms, now_ms + int(hours * 3_600_000)), self.operator)

    def member(self) -> Person:
        return Person(Identity.create(), network=self.network)

    def one(self, clock: Clock, hours: float = 2.0) -> One:
        identity = Identity.create()
        return One(clock, identity=identity, network=self.network, grant=self.grant(identity.peer, hours))

    def revoked(self, *peers: PeerId) -> bytes:
        return revocations.sign(Revocations(1, int(NOW * 1000), dict.fromkeys(peers, int(NOW * 1000))), self.operator)


@pytest.fixture
def net() -> Operated:
    return Operated()


def test_a_revocation_puts_a_peer_out_at_once_with_all_that_is_known_of_it(net: Operated, clock: Clock) -> None:
    one, out, stays = net.one(clock), net.member(), net.member()
    for person in (out, stays):
        learn(one, person, grant=net.grant(person.peer))
    forgotten: list[PeerId] = []
    one.roster.on_forgotten = forgotten.append
    with structlog.testing.capture_logs() as said:
        assert one.roster.merge_revocations(net.revoked(out.peer)) == [out.peer]
    assert [(line["event"], line["peer"]) for line in said] == [
        ("a peer is put out: the operator took its grant back", out.peer)
    ]
    assert forgotten == [out.peer]
    assert set(one.roster.view(MODEL).records) == {one.peer, stays.peer}
    assert one.roster.tick() == (False, [out.peer])
    with pytest.raises(PermissionDenied):
        one.roster.permit(Caller(out.peer, b""), "/shoal.v1.Stage/Open")
    with pytest.raises(GrantRevoked):
        one.roster.merge(out.record(2, grant=net.grant(out.peer)), "there")
    assert one.roster.merge_revocations(net.revoked(out.peer)) == []
    assert one.roster.revocations == net.revoked(out.peer)


def test_a_node_without_a_grant_does_not_begin(net: Operated, clock: Clock) -> None:
    with pytest.raises(GrantMissing):
        One(clock, network=net.network)
    identity = Identity.create()
    late = Clock()
    late.now = NOW + 3 * 3600
    with pytest.raises(GrantExpired):
        One(late, identity=identity, network=net.network, grant=net.grant(identity.peer))


@pytest.mark.parametrize("how", ["revoked", "ended"])
def test_a_node_whose_grant_ends_says_so_once_and_goes_on_for_itself(
    net: Operated, clock: Clock, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = net.one(clock)
    if how == "revoked":
        assert one.roster.refused == ""
        assert one.roster.merge_revocations(net.revoked(one.peer)) == [one.peer]
        assert one.roster.refused == "the operator took this node's grant back"
    for _ in range(5):
        clock.now += 3600
        one.roster.tick()
    assert one.roster.record_of(one.peer) is None
    assert list(one.roster.view(MODEL).records) == [one.peer]
    assert [status.state for status in one.roster.status()] == ["self"]
    said = "".join(capsys.readouterr())
    assert said.count("others refuse") == (2 if how == "revoked" else 1)
    assert "ask the network's operator" in said


def test_no_record_outlives_the_grant(net: Operated, clock: Clock) -> None:
    one = net.one(clock, hours=0.5)
    own = one.roster.record_of(one.peer)
    assert own.expires_at_ms == int(NOW * 1000) + 1_800_000
    assert record.read(one.roster.signed_of(one.peer), int(NOW * 1000), net.network) == own
