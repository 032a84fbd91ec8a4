"""Who is alive: SWIM with Lifeguard.  PROTOCOL.md, section 15.

Pure: equal events, times and randomness give equal effects; no clock, no socket, no address.
Beside it: who is probed (`failure_detector`), what rides on messages (`dissemination`), what is held against members
(`suspicions`), when push-pulls begin (`sync_schedule`).

Laws
- A claim counts by its subject's signature alone, and only its subject raises its incarnation.
- Nobody's "dead" is believed, or said.  A death is this node's own conclusion from a suspicion that nobody refuted in
  time.
- A suspicion counts only for the incarnation that this node holds a claim of, and only from an accuser that it believes
  alive; a refutation is a claim with a higher incarnation.
- What replays or comes twice changes nothing: a message that was handled before can cause an answer, never a change.
- A member is somebody whose claim a push-pull brought (`Synced`), so that its record was admitted; gossip about anybody
  else only asks for a push-pull.
- Everything that others can make grow has a limit in the profile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from node.census import EMPTY, Census
from node.claim import Claim, Item, PeerHash, Sign, Suspicion, Verify, peer_hash
from node.dissemination import Dissemination
from node.failure_detector import FailureDetector
from node.local_health import LocalHealth
from node.member import Member, State
from node.member_table import MemberTable
from node.membership_effect import Changed, Effect, Forgotten, Refusal, Sync
from node.membership_event import Deaf, Doubt, Event, Forget, Greet, Leave, Received, RecordIssued, Synced, Tick
from node.message import Ack, Message, Nack, Ping, PingRequest
from node.outbox import Outbox
from node.profile import LAN, Profile
from node.rates import Rates
from node.suspicions import Suspicions
from node.sync_schedule import SyncSchedule
from node.verified import Verified
from node.voice import Voice
from protos.limits import INCARNATION_MAX

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


class Membership:
    """The table of one node.  The node itself is no member of its own table.

    A row's life: unknown -> ALIVE by `Synced`; ALIVE -> SUSPECT by a failed probe or an accuser; SUSPECT -> DEAD when
    the timer runs out; SUSPECT, DEAD and LEFT -> ALIVE by a claim with a higher incarnation; any state -> LEFT by the
    peer's own word; DEAD and LEFT -> unknown after `tombstone_s`.
    """

    __slots__ = (
        "_accusations", "_dead_probe_at", "_deadline", "_detector", "_gossip", "_handled_at", "_health", "_lied",
        "_outbox", "_profile", "_random", "_renewals", "_suspicions", "_syncs", "_table", "_verified", "_voice",
    )  # fmt: skip

    def __init__(
        self,
        public_key: bytes,
        network: bytes,
        *,
        incarnation: int,
        sequence: int,
        sign: Sign,
        verify: Verify,
        random: random.Random,
        now: float,
        profile: Profile = LAN,
        census: Census = EMPTY,
    ) -> None:
        """`incarnation`: the wall clock in ms at the process's start, so that a restart outranks its past.  `now`: any
        clock that never goes back, in seconds.  `census`: members from the start, alive; it may hold this node's own
        claim, which is then taken for its own if incarnation and sequence agree."""
        own = peer_hash(public_key)
        held = census.get(own)
        known = None if held is None else held.claim
        self._random = random
        self._profile = profile
        self._voice = Voice(public_key, network, sign, incarnation, sequence, known)
        self._table = MemberTable(own, census, random)
        self._suspicions = Suspicions(own, profile)
        self._accusations: Rates[tuple[PeerHash, PeerHash]] = Rates(  # by accuser and accused
            profile.accusations_max / profile.accuser_gap_s, profile.accusations_max, profile.accusations_counted_max
        )
        self._renewals: Rates[PeerHash] = Rates(1 / profile.record_gap_s, 2, profile.renewals_counted_max)
        self._verified = Verified(verify, network, profile.verified_max)
        self._lied = False  # who told of this event passed a forgery on
        self._outbox = Outbox()
        self._health = LocalHealth(profile)
        self._gossip = Dissemination(self._table, self._suspicions, self._voice, self._outbox, random, profile)
        self._detector = FailureDetector(self._table, self._health, self._gossip, self._outbox, random, profile, now)
        self._dead_probe_at = now + (0.5 + random.random()) * (profile.dead_probe_period_s or math.inf)
        self._syncs = SyncSchedule(self._table, random, profile, now)
        if self._voice.claim is not known:
            self._tell(self._voice.claim, now)
        self._deadline = self._next_deadline()
        self._handled_at = now  # an overdue timer is late only from then on: until then this node was awake

    # --- what others read ---

    @property
    def deadline(self) -> float | None:
        """When `handle(Tick(), now)` is due next.  None: never, all has been said."""
        return None if self._deadline == math.inf else self._deadline

    @property
    def peer(self) -> PeerHash:
        """This node."""
        return self._voice.peer

    @property
    def claim(self) -> Claim:
        """This node's own, in force."""
        return self._voice.claim

    @property
    def health(self) -> int:
        """Lifeguard's local health score: 0 is well; period and timeout are stretched 1 + health times."""
        return self._health.score

    def __len__(self) -> int:
        """Members that are alive or suspect, and this node."""
        return self._table.active + 1

    def member(self, peer: PeerHash) -> Member | None:
        """None: a stranger, or this node itself."""
        return self._table.get(peer)

    def members(self) -> Iterator[Member]:
        """All, tombstones too, in no order that means something."""
        return self._table.rows()

    def differences(self) -> Iterator[tuple[PeerHash, Member | None]]:
        """Where this table is not its census: the cheap way to compare ten thousand of them.  None: forgotten."""
        return self._table.differences()

    def suspicions(self) -> Iterator[Suspicion]:
        """What a push-pull takes along: those in force, and one for each of the dead.

        So a newcomer who gets the claims of the dead comes to the same conclusion, and one who lives hears of it.
        """
        return iter(self._suspicions)

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        """State changes here and nowhere else.  Effects are in order of execution.

        - `Tick`: news is told; suspicions that ran out become deaths; the probe goes its next step; helpers' nacks,
          push-pulls and notices to the dead that are due go out; old tombstones are forgotten.
        - `Received`: refused from a stranger, who is asked for a push-pull.  Otherwise its first `items_max` items are
          taken, then the message is answered.  A sender that is thought dead or left, or that holds something old
          about this node, is told.
        - `Synced`: claims, whose peers become members, then suspicions.
        - `RecordIssued`, `Leave`: a new claim of this node is told.
        - `Forget`: the row goes, and `Forgotten` says so.
        - `Doubt`: the next probe is this member's, and comes at once if none is under way.
        - `Greet`: the member is pinged.
        - `Deaf`: what was concluded from silence so far is void.  Who hears again says so with a new claim.

        A claim is checked in this order: about whom; newer than the one held; room; signature.  A suspicion: about
        whom; its incarnation; the subject's state; its accuser is alive; new to this timer; signature; its accuser has
        not accused it too often of late.  What fails a check changes nothing, and only a signature that does not fit is
        held against its sender (`Refused`): the rest of what it tells in this event is not looked at.  Nobody honest
        passes on what he has not verified, and thousands of forgeries must not cost as many verifications.
        """
        effects = self._outbox.begin()
        self._lied = False
        late_s = now - max(self._deadline, self._handled_at)
        if self._profile.pause_s and late_s > self._profile.pause_s:
            self._notice_pause(late_s)
        self._handled_at = now
        if isinstance(event, Received):
            self._receive(event.sender, event.message, now)
        elif isinstance(event, Tick):
            self._tick(now)
        elif isinstance(event, Synced):
            self._take_sync(event, now)
        elif isinstance(event, RecordIssued):
            self._issue(self._voice.claim.incarnation, max(self._voice.claim.sequence, event.sequence), now)
        elif isinstance(event, Forget):
            self._forget(event.peer)
        elif not self._voice.left:
            self._act(event, now)
        if not self._voice.left:
            self._sync(self._syncs.take_asked(now))
        self._deadline = self._next_deadline()
        return effects

    def _act(self, event: Leave | Doubt | Greet | Deaf, now: float) -> None:
        """What a node that has left does no more."""
        if isinstance(event, Leave):
            self._leave(now)
        elif isinstance(event, Doubt):
            self._detector.doubt(event.peer, now)
        elif isinstance(event, Greet):
            self._detector.greet(event.peer, now)
        elif event.deaf != self._detector.deaf:
            self._set_deaf(event.deaf, now)

    def _receive(self, sender: PeerHash, message: Message, now: float) -> None:
        if self._table.get(sender) is None:
            self._meet_stranger(sender, now)
            return
        behind = self._take_items(message.gossip, sender, now)
        if isinstance(message, Ping):
            self._detector.ack(sender, message.nonce, own=behind)
            return
        if isinstance(message, Ack):
            self._detector.take_ack(sender, message.nonce, now)
        elif isinstance(message, PingRequest):
            self._take_request(sender, message, now)
        elif isinstance(message, Nack):
            self._detector.take_nack(sender, message.nonce)
        if behind or self._gossip.is_untold(sender, now):
            self._gossip.tell(sender, own=behind)

    def _take_request(self, asker: PeerHash, request: PingRequest, now: float) -> None:
        if request.target == self._voice.peer:
            self._detector.ack(asker, request.nonce)
        elif not self._voice.left:
            self._detector.relay(asker, request, now)

    def _tick(self, now: float) -> None:
        if now >= self._gossip.deadline:
            self._gossip.tell_news(now)
        if self._voice.left:
            return
        self._expire_suspicions(now)
        self._step_probe(now)
        self._detector.send_nacks(now)
        self._sync(self._syncs.take_due(now))
        if now >= self._dead_probe_at:
            self._probe_dead(now)
        while (oldest := self._table.oldest_tombstone()) is not None and now >= oldest[1]:
            self._forget(oldest[0])

    def _step_probe(self, now: float) -> None:
        """Who did not answer is accused before the next one is probed, who may hear of it at once."""
        silent = self._detector.step(now)
        if silent is not None and self._suspicions.counts(silent, self._voice.peer):
            held = self._table.get(silent)
            assert held is not None
            self._suspect(held, self._voice.accuse(held.claim), now)
        self._detector.begin_if_due(now)

    def _probe_dead(self, now: float) -> None:
        self._dead_probe_at = now + (0.5 + self._random.random()) * self._profile.dead_probe_period_s
        self._detector.ping_dead()

    def _notice_pause(self, late_s: float) -> None:
        """This process stood still: what others sent meanwhile is still unread, so nobody is judged by that time."""
        self._health.change(1)
        self._detector.postpone(late_s)
        self._suspicions.postpone(late_s)

    def _sync(self, peer: PeerHash | None) -> None:
        if peer is not None:
            self._outbox.add(Sync(peer))

    def _take_sync(self, event: Synced, now: float) -> None:
        self._syncs.done_with(event.peer)
        behind = False
        told = 0
        for claim in event.claims:
            if self._lied:
                return
            if claim.peer == self._voice.peer:
                behind |= self._meet_own(claim, event.peer, now)
            else:
                told += self._take_claim(claim, event.peer, now, told)
        for suspicion in event.suspicions:
            if self._lied:
                return
            behind |= self._take_suspicion(suspicion, event.peer, now)
        if behind:
            self._gossip.tell(event.peer, own=True)

    def _leave(self, now: float) -> None:
        """Told at once to a few, and then as other news; nothing else is told any more."""
        self._voice.left = True
        self._detector.abandon()
        self._gossip.clear()
        self._raise_above(self._voice.claim.incarnation, now)
        for peer in self._table.pick(max(self._profile.gossip_fanout, self._profile.helpers, 1)):
            self._gossip.tell(peer)

    def _set_deaf(self, deaf: bool, now: float) -> None:
        if not deaf:
            self._detector.deaf = False
            self._raise_above(self._voice.claim.incarnation, now)
            return
        self._detector.stop_hearing()
        for member in list(self._table.rows()):
            if member.state in (State.SUSPECT, State.DEAD):
                self._clear(member.claim.peer)
                self._change(member.state, Member(member.claim, State.ALIVE), now)

    def _forget(self, peer: PeerHash) -> None:
        if self._table.get(peer) is None:
            return
        self._clear(peer)
        self._table.remove(peer)
        self._outbox.add(Forgotten(peer))

    def _meet_stranger(self, sender: PeerHash, now: float) -> None:
        """It gets no answer, whatever it sends: who has no record here has no address."""
        if sender == self._voice.peer:
            return
        self._outbox.refuse(sender, Refusal.STRANGER)
        self._syncs.meet(sender, now)

    # --- claims ---

    def _take_items(self, items: tuple[Item, ...], teller: PeerHash, now: float) -> bool:
        """True: the teller is behind about this node, and needs its claim."""
        behind = False
        for item in items[: self._profile.items_max]:
            if self._lied:
                break
            if isinstance(item, Suspicion):
                behind |= self._take_suspicion(item, teller, now)
            elif item.peer == self._voice.peer:
                behind |= self._meet_own(item, teller, now)
            else:
                self._take_claim(item, teller, now)
        return behind

    def _take_claim(self, claim: Claim, teller: PeerHash, now: float, told: int | None = None) -> bool:
        """True: it was news.  `told`: it comes by a push-pull, of whose claims so many were news; None: by gossip."""
        held = self._table.get(claim.peer)
        if held is None:
            return self._take_unknown(claim, teller, now, told)
        if claim.rank <= held.claim.rank or not self._fits(claim, teller):
            return False
        self._adopt(claim, held, now)
        is_back = held.state == State.DEAD and claim.incarnation > held.claim.incarnation  # with a partition, perhaps
        is_renewed = claim.sequence > held.claim.sequence
        if told is None and (is_back or (is_renewed and self._renewals.admit(claim.peer, now))):
            self._syncs.want(teller, now)
        if (told or 0) < self._profile.synced_broadcasts_max:
            self._tell(claim, now)
        return True

    def _adopt(self, claim: Claim, held: Member, now: float) -> None:
        """A newer record alone refutes nothing: that takes a higher incarnation."""
        state = held.state
        if claim.left:
            state = State.LEFT
        elif claim.incarnation > held.claim.incarnation:
            state = State.ALIVE
        if state != held.state or claim.incarnation > held.claim.incarnation:
            self._clear(claim.peer)
        self._change(held.state, Member(claim, state), now)

    def _take_unknown(self, claim: Claim, teller: PeerHash, now: float, told: int | None) -> bool:
        """Gossip alone makes nobody a member: its record must be here, and admitted, first."""
        if claim.left:
            return False
        full = self._table.size >= self._profile.members_max
        if full and not self._table.tombstones:
            self._outbox.refuse(claim.peer, Refusal.FULL)
            return False
        if not self._fits(claim, teller):
            return False
        if told is None:
            self._syncs.want(teller, now)
            return False
        if full:
            self._forget_oldest()
        if not self._table.active:
            self._syncs.hasten_first(now)
        self._change(None, Member(claim, State.ALIVE), now)
        if told < self._profile.synced_broadcasts_max:
            self._tell(claim, now)
        return True

    def _meet_own(self, claim: Claim, teller: PeerHash, now: float) -> bool:
        """True: the teller needs this node's claim.  A higher one is from its past, before its clock went back."""
        if claim.rank <= self._voice.claim.rank:
            return claim.left and not self._voice.left
        if self._voice.claim.incarnation >= INCARNATION_MAX or not self._fits(claim, teller):
            return False
        self._raise_above(claim.incarnation, now)
        return True

    def _raise_above(self, incarnation: int, now: float) -> None:
        self._issue(min(incarnation + 1, INCARNATION_MAX), self._voice.claim.sequence, now)

    def _issue(self, incarnation: int, sequence: int, now: float) -> None:
        self._voice.issue(incarnation, sequence)
        self._tell(self._voice.claim, now)

    def _tell(self, item: Item, now: float) -> None:
        """What there is no room for a push-pull must carry."""
        if self._voice.left and item is not self._voice.claim:
            return
        if not self._gossip.add(item):
            self._syncs.hasten(now)
        self._gossip.schedule(now)

    # --- suspicions ---

    def _take_suspicion(self, suspicion: Suspicion, teller: PeerHash, now: float) -> bool:
        """True: it is about this node, and the teller needs its claim."""
        if suspicion.subject == self._voice.peer:
            return self._meet_accusation(suspicion, teller, now)
        held = self._table.get(suspicion.subject)
        if held is None or suspicion.incarnation < held.claim.incarnation or not held.active:
            return False
        if suspicion.accuser == suspicion.subject or not self._is_alive(suspicion.accuser):
            return False
        if not self._suspicions.counts(suspicion.subject, suspicion.accuser) or not self._fits(suspicion, teller):
            return False
        if suspicion.incarnation != held.claim.incarnation:
            self._syncs.want(teller, now)  # for the claim that it is about: it counts once that is here
        elif self._accusations.admit((suspicion.accuser, suspicion.subject), now):
            self._suspect(held, suspicion, now)
        return False

    def _meet_accusation(self, suspicion: Suspicion, teller: PeerHash, now: float) -> bool:
        """Who is deaf is rightly thought dead, and refutes nothing; it would be accused again at once.

        Anybody's of the incarnation in force is refuted, also that of an accuser who is thought dead here: after a
        partition each side thinks so of the other.  One of a higher incarnation is a lie, or of a past that its accuser
        shows beside it (a claim): it raises nothing, so that nobody can drive a node's incarnation up.

        Of the highest one nothing is refuted, since there is none above it: two that have signed it would contradict
        each other without end.  A lower one is answered with it.
        """
        if self._voice.claim.incarnation >= INCARNATION_MAX:
            return suspicion.incarnation < INCARNATION_MAX
        if self._voice.left or suspicion.incarnation < self._voice.claim.incarnation:
            return True
        if self._detector.deaf or suspicion.incarnation > self._voice.claim.incarnation:
            return False
        if not self._fits(suspicion, teller):
            return False
        if self._is_alive(suspicion.accuser):
            self._health.count_accuser(suspicion.accuser, now)
        self._raise_above(self._voice.claim.incarnation, now)
        return True

    def _suspect(self, held: Member, suspicion: Suspicion, now: float) -> None:
        """One more accuser of an active member in its incarnation."""
        if self._suspicions.add(suspicion, len(self), now):
            self._change(held.state, Member(held.claim, State.SUSPECT), now)
        self._tell(suspicion, now)

    def _expire_suspicions(self, now: float) -> None:
        while (peer := self._suspicions.next_expired(self._health.suspicion_stretch, now)) is not None:
            self._bury(peer, now)

    def _bury(self, suspect: PeerHash, now: float) -> None:
        held = self._table.get(suspect)
        assert held is not None
        self._suspicions.conclude(suspect)
        self._change(State.SUSPECT, Member(held.claim, State.DEAD), now)

    def _clear(self, peer: PeerHash) -> None:
        """What was held against it is over, and told no more."""
        self._gossip.clear_peer(peer, self._suspicions.clear(peer))

    # --- rows ---

    def _change(self, before: State | None, after: Member, now: float) -> None:
        claim = after.claim
        self._table.put(claim.peer, after, now + self._profile.tombstone_s)
        self._outbox.add(Changed(claim.peer, before, after.state, claim.incarnation, claim))
        if self._table.tombstones > self._profile.tombstones_max:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest = self._table.oldest_tombstone()
        assert oldest is not None
        self._forget(oldest[0])

    def _is_alive(self, peer: PeerHash) -> bool:
        member = self._table.get(peer)
        return member is not None and member.state == State.ALIVE

    def _fits(self, item: Item, teller: PeerHash) -> bool:
        """Whether its signer said it."""
        if self._verified.fits(item):
            return True
        self._lied = True
        self._outbox.refuse(teller, Refusal.FORGED)
        return False

    def _next_deadline(self) -> float:
        if self._voice.left:
            return self._gossip.deadline
        due = min(
            self._detector.deadline,
            self._gossip.deadline,
            self._syncs.deadline,
            self._suspicions.deadline,
            self._dead_probe_at,
        )
        oldest = self._table.oldest_tombstone()
        return due if oldest is None else min(due, oldest[1])
