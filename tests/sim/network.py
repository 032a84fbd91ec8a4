"""Network: machines, the links between them, and the agenda that moves them.

Law: everything that happens is an entry of one agenda, and every drop of luck comes from one seed; whoever watches sees
each step, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.sim.agenda import Agenda
from tests.sim.machine import Machine

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.links import Links

# The wall clock at the beginning of each run: 2026-01-01 UTC.
EPOCH_S = 1_767_225_600.0
# TCP and TLS take so many round trips before a push-pull begins.
HANDSHAKE_ROUND_TRIPS = 3


class Watcher:
    """Sees every step, and does nothing about it."""

    def sent(self, machine: Machine, address: int, datagram: Any) -> None: ...

    def stepped(self, machine: Machine, kind: str, content: Any, effects: list[Any]) -> None: ...

    def stopped(self, machine: Machine) -> None: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One end of a push-pull.  `process`: the one that waits for the answer, on the machine `caller`."""

    caller: int
    process: Host
    content: Any


class Network:
    def __init__(self, links: Links, watchers: tuple[Watcher, ...] = ()) -> None:
        self.agenda = Agenda()
        self.links = links
        self.machines: list[Machine] = []
        self.watchers = watchers
        self._at: dict[int, Machine] = {}  # by address
        self._moved = 0

    @property
    def now(self) -> float:
        return self.agenda.now

    def wall_s(self, skew_s: float) -> float:
        return EPOCH_S + self.agenda.now + skew_s

    def add(self) -> Machine:
        machine = Machine(self, len(self.machines))
        self.machines.append(machine)
        self._at[machine.address] = machine
        return machine

    def stop(self, machine: Machine) -> Host | None:
        for watcher in self.watchers:
            watcher.stopped(machine)
        return machine.stop()

    def move(self, machine: Machine) -> None:
        """To an address that nobody had."""
        del self._at[machine.address]
        self._moved -= 1
        machine.address = self._moved
        self._at[machine.address] = machine

    def send(self, machine: Machine, address: int, datagram: Any) -> None:
        for watcher in self.watchers:
            watcher.sent(machine, address, datagram)
        target = self._at.get(address)
        delays_s = self.links.delays_s(machine.number, -1 if target is None else target.number)
        if target is not None:
            for delay_s in delays_s:
                self.agenda.after(delay_s, target.arrive, "receive", datagram)

    # -- push-pull: an exchange that arrives as a whole, or not at all

    def call(self, machine: Machine, address: int, content: Any) -> None:
        target = self._at.get(address)
        if target is None or self._is_cut(machine, target):
            return
        assert machine.host is not None
        call = Call(machine.number, machine.host, content)
        way_s = self.links.way_s(machine.number, target.number)
        self.agenda.after(way_s * (1 + 2 * HANDSHAKE_ROUND_TRIPS), self._arrive, machine, target, "asked", call)

    def reply(self, machine: Machine, call: Call, content: Any) -> None:
        target = self.machines[call.caller]
        answer = Call(call.caller, call.process, content)
        self.agenda.after(
            self.links.way_s(machine.number, target.number), self._arrive, machine, target, "answered", answer
        )

    def _arrive(self, source: Machine, target: Machine, kind: str, call: Call) -> None:
        """Nobody is told of a failure: membership has no event for it, and asks again by itself."""
        if not self._is_cut(source, target) and (kind == "asked" or target.host is call.process):
            target.arrive(kind, call)

    def _is_cut(self, one: Machine, other: Machine) -> bool:
        cuts = self.links
        return bool(cuts.cuts) and (cuts.is_cut(one.number, other.number) or cuts.is_cut(other.number, one.number))
