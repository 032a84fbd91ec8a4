"""Laws: what must hold at every step, and what must hold in the end.

Law: a checker reads what nodes believe and what the notary saw being signed; it trusts no effect and no verification of
the core that it checks.  A break is an exception: the run ends there, with the time and the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node.claim import Claim, Suspicion, verify_item
from protos.errors import InvalidSignature
from protos.transcript import RECORD_DOMAIN
from tests.sim.host import NETWORK, Changed, State
from tests.sim.network import Network, Watcher
from tests.sim.wire import DATAGRAM_BYTES_MAX, datagram_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.sim.book import Page
    from tests.sim.host import Datagram, Host, Member
    from tests.sim.machine import Machine
    from tests.sim.notary import Notary

# A run takes some tens of thousands; nodes that answer each other without end take all there are.
STEPS_MAX = 1_000_000

Believed = dict[bytes, tuple[State, Claim]]


class LawBroken(AssertionError):  # noqa: N818 - what it says is the name
    """Says which law, who broke it, and when."""


class _Seen:
    """What one process held after its last step."""

    __slots__ = ("believed", "members", "own", "pages", "suspicions")

    def __init__(self) -> None:
        self.believed: Believed = {}
        self.members: list[Member] = []
        self.own: list[Claim] = []
        self.pages: list[Page] = []
        self.suspicions: list[Suspicion] = []

    def is_new(self, name: str, held: list[Any]) -> bool:
        if held == getattr(self, name):
            return False
        setattr(self, name, held)
        return True


class Laws(Watcher):
    """`dead_s_max`: how long a live and reachable peer may be thought dead.  `evil`: whose word is not ours."""

    def __init__(self, notary: Notary, dead_s_max: float, evil: frozenset[int] = frozenset()) -> None:
        self.network: Network  # set by who makes both
        self.dead_s_max = dead_s_max
        self.longest_dead_s = 0.0
        self._steps = 0
        self._notary = notary
        self._evil = evil
        self._true: set[bytes] = set()  # signatures that were asked after
        self._seen: dict[int, _Seen] = {}
        self._own: dict[int, tuple[int, bool, int]] = {}
        self._sequences: dict[int, dict[bytes, int]] = {}
        self._dead_since: dict[tuple[int, bytes], float] = {}
        self._suspect_since: dict[tuple[int, bytes], float] = {}
        self._machine_of: dict[bytes, Machine] = {}
        self._apart_until: list[tuple[frozenset[int], frozenset[int], float]] = []

    # -- what the run tells

    def knows(self, machine: Machine, peer: bytes) -> None:
        self._machine_of[peer] = machine

    def healed(self, one: frozenset[int], other: frozenset[int]) -> None:
        """A cut between these has ended."""
        self._apart_until.append((one, other, self.network.now))

    # -- every step

    def sent(self, machine: Machine, address: int, datagram: Datagram) -> None:
        if machine.number in self._evil:
            return
        for item in datagram.message.gossip:
            self._must_be_true(machine, item, "passes on")
        if (size := datagram_bytes(datagram.message)) > DATAGRAM_BYTES_MAX:
            self._break(machine, f"sends a datagram of {size} bytes")

    def stepped(self, machine: Machine, kind: str, content: Any, effects: list[Any]) -> None:
        """What is the same objects as before has been looked at before."""
        self._steps += 1
        if self._steps > STEPS_MAX:
            self._break(machine, f"takes step {self._steps}: somebody answers somebody without end")
        host = machine.host
        if host is None or machine.number in self._evil:
            return
        seen = self._seen.setdefault(machine.number, _Seen())
        before = after = seen.believed
        if seen.is_new("members", list(host.beliefs())):
            after = seen.believed = {member.claim.peer: (member.state, member.claim) for member in seen.members}
            self._table(machine, before, after)
            self._limits(machine, host, after)
        self._effects(machine, before, after, effects)
        if seen.is_new("own", [host.claim]):
            self._own_claim(machine, host)
        if seen.is_new("pages", list(host.disk.book.pages.values())):
            self._records(machine, host)
        if seen.is_new("suspicions", list(host.suspicions())):
            for suspicion in seen.suspicions:
                self._must_be_true(machine, suspicion, "holds")

    def stopped(self, machine: Machine) -> None:
        """A new process begins with an empty table; its book of records is what the disk kept."""
        seen = self._seen.pop(machine.number, None)
        for peer in seen.believed if seen else ():
            self._dead_since.pop((machine.number, peer), None)
            self._suspect_since.pop((machine.number, peer), None)
        self._own.pop(machine.number, None)

    def wiped(self, machine: Machine) -> None:
        self._sequences.pop(machine.number, None)

    def _own_claim(self, machine: Machine, host: Host) -> None:
        """Nobody raises another's incarnation, so it is the subject's own table that says what was issued."""
        claim = host.claim
        self._must_be_true(machine, claim, "claims")
        rank = (claim.incarnation, claim.left, claim.sequence)
        if (earlier := self._own.get(machine.number)) is not None and rank < earlier:
            self._break(machine, f"goes back from {earlier} to {rank} in its own claim")
        self._own[machine.number] = rank

    def _table(self, machine: Machine, before: Believed, after: Believed) -> None:
        if machine.host is not None and machine.host.peer in after:
            self._break(machine, "is a member of its own table")
        for peer, (state, claim) in after.items():
            earlier = before.get(peer)
            if earlier is not None and earlier == (state, claim):
                continue
            self._must_be_true(machine, claim, "believes")
            if earlier is not None and claim.rank < earlier[1].rank:
                self._break(machine, f"goes back from {earlier[1].rank} to {claim.rank} about {self._name(peer)}")
            if (state is State.LEFT) != claim.left:
                self._break(machine, f"believes {state.name} of {self._name(peer)}, who did not claim that")
            self._death(machine, peer, earlier[0] if earlier else None, state)
            self._dead(machine, peer, state)
        for peer in before.keys() - after.keys():
            self._dead(machine, peer, None)
            self._suspect_since.pop((machine.number, peer), None)

    def _death(self, machine: Machine, peer: bytes, before: State | None, after: State) -> None:
        """It is this node's own conclusion, from a suspicion that had its time here."""
        key = (machine.number, peer)
        if after is State.SUSPECT:
            self._suspect_since.setdefault(key, self.network.now)
            return
        since = self._suspect_since.pop(key, self.network.now)
        if after is State.DEAD and before is not State.DEAD and machine.host is not None:
            profile = machine.host.profile
            if self.network.now - since < profile.suspicion_multiplier * profile.probe_period_s - 1e-6:
                self._break(machine, f"buries {self._name(peer)} after {self.network.now - since:.2f} s of suspicion")

    def _effects(self, machine: Machine, before: Believed, after: Believed, effects: list[Any]) -> None:
        """The last word of the effects about a peer is what the table says: drivers see nothing else."""
        told = {effect.peer: effect.after for effect in effects if isinstance(effect, Changed)}
        for peer, state in told.items():
            if peer in after and after[peer][0] is not state:
                self._break(machine, f"says {state.name} of {self._name(peer)} and believes {after[peer][0].name}")
        if after is not before:
            for peer, (state, _) in after.items():
                if (peer not in before or before[peer][0] is not state) and peer not in told:
                    self._break(machine, f"believes {state.name} of {self._name(peer)} and does not say so")

    def _limits(self, machine: Machine, host: Host, after: Believed) -> None:
        profile = host.profile
        if len(after) > profile.members_max:
            self._break(machine, f"has {len(after)} members")
        if sum(state in (State.DEAD, State.LEFT) for state, _ in after.values()) > profile.tombstones_max:
            self._break(machine, "has too many tombstones")

    def _records(self, machine: Machine, host: Host) -> None:
        seen = self._sequences.setdefault(machine.number, {})
        for peer, page in host.disk.book.pages.items():
            earlier = seen.get(peer, -1)
            if page.sequence == earlier:
                continue
            if page.sequence < earlier:
                self._break(machine, f"goes back to an older record of {self._name(peer)}")
            if not self._notary.did_sign(page.key, page.signature, RECORD_DOMAIN, page.signed):
                self._break(machine, f"holds a record that {self._name(peer)} never signed")
            seen[peer] = page.sequence

    def _must_be_true(self, machine: Machine, item: Claim | Suspicion, does: str) -> None:
        """Cheap when asked again: what was said once stays said, but not under other numbers."""
        if item in self._true:
            return
        try:
            verify_item(self._sworn, NETWORK, item)
        except InvalidSignature:
            self._break(machine, f"{does} what was never signed: {item}")
        self._true.add(item)

    def _sworn(self, key: bytes, signature: bytes, domain: bytes, data: bytes) -> None:
        if not self._notary.did_sign(key, signature, domain, data):
            raise InvalidSignature("never said")

    # -- nobody is buried alive

    def _dead(self, machine: Machine, peer: bytes, state: State | None) -> None:
        key = (machine.number, peer)
        if state is State.DEAD:
            self._dead_since.setdefault(key, self.network.now)
        elif key in self._dead_since:
            self._look_at(*key)
            del self._dead_since[key]

    def look(self) -> None:
        """At all that are thought dead now; called every second of virtual time."""
        for number, peer in tuple(self._dead_since):
            self._look_at(number, peer)

    def _look_at(self, number: int, peer: bytes) -> None:
        observer, subject = self.network.machines[number], self._machine_of.get(peer)
        if subject is None or subject.number in self._evil or number in self._evil:
            return
        if not (observer.is_well and subject.is_well) or self._is_apart(observer, subject):
            return
        since = max(
            self._dead_since[number, peer],
            observer.calm_since_s,
            subject.calm_since_s,
            *(at for one, other, at in self._apart_until if _between(one, other, observer.number, subject.number)),
        )
        self.longest_dead_s = max(self.longest_dead_s, self.network.now - since)
        if self.network.now - since > self.dead_s_max:
            self._break(observer, f"buries {self._name(peer)} alive for {self.network.now - since:.1f} s")

    def _is_apart(self, one: Machine, other: Machine) -> bool:
        return any(cut.touches(one.number, other.number) for cut in self.network.links.cuts)

    # -- in the end

    def disagreements(self) -> list[str]:
        """Where somebody who lives does not believe the truth about somebody else."""
        wrong = []
        honest = [machine for machine in self.network.machines if machine.number not in self._evil]
        for observer in honest:
            if observer.host is None:
                continue
            believed = self._seen[observer.number].believed
            for peer, subject in self._machine_of.items():
                if subject is not observer and subject.number not in self._evil:
                    wrong += self._wrong(observer, believed.get(peer), peer, subject)
        return wrong

    def _wrong(
        self, observer: Machine, belief: tuple[State, Claim] | None, peer: bytes, subject: Machine
    ) -> Iterable[str]:
        says = f"{observer.number} believes {belief[0].name if belief else 'nothing'} of {self._name(peer)}"
        if subject.host is None:
            if belief is not None and belief[0] in (State.ALIVE, State.SUSPECT):
                yield f"{says}, which is gone"
        elif belief is None or belief[0] is not State.ALIVE:
            yield f"{says}, which lives"
        elif belief[1] != subject.host.claim:
            yield f"{says} by {belief[1].rank}, and it claims {subject.host.claim.rank}"
        elif observer.host is not None and observer.host.disk.book.address_of(peer) != subject.address:
            yield f"{says} at another address than it has"

    def _name(self, peer: bytes) -> str:
        machine = self._machine_of.get(peer)
        return peer.hex()[:8] if machine is None else str(machine.number)

    def _break(self, machine: Machine, what: str) -> None:
        raise LawBroken(f"at {self.network.now:.3f} s: {machine.number} {what}")


def _between(one: frozenset[int], other: frozenset[int], a: int, b: int) -> bool:
    return (a in one and b in other) or (b in one and a in other)
