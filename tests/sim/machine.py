"""Machine: a computer that a node runs on.  It can be off, paused (SIGSTOP), or slow as Lifeguard's paper has it.

Law: a paused process does nothing, and finds what the socket's buffer held when it goes on; a slow one's timers run,
but what it receives and what it sends waits while it is blocked.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

    from tests.sim.host import Host
    from tests.sim.network import Call, Network

# What a socket's buffer holds of datagrams: 208 KiB, Linux's default, of 1,200 bytes with the kernel's overhead.
BUFFERED_MAX = 128


class Machine:
    """`number` is also its address until it moves.  `host` is None while no process runs."""

    __slots__ = (
        "_blocked",
        "_in",
        "_network",
        "_out",
        "_slow_run",
        "_tick_at",
        "address",
        "calm_since_s",
        "host",
        "number",
        "paused",
        "skew_s",
        "slow",
    )

    def __init__(self, network: Network, number: int) -> None:
        self._network = network
        self.number = number
        self.address = number
        self.host: Host | None = None
        self.paused = 0  # pauses may overlap
        self.slow = 0
        self.skew_s = 0.0
        self.calm_since_s = 0.0  # nothing was wrong with it since then
        self._blocked = False
        self._slow_run = 0
        self._tick_at: float | None = None
        self._in: deque[tuple[str, Any]] = deque()
        self._out: list[tuple[int, Any]] = []

    @property
    def now(self) -> float:
        return self._network.now

    @property
    def is_well(self) -> bool:
        return self.host is not None and not self.paused and not self.slow and not self.host.leaving

    def wall_s(self) -> float:
        return self._network.wall_s(self.skew_s)

    # -- power

    def start(self, host: Host) -> None:
        assert self.host is None
        self.host = host
        self.calm_since_s = self.now
        self._carry_out("start", None, host.start(self))

    def stop(self) -> Host | None:
        """Without a word."""
        gone, self.host = self.host, None
        self._tick_at = None
        self._in.clear()
        self._out.clear()
        return gone

    # -- troubles

    def pause(self) -> None:
        self.paused += 1

    def go_on(self) -> None:
        """The timers that passed are seen before the messages that wait: the worse order of the two."""
        self.paused -= 1
        self.calm_since_s = self.now
        if self.host is not None and not self.paused:
            self._tick(self.host)
            self._catch_up()

    def slow_down(self, luck: random.Random, blocked_s: float, open_s: float) -> None:
        self.slow += 1
        self._slow_run += 1
        self._block(self._slow_run, luck, blocked_s, open_s)

    def speed_up(self) -> None:
        self.slow -= 1
        self.calm_since_s = self.now
        if not self.slow:
            self._slow_run += 1
            self._unblock()

    def _block(self, run: int, luck: random.Random, blocked_s: float, open_s: float) -> None:
        if run == self._slow_run:
            self._blocked = True
            self._network.agenda.after(luck.expovariate(1 / blocked_s), self._open, run, luck, blocked_s, open_s)

    def _open(self, run: int, luck: random.Random, blocked_s: float, open_s: float) -> None:
        if run == self._slow_run:
            self._unblock()
            self._network.agenda.after(luck.expovariate(1 / open_s), self._block, run, luck, blocked_s, open_s)

    def _unblock(self) -> None:
        self._blocked = False
        self._catch_up()

    def _catch_up(self) -> None:
        if self.paused or self._blocked:
            return
        waiting, self._out = self._out, []
        for address, datagram in waiting:
            self._network.send(self, address, datagram)
        while self._in and not (self.paused or self._blocked) and self.host is not None:
            self.take(*self._in.popleft())

    # -- what a process does

    def arrive(self, kind: str, content: Any) -> None:
        """A datagram or one end of a push-pull; `kind` names the host's method that takes it."""
        if self.host is None:
            return
        if not (self.paused or self._blocked):
            self.take(kind, content)
        elif len(self._in) < BUFFERED_MAX:
            self._in.append((kind, content))

    def take(self, kind: str, content: Any) -> None:
        host = self.host
        assert host is not None
        self._carry_out(kind, content, getattr(host, kind)(content, self._network.agenda.now))

    def send(self, address: int, datagram: Any) -> None:
        if self._blocked:
            self._out.append((address, datagram))
        else:
            self._network.send(self, address, datagram)

    def call(self, address: int, content: Any) -> None:
        self._network.call(self, address, content)

    def reply(self, call: Call, content: Any) -> None:
        self._network.reply(self, call, content)

    def _carry_out(self, kind: str, content: Any, effects: list[Any]) -> None:
        host, network = self.host, self._network
        assert host is not None
        for effect in effects:
            host.perform(effect)
        for watcher in network.watchers:
            watcher.stepped(self, kind, content, effects)
        if host.leaving and host.has_gone:
            network.stop(self)
            return
        deadline = host.deadline
        if deadline is not None and (self._tick_at is None or deadline < self._tick_at):
            self._tick_at = max(deadline, network.now)
            network.agenda.at(deadline, self._tick, host)

    def _tick(self, host: Host) -> None:
        """Deadlines move, so one that was entered may come early: then it only enters the next."""
        if host is not self.host or self.paused:
            return
        now = self._network.agenda.now
        if self._tick_at is not None and self._tick_at <= now:
            self._tick_at = None
        deadline = host.deadline
        if deadline is not None and deadline <= now:
            self.take("tick", None)
        elif deadline is not None and self._tick_at is None:
            self._tick_at = deadline
            self._network.agenda.at(deadline, self._tick, host)
