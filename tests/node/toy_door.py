"""A node that only clients see: TLS, Hello, and answers from a script, over real gRPC on loopback."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from node import status
from node.certificate import Certificate
from node.hello import Authentication, Callers, caller_of
from node.identity import Identity
from node.link import SERVER_OPTIONS, server_credentials
from protos import inference_pb2 as pb
from protos import messages
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from protos.peers_pb2_grpc import PeersServicer, add_PeersServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protos.errors import ShoalError

MODEL = "ab" * 32


def token(position: int, word: str) -> pb.GenerateEvent:
    return pb.GenerateEvent(token=pb.Token(id=sum(word.encode()), text=word, position=position))


def notice(message: str, *, late: bool = False) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        notice=pb.Notice(code="peer_lost", message=message, peer_id="p" * 52, position=1, late=late)
    )


@dataclass
class Script:
    """What a toy door says.  `words` is the answer; events in `between` come before the word of that number."""

    words: list[str] = field(default_factory="The capital of France is Paris .".split)
    between: dict[int, pb.GenerateEvent] = field(default_factory=dict)
    refuses: ShoalError | None = None
    fails: tuple[int, ShoalError] | None = None  # after so many words
    heartbeat_s: float = 0.1
    silent_at: int | None = None  # before the word of that number it says nothing until it is stopped
    heartbeats_at: dict[int, int] = field(default_factory=dict)  # before a word, so many
    vanishes_after: int | None = None  # the node is gone after so many words
    peers: pb.PeersReply = field(default_factory=pb.PeersReply)
    template: bool = True
    tokenizer: bool = True
    model: str = MODEL


class ToyDoor(InferenceServicer, PeersServicer):
    """Listens from construction on; `stop` is as if it was killed."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        plaintext: bool = False,
        identity: Identity | None = None,
        port: int = 0,
    ) -> None:
        self.script = script or Script()
        self.identity = identity or Identity.create()
        self.asked: list[pb.GenerateRequest] = []
        self.callers: set[str] = set()
        self.pause = threading.Event()
        certificate = None if plaintext else Certificate.make(time.time())
        self._known = Callers(self.identity, certificate.sha256 if certificate else None)
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=SERVER_OPTIONS, interceptors=[Authentication(self._known)])
        add_InferenceServicer_to_server(self, self._server)
        add_PeersServicer_to_server(self, self._server)
        if certificate is None:
            port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            port = self._server.add_secure_port(f"127.0.0.1:{port}", server_credentials(certificate))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self.pause.set()
        self._server.stop(None).wait(20)
        self._pool.shutdown(wait=True)

    def __enter__(self) -> ToyDoor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def forget_tokens(self) -> None:
        self._known._tokens.clear()

    def Challenge(self, request: object, context: grpc.ServicerContext):  # noqa: N802
        return self._known.challenge(time.time())

    def Hello(self, request, context: grpc.ServicerContext):  # noqa: N802
        return self._known.hello(request, time.time())

    def Info(self, request: object, context: grpc.ServicerContext) -> pb.InfoReply:  # noqa: N802
        self.callers.add(caller_of(context).peer)
        return pb.InfoReply(
            model_id=self.script.model,
            family="toy",
            has_tokenizer=self.script.tokenizer,
            has_chat_template=self.script.template,
        )

    def Peers(self, request: object, context: grpc.ServicerContext) -> pb.PeersReply:  # noqa: N802
        return self.script.peers

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateEvent]:
        self.asked.append(request)
        script = self.script
        if script.refuses is not None:
            context.set_trailing_metadata(status.metadata_of(script.refuses))
            context.abort(status.status_of(script.refuses), script.refuses.message)
        yield pb.GenerateEvent(started=pb.Started(session_id="s", model_id=script.model, prompt_tokens=5))
        for number, word in enumerate(script.words):
            for _ in range(script.heartbeats_at.get(number, 0)):
                self.pause.wait(script.heartbeat_s)
                yield pb.GenerateEvent(heartbeat=pb.Heartbeat())
            if script.silent_at == number:
                self.pause.wait()
            if number in script.between:
                yield script.between[number]
            if script.fails is not None and script.fails[0] == number:
                yield pb.GenerateEvent(failed=messages.failed(script.fails[1]))
                return
            if script.vanishes_after == number:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            yield token(5 + number, f"{word} ")
        yield pb.GenerateEvent(finished=pb.Finished(reason=pb.Finished.STOP, generated=len(script.words)))
