"""The node's process: load, join, serve, and leave cleanly.

Law: a signal ends running answers with a typed error, frees everything in reverse order, and the exit code says which
signal it was; a second one does not wait.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING

import trio

from coordinator.admission import Admission
from coordinator.view import Load
from node import log, model, presence, status
from node import profile as profiles
from node.bridge import Portal, in_thread
from node.capacity import Capacity
from node.expert_service import ExpertService
from node.gate import Gate
from node.generate import Door
from node.hello import caller_of
from node.inference_service import Clients, InferenceService, software_version
from node.peers import About, Peers, Places
from node.peers_service import PeersService
from node.sizes import Sizes
from node.stage_host import StageHost
from node.stage_service import Lanes, StageServices
from protos import inference_pb2, stage_pb2
from protos.errors import ShuttingDown
from protos.ids import PeerId

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from node.config import Config
    from node.contact import Status
    from node.model import Model, Progress
    from node.profile import Profile
    from node.wire import Wire

    Ready = Callable[[str, str], None]

# CPython's default of 5 ms is how long a thread that wants to run may wait for one that computes in Python; it shows up
# in every hop between the worker, trio and gRPC.
SWITCH_INTERVAL_S = 0.0005
# Answers that were told to end get so long to tell their clients.
GRACE_S = 5.0


def serve(
    config: Config,
    wire: Wire,
    ready: Ready,
    progress: Progress,
    *,
    announce: bool = True,
    until_stdin_closes: bool = False,
) -> int:
    """Runs the node until a signal; gives the exit code.  `ready` hears (address, model id) once it serves.

    `until_stdin_closes`: for a node that a command started for itself, so that it cannot outlive that command.
    Closes `wire`.  Raises what model.load does.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        return trio.run(_main, config, wire, ready, progress, announce, until_stdin_closes)
    except BaseExceptionGroup as group:
        raise _only(group) from None


def _only(group: BaseExceptionGroup) -> BaseException:
    """A nursery wraps what its block raised; here there is one block, so one reason."""
    first = group.exceptions[0]
    return _only(first) if isinstance(first, BaseExceptionGroup) else first


async def _main(
    config: Config, wire: Wire, ready: Ready, progress: Progress, announce: bool, until_stdin_closes: bool
) -> int:
    ended = _Ended()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, ended)
        if until_stdin_closes:
            nursery.start_soon(_watch_stdin, ended)
        try:
            served = None
            with ended.loading:
                served = await in_thread(partial(model.load, config, progress, wire.port), abandon=True)
            if served is not None:
                _keep_for_good()
                try:
                    await _Node(config, wire, served).serve(ready, announce, ended)
                finally:
                    await in_thread(wire.leave)  # a layer that waits for another node must not hold up its thread
                    await in_thread(served.shutdown)
        finally:
            await in_thread(wire.close)
        nursery.cancel_scope.cancel()
    return ended.exit_code


def _keep_for_good() -> None:
    """What was imported and loaded stays: without this each full collection walks it, 0.3 s in which no thread runs."""
    gc.collect()
    gc.freeze()


class _Node:
    """What a node is once its model is loaded."""

    def __init__(self, config: Config, wire: Wire, served: Model) -> None:
        self._config = config
        self._wire = wire
        self._served = served
        self._sizes = Sizes(served.manifest)
        self.gate = Gate(Admission(config.sessions_max, config.queue_max, config.queue_wait_s))
        about = About(
            wire.address,
            wire.sha256,
            zone=config.zone,
            owner=config.owner,
            version=software_version(),
            sessions_max=config.sessions_max,
            kv_bytes_max=self._kv_bytes()[1],
            grant=wire.admission.grant,
        )
        self.peers = wire.peers = Peers(
            wire.identity,
            wire.admission.network,
            wire.links,
            wire.udp,
            wire.health,
            about,
            [served.holding.held(served.manifest)],
            places=Places(
                join=config.join,
                lan_host=config.host if config.searches_lan else "",
                advertise=config.advertise,
                peers_file=config.remembered,
                marks_file=config.marks_file,
                operators_list=config.operators_list,
                revocations_file=config.revocations_file if wire.admission.network.permissioned else None,
            ),
            profile=_profile(config),
            load=self._load,
        )
        self.peers.roster.on_forgotten = wire.server.cut
        me = stage_pb2.Peer(peer_id=wire.me, address=wire.address)
        capacity = Capacity(*served.worker.capacity) if served.worker is not None else None
        self.host = StageHost(me, served.manifest, served.worker, served.holding.span, wire.links, capacity=capacity)
        self.door = Door(self.peers, served.manifest, served.text, self.host, wire.links, self.gate, config)
        if wire.experts is not None:
            wire.experts.on_notice = self._notice

    async def serve(self, ready: Ready, announce: bool, ended: _Ended) -> None:
        wire = self._wire
        async with trio.open_nursery() as answers:
            portal = Portal(answers, lambda: ShuttingDown("this node is shutting down"))
            wire.server.start(self._services(portal))
            await answers.start(self.peers.run)
            try:
                with presence.announced(wire.address) if announce else contextlib.nullcontext():
                    log.get("runtime").info(
                        "serving", address=wire.address, model=self._served.manifest.model_id, peer=wire.me
                    )
                    ready(wire.address, self._served.manifest.model_id)
                    await ended.asked.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await self._leave(portal)
                answers.cancel_scope.cancel()

    async def _leave(self, portal: Portal) -> None:
        log.get("runtime").info("leaving", sessions=self.gate.running)
        self.door.leave()
        await self.peers.leave()
        await in_thread(partial(self._wire.server.stop, GRACE_S))
        portal.close()
        await in_thread(self.door.shutdown)
        await in_thread(self.host.shutdown)

    def _services(self, portal: Portal) -> list[InferenceService | PeersService | StageServices | ExpertService]:
        config, pools, served = self._config, self._wire.pools, self._served
        lanes = Lanes(pools.steps, pools.stage, config.step_streams_max)
        return [
            InferenceService(
                self.door, portal, Clients(config.clients), pools.clients, self._kv_bytes, self._peers_reply
            ),
            PeersService(
                self._wire.callers,
                self.peers.roster,
                self.peers.gossip,
                self._wire.identity,
                plaintext=config.plaintext,
            ),
            StageServices(self.host, self.door.mail, lanes, _peer),
            ExpertService(
                served.manifest,
                served.bank,
                _peer,
                pool=pools.experts,
                streams_max=config.expert_streams_max,
                queue_max=config.expert_queue_max,
            ),
        ]

    def _peers_reply(self) -> inference_pb2.PeersReply:
        experts = self._wire.experts
        return inference_pb2.PeersReply(
            peer_id=self._wire.me,
            peers=self.peers.status(self._sizes.of),
            work=experts.work() if experts is not None else [],
            network=str(self._wire.admission.network),
            unreached=self.peers.unreached,
            contacts=map(_contact, self.peers.contacts()),
            counts=self.peers.counts(),
        )

    def _notice(self, notice: inference_pb2.Notice) -> None:
        self.host.notice(notice.code, notice.message, PeerId(notice.peer_id), late=notice.late)

    def _kv_bytes(self) -> tuple[int, int]:
        return self._served.worker.kv_bytes if self._served.worker is not None else (0, 0)

    def _load(self) -> Load:
        used, limit = self._kv_bytes()
        return Load(queue=self.door.queue, kv_bytes_free=limit - used)


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


def _peer(context: grpc.ServicerContext) -> PeerId:
    """Who calls."""
    return caller_of(context).peer


def _contact(status: Status) -> inference_pb2.ContactStatus:
    return inference_pb2.ContactStatus(
        address=status.address,
        source=status.source.name.lower(),
        state=status.state,
        peer_id=status.peer or "",
        why=status.why,
        retry_s=status.retry_s,
    )


def _profile(config: Config) -> Profile:
    profile = profiles.WAN if config.profile == "wan" else profiles.LAN
    return profiles.scaled(profile, config.probe_period_s) if config.probe_period_s else profile
