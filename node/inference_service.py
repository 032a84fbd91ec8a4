"""The Inference service over gRPC: what clients ask of a door, each method a thin skin.

Law: who may not ask is refused before its message is looked at; an answer that nobody reads is given up.
"""

from __future__ import annotations

import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from node import request
from node.config import is_loopback
from node.generate import ClientStalled
from node.heartbeat import Heart
from node.hello import caller_of
from node.refusal import refusing
from protos import inference_pb2 as pb
from protos.errors import PermissionDenied
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from node.bridge import Portal, Stream
    from node.generate import Door

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
        self._kv_bytes = kv_bytes
        self._peers = peers
        self._started_at = time.time()
        self.Generate = _Method(self._generate, clients, pool)
        self.Info = _Method(self._info, clients)
        self.Peers = _Method(self._told_peers, clients)

    def add_to(self, server: grpc.Server) -> None:
        add_InferenceServicer_to_server(cast("InferenceServicer", self), server)

    def _told_peers(self, message: pb.PeersRequest, context: grpc.ServicerContext) -> pb.PeersReply:
        with refusing(context, "server"):
            return self._peers()

    def _info(self, message: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        with refusing(context, "server"):
            return self._told_info()

    def _told_info(self) -> pb.InfoReply:
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
        with refusing(context, "server"):
            ask = request.read(message, self._door.manifest, self._door.text)

            async def work(stream: Stream[pb.GenerateEvent]) -> None:
                heart = Heart(stream)
                try:
                    await heart.beat_during(partial(self._door.generate, ask, heart.send))
                except ClientStalled:
                    context.cancel()  # the handler's thread waits inside grpc for this client
                    raise

            stream = self._portal.stream(work, EVENTS_AHEAD_MAX)
            if not context.add_callback(stream.abandon):
                stream.abandon()
            yield from stream


class _Method:
    """A method for clients that may ask, which node.intake finds out before it reads what they ask.

    A pool of its own, if it has one, is where grpc looks for it.
    """

    def __init__(self, method: Callable[..., Any], clients: Clients, pool: ThreadPoolExecutor | None = None) -> None:
        self._method = method
        self.admit = clients.check
        self.experimental_thread_pool = pool

    def __call__(self, message: Any, context: grpc.ServicerContext) -> Any:
        return self._method(message, context)


def software_version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:
        return "0"
