"""The node's gRPC server: one port, TLS, and thread pools of their own for control, steps, experts and clients.

Law: long streams and short calls never share threads, and each pool has room for refusals beside what it may hold, so
that nothing waits in silence.  The port is taken at construction, before anything is loaded; calls are taken from
`start` on.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from node.hello import Authentication, caller_of
from node.intake import READERS_MAX, Intake
from node.link import SERVER_OPTIONS, server_credentials
from protos.errors import PermissionDenied, PortInUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from node.certificate import Certificate
    from node.config import Config
    from node.hello import Caller, Callers
    from protos.ids import PeerId

# Threads for calls that answer at once: Hello, records, Info.  Each pool of short calls and answers has READERS_MAX
# more, for messages that have not come.
CONTROL_THREADS = 4
# Threads for opening and closing sessions, each of which waits for at most one batch.
STAGE_THREADS = 4
# Threads beside those of streams and answers: a refusal holds one for about a millisecond.
REFUSAL_THREADS = 8
# Calls in the server at once beyond its pools; what exceeds this is refused by gRPC itself, before it is read.
SPARE_CALLS_MAX = 64


class Service(Protocol):
    def add_to(self, server: grpc.Server) -> None: ...


class Pools:
    """Who may hold how many threads."""

    def __init__(self, config: Config) -> None:
        answers = config.sessions_max + config.queue_max
        self.control = ThreadPoolExecutor(CONTROL_THREADS + READERS_MAX, thread_name_prefix="shoal-call")
        self.stage = ThreadPoolExecutor(STAGE_THREADS + READERS_MAX, thread_name_prefix="shoal-session")
        self.steps = ThreadPoolExecutor(config.step_streams_max + REFUSAL_THREADS, thread_name_prefix="shoal-steps")
        self.experts = ThreadPoolExecutor(
            config.expert_streams_max + REFUSAL_THREADS, thread_name_prefix="shoal-calls-experts"
        )
        self.clients = ThreadPoolExecutor(answers + REFUSAL_THREADS + READERS_MAX, thread_name_prefix="shoal-stream")
        streams = answers + config.step_streams_max + config.expert_streams_max + 3 * REFUSAL_THREADS
        self.calls_max = streams + 3 * READERS_MAX + SPARE_CALLS_MAX

    def shutdown(self) -> None:
        for pool in (self.clients, self.steps, self.experts, self.stage, self.control):
            pool.shutdown(wait=True)


class Server:
    """`permit(caller, method)` refuses, in gRPC's polling thread, who is known and may not make a call."""

    def __init__(
        self,
        config: Config,
        pools: Pools,
        callers: Callers,
        certificate: Certificate | None,
        permit: Callable[[Caller, str], None] | None = None,
        port: int | None = None,
    ) -> None:
        """`port`: in place of the configured one.  Raises PortInUse.  Without a certificate the wire is plaintext."""
        self._pools = pools
        self._streams = _PeerStreams(permit)
        self._intake = Intake()
        self._server = grpc.server(
            pools.control,
            options=SERVER_OPTIONS,
            interceptors=[Authentication(callers, permit=permit), self._intake, self._streams],
            maximum_concurrent_rpcs=pools.calls_max,
        )
        self.port = _bind(self._server, config, config.port if port is None else port, certificate)
        self._started = False

    def start(self, services: Iterable[Service]) -> None:
        for service in services:
            service.add_to(self._server)
        self._intake.start()
        self._server.start()
        self._started = True

    def cut(self, peer: PeerId) -> None:
        """Ends the streams of a node that may make none now; those that it begins are refused by `permit`."""
        self._streams.cut(peer)

    def stop(self, grace_s: float) -> None:
        """Blocks until every call has ended, `grace_s` seconds at most; then cancels them.

        Other nodes' streams, which no call's end would end, are cut at once: so their nodes look elsewhere now.
        """
        if not self._started:  # grpc would wait for ever for a server that never ran
            self.start(())
        stopped = self._server.stop(grace_s)
        self._streams.cut_all()
        stopped.wait()
        self._intake.close()
        self._pools.shutdown()


class _PeerStreams(grpc.ServerInterceptor):
    """Knows the streams in both directions that are open: only nodes have such, and they last as long as the node."""

    def __init__(self, permit: Callable[[Caller, str], None] | None) -> None:
        self._permit = permit
        self._open: dict[grpc.ServicerContext, Caller] = {}
        self._lock = threading.Lock()
        self._leaving = False

    def cut(self, peer: PeerId) -> None:
        with self._lock:
            streams = [context for context, caller in self._open.items() if caller.peer == peer]
        for context in streams:
            context.cancel()

    def cut_all(self) -> None:
        with self._lock:
            self._leaving = True
            streams = list(self._open)
        for context in streams:
            context.cancel()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(details)
        if handler is None or handler.stream_stream is None:
            return handler
        return grpc.stream_stream_rpc_method_handler(
            _Counted(self, details.method, handler.stream_stream),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def add(self, context: grpc.ServicerContext, method: str) -> None:
        caller = caller_of(context)
        with self._lock:
            self._open[context] = caller
            leaving = self._leaving
        # Asked once more: who was put out between the first time and now was not cut.
        if leaving or not self._permits(caller, method) or not context.add_callback(lambda: self._forget(context)):
            self._forget(context)
            context.cancel()

    def _permits(self, caller: Caller, method: str) -> bool:
        try:
            if self._permit is not None:
                self._permit(caller, method)
        except PermissionDenied:
            return False
        return True

    def _forget(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._open.pop(context, None)


class _Counted:
    """A stream's handler that tells of it first; it keeps the handler's thread pool, by the attribute of grpc's."""

    def __init__(self, streams: _PeerStreams, method: str, handle: Callable[..., Iterator[Any]]) -> None:
        self._streams = streams
        self._method = method
        self._handle = handle
        self.experimental_thread_pool = getattr(handle, "experimental_thread_pool", None)

    def __call__(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        self._streams.add(context, self._method)
        return self._handle(requests, context)


def _bind(server: grpc.Server, config: Config, wanted: int, certificate: Certificate | None) -> int:
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{wanted}"
    try:
        if certificate is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(certificate))
    except RuntimeError:  # grpc raises this for whatever bind() says, and does not say it
        port = 0
    if port == 0:
        raise PortInUse(
            f"cannot listen on {config.host} port {wanted} ({_reason(config, wanted)}): "
            "stop the process that holds it, or choose another with --port (0: any free one)"
        )
    return port


def _reason(config: Config, port: int) -> str:
    """What the system says to whoever wants this address."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((config.host, port))
        except OSError as error:
            return os.strerror(error.errno or 0)
    return "it is free again now; try again"
