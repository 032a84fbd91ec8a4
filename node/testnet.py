"""Nodes on this machine that form a network of their own: started together, ready together, ended together.

Law: whatever fails, or interrupts, a start ends all nodes of it; logs stay.  A node is found again by its pid and by
its key's path in its command line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from node import child, process, status
from node.client import Client
from node.identity import Identity
from node.testnet_state import Member
from protos.errors import BrokenInvariant, DeadlineExceeded, InvalidRequest, ShoalError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.progress import Report
    from node.topology import Place

START_S: Final = 180.0
"""Until all nodes serve: they load torch side by side."""
MEET_S: Final = 30.0
"""From then on, until each sees all others."""
END_S: Final = 10.0

LOG_LINES_SHOWN: Final = 8
_SEEDS = 2
_POLL_S = 0.1
_INFO_S = 2.0
_KV_BYTES_MIN = 64 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What all nodes are told alike."""

    store: Path
    model: str
    attached: bool = False  # they end when this process does, and nobody else finds them


class Testnet:
    """`launch` makes a node's command line; tests give another."""

    def __init__(
        self, members: Sequence[Member], launch: Callable[[Member, Sequence[str]], list[str]], *, attached: bool = False
    ) -> None:
        """`members` as `planned` gives them; nothing is started yet."""
        self.members = list(members)
        self._launch = launch
        self._attached = attached
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._clients: dict[int, Client] = {}

    def start(self, started: Callable[[Member], None] = lambda _: None) -> None:
        """Starts the processes; `started` hears of each at once, with its pid."""
        for place, member in enumerate(self.members):
            seeds = [other.where for other in self.members[:_SEEDS] if other is not member]
            with Path(member.log).open("wb") as log:
                running = child.start(
                    self._launch(member, seeds),
                    stdin=subprocess.PIPE if self._attached else subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self._children[member.number] = running
            self.members[place] = replace(member, pid=running.pid)
            started(self.members[place])

    def wait_ready(self, report: Report, start_s: float = START_S, meet_s: float = MEET_S) -> None:
        """Until every node sees every other alive.  Raises what ended a node, or DeadlineExceeded."""
        count = len(self.members)
        self._wait(lambda: sum(map(self._serves, self.members)), count, "starting nodes", report, start_s)
        pairs = count * (count - 1)
        self._wait(lambda: sum(map(self._seen, self.members)), pairs, "nodes get to know each other", report, meet_s)

    def ended(self) -> list[Member]:
        """Those whose process ended by itself."""
        return [member for member in self.members if self._exit_code(member) is not None]

    def client(self, member: Member) -> Client:
        """Of that node and no other; stays open until `end`."""
        if member.number not in self._clients:
            self._clients[member.number] = Client(member.where)
        return self._clients[member.number]

    def kill(self, member: Member) -> None:
        """As a crash: nothing is said to anybody."""
        running = self._children[member.number]
        running.kill()
        running.wait()

    def end(self, grace_s: float = END_S) -> None:
        """Ends what still runs."""
        self._hang_up()
        noted = [(member.pid, member.key) for member in self.members if member.pid]
        # An interrupt may come between a node's start and the note of its pid.
        noted += process.children([member.key for member in self.members if not member.pid])
        process.end(noted, grace_s)
        for running in self._children.values():
            if running.stdin is not None:
                running.stdin.close()
            running.wait()

    def leave(self) -> None:
        """They go on without this process."""
        self._hang_up()
        for running in self._children.values():
            running.returncode = 0  # or its destructor would warn that it still runs

    def _hang_up(self) -> None:
        for client in self._clients.values():
            client.close()

    def _wait(self, done: Callable[[], int], total: int, what: str, report: Report, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        report(what, 0, total)
        while (now := done()) < total:
            report(what, now, total)
            self._check_alive()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{what}: {now} of {total} after {within_s:g} s; the logs say more")
            time.sleep(_POLL_S)
        report(what, total, total)

    def _check_alive(self) -> None:
        for member in self.members:
            if (exit_code := self._exit_code(member)) is not None:
                raise _ended(member, exit_code)

    def _exit_code(self, member: Member) -> int | None:
        running = self._children.get(member.number)
        return None if running is None else running.poll()

    def _serves(self, member: Member) -> bool:
        with contextlib.suppress(Unavailable):
            return bool(self.client(member).info(_INFO_S).model_id)
        return False

    def _seen(self, member: Member) -> int:
        """How many of the others it sees alive."""
        with contextlib.suppress(Unavailable):
            alive = {peer.peer_id for peer in self.client(member).peers(_INFO_S).peers if peer.state == "alive"}
            return len(alive & {other.peer for other in self.members})
        return 0


def planned(folder: Path, places: Sequence[Place], ports: Sequence[int]) -> list[Member]:
    """The nodes to be; their keys are made."""
    members = []
    for number, (place, port) in enumerate(zip(places, ports, strict=True), 1):
        key = folder / f"node-{number}.key"
        identity = Identity.create()
        identity.save(key)
        log = str(folder / f"node-{number}.log")
        members.append(Member(number, 0, f"127.0.0.1:{port}", identity.peer, place.hold, place.zone, str(key), log))
    return members


def command(options: Options, nodes: int) -> Callable[[Member, Sequence[str]], list[str]]:
    """How a node of so many is started: they share the machine's cores and memory."""
    threads = max(1, (os.cpu_count() or 1) // nodes)
    kv_bytes = max(psutil.virtual_memory().available // (4 * nodes), _KV_BYTES_MIN)

    def of(member: Member, seeds: Sequence[str]) -> list[str]:
        host, _, port = member.address.rpartition(":")
        given = [("host", host), ("port", port), ("advertise", member.address), ("identity", member.key)]
        given += [("store", str(options.store)), ("model", options.model), ("zone", member.zone)]
        given += [("threads", str(threads)), ("kv-limit", str(kv_bytes)), ("clients", "loopback")]
        given += [("hold", what) for what in member.hold] + [("join", seed) for seed in seeds]
        flags = [part for name, value in given for part in (f"--{name}", value)]
        return child.run_command(*flags, *(["--attached"] if options.attached else []))

    return of


def log_end(member: Member) -> list[str]:
    """The last lines of its log."""
    with contextlib.suppress(OSError), Path(member.log).open(errors="replace") as log:
        return [line.rstrip() for line in deque(log, LOG_LINES_SHOWN)]
    return []


def _ended(member: Member, exit_code: int) -> ShoalError:
    """The family that the node's own exit code means."""
    text = f"node {member.number} ended with exit code {exit_code} before it was ready; its log is {member.log}"
    if exit_code == status.EXIT_REMOTE:
        return InvalidRequest(text)
    return BrokenInvariant(text) if exit_code == status.EXIT_LOCAL else Unavailable(text)
