"""The failure detector: whom this node probes, and what the probes come to; its probes for others.

Pure; randomness is an argument.  Law: it says who did not answer and believes nothing of anybody: what a failed probe
means is for `membership` to say.  (The name is of SWIM's paper, section 3.1.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from node.membership_effect import Answered, Refusal
from node.message import GOSSIP_ROOM_BYTES, TARGET_BYTES, Ack, Nack, Ping, PingRequest
from node.probe import Probe
from node.relays import Relay, Relays

if TYPE_CHECKING:
    import random

    from node.claim import PeerHash
    from node.dissemination import Dissemination
    from node.local_health import LocalHealth
    from node.member_table import MemberTable
    from node.outbox import Outbox
    from node.profile import Profile


class FailureDetector:
    """One probe in each period.  `deaf`: no answer reaches this node, so it probes nobody."""

    __slots__ = (
        "_began_at", "_doubted", "_gossip", "_greetings", "_health", "_next_at", "_outbox", "_probe", "_profile",
        "_random", "_relays", "_table", "deaf",
    )  # fmt: skip

    def __init__(
        self,
        table: MemberTable,
        health: LocalHealth,
        gossip: Dissemination,
        outbox: Outbox,
        random: random.Random,
        profile: Profile,
        now: float,
    ) -> None:
        self._table = table
        self._health = health
        self._gossip = gossip
        self._outbox = outbox
        self._random = random
        self._profile = profile
        self._probe: Probe | None = None
        self._began_at = -math.inf  # the period
        self._next_at = now + random.random() * profile.probe_period_s
        self._doubted: dict[PeerHash, None] = {}  # to be probed ahead of their turn, the first first
        self._greetings: dict[int, tuple[PeerHash, float]] = {}  # by nonce, the oldest first: to whom, and when
        self._relays = Relays(profile)
        self.deaf = False

    @property
    def deadline(self) -> float:
        due = min(self._next_at, self._relays.deadline)
        return due if self._probe is None else min(due, self._probe.deadline)

    # --- this node's own probes ---

    def step(self, now: float) -> PeerHash | None:
        """The probe that is under way: helpers are asked; at its end, whose silence it was, if that is still active."""
        probe = self._probe
        if probe is not None and not probe.asked and now >= probe.helpers_at:
            self._ask_helpers(probe)
        if probe is None or now < probe.ends_at:
            return None
        self._probe = None
        if not self._is_active(probe.target):
            return None
        self._score_failure(probe)
        return probe.target

    def begin_if_due(self, now: float) -> None:
        """The next one begins when the period is over."""
        if self._probe is not None or now < self._next_at:
            return
        stretch = self._health.stretch
        self._began_at = now
        self._next_at = now + self._profile.probe_period_s * stretch
        target = None if self.deaf else self._next_target()
        if target is None:
            return
        nonce = self._random.getrandbits(64)
        helpers_at = now + self._profile.probe_timeout_s * stretch
        self._probe = Probe(target, nonce, now, helpers_at, self._next_at)
        self._ping(target, nonce)

    def abandon(self) -> None:
        """The probe under way comes to nothing."""
        self._probe = None

    def stop_hearing(self) -> None:
        """From now on no answer comes, and whom to doubt is not asked."""
        self.deaf = True
        self._probe = None
        self._doubted.clear()

    def postpone(self, late_s: float) -> None:
        """This process stood still for so long."""
        self._next_at += late_s
        if self._probe is not None:
            self._probe.postpone(late_s)

    def doubt(self, peer: PeerHash, now: float) -> None:
        """However many calls fail, no more than two probes go out in a period."""
        if self.deaf or not self._is_active(peer) or len(self._doubted) >= self._profile.doubted_max:
            return
        if self._probe is not None and self._probe.target == peer:
            return
        self._doubted[peer] = None
        if self._probe is None:
            earliest = self._began_at + self._profile.probe_period_s / 2
            self._next_at = min(self._next_at, max(now, earliest))

    def greet(self, peer: PeerHash, now: float) -> None:
        if self._table.get(peer) is None:
            return
        if len(self._greetings) >= self._profile.greetings_max:
            del self._greetings[next(iter(self._greetings))]
        nonce = self._random.getrandbits(64)
        self._greetings[nonce] = (peer, now)
        self._ping(peer, nonce)

    def ping_dead(self) -> None:
        """Its answer, if it lives, carries a refutation; nobody waits for it."""
        peer = self._table.random_dead()
        if peer is not None:
            self._ping(peer, self._random.getrandbits(64))

    # --- answers ---

    def take_ack(self, sender: PeerHash, nonce: int, now: float) -> None:
        """Of this node's probe (from the target or a helper), or of one for another node (from the target)."""
        probe = self._probe
        if probe is not None and nonce == probe.nonce:
            if sender == probe.target and probe.sent_at is not None:
                self._outbox.add(Answered(sender, now - probe.sent_at))
            if sender == probe.target or sender in probe.helpers:
                self._probe = None
                self._health.change(-1)
            return
        greeted, sent_at = self._greetings.get(nonce, (None, 0.0))
        if greeted is not None:
            if sender == greeted:
                del self._greetings[nonce]
                self._outbox.add(Answered(sender, now - sent_at))
            return
        relay = self._relays.take_answer(sender, nonce)
        if relay is not None:
            self.ack(relay.asker, relay.nonce)

    def take_nack(self, sender: PeerHash, nonce: int) -> None:
        probe = self._probe
        if probe is not None and nonce == probe.nonce and sender in probe.helpers and sender not in probe.nacked:
            probe.nacked.append(sender)

    def ack(self, asker: PeerHash, nonce: int, *, own: bool = False) -> None:
        """`own`: with this node's claim."""
        self._outbox.send(Ack(nonce, self._gossip.gossip_for(asker, own=own)), asker)

    # --- probes for others ---

    def relay(self, asker: PeerHash, request: PingRequest, now: float) -> None:
        if self._table.get(request.target) is None:
            return
        if self._relays.full:
            self._outbox.refuse(asker, Refusal.BUSY)
            return
        nonce = self._random.getrandbits(64)
        nack_at = now + self._profile.nack_share * self._profile.probe_timeout_s
        self._relays.add(nonce, Relay(asker, request.nonce, request.target, nack_at))
        self._ping(request.target, nonce)

    def send_nacks(self, now: float) -> None:
        for relay in self._relays.take_overdue(now):
            if self._profile.nacks:
                self._outbox.send(Nack(relay.nonce, self._gossip.gossip_for(relay.asker)), relay.asker)
        self._relays.drop_late(now)

    # --- steps of a probe ---

    def _next_target(self) -> PeerHash | None:
        while self._doubted:
            peer = next(iter(self._doubted))
            del self._doubted[peer]
            if self._is_active(peer):
                return peer
        return self._table.next_to_probe()

    def _ask_helpers(self, probe: Probe) -> None:
        probe.asked = True
        probe.helpers = self._table.pick(self._profile.helpers, probe.target)
        for helper in probe.helpers:
            gossip = self._gossip.gossip_for(helper, room_bytes=GOSSIP_ROOM_BYTES - TARGET_BYTES)
            self._outbox.send(PingRequest(probe.nonce, probe.target, gossip), helper)

    def _score_failure(self, probe: Probe) -> None:
        """As memberlist does: helpers that were silent speak against this node, nacks for it."""
        if self._profile.nacks and probe.helpers:
            self._health.change(len(probe.helpers) - len(probe.nacked))
        else:
            self._health.change(1)

    def _ping(self, peer: PeerHash, nonce: int) -> None:
        self._outbox.send(Ping(nonce, self._gossip.gossip_for(peer)), peer)

    def _is_active(self, peer: PeerHash) -> bool:
        held = self._table.get(peer)
        return held is not None and held.active
