"""Machines on one LAN, without machines: network namespaces, joined by a bridge that carries multicast.

Law: the switch and its cables are in namespaces too, so nothing of this machine's own network is touched or reached;
names carry this process's id; what was started or made ends with the block, also after a failure, and what a killed
run has left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MACHINES_MAX = 32
COMMAND_S = 20.0
END_S = 10.0
NETWORK = "10.77.0"  # inside the namespaces only: any number of LANs may use it at a time

_PREFIX = "shoal-lan-"
_NAME = re.compile(_PREFIX + r"(\d+)-\d+-\w+")
_PR_SET_PDEATHSIG = 1
_numbers = itertools.count()


class NoNamespaces(Exception):  # noqa: N818  (a reason, as in tests/deploy)
    """Why there can be none here."""


def require() -> None:
    """Raises NoNamespaces unless this machine lets us make them."""
    if sys.platform != "linux":
        raise NoNamespaces("they are Linux's")
    if os.geteuid() != 0:
        raise NoNamespaces("only root may make them")
    if shutil.which("ip") is None:
        raise NoNamespaces("there is no `ip` here: install iproute2")
    name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}-probe"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", "end")
        _ip("-n", name, "link", "add", "switch", "type", "bridge")
    except (subprocess.SubprocessError, OSError) as error:
        raise NoNamespaces(f"the kernel refuses: {error}") from None
    finally:
        _remove(name)


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace: `lo`, and `eth0` with `address`, on the LAN."""

    name: str
    address: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list, compare=False)

    def start(
        self,
        command: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Its pid is the command's own.  It is killed with the thread that starts it, or with the block: start it from
        the tests' main thread."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=None if environment is None else dict(os.environ) | dict(environment),
            cwd=folder,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  (one system call, no lock)
        )
        self.started.append(process)
        return process

    def run(self, *command: str) -> str:
        """Its stdout.  Raises CalledProcessError, TimeoutExpired."""
        whole = ["ip", "netns", "exec", self.name, *command]
        return subprocess.run(whole, check=True, capture_output=True, text=True, timeout=COMMAND_S).stdout

    def pids(self) -> list[int]:
        """Of all that runs in it."""
        return [int(word) for word in _ip("netns", "pids", self.name).split()]

    def unplug(self) -> None:
        """Its cable is out: nothing comes in or goes out."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def plug(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")

    def limit(self, rate: str) -> None:
        """What it sends takes its time, such as 1mbit."""
        self.run(*f"tc qdisc replace dev eth0 root tbf rate {rate} burst 32kb latency 400ms".split())


class Lan:
    """So many machines on one bridge; use as a context manager.  No machine has a way out of the LAN."""

    def __init__(self, count: int) -> None:
        assert 1 <= count <= MACHINES_MAX
        stem = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self._switch = f"{stem}-switch"
        self.machines = [Machine(f"{stem}-{n}", f"{NETWORK}.{n + 1}") for n in range(count)]

    def __enter__(self) -> Self:
        remove_left_behind()
        try:
            self._make_switch()
            for number, machine in enumerate(self.machines):
                self._make(machine, number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            for process in machine.started:  # one that has just begun may not be in its namespace yet
                if process.poll() is None:
                    process.kill()
            _remove(machine.name)
        _remove(self._switch)

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number]

    def _make_switch(self) -> None:
        """Without snooping: a bridge that waits for a querier would lose the first multicasts."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
        _ip("-n", self._switch, "link", "set", "switch", "up")

    def _make(self, machine: Machine, number: int) -> None:
        port = f"port{number}"
        _ip("netns", "add", machine.name)
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
        _ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
        _ip("-n", machine.name, "link", "set", "lo", "up")
        _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "brd", "+", "dev", "eth0")
        _ip("-n", machine.name, "link", "set", "eth0", "up")


def remove_left_behind() -> None:
    """What is named after a process that no longer runs."""
    for name in _names():
        owner = int(_NAME.fullmatch(name)[1])  # type: ignore[index]
        if owner != os.getpid() and not Path(f"/proc/{owner}").exists():
            _remove(name)


def _names() -> Iterator[str]:
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        if _NAME.fullmatch(name):
            yield name


def _remove(name: str) -> None:
    """Ends what runs in it, by process id, and then the namespace, with its cables."""
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        for pid in [int(word) for word in _ip("netns", "pids", name).split()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode:
        raise subprocess.SubprocessError(f"`ip {' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout


_libc = ctypes.CDLL(None, use_errno=True)


def _end_with_parent() -> None:
    """In the child, before it becomes the command: also where the tests are killed, nothing is left running."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
