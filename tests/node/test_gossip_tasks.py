"""The driver of membership in virtual time: what its tasks do by themselves."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import trio
import trio.testing
from toy_gossip import HOLDS, NOW, Clock, One, Person, Virtual, eventually, of, run

from node import grant as grants
from node import revocations
from node.bridge import Inbox
from node.claim import id_of
from node.grant import Grant
from node.identity import Identity
from node.member import State
from node.membership_event import Tick
from node.message import Gossip as News
from node.message import Ping
from node.network import permissioned
from node.profile import LAN
from node.revocations import Revocations

if TYPE_CHECKING:
    from protos.ids import PeerId


def test_a_peer_that_never_answers_is_dead_and_one_whose_record_expires_is_forgotten() -> None:
    async def main() -> None:
        one = One(Virtual(), profile=LAN)
        silent, brief = Person.create("10.0.0.1:1"), Person.create("10.0.0.2:2")
        one.roster.merge(brief.record(expires_at_ms=int(NOW * 1000) + 9_000), "there")
        one.knows(silent)
        one.gossip.synced(brief.peer, (brief.claim(),), ())
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.sleep(8.0)
            assert one.state(brief.peer) is not None
            await trio.sleep(2.0)
            assert one.state(brief.peer) is None
            assert one.roster.record_of(brief.peer) is None
            await trio.sleep(50.0)
            assert one.state(silent.peer) is State.DEAD
            assert {status.peer_id: status.state for status in one.roster.status()}[silent.peer] == "dead"
            nursery.cancel_scope.cancel()

    run(main)


def test_a_deadline_that_a_thread_brings_forward_while_it_is_read_is_not_slept_through(one: One) -> None:
    here = threading.get_ident()

    class Core:
        """Its deadline is far away when the task first reads it; just then a thread brings it forward."""

        claim, peer = one.gossip._core.claim, one.gossip._core.peer
        at = 100.0
        reads = 0

        @property
        def deadline(self) -> float:
            at = NOW + self.at
            if threading.get_ident() == here:
                Core.reads += 1
            if self.reads == 1 and self.at == 100.0:
                thread = threading.Thread(target=one.gossip.handle, args=(Tick(),))
                thread.start()
                thread.join(0.2)  # it is done by then, or waits until the task has let go
            return at

        def handle(self, event: object, now: float) -> list[object]:
            Core.at = 50.0
            return []

    async def main() -> None:
        one.gossip._core = Core()
        one.gossip._sleeps_until = NOW  # of the last sleep
        one.gossip._wake = Inbox(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.gossip._tick, one.gossip._wake)
            await eventually(lambda: Core.reads >= 2)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_new_record_is_told_with_its_sequence() -> None:
    async def main() -> None:
        one = One(Virtual())
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            one.roster.publish(HOLDS[:0])
            await trio.sleep(12.0)
            nursery.cancel_scope.cancel()
        assert one.roster.sequence > int(NOW * 1000)
        assert one.gossip.own_claim().sequence == one.roster.sequence

    run(main)


def test_a_node_that_leaves_tells_others_and_one_that_knows_nobody_just_goes() -> None:
    async def main() -> None:
        one = One(Virtual(), profile=LAN)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            began = trio.current_time()
            await one.gossip.leave()
            assert trio.current_time() == began
            nursery.cancel_scope.cancel()
        one = One(Virtual(), profile=LAN)
        one.knows(*(Person.create(f"10.0.0.{n}:1") for n in range(1, 5)))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            one.sent()
            await one.gossip.leave()
            nursery.cancel_scope.cancel()
        farewells = [message for _, message in of(one.sent(), News) if one.gossip.own_claim() in message.gossip]
        assert len(farewells) >= 3
        assert one.gossip.own_claim().left

    run(main)


def test_a_list_of_revocations_that_is_new_goes_to_a_few_at_once() -> None:
    async def main() -> None:
        operator, own = Identity.create(), Identity.create()
        network = permissioned(operator.public_key)
        now_ms = int(NOW * 1000)

        def granted(peer: PeerId) -> bytes:
            return grants.sign(Grant(peer, now_ms, now_ms + 3_600_000), operator)

        one = One(Virtual(), identity=own, network=network, grant=granted(own.peer))
        crowd = [Person.create(network=network) for _ in range(8)]
        for person in crowd:
            one.roster.merge(person.record(grant=granted(person.peer)), "there")
        one.gossip.synced(crowd[0].peer, tuple(person.claim() for person in crowd), ())
        asked = []
        one.gossip._sync_with = lambda peer: asked.append(id_of(peer))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.sleep(0.2)
            asked.clear()
            at_ms = {crowd[0].peer: now_ms}
            one.roster.merge_revocations(revocations.sign(Revocations(1, now_ms, at_ms), operator))
            await eventually(lambda: len(asked) >= 3)
            assert crowd[0].peer not in asked
            assert one.state(crowd[0].peer) is None, "and who is put out is no member"
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_node_that_cannot_be_called_asks_by_push_pulls_since_no_answer_reaches_it() -> None:
    async def main() -> None:
        one = One(Virtual())
        person = Person.create()
        one.knows(person)
        one.gossip.set_deaf(True)
        asked = []
        one.gossip._sync_with = lambda peer: asked.append(id_of(peer))
        one.sent()
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await eventually(lambda: person.peer in asked)
            nursery.cancel_scope.cancel()
        assert not of(one.sent(), Ping)

    trio.run(main)


def test_events_of_other_threads_wake_the_task_that_ticks() -> None:
    """A node that knows nobody has nothing to do for long: what a thread brings must not wait as long."""

    class Running(Clock):
        def __call__(self) -> float:
            return NOW + time.monotonic() - self.now

        def __init__(self) -> None:
            self.now = time.monotonic()

    async def main() -> None:
        one = One(Running(), profile=replace(LAN, probe_period_s=1000.0, probe_timeout_s=500.0))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(one.knows, Person.create("10.0.0.1:1"))
            await eventually(lambda: any(isinstance(message, News) for _, message in one.sent()))
            nursery.cancel_scope.cancel()

    trio.run(main)
