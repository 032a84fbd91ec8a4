"""The driver of membership, without a network: who is pinged out of turn, and what an answer says."""

from __future__ import annotations

import threading
import time

import pytest
import trio
from toy_gossip import QUIET, WAIT_S, Clock, One, Person, Virtual, of, read, run, tick_until

from node.gossip import GREETINGS_AT_ONCE_MAX, TOLD_MAX
from node.identity import Identity
from node.member import State
from node.membership_event import Tick
from node.message import Ack, Ping
from protos.errors import DeadlineExceeded, Overloaded, PeerLost, Unavailable


@pytest.mark.parametrize("error", [PeerLost("gone"), DeadlineExceeded("late")])
def test_a_member_that_calls_doubt_is_probed_out_of_turn(
    known: One, people: list[Person], error: Exception, clock: Clock
) -> None:
    clock.now += 0.5
    known.gossip.failed(people[3].peer, error)
    clock.now = max(clock.now, known.gossip._core.deadline)
    known.gossip.handle(Tick())
    assert [address for address, _ in of(known.sent(), Ping)] == [people[3].address]
    assert known.state(people[3].peer) is State.ALIVE, "and nothing else follows"


def test_a_busy_one_is_not_doubted(known: One, people: list[Person]) -> None:
    deadline = known.gossip._core.deadline
    known.gossip.failed(people[3].peer, Overloaded("full"))
    assert (known.gossip._core.deadline, known.sent()) == (deadline, [])
    assert known.health.score(people[3].peer).calls_failed == 1
    known.gossip.failed(Identity.create().peer, PeerLost("a stranger"))


def test_newcomers_are_greeted_a_few_at_once_and_the_others_round_by_round(one: One, clock: Clock) -> None:
    crowd = [Person.create(f"10.1.0.{n}:7645") for n in range(2 * GREETINGS_AT_ONCE_MAX + 3)]
    one.knows(*crowd)
    assert len(of(one.sent(), Ping)) == GREETINGS_AT_ONCE_MAX
    assert not one.gossip._greet
    assert len(one.roster.unanswered()) == len(crowd)


def test_who_joins_a_crowd_fills_no_log_and_hears_of_every_death(
    known: One, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    known.knows(Person.create())
    assert told(capsys, "a peer is alive") == 1
    known.knows(*(Person.create() for _ in range(TOLD_MAX)))
    assert told(capsys, "a peer is alive") == 0
    tick_until(known, known.clock.now + 600.0)
    assert told(capsys, "a peer is dead") > 0


def told(capsys: pytest.CaptureFixture[str], what: str) -> int:
    """How many lines of the log that a person sees say so."""
    return sum("[info" in line and what in line for line in "".join(capsys.readouterr()).splitlines())


def test_whether_a_peer_answers_is_what_its_ack_says(one: One, people: list[Person]) -> None:
    one.knows(people[0])
    one.sent()
    assert not one.gossip.answers(people[0].peer, 0.02)
    assert len(of(one.sent(), Ping)) == 2, "one may be lost"
    assert not one.gossip._pings

    class Answering:
        def send(self, address: str, data: bytes) -> bool:
            message = read(data)
            answer = people[0].datagram(one.peer, Ack(message.nonce))
            threading.Thread(target=one.gossip._read, args=(answer, "10.0.0.1", 7645)).start()
            return True

    one.gossip._udp = Answering()
    assert one.gossip.answers(people[0].peer, WAIT_S)


def test_of_two_who_wait_for_one_peers_answer_the_first_to_give_up_takes_nothing_from_the_other(
    one: One, people: list[Person]
) -> None:
    one.knows(people[0])
    waits = threading.Thread(target=lambda: said.append(one.gossip.answers(people[0].peer, WAIT_S)))
    said: list[bool] = []
    waits.start()
    while not one.gossip._pings:
        time.sleep(0.001)  # until the other waits
    assert not one.gossip.answers(people[0].peer, 0.02)
    for _, ping in of(one.sent(), Ping):
        one.gossip._read(people[0].datagram(one.peer, Ack(ping.nonce)), "10.0.0.1", 7645)
    waits.join(WAIT_S / 4)
    assert said == [True]
    assert not one.gossip._pings


def test_whether_a_stranger_answers_nobody_can_say_as_nobody_pings_it(one: One) -> None:
    with pytest.raises(Unavailable, match="no member"):
        one.gossip.answers(Identity.create().peer, 0.02)
    assert not one.gossip._pings


def test_who_holds_something_and_has_not_answered_is_greeted_round_by_round() -> None:
    async def main() -> None:
        one = One(Virtual(), profile=QUIET)
        crowd = [Person.create(f"10.1.0.{n}:7645") for n in range(2 * GREETINGS_AT_ONCE_MAX)]
        one.knows(*crowd)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.sleep(8.0)
            nursery.cancel_scope.cancel()
        greeted = {address for address, _ in of(one.sent(), Ping)}
        assert greeted == {person.address for person in crowd}

    run(main)
