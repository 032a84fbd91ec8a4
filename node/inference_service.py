"""The Inference service over gRPC: what clients ask of a door, each method a thin skin.

Law: who may not ask is refused before its message is looked at; an answer that nobody reads is given up.
"""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast
from urllib.parse import unquote

from node import log, request, status
from node.config import is_loopback
from node.generate import ClientStalled
from node.hello import caller_of
from protos import inference_pb2 as pb
from protos.errors import BrokenInvariant, FrameTooLarge, PermissionDenied, ShoalError
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from protos.limits import INFERENCE_MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from node.bridge import Portal, Stream
    from node.generate import Door

T = TypeVar("T")

# Events that an answer may be ahead of its client, beside what gRPC's flow control buffers.
EVENTS_AHEAD_MAX = 32


class Clients:
    """Who may ask: `loopback`, `any`, or peer ids of clients' keys (several words add up)."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = frozenset(words)

    def check(self, context: grpc.ServicerContext) -> None:
        """Raises PermissionDenied."""
        if "any" in self._words or ("loopback" in self._words and _is_local(context.peer())):
            return
        caller = caller_of(context).peer
        if caller not in self._words:
            raise PermissionDenied(
                f"this node does not answer the client {caller}: its operator can allow it with --clients"
            )


def _is_local(peer: str) -> bool:
    """grpc's spelling of an address: `ipv4:127.0.0.1:4711`, `ipv6:%5B::1%5D:4711`."""
    return is_loopback(unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]"))


class InferenceService:
    """`busy` gives KV bytes used and their limit; `peers` what Inference.Peers answers."""

    def __init__(
        self,
        door: Door,
        portal: Portal,
        clients: Clients,
        pool: ThreadPoolExecutor,
        kv_bytes: Callable[[], tuple[int, int]],
        peers: Callable[[], pb.PeersReply],
    ) -> None:
        self._door = door
        self._portal = portal
        self._clients = clients
        self._kv_bytes = kv_bytes
        self._peers = peers
        self._started_at = time.time()
        self.Generate = _InPool(self._generate, pool)

    def add_to(self, server: grpc.Server) -> None:
        add_InferenceServicer_to_server(cast("InferenceServicer", self), server)

    def Info(self, message: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:  # noqa: N802
        return self._told(context, self._info)

    def Peers(self, message: pb.PeersRequest, context: grpc.ServicerContext) -> pb.PeersReply:  # noqa: N802
        return self._told(context, self._peers)

    def _told(self, context: grpc.ServicerContext, answer: Callable[[], T]) -> T:
        try:
            self._clients.check(context)
            return answer()
        except ShoalError as error:
            _abort(context, error)

    def _info(self) -> pb.InfoReply:
        manifest = self._door.manifest
        used, limit = self._kv_bytes()
        return pb.InfoReply(
            version=software_version(),
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

    def _generate(self, message: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        try:
            self._clients.check(context)
            if (size := message.ByteSize()) > INFERENCE_MESSAGE_BYTES_MAX:
                raise FrameTooLarge(f"the request has {size} bytes; at most {INFERENCE_MESSAGE_BYTES_MAX} are allowed")
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


class _InPool:
    """A method with a thread pool of its own: grpc looks for that attribute."""

    def __init__(self, method: Callable[..., Iterator[pb.GenerateEvent]], pool: ThreadPoolExecutor) -> None:
        self._method = method
        self.experimental_thread_pool = pool

    def __call__(self, message: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        return self._method(message, context)


def _abort(context: grpc.ServicerContext, error: ShoalError) -> NoReturn:
    context.set_trailing_metadata(status.metadata_of(error))
    context.abort(status.status_of(error), status.details_of(error))
    raise error  # abort has raised; this line tells the type checker so


def software_version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:
        return "0"
