"""The Inference service over gRPC: sync handlers in bounded thread pools, each a thin skin over the door.

Law: streams and short calls have pools of their own, so that long answers cannot starve Info; the stream pool has room
for every answer that may run or wait, and for refusals beside them, so that nothing waits in silence.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc

from node import log, request, status
from node.generate import ClientStalled
from protos import inference_pb2 as pb
from protos.errors import BrokenInvariant, PortInUse, ShoalError
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from protos.limits import INFERENCE_MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.bridge import Portal, Stream
    from node.config import Config
    from node.generate import Door

# Threads for calls that answer at once (Info).
WORK_THREADS = 4
# Threads beside the answers': a refusal holds one for about a millisecond.
REFUSAL_THREADS = 8
# Calls in the server at once beyond its answers; what exceeds this is refused by gRPC itself, before it is read.
SPARE_CALLS_MAX = 64
# Events that an answer may be ahead of its client, beside what gRPC's flow control buffers.
EVENTS_AHEAD_MAX = 32

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # or two nodes would share a port, and each get half of the calls
    ("grpc.max_receive_message_length", INFERENCE_MESSAGE_BYTES_MAX),
    # A client's host that vanished without a word is noticed, and its answer's KV freed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


class Server:
    """Listens from construction on; `stop` refuses new calls and waits for those that run."""

    def __init__(self, config: Config, door: Door, portal: Portal, kv_bytes: Callable[[], tuple[int, int]]) -> None:
        answers = config.sessions_max + config.queue_max
        self._streams = ThreadPoolExecutor(answers + REFUSAL_THREADS, thread_name_prefix="shoal-stream")
        self._work = ThreadPoolExecutor(WORK_THREADS, thread_name_prefix="shoal-call")
        self._server = grpc.server(
            self._work, options=_OPTIONS, maximum_concurrent_rpcs=answers + REFUSAL_THREADS + SPARE_CALLS_MAX
        )
        service = _Inference(door, portal, kv_bytes, self._streams)
        add_InferenceServicer_to_server(cast("InferenceServicer", service), self._server)
        self.port = _bind(self._server, config)
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Blocks until every call has ended, `grace_s` seconds at most; then cancels them."""
        self._server.stop(grace_s).wait()
        self._streams.shutdown(wait=True)
        self._work.shutdown(wait=True)


def _bind(server: grpc.Server, config: Config) -> int:
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.port}")
    except RuntimeError:  # grpc raises this for whatever bind() says, and does not say it
        port = 0
    if port == 0:
        raise PortInUse(
            f"cannot listen on {config.host} port {config.port} ({_reason(config)}): "
            "stop the process that holds it, or choose another with --port (0: any free one)"
        )
    return port


def _reason(config: Config) -> str:
    """What the system says to whoever wants this address."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            return os.strerror(error.errno or 0)
    return "it is free again now; try again"


class _InPool:
    """A method with a thread pool of its own: grpc looks for that attribute."""

    def __init__(self, method: Callable[..., Iterator[pb.GenerateEvent]], pool: ThreadPoolExecutor) -> None:
        self._method = method
        self.experimental_thread_pool = pool

    def __call__(self, message: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        return self._method(message, context)


class _Inference:
    """What add_InferenceServicer_to_server takes: a Generate and an Info."""

    def __init__(
        self, door: Door, portal: Portal, kv_bytes: Callable[[], tuple[int, int]], streams: ThreadPoolExecutor
    ) -> None:
        self._door = door
        self._portal = portal
        self._kv_bytes = kv_bytes
        self._started_at = time.time()
        self.Generate = _InPool(self._generate, streams)

    def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoReply:  # noqa: N802
        manifest = self._door.manifest
        used, limit = self._kv_bytes()
        return pb.InfoReply(
            version=_version(),
            model_id=manifest.model_id,
            family=manifest.family,
            architecture=manifest.architecture,
            dtype=manifest.dtype,
            layers=manifest.layers,
            context=manifest.context,
            has_tokenizer=self._door.text.has_tokenizer,
            has_chat_template=self._door.text.has_chat_template,
            sessions_running=self._door.gate.running,
            kv_bytes_used=used,
            kv_bytes_limit=limit,
            started_at=self._started_at,
        )

    def Peers(self, request: pb.PeersRequest, context: Any) -> pb.PeersReply:  # noqa: N802
        """This node alone, until there are others."""
        manifest, peer = self._door.manifest, self._door.peer
        itself = pb.PeerStatus(peer_id=peer, state="self", model_id=manifest.model_id, layers=manifest.layers)
        return pb.PeersReply(peer_id=peer, peers=[itself])

    def _generate(self, message: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        try:
            ask = request.read(message, self._door.manifest, self._door.text)

            async def work(stream: Stream[pb.GenerateEvent]) -> None:
                try:
                    await self._door.generate(ask, stream.send)
                except ClientStalled:
                    context.cancel()  # the handler's thread waits inside grpc for this client
                    raise

            stream = self._portal.stream(work, EVENTS_AHEAD_MAX)
            if not context.add_callback(stream.abandon):
                stream.abandon()
            yield from stream
        except ShoalError as error:
            _abort(context, error)
        except Exception as error:  # noqa: BLE001  (a bug in one call must not look like anything else to its client)
            log.get("server").exception("a call failed", error=str(error))
            _abort(context, BrokenInvariant(f"the node failed: {type(error).__name__}; its log says more"))


def _abort(context: grpc.ServicerContext, error: ShoalError) -> NoReturn:
    context.set_trailing_metadata(status.metadata_of(error))
    context.abort(status.status_of(error), status.details_of(error))
    raise error  # abort has raised; this line tells the type checker so


def _version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:
        return "0"
