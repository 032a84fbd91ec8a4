"""A client of a node: what the command line, and any program, needs to ask one.

Law: every failure is a typed error with the class that the node raised; imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

import grpc

from node import status
from protos import inference_pb2 as pb
from protos import messages
from protos.errors import DeadlineExceeded, InvalidRequest, PeerLost, ShoalError
from protos.inference_pb2_grpc import InferenceStub
from protos.limits import INFERENCE_MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

INFO_DEADLINE_S = 10.0
# Within this time a machine that is there takes a connection, however busy its node is.
CONNECT_S = 2.0

_OPTIONS = [
    ("grpc.max_receive_message_length", INFERENCE_MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # a node is asked itself, not whatever answers in its place
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class Client:
    """One connection to a node at `host:port`; use as a context manager."""

    def __init__(self, address: str) -> None:
        """Raises InvalidRequest for what is no host:port."""
        _check_address(address)
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = InferenceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def info(self, deadline_s: float = INFO_DEADLINE_S) -> pb.InfoReply:
        """Raises PeerLost if nobody answers there."""
        try:
            return self._stub.Info(pb.InfoRequest(), timeout=deadline_s)
        except grpc.RpcError as error:
            raise status.from_rpc(error, self.address) from None

    def reach(self) -> pb.InfoReply:
        """What the node is.  Raises PeerLost soon if nothing is there; a busy node gets longer to answer."""
        try:
            return self.info(CONNECT_S)
        except DeadlineExceeded:
            if not self._is_connected():
                raise PeerLost(
                    f"no node answers at {self.address} within {CONNECT_S:g} s: "
                    "is one running there, and is the address right?"
                ) from None
        return self.info()

    def _is_connected(self) -> bool:
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=0.1)
        except grpc.FutureTimeoutError:
            return False
        finally:
            ready.cancel()
        return True

    def generate(self, request: pb.GenerateRequest) -> Generator[pb.GenerateEvent, None, None]:
        """Started, Tokens, Finished.  A Failed event, or a failed call, is raised as its error.

        Closing the iterator cancels the answer.
        """
        if (size := request.ByteSize()) > INFERENCE_MESSAGE_BYTES_MAX:
            raise InvalidRequest(f"the request has {size} bytes; at most {INFERENCE_MESSAGE_BYTES_MAX} are allowed")
        call = self._stub.Generate(request)
        begun = False
        with contextlib.closing(_Cancelling(call)):
            try:
                for event in call:
                    begun = True
                    if event.HasField("failed"):
                        raise messages.error(event.failed)
                    yield event
                    if event.HasField("finished"):
                        return
            except grpc.RpcError as error:
                raise self._lost(error) if begun else status.from_rpc(error, self.address) from None
        raise PeerLost(f"the node at {self.address} ended the answer without saying why; ask it again")

    def _lost(self, error: grpc.RpcError) -> ShoalError:
        """Why a stream broke off.  A node that had begun to answer was there, so what is missing now is gone."""
        reason = status.from_rpc(error, self.address)
        if not isinstance(reason, PeerLost):
            return reason
        return PeerLost(
            f"the node at {self.address} is gone in the middle of its answer: ask again, or ask another node"
        )


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) <= 65535:
        raise InvalidRequest(f"{address!r:.80} is no address of a node: give host:port, such as 127.0.0.1:7645")


class _Cancelling:
    def __init__(self, call: grpc.Call) -> None:
        self._call = call

    def close(self) -> None:
        self._call.cancel()
