"""Processes that another command started: are they there, and signals to them.

Law: pids are used again, so a process is the one that was meant only if its command line has the mark that it was
started with; nobody else is ever signalled.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Literal

import psutil

if TYPE_CHECKING:
    from collections.abc import Collection

State = Literal["running", "frozen", "dead"]

_POLL_S = 0.02


def state(pid: int, mark: str) -> State:
    """`mark`: an argument that no other process has.  One that ended and that nobody waited for is dead too."""
    try:
        process = psutil.Process(pid)
        if mark not in process.cmdline():
            return "dead"
        status = process.status()
    except psutil.Error:
        return "dead"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "dead"
    return "frozen" if status == psutil.STATUS_STOPPED else "running"


def children(marks: Collection[str]) -> list[tuple[int, str]]:
    """Those of this process whose command line has one of the marks, and which."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            command = child.cmdline()
            found += [(child.pid, mark) for mark in marks if mark in command]
    return found


def memory(pid: int) -> int:
    """Resident bytes; 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def send(pid: int, mark: str, number: signal.Signals) -> bool:
    """False if the process is dead."""
    if state(pid, mark) == "dead":
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).send_signal(number)
    return True


def end(processes: Collection[tuple[int, str]], grace_s: float) -> int:
    """Ends them all, also frozen ones; those that take longer than `grace_s` are killed.  How many there were."""
    there = [each for each in processes if send(*each, signal.SIGCONT)]
    for each in there:  # not while it is frozen, when any of its threads might get the signal
        send(*each, signal.SIGTERM)
    if not _gone(there, grace_s):
        for each in there:
            send(*each, signal.SIGKILL)
        _gone(there, grace_s)
    return len(there)


def _gone(processes: Collection[tuple[int, str]], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(state(*each) != "dead" for each in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
