"""Who is alive: SWIM with Lifeguard.  PROTOCOL.md, section 15.

Pure: equal events, times and randomness give equal effects; no clock, no socket, no address.

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

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.broadcasts import Broadcasts
from node.census import EMPTY, Census
from node.claim import (
    Claim,
    Item,
    PeerHash,
    Sign,
    Suspicion,
    Verify,
    encoded_bytes,
    peer_hash,
    sign_claim,
    sign_suspicion,
    verify_item,
)
from node.member import Member, State
from node.member_table import MemberTable
from node.membership_effect import Answered, Changed, Effect, Forgotten, Refusal, Refused, Send, Sync
from node.membership_event import Deaf, Doubt, Event, Greet, Leave, Received, RecordIssued, Synced, Tick
from node.message import GOSSIP_ROOM_BYTES, TARGET_BYTES, Ack, Gossip, Message, Nack, Ping, PingRequest
from node.profile import LAN, Profile
from node.rates import Rates
from node.suspicion import SuspicionTimer
from protos.errors import InvalidSignature
from protos.limits import INCARNATION_MAX

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator


class _Probe:
    """The probe of this period.  Times move when the process stood still; `sent_at` is then None."""

    __slots__ = ("asked", "ends_at", "helpers", "helpers_at", "nacked", "nonce", "sent_at", "target")

    def __init__(self, target: PeerHash, nonce: int, sent_at: float, helpers_at: float, ends_at: float) -> None:
        self.target = target
        self.nonce = nonce
        self.sent_at: float | None = sent_at
        self.helpers_at = helpers_at
        self.ends_at = ends_at
        self.asked = False
        self.helpers: list[PeerHash] = []
        self.nacked: list[PeerHash] = []


@dataclass(frozen=True, slots=True)
class _Relay:
    """A probe for `asker`, who knows it by `nonce`."""

    asker: PeerHash
    nonce: int
    target: PeerHash
    nack_at: float


class Membership:
    """The table of one node.  The node itself is no member of its own table.

    A row's life: unknown -> ALIVE by `Synced`; ALIVE -> SUSPECT by a failed probe or an accuser; SUSPECT -> DEAD when
    the timer runs out; SUSPECT, DEAD and LEFT -> ALIVE by a claim with a higher incarnation; any state -> LEFT by the
    peer's own word; DEAD and LEFT -> unknown after `tombstone_s`.
    """

    __slots__ = (
        "_accusations", "_accused_at", "_asked_sync_at", "_claim", "_dead_probe_at", "_deadline", "_deaf", "_doubted",
        "_effects", "_expiries", "_gossip_at", "_greetings", "_handled_at", "_health", "_key", "_late_relays",
        "_left", "_lied", "_network", "_next_probe_at", "_notices", "_own", "_probe", "_probe_began_at", "_profile",
        "_queue", "_random", "_refuted_at", "_relays", "_renewals", "_sign", "_stranger", "_sync_at", "_synced_at",
        "_table", "_timers", "_told_at", "_verified", "_verify", "_wanted",
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
        self._key = public_key
        self._own = peer_hash(public_key)
        self._network = network
        self._sign = sign
        self._verify = verify
        self._random = random
        self._profile = profile
        self._table = MemberTable(self._own, census, random)
        self._left = False
        self._health = 0
        self._refuted_at = -math.inf
        self._accused_at: dict[PeerHash, float] = {}  # when an accuser's word last told on health, the oldest first
        self._accusations: Rates[tuple[PeerHash, PeerHash]] = Rates(  # by accuser and accused
            profile.accusations_max / profile.accuser_gap_s, profile.accusations_max, profile.accusations_counted_max
        )
        self._renewals: Rates[PeerHash] = Rates(1 / profile.record_gap_s, 2, profile.renewals_counted_max)
        self._probe: _Probe | None = None
        self._probe_began_at = -math.inf
        self._next_probe_at = now + random.random() * profile.probe_period_s
        self._timers: dict[PeerHash, SuspicionTimer] = {}  # of the suspects
        self._expiries: list[tuple[float, PeerHash]] = []  # a heap; a timer that changed has several entries in it
        self._notices: dict[PeerHash, Suspicion] = {}  # of the dead: what to tell them
        self._told_at: dict[PeerHash, float] = {}  # of the dead and the left: when one was told without having asked
        self._doubted: dict[PeerHash, None] = {}  # to be probed ahead of their turn, the first first
        self._greetings: dict[int, tuple[PeerHash, float]] = {}  # by nonce, the oldest first: to whom, and when
        self._relays: dict[int, _Relay] = {}  # by this node's nonce, the oldest first
        self._late_relays: dict[int, _Relay] = {}  # whose time for a Nack has come
        self._verified: dict[bytes, Item] = {}  # by signature, the oldest first
        self._synced_at = -math.inf  # when a push-pull was last begun
        self._sync_at = math.inf
        self._asked_sync_at = math.inf
        self._wanted: PeerHash | None = None  # whom to sync with then: a member goes before a stranger
        self._stranger: PeerHash | None = None
        self._dead_probe_at = now + (0.5 + random.random()) * (profile.dead_probe_period_s or math.inf)
        self._effects: list[Effect] = []
        self._lied = False  # who told of this event passed a forgery on
        self._deaf = False
        self._claim, is_new = self._first_claim(census, incarnation, sequence)
        self._queue = Broadcasts(profile.broadcasts_max)
        self._gossip_at = math.inf
        if self._table.active:
            self._sync_at = now + random.random() * self._scaled(profile.sync_period_s)
        if is_new:
            self._tell(self._claim, now)
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
        return self._own

    @property
    def claim(self) -> Claim:
        """This node's own, in force."""
        return self._claim

    @property
    def health(self) -> int:
        """Lifeguard's local health score: 0 is well; period and timeout are stretched 1 + health times."""
        return self._health

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
        for timer in self._timers.values():
            yield from timer.accusers.values()
        yield from self._notices.values()

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
        effects: list[Effect] = []
        self._effects = effects
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
            self._issue(self._claim.incarnation, max(self._claim.sequence, event.sequence), now)
        elif isinstance(event, Leave):
            self._leave(now)
        elif isinstance(event, Doubt):
            self._doubt(event.peer, now)
        elif isinstance(event, Greet):
            self._greet(event.peer, now)
        elif isinstance(event, Deaf):
            self._set_deaf(event.deaf, now)
        else:
            self._forget(event.peer)
        self._sync_if_asked(now)
        self._deadline = self._next_deadline()
        return effects

    def _receive(self, sender: PeerHash, message: Message, now: float) -> None:
        if self._table.get(sender) is None:
            self._meet_stranger(sender, now)
            return
        behind = self._take_items(message.gossip, sender, now)
        if isinstance(message, Ping):
            self._send(Ack(message.nonce, self._gossip_for(sender, own=behind)), sender)
            return
        if isinstance(message, Ack):
            self._take_ack(sender, message.nonce, now)
        elif isinstance(message, PingRequest):
            self._relay(sender, message, now)
        elif isinstance(message, Nack):
            self._take_nack(sender, message.nonce)
        if behind or self._is_untold(sender, now):
            self._send(Gossip(self._gossip_for(sender, own=behind)), sender)

    def _tick(self, now: float) -> None:
        if now >= self._gossip_at:
            self._tell_news(now)
        if self._left:
            return
        self._expire_suspicions(now)
        self._step_probe(now)
        self._send_nacks(now)
        if now >= self._sync_at:
            self._sync_at = now + (0.5 + self._random.random()) * self._scaled(self._profile.sync_period_s)
            self._sync(self._table.pick(1), now)
        if now >= self._dead_probe_at:
            self._probe_dead(now)
        while (oldest := self._table.oldest_tombstone()) is not None and now >= oldest[1]:
            self._forget(oldest[0])

    def _take_sync(self, event: Synced, now: float) -> None:
        if event.peer in (self._wanted, self._stranger):
            self._wanted = self._stranger = None
            self._asked_sync_at = math.inf
        behind = False
        told = 0
        for claim in event.claims:
            if self._lied:
                return
            if claim.peer == self._own:
                behind |= self._meet_own(claim, event.peer, now)
            else:
                told += self._take_claim(claim, event.peer, now, told)
        for suspicion in event.suspicions:
            if self._lied:
                return
            behind |= self._take_suspicion(suspicion, event.peer, now)
        if behind:
            self._send(Gossip(self._gossip_for(event.peer, own=True)), event.peer)

    def _leave(self, now: float) -> None:
        """Told at once to a few, and then as other news; nothing else is told any more."""
        if self._left:
            return
        self._left = True
        self._probe = None
        self._queue = Broadcasts(self._profile.broadcasts_max)
        self._raise_above(self._claim.incarnation, now)
        for peer in self._table.pick(max(self._profile.gossip_fanout, self._profile.helpers, 1)):
            self._send(Gossip(self._gossip_for(peer)), peer)

    def _set_deaf(self, deaf: bool, now: float) -> None:
        if deaf == self._deaf or self._left:
            return
        self._deaf = deaf
        if not deaf:
            self._raise_above(self._claim.incarnation, now)
            return
        self._probe = None
        self._doubted.clear()
        for member in list(self._table.rows()):
            if member.state in (State.SUSPECT, State.DEAD):
                self._clear(member.claim.peer)
                self._change(member.state, Member(member.claim, State.ALIVE), now)

    def _forget(self, peer: PeerHash) -> None:
        if self._table.get(peer) is None:
            return
        self._clear(peer)
        self._table.remove(peer)
        self._effects.append(Forgotten(peer))

    def _meet_stranger(self, sender: PeerHash, now: float) -> None:
        """It gets no answer, whatever it sends: who has no record here has no address."""
        if sender == self._own:
            return
        self._refuse(sender, Refusal.STRANGER)
        if self._stranger is None:
            self._stranger = sender
            self._ask_sync(now)

    # --- claims ---

    def _take_items(self, items: tuple[Item, ...], teller: PeerHash, now: float) -> bool:
        """True: the teller is behind about this node, and needs its claim."""
        behind = False
        for item in items[: self._profile.items_max]:
            if self._lied:
                break
            if isinstance(item, Suspicion):
                behind |= self._take_suspicion(item, teller, now)
            elif item.peer == self._own:
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
            self._want_sync(teller, now)
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
            self._refuse(claim.peer, Refusal.FULL)
            return False
        if not self._fits(claim, teller):
            return False
        if told is None:
            self._want_sync(teller, now)
            return False
        if full:
            self._forget_oldest()
        if not self._table.active:
            self._sync_at = min(self._sync_at, now + self._random.random() * self._profile.sync_first_s)
        self._change(None, Member(claim, State.ALIVE), now)
        if told < self._profile.synced_broadcasts_max:
            self._tell(claim, now)
        return True

    def _meet_own(self, claim: Claim, teller: PeerHash, now: float) -> bool:
        """True: the teller needs this node's claim.  A higher one is from its past, before its clock went back."""
        if claim.rank <= self._claim.rank:
            return claim.left and not self._left
        if not self._fits(claim, teller):
            return False
        self._raise_above(claim.incarnation, now)
        return True

    def _raise_above(self, incarnation: int, now: float) -> None:
        self._issue(min(incarnation + 1, INCARNATION_MAX), self._claim.sequence, now)

    def _issue(self, incarnation: int, sequence: int, now: float) -> None:
        self._claim = sign_claim(self._sign, self._network, self._key, incarnation, sequence, left=self._left)
        self._tell(self._claim, now)

    def _first_claim(self, census: Census, incarnation: int, sequence: int) -> tuple[Claim, bool]:
        """This node's claim, and whether the others have yet to hear of it."""
        member = census.get(self._own)
        if member is not None and member.claim.rank == (incarnation, False, sequence):
            return member.claim, False
        return sign_claim(self._sign, self._network, self._key, incarnation, sequence), True

    # --- suspicions ---

    def _take_suspicion(self, suspicion: Suspicion, teller: PeerHash, now: float) -> bool:
        """True: it is about this node, and the teller needs its claim."""
        if suspicion.subject == self._own:
            return self._meet_accusation(suspicion, teller, now)
        held = self._table.get(suspicion.subject)
        if held is None or suspicion.incarnation < held.claim.incarnation or not held.active:
            return False
        if suspicion.accuser == suspicion.subject or not self._is_alive(suspicion.accuser):
            return False
        timer = self._timers.get(suspicion.subject)
        if timer is not None and (timer.full or suspicion.accuser in timer.accusers):
            return False
        if not self._fits(suspicion, teller):
            return False
        if suspicion.incarnation != held.claim.incarnation:
            self._want_sync(teller, now)  # for the claim that it is about: it counts once that is here
        elif self._accusations.admit((suspicion.accuser, suspicion.subject), now):
            self._suspect(held, suspicion, now)
        return False

    def _meet_accusation(self, suspicion: Suspicion, teller: PeerHash, now: float) -> bool:
        """Who is deaf is rightly thought dead, and refutes nothing; it would be accused again at once.

        Anybody's of the incarnation in force is refuted, also that of an accuser who is thought dead here: after a
        partition each side thinks so of the other.  One of a higher incarnation is a lie, or of a past that its accuser
        shows beside it (a claim): it raises nothing, so that nobody can drive a node's incarnation up."""
        if self._left or suspicion.incarnation < self._claim.incarnation:
            return True
        if self._deaf or suspicion.incarnation > self._claim.incarnation or not self._fits(suspicion, teller):
            return False
        if self._tells_on_health(suspicion.accuser, now):
            self._refuted_at = self._accused_at[suspicion.accuser] = now
            self._change_health(1)
        self._raise_above(self._claim.incarnation, now)
        return True

    def _tells_on_health(self, accuser: PeerHash, now: float) -> bool:
        """One accuser, or a crowd of them, must not keep a healthy node ill: its own probes say how it is."""
        if not self._is_alive(accuser) or now - self._refuted_at < self._profile.probe_period_s:
            return False
        while self._accused_at:
            oldest, at = next(iter(self._accused_at.items()))
            if now - at < self._profile.accuser_gap_s:
                break
            del self._accused_at[oldest]
        return accuser not in self._accused_at and len(self._accused_at) < self._profile.health_max

    def _suspect(self, held: Member, suspicion: Suspicion, now: float) -> None:
        """One more accuser of an active member in its incarnation."""
        peer = suspicion.subject
        timer = self._timers.get(peer)
        if timer is None:
            timer = self._timers[peer] = SuspicionTimer(suspicion, now, len(self), self._profile)
            self._change(held.state, Member(held.claim, State.SUSPECT), now)
        else:
            timer.add(suspicion)
        heapq.heappush(self._expiries, (timer.deadline(1), peer))
        self._tell(suspicion, now)

    def _expire_suspicions(self, now: float) -> None:
        """A timer that is stretched by ill health, or was moved by a pause, is looked at again in each period."""
        while self._expiries and self._expiries[0][0] <= now:
            _, peer = heapq.heappop(self._expiries)
            timer = self._timers.get(peer)
            if timer is None:
                continue
            due = timer.deadline(min(1.0 + self._health, self._profile.suspicion_stretch_max))
            if due > now:
                heapq.heappush(self._expiries, (min(due, now + self._profile.probe_period_s), peer))
            else:
                self._bury(peer, timer, now)

    def _bury(self, peer: PeerHash, timer: SuspicionTimer, now: float) -> None:
        held = self._table.get(peer)
        assert held is not None
        del self._timers[peer]
        self._notices[peer] = timer.accusers.get(self._own) or next(iter(timer.accusers.values()))
        self._change(State.SUSPECT, Member(held.claim, State.DEAD), now)

    def _clear(self, peer: PeerHash) -> None:
        """What was held against it is over, and told no more."""
        timer = self._timers.pop(peer, None)
        notice = self._notices.pop(peer, None)
        self._told_at.pop(peer, None)
        for accuser in timer.accusers if timer is not None else ():
            self._queue.discard_suspicion(peer, accuser)
        if notice is not None:
            self._queue.discard_suspicion(peer, notice.accuser)

    def _accuse(self, claim: Claim) -> Suspicion:
        return sign_suspicion(self._sign, self._network, claim.peer, claim.incarnation, self._key)

    # --- rows ---

    def _change(self, before: State | None, after: Member, now: float) -> None:
        claim = after.claim
        self._table.put(claim.peer, after, now + self._profile.tombstone_s)
        self._effects.append(Changed(claim.peer, before, after.state, claim.incarnation, claim))
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
        """Whether its signer said it.  Identical items are verified once."""
        if self._verified.get(item.signature) == item:
            return True
        try:
            verify_item(self._verify, self._network, item)
        except InvalidSignature:
            self._lied = True
            self._refuse(teller, Refusal.FORGED)
            return False
        if len(self._verified) >= self._profile.verified_max:
            del self._verified[next(iter(self._verified))]
        self._verified[item.signature] = item
        return True

    def _refuse(self, peer: PeerHash, reason: Refusal) -> None:
        if not any(isinstance(effect, Refused) and effect.reason is reason for effect in self._effects):
            self._effects.append(Refused(peer, reason))

    # --- probes ---

    def _step_probe(self, now: float) -> None:
        """Direct, then through helpers, then failed; the next one begins when the period is over."""
        probe = self._probe
        if probe is not None and not probe.asked and now >= probe.helpers_at:
            self._ask_helpers(probe)
        if probe is not None and now >= probe.ends_at:
            self._probe = None
            self._fail(probe, now)
        if self._probe is None and now >= self._next_probe_at:
            self._begin_probe(now)

    def _begin_probe(self, now: float) -> None:
        stretch = 1 + self._health
        self._probe_began_at = now
        self._next_probe_at = now + self._profile.probe_period_s * stretch
        target = None if self._deaf else self._next_target()
        if target is None:
            return
        nonce = self._random.getrandbits(64)
        helpers_at = now + self._profile.probe_timeout_s * stretch
        self._probe = _Probe(target, nonce, now, helpers_at, self._next_probe_at)
        self._send(Ping(nonce, self._gossip_for(target)), target)

    def _next_target(self) -> PeerHash | None:
        while self._doubted:
            peer = next(iter(self._doubted))
            del self._doubted[peer]
            held = self._table.get(peer)
            if held is not None and held.active:
                return peer
        return self._table.next_to_probe()

    def _doubt(self, peer: PeerHash, now: float) -> None:
        """However many calls fail, no more than two probes go out in a period."""
        held = self._table.get(peer)
        if self._left or self._deaf or held is None or not held.active:
            return
        if len(self._doubted) >= self._profile.doubted_max:
            return
        if self._probe is not None and self._probe.target == peer:
            return
        self._doubted[peer] = None
        if self._probe is None:
            earliest = self._probe_began_at + self._profile.probe_period_s / 2
            self._next_probe_at = min(self._next_probe_at, max(now, earliest))

    def _greet(self, peer: PeerHash, now: float) -> None:
        if self._left or self._table.get(peer) is None:
            return
        if len(self._greetings) >= self._profile.greetings_max:
            del self._greetings[next(iter(self._greetings))]
        nonce = self._random.getrandbits(64)
        self._greetings[nonce] = (peer, now)
        self._send(Ping(nonce, self._gossip_for(peer)), peer)

    def _ask_helpers(self, probe: _Probe) -> None:
        probe.asked = True
        probe.helpers = self._table.pick(self._profile.helpers, probe.target)
        for helper in probe.helpers:
            gossip = self._gossip_for(helper, room_bytes=GOSSIP_ROOM_BYTES - TARGET_BYTES)
            self._send(PingRequest(probe.nonce, probe.target, gossip), helper)

    def _fail(self, probe: _Probe, now: float) -> None:
        """Scored as memberlist does: helpers that were silent speak against this node, nacks for it."""
        held = self._table.get(probe.target)
        if held is None or not held.active:
            return
        if self._profile.nacks and probe.helpers:
            self._change_health(len(probe.helpers) - len(probe.nacked))
        else:
            self._change_health(1)
        timer = self._timers.get(probe.target)
        if timer is None or not (timer.full or self._own in timer.accusers):
            self._suspect(held, self._accuse(held.claim), now)

    def _take_ack(self, sender: PeerHash, nonce: int, now: float) -> None:
        """Of this node's probe (from the target or a helper), or of one for another node (from the target)."""
        probe = self._probe
        if probe is not None and nonce == probe.nonce:
            if sender == probe.target and probe.sent_at is not None:
                self._effects.append(Answered(sender, now - probe.sent_at))
            if sender == probe.target or sender in probe.helpers:
                self._probe = None
                self._change_health(-1)
            return
        greeted, sent_at = self._greetings.get(nonce, (None, 0.0))
        if greeted is not None:
            if sender == greeted:
                del self._greetings[nonce]
                self._effects.append(Answered(sender, now - sent_at))
            return
        relays = self._relays if nonce in self._relays else self._late_relays
        relay = relays.get(nonce)
        if relay is not None and sender == relay.target:
            del relays[nonce]
            self._send(Ack(relay.nonce, self._gossip_for(relay.asker)), relay.asker)

    def _take_nack(self, sender: PeerHash, nonce: int) -> None:
        probe = self._probe
        if probe is not None and nonce == probe.nonce and sender in probe.helpers and sender not in probe.nacked:
            probe.nacked.append(sender)

    def _relay(self, asker: PeerHash, request: PingRequest, now: float) -> None:
        if request.target == self._own:
            self._send(Ack(request.nonce, self._gossip_for(asker)), asker)
            return
        if self._left or self._table.get(request.target) is None:
            return
        if len(self._relays) >= self._profile.relays_max:
            self._refuse(asker, Refusal.BUSY)
            return
        nonce = self._random.getrandbits(64)
        nack_at = now + self._profile.nack_share * self._profile.probe_timeout_s
        self._relays[nonce] = _Relay(asker, request.nonce, request.target, nack_at)
        self._send(Ping(nonce, self._gossip_for(request.target)), request.target)

    def _send_nacks(self, now: float) -> None:
        """An answer that is later than the Nack is passed on all the same, for a period and while there is room."""
        while self._relays:
            nonce, relay = next(iter(self._relays.items()))
            if relay.nack_at > now:
                break
            del self._relays[nonce]
            self._late_relays[nonce] = relay
            if self._profile.nacks:
                self._send(Nack(relay.nonce, self._gossip_for(relay.asker)), relay.asker)
        while self._late_relays:
            nonce, relay = next(iter(self._late_relays.items()))
            is_over = relay.nack_at + self._profile.probe_period_s <= now
            if not is_over and len(self._late_relays) <= self._profile.relays_max:
                break
            del self._late_relays[nonce]

    def _probe_dead(self, now: float) -> None:
        """Its answer, if it lives, carries a refutation; nobody waits for it."""
        self._dead_probe_at = now + (0.5 + self._random.random()) * self._profile.dead_probe_period_s
        peer = self._table.random_dead()
        if peer is not None:
            self._send(Ping(self._random.getrandbits(64), self._gossip_for(peer)), peer)

    def _change_health(self, by: int) -> None:
        self._health = min(max(0, self._health + by), self._profile.health_max - 1)

    def _notice_pause(self, late_s: float) -> None:
        """This process stood still: what others sent meanwhile is still unread, so nobody is judged by that time."""
        self._change_health(1)
        self._next_probe_at += late_s
        if self._probe is not None:
            self._probe.sent_at = None
            self._probe.helpers_at += late_s
            self._probe.ends_at += late_s
        for timer in self._timers.values():
            timer.began_at += late_s

    # --- telling ---

    def _send(self, message: Message, to: PeerHash) -> None:
        self._effects.append(Send(to, message))

    def _tell(self, item: Item, now: float) -> None:
        """What the queue has no room for a push-pull must carry."""
        if self._left and item is not self._claim:
            return
        if not self._queue.add(item):
            self._sync_at = min(
                self._sync_at, now + (1 + self._random.random()) * self._scaled(self._profile.sync_gap_s)
            )
        if self._gossip_at == math.inf and self._profile.gossip_fanout and self._table.active:
            self._gossip_at = now + self._random.random() * self._profile.gossip_period_s

    def _tell_news(self, now: float) -> None:
        for peer in self._table.pick(self._profile.gossip_fanout):
            if len(self._queue):
                self._send(Gossip(self._gossip_for(peer)), peer)
        waits = len(self._queue) and self._table.active
        self._gossip_at = now + self._profile.gossip_period_s if waits else math.inf

    def _gossip_for(
        self, peer: PeerHash, *, own: bool = False, room_bytes: int = GOSSIP_ROOM_BYTES
    ) -> tuple[Item, ...]:
        """As many items as fit.  This node's claim (`own`) and what is held against the peer go before the news."""
        urgent = self._notice_for(peer)
        if own or self._left:
            urgent.insert(0, self._claim)
        if not urgent and not len(self._queue):
            return ()
        room_bytes -= sum(map(encoded_bytes, urgent))
        news = self._queue.take(
            room_bytes, self._profile.items_max - len(urgent), len(self), self._profile.retransmit_multiplier
        )
        if not urgent:
            return tuple(news)
        return tuple(sorted([*urgent, *(item for item in news if item not in urgent)], key=_claims_first))

    def _notice_for(self, peer: PeerHash) -> list[Item]:
        """The claim of it that is held here, and a suspicion: so it can refute, and sees a past it has forgotten."""
        held = self._table.get(peer)
        if held is None or held.state == State.ALIVE:
            return []
        if held.state == State.LEFT:
            return [held.claim]
        if held.state == State.DEAD:
            return [held.claim, self._notices[peer]]
        if not self._profile.buddy:
            return []
        return [held.claim, next(iter(self._timers[peer].accusers.values()))]

    def _is_untold(self, peer: PeerHash, now: float) -> bool:
        """Heard from, yet thought dead or left, and not told so within this period: two such could go on for ever."""
        held = self._table.get(peer)
        if held is None or held.active:
            return False
        if now - self._told_at.get(peer, -math.inf) < self._profile.probe_period_s:
            return False
        self._told_at[peer] = now
        return True

    # --- push-pull ---

    def _want_sync(self, teller: PeerHash, now: float) -> None:
        if self._wanted is None:
            self._wanted = teller
            self._ask_sync(now)

    def _ask_sync(self, now: float) -> None:
        """At once, or when the gap since the last one is over."""
        at = max(now, self._synced_at + self._scaled(self._profile.sync_gap_s))
        self._asked_sync_at = min(self._asked_sync_at, at)

    def _sync_if_asked(self, now: float) -> None:
        if now < self._asked_sync_at or self._left:
            return
        peer = self._wanted or self._stranger
        self._wanted = self._stranger = None
        self._asked_sync_at = math.inf
        self._sync([peer] if peer is not None else [], now)

    def _sync(self, peers: Iterable[PeerHash], now: float) -> None:
        for peer in peers:
            self._synced_at = now
            self._effects.append(Sync(peer))

    def _scaled(self, period_s: float) -> float:
        """memberlist's pushPullScale: beyond 32 members a doubling adds one more period."""
        members = len(self)
        return period_s * (math.ceil(math.log2(members) - 5) + 1 if members > 32 else 1)

    def _next_deadline(self) -> float:
        if self._left:
            return self._gossip_at
        due = min(self._next_probe_at, self._gossip_at, self._sync_at, self._asked_sync_at, self._dead_probe_at)
        probe = self._probe
        if probe is not None:
            due = min(due, probe.ends_at if probe.asked else probe.helpers_at)
        if self._expiries:
            due = min(due, self._expiries[0][0])
        if self._relays:
            due = min(due, next(iter(self._relays.values())).nack_at)
        oldest = self._table.oldest_tombstone()
        return due if oldest is None else min(due, oldest[1])


def _claims_first(item: Item) -> bool:
    return isinstance(item, Suspicion)
