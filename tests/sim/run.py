"""Run: plays a scenario from its seed to its end, and gives an account of it.

Law: after the last trouble everything heals, and within the stated time everybody who lives agrees about everybody.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from node.profile import LAN, Profile
from tests.sim import dice, trials
from tests.sim.host import Changed, Disk, Host, Membership
from tests.sim.laws import LawBroken, Laws
from tests.sim.links import Cut, Links
from tests.sim.network import Network, Watcher
from tests.sim.notary import Notary
from tests.sim.table import Table
from tests.sim.troubles import (
    Arrival,
    ClockStep,
    Crash,
    Evil,
    Leave,
    Pause,
    Slow,
    Split,
    Storm,
    Trouble,
)
from tests.sim.troubles import (
    Disk as Kept,
)
from tests.sim.villain import Villain, Wiretap

if TYPE_CHECKING:
    from tests.sim.machine import Machine
    from tests.sim.trials import Scenario

# The bounds that a run is held to, LAN profile.  The dead are told so every ten seconds, and whoever lives answers at
# once; what gossip missed comes by a push-pull, one in thirty seconds, and four of them may be needed.
DEAD_S_MAX = 30.0
SETTLE_S_MAX = 120.0
LOOK_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    broken: str | None
    settled_s: float | None  # after the last trouble
    longest_dead_s: float
    steps: int
    digest: str
    story: tuple[str, ...] = ()


@dataclass(slots=True)
class Trace(Watcher):
    """Everything that happened, as one hash; and the turns of belief in words."""

    machine_of: dict[bytes, int]
    tells: bool
    steps: int = 0
    story: list[str] = field(default_factory=list)
    _hash: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def sent(self, machine: Machine, address: int, datagram: Any) -> None:
        """An item's signature says all of it."""
        message = datagram.message
        line = f"{machine.now!r} {machine.number} > {address} {type(message).__name__} {getattr(message, 'nonce', 0)} "
        self._hash.update(line.encode() + b"".join(item.signature for item in message.gossip))

    def stepped(self, machine: Machine, kind: str, content: Any, effects: list[Any]) -> None:
        self.steps += 1
        self._hash.update(f"{machine.now!r} {machine.number} {kind} {len(effects)} ".encode())
        for effect in effects:
            if isinstance(effect, Changed):
                self._turn(machine, effect)

    def _turn(self, machine: Machine, effect: Changed) -> None:
        about = self.machine_of.get(effect.peer, effect.peer.hex()[:8])
        before = "-" if effect.before is None else effect.before.name
        line = f"{machine.now:9.3f}  {machine.number} about {about}: {before} -> {effect.after.name}"
        self._hash.update(f"{line} {effect.incarnation}".encode())
        if self.tells and effect.before is not effect.after:
            self.story.append(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Run:
    """One scenario.  `core`: the class under test, so that a broken one can be tried."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        core: type[Membership] = Membership,
        profile: Profile = LAN,
        tells: bool = False,
        dead_s_max: float = DEAD_S_MAX,
        real_records: bool = False,
    ) -> None:
        self.scenario = scenario
        self.notary = Notary()
        self.laws = Laws(self.notary, dead_s_max, scenario.evil)
        self.trace = Trace({}, tells)
        self.tap = Wiretap()
        links = Links(scenario.seed, scenario.quality, scenario.islands, scenario.between_s)
        self.network = Network(links, (self.trace, self.tap, self.laws))
        self.laws.network = self.network
        self._core = core
        self._profile = profile
        self._starts = 0
        self._real_records = real_records
        self._pens = [self.notary.pen(f"{scenario.seed} {number}") for number in range(scenario.hosts)]
        for number, pen in enumerate(self._pens):
            machine = self.network.add()
            machine.skew_s = scenario.skews_s[number]
            self.laws.knows(machine, pen.peer)
            self.trace.machine_of[pen.peer] = number

    def play(self) -> Outcome:
        broken, settled_s = None, None
        try:
            self._enter_all()
            self._look()
            self.network.agenda.run_until(self.scenario.ends_s)
            self._heal()
            settled_s = self._settle()
        except LawBroken as error:
            broken = str(error)
        return Outcome(
            self.scenario.seed,
            broken,
            settled_s,
            self.laws.longest_dead_s,
            self.trace.steps,
            self.trace.digest,
            tuple(self.trace.story),
        )

    def _enter_all(self) -> None:
        for number, at_s in self.scenario.starts_s.items():
            self.network.agenda.at(at_s, self._start, number, None)
        for trouble in self.scenario.troubles:
            self.network.agenda.at(trouble.at_s, self._begin, trouble)

    def _look(self) -> None:
        self.laws.look()
        self.network.agenda.after(LOOK_PERIOD_S, self._look)

    def _heal(self) -> None:
        """Troubles end by themselves; this is for what a trouble without an end has left."""
        self.network.links.quality = self.scenario.quality
        self.trace.story.append(f"{self.network.now:9.3f}  all troubles have ended")

    def _settle(self) -> float:
        began_s = self.network.now
        while True:
            self.network.agenda.run_until(self.network.now + LOOK_PERIOD_S)
            wrong = self.laws.disagreements()
            if not wrong:
                return self.network.now - began_s
            if self.network.now - began_s > SETTLE_S_MAX:
                raise LawBroken(
                    f"after {SETTLE_S_MAX:.0f} s of peace {len(wrong)} beliefs are wrong: {'; '.join(wrong[:4])}"
                )

    # -- processes

    def _start(self, number: int, disk: Disk | None) -> None:
        self._starts += 1
        luck = dice.stream(self.scenario.seed, "node", number, self._starts)
        seeds = tuple(self.network.machines[seed].address for seed in self.scenario.seeds[number])
        if disk is None and self._real_records:
            disk = Disk(0, Table(self.notary))
        host = Host(self._pens[number], self.notary, luck, seeds=seeds, disk=disk, profile=self._profile)
        host.core_class = self._core
        self.network.machines[number].start(host)

    # -- troubles

    def _begin(self, trouble: Trouble) -> None:
        self.trace.story.append(f"{self.network.now:9.3f}  {trouble}")
        machine = self.network.machines[trouble.host] if hasattr(trouble, "host") else None
        match trouble:
            case Arrival(host=host):
                self._start(host, None)
            case ClockStep(by_s=by_s) if machine:
                machine.skew_s += by_s
            case Pause() if machine:
                machine.pause()
                self._later(trouble, machine.go_on)
            case Slow(blocked_s=blocked_s, open_s=open_s, host=host) if machine:
                machine.slow_down(dice.stream(self.scenario.seed, "slow", host, repr(trouble)), blocked_s, open_s)
                self._later(trouble, machine.speed_up)
            case Crash() if machine:
                self._crash(trouble, machine)
            case Leave() if machine:
                self._leave(trouble, machine)
            case Split():
                self._split(trouble)
            case Storm(quality=quality):
                self.network.links.quality = quality
                self._later(trouble, self._calm)
            case Evil(host=host, malice=malice) if machine:
                luck = dice.stream(self.scenario.seed, "evil", host, malice.name)
                Villain(self.network, machine, self.notary, self.tap, luck).begin(malice, trouble.until_s)

    def _later(self, trouble: Trouble, act: Any, *arguments: Any) -> None:
        if not math.isinf(trouble.for_s):
            self.network.agenda.at(trouble.until_s, act, *arguments)

    def _calm(self) -> None:
        self.network.links.quality = self.scenario.quality

    def _crash(self, trouble: Crash, machine: Machine) -> None:
        host = self.network.stop(machine)
        if host is None:
            return
        disk = host.disk if trouble.disk is Kept.WHOLE else None
        if disk is None:
            self.laws.wiped(machine)
        self._later(trouble, self._back, machine, disk, trouble.moves)

    def _back(self, machine: Machine, disk: Disk | None, moves: bool) -> None:
        if moves:
            self.network.move(machine)
        self._start(machine.number, disk)

    def _leave(self, trouble: Leave, machine: Machine) -> None:
        if machine.host is None:
            return
        disk = machine.host.disk
        machine.take("leave", None)
        self._later(trouble, self._return, machine, disk)

    def _return(self, machine: Machine, disk: Disk) -> None:
        """Whoever has not yet said all that it wanted to is cut short."""
        self.network.stop(machine)
        self._start(machine.number, disk)

    def _split(self, trouble: Split) -> None:
        cuts = [Cut(trouble.sources, trouble.targets)]
        if trouble.both_ways:
            cuts.append(Cut(trouble.targets, trouble.sources))
        self.network.links.cuts += cuts
        self._later(trouble, self._unite, cuts)

    def _unite(self, cuts: list[Cut]) -> None:
        for cut in cuts:
            self.network.links.cuts.remove(cut)
        self.laws.healed(cuts[0].sources, cuts[0].targets)


def play(seed: int) -> Outcome:
    """Whatever goes wrong is this seed's; `make sim SEED=...` shows where."""
    try:
        return Run(trials.draw(seed)).play()
    except Exception as error:  # noqa: BLE001 - a core that raises is a failure with a seed, like a law that breaks
        return Outcome(seed, f"{type(error).__name__}: {error}", None, 0.0, 0, "")
