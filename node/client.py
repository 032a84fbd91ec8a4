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
from protos.errors import InvalidRequest, PeerLost
from protos.inference_pb2_grpc import InferenceStub
from protos.limits import INFERENCE_MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

INFO_DEADLINE_S = 5.0

_OPTIONS = [
    ("grpc.max_receive_message_length", INFERENCE_MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # a node is asked itself, not whatever answers in its place
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class Client:
    """One connection to a node at `host:port`; use as a context manager."""

    def __init__(self, address: str) -> None:
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

    def generate(self, request: pb.GenerateRequest) -> Generator[pb.GenerateEvent, None, None]:
        """Started, Tokens, Finished.  A Failed event, or a failed call, is raised as its error.

        Closing the iterator cancels the answer.
        """
        if (size := request.ByteSize()) > INFERENCE_MESSAGE_BYTES_MAX:
            raise InvalidRequest(f"the request has {size} bytes; at most {INFERENCE_MESSAGE_BYTES_MAX} are allowed")
        call = self._stub.Generate(request)
        with contextlib.closing(_Cancelling(call)):
            try:
                for event in call:
                    if event.HasField("failed"):
                        raise messages.error(event.failed)
                    yield event
                    if event.HasField("finished"):
                        return
            except grpc.RpcError as error:
                raise status.from_rpc(error, self.address) from None
        raise PeerLost(f"the node at {self.address} ended the answer without saying why; ask it again")


class _Cancelling:
    def __init__(self, call: grpc.Call) -> None:
        self._call = call

    def close(self) -> None:
        self._call.cancel()
