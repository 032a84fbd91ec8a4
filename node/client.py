"""A client of a node: what the command line, and any program, needs to ask one.

Law: every failure is a typed error with the class that the node raised; imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

import grpc

from node import address as addresses
from node import status
from node.identity import Identity
from node.link import HELLO_S, Lane, Link, connect
from node.silence import SILENCE_S, Silence
from protos import inference_pb2 as pb
from protos import messages
from protos.errors import DeadlineExceeded, InvalidRequest, PeerLost, ShoalError, Unauthenticated
from protos.inference_pb2_grpc import InferenceStub
from protos.limits import INFERENCE_MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

INFO_DEADLINE_S = 10.0


class Client:
    """Of the node at `host:port`, or `host:port#PEERID` where nobody else will do; use as a context manager.

    Connects with the first call, and again with the next one after the node was lost.
    """

    def __init__(
        self,
        address: str,
        identity: Identity | None = None,
        *,
        plaintext: bool = False,
        silence_s: float = SILENCE_S,
    ) -> None:
        """`identity` None: a key for this client alone.  Raises InvalidRequest for what is no address."""
        self._wanted = address
        self.address = addresses.parse(address).host_port
        self._identity = identity or Identity.create()
        self._plaintext = plaintext
        self._silence_s = silence_s
        self._link: Link | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def info(self, deadline_s: float = INFO_DEADLINE_S) -> pb.InfoReply:
        """What the node is.  Raises PeerLost if nobody answers there."""
        link = self._linked(deadline_s)
        with self._lost(link):
            return link.call(
                lambda channel: InferenceStub(channel).Info, pb.InfoRequest(), timeout_s=deadline_s, lane=Lane.CLIENTS
            )

    def peers(self, deadline_s: float = INFO_DEADLINE_S) -> pb.PeersReply:
        """Whom the node knows, and who computed for its stages.  Raises as info does."""
        link = self._linked(deadline_s)
        with self._lost(link):
            return link.call(
                lambda channel: InferenceStub(channel).Peers, pb.PeersRequest(), timeout_s=deadline_s, lane=Lane.CLIENTS
            )

    def generate(self, request: pb.GenerateRequest) -> Generator[pb.GenerateEvent, None, None]:
        """Started, Tokens and Notices, Finished.  A Failed event, or a failed call, is raised as its error.

        A node of which nothing is heard is given up with DeadlineExceeded.  Closing the iterator cancels the answer.
        """
        if (size := request.ByteSize()) > INFERENCE_MESSAGE_BYTES_MAX:
            raise InvalidRequest(f"the request has {size} bytes; at most {INFERENCE_MESSAGE_BYTES_MAX} are allowed")
        link = self._linked(HELLO_S)
        try:
            yield from self._stream(link, request)
        except Unauthenticated:  # the node has forgotten the token; nothing has begun
            link.renew()
            yield from self._stream(link, request)

    def _stream(self, link: Link, request: pb.GenerateRequest) -> Generator[pb.GenerateEvent, None, None]:
        with self._lost(link):
            call = InferenceStub(link.channel(Lane.CLIENTS)).Generate(request, metadata=link.metadata())
        begun = False
        with contextlib.closing(_Cancelling(call)), Silence(call, self._silence_s) as silence:
            try:
                silence.wait()
                for event in call:
                    if event.HasField("heartbeat"):
                        silence.wait()
                        continue
                    silence.heard()
                    begun = True
                    if event.HasField("failed"):
                        raise messages.error(event.failed)
                    yield event
                    if event.HasField("finished"):
                        return
                    silence.wait()
            except grpc.RpcError as error:
                if silence.passed:
                    raise DeadlineExceeded(
                        f"the node at {self.address} said nothing for {self._silence_s:g} s: ask again, or ask another"
                    ) from None
                with self._lost(link):
                    raise self._broken_off(error) if begun else status.from_rpc(error, self.address) from None
        raise PeerLost(f"the node at {self.address} ended the answer without saying why; ask it again")

    def _broken_off(self, error: grpc.RpcError) -> ShoalError:
        """Why a stream broke off.  A node that had begun to answer was there, so what is missing now is gone."""
        reason = status.from_rpc(error, self.address)
        if not isinstance(reason, PeerLost):
            return reason
        return PeerLost(
            f"the node at {self.address} is gone in the middle of its answer: ask again, or ask another node"
        )

    def _linked(self, timeout_s: float) -> Link:
        with self._lock:
            if self._link is None:
                self._link = connect(
                    self._identity, self._wanted, plaintext=self._plaintext, timeout_s=min(timeout_s, HELLO_S)
                )
            return self._link

    @contextlib.contextmanager
    def _lost(self, link: Link) -> Generator[None, None, None]:
        """A node that comes back has another certificate: the link to the one that was lost is of no more use."""
        try:
            yield
        except PeerLost:
            with self._lock:
                if self._link is link:
                    self._link = None
            link.close()
            raise


class _Cancelling:
    def __init__(self, call: grpc.Call) -> None:
        self._call = call

    def close(self) -> None:
        self._call.cancel()
