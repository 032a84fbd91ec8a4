"""The node's process: load, listen, serve, and leave cleanly.

Law: a signal ends running answers with a typed error, frees everything in reverse order, and the exit code says which
signal it was; a second one does not wait.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING

import trio

from coordinator.admission import Admission
from node import log, model, presence, status
from node.bridge import Portal, in_thread
from node.gate import Gate
from node.generate import Door
from node.server import Server
from protos.errors import ShuttingDown
from protos.ids import PeerId

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.config import Config
    from node.model import Model, Progress

    Ready = Callable[[str, str], None]

# CPython's default of 5 ms is how long a thread that wants to run may wait for one that computes in Python; it shows up
# in every hop between the worker, trio and gRPC.
SWITCH_INTERVAL_S = 0.0005
# Answers that were told to end get so long to tell their clients.
GRACE_S = 5.0


def serve(
    config: Config, ready: Ready, progress: Progress, *, announce: bool = True, until_stdin_closes: bool = False
) -> int:
    """Runs the node until a signal; gives the exit code.  `ready` hears (address, model id) once it listens.

    `until_stdin_closes`: for a node that a command started for itself, so that it cannot outlive that command.
    Raises what model.load does, and PortInUse.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        return trio.run(_main, config, ready, progress, announce, until_stdin_closes)
    except BaseExceptionGroup as group:
        raise _only(group) from None


def _only(group: BaseExceptionGroup) -> BaseException:
    """A nursery wraps what its block raised; here there is one block, so one reason."""
    first = group.exceptions[0]
    return _only(first) if isinstance(first, BaseExceptionGroup) else first


async def _main(config: Config, ready: Ready, progress: Progress, announce: bool, until_stdin_closes: bool) -> int:
    ended = _Ended()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, ended)
        if until_stdin_closes:
            nursery.start_soon(_watch_stdin, ended)
        served = None
        with ended.loading:
            served = await in_thread(partial(model.load, config, progress), abandon=True)
        if served is not None:
            try:
                await _serve(config, served, ready, announce, ended)
            finally:
                await in_thread(served.worker.shutdown)
        nursery.cancel_scope.cancel()
    return ended.exit_code


async def _serve(config: Config, served: Model, ready: Ready, announce: bool, ended: _Ended) -> None:
    gate = Gate(Admission(config.sessions_max, config.queue_max, config.queue_wait_s))
    peer = PeerId(f"node-{secrets.token_hex(8)}")
    door = Door(peer, served.manifest, served.text, served.worker, gate, config)
    async with trio.open_nursery() as answers:
        portal = Portal(answers, lambda: ShuttingDown("this node is shutting down"))
        server = Server(config, door, portal, lambda: served.worker.kv_bytes)
        address = _address(config.host, server.port)
        try:
            with presence.announced(address) if announce else contextlib.nullcontext():
                log.get("runtime").info("serving", address=address, model=served.manifest.model_id, peer=peer)
                ready(address, served.manifest.model_id)
                await ended.asked.wait()
        finally:
            log.get("runtime").info("leaving", sessions=gate.running)
            door.leave()
            await in_thread(partial(server.stop, GRACE_S))
            portal.close()
            answers.cancel_scope.cancel()


class _Ended:
    """That the process was asked to end, and how.  Running answers are not cancelled by it: they are told."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.loading = trio.CancelScope()
        self.exit_code = status.EXIT_OK

    def end(self, exit_code: int) -> None:
        if self.asked.is_set():
            os._exit(exit_code)  # asked twice: nothing that is left is worth waiting for
        self.exit_code = exit_code
        self.asked.set()
        self.loading.cancel()


async def _watch_signals(ended: _Ended, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            ended.end(status.EXIT_INTERRUPTED if number == signal.SIGINT else status.EXIT_OK)


async def _watch_stdin(ended: _Ended) -> None:
    """os.read, because a thread left inside sys.stdin would hold its lock when the interpreter ends."""
    while await in_thread(partial(os.read, 0, 4096), abandon=True):
        continue
    ended.end(status.EXIT_OK)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
