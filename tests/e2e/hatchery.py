"""A process that has imported what a node imports, and forks nodes: each one then runs within a fraction of a second.

Run as a script: one JSON order a line on stdin, one JSON report a line on stdout.  Law: it starts no thread, so that a
fork is a clean start; a child has a session of its own; when stdin closes, every child that still runs is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import sys
from typing import Any

import psutil

CLONE_NEWNET = 0x40000000
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe", "llama")


class Hatchery:
    """Forks on order, reaps on SIGCHLD."""

    def __init__(self) -> None:
        self._children: set[int] = set()
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._fds = (self._wake, wake)

    def serve(self) -> None:
        """Until stdin closes."""
        pending = b""
        while True:
            ready, _, _ = select.select([0, self._wake], [], [])
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._reap()
            if 0 in ready:
                more = os.read(0, 65536)
                if not more:
                    return self._kill()
                *lines, pending = (pending + more).split(b"\n")
                for line in lines:
                    self._start(json.loads(line))

    def _start(self, order: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd in self._fds:
                os.close(fd)
            _become(order)
        self._children.add(pid)
        _say(started=order["number"], pid=pid)

    def _reap(self) -> None:
        for pid in list(self._children):
            with contextlib.suppress(ChildProcessError):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._children.discard(pid)
                    _say(ended=pid, exit_code=os.waitstatus_to_exitcode(status))

    def _kill(self) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _say(**report: Any) -> None:
    os.write(1, json.dumps(report).encode() + b"\n")


def _become(order: dict[str, Any]) -> None:
    """Turns this fork into the node that the order describes; never returns."""
    exit_code = 1
    try:
        os.setsid()
        if order["namespace"]:
            _move(order["namespace"])
        _redirect(order["folder"])
        os.chdir(order["folder"])
        os.environ.update(order["environment"])
        if order["deeds"]:
            importlib.import_module("deeds").install(order["deeds"])
        sys.argv = ["shoal", *order["arguments"]]
        importlib.import_module("node.cli").main()
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (the fork must not go on as a hatchery, whatever happens)
        importlib.import_module("traceback").print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(exit_code)


def _move(namespace: str) -> None:
    """Into the network namespace of that name: Python has os.setns from 3.12 on."""
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    os.close(fd)


def _redirect(folder: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for fd, path in ((1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def main() -> None:
    for name in ("node.cli", "node.runtime", "node.show", "transformers.generation.configuration_utils"):
        importlib.import_module(name)
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert psutil.Process().num_threads() == 1, "a fork would take half of what runs here"
    _say(ready=True)
    Hatchery().serve()


if __name__ == "__main__":
    main()
