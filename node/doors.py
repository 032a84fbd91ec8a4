"""The nodes that a command may ask, one after the other: an answer outlives the door that it began at.

Law: each door is asked at most once for an answer; what another one repeats is compared with what was shown already,
token by token, and a difference is an error, never a correction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from protos import inference_pb2 as pb
from protos.errors import PermissionDenied, RemoteError, ShoalError, Unavailable, WrongModel, WrongPeer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from node.client import Client

R = TypeVar("R")

# What is wrong with one door, and perhaps not with the next.
_ELSEWHERE = (Unavailable, PermissionDenied, WrongModel, WrongPeer)


@dataclass(slots=True)
class _Given:
    """What a client has of an answer."""

    started: bool = False
    tokens: list[int] = field(default_factory=list)


class Doors:
    """At least one client.  Who failed goes to the end of the row; `tell` hears what a person should know."""

    def __init__(self, clients: Sequence[Client], tell: Callable[[str], None], model: str = "") -> None:
        """`model`: an id, or the beginning of one, that a door must serve."""
        self._clients = list(clients)
        self._tell = tell
        self._model = model

    @property
    def client(self) -> Client:
        """The one to be asked first."""
        return self._clients[0]

    def reach(self) -> pb.InfoReply:
        """What the first door is that can be reached and serves the model.  Raises what the last one said."""
        return self._first(self._served)

    def peers(self) -> pb.PeersReply:
        """Whom the first door knows that can be reached.  Raises what the last one said."""
        return self._first(lambda door: door.peers())

    def _first(self, ask: Callable[[Client], R]) -> R:
        for _ in self._clients[1:]:
            try:
                return ask(self.client)
            except _ELSEWHERE as error:
                self._tell(self._moved_on(error))
        return ask(self.client)

    def generate(self, request: pb.GenerateRequest) -> Generator[pb.GenerateEvent, None, None]:
        """As Client.generate does; a Notice tells of each door that was lost.  Closing it cancels the answer."""
        given = _Given()
        for _ in self._clients[1:]:
            try:
                yield from self._ask(request, given)
                return
            except _ELSEWHERE as error:
                said = self._moved_on(error)
                if given.tokens:
                    said += f", which must repeat the {len(given.tokens)} tokens above"
                yield pb.GenerateEvent(notice=pb.Notice(code=error.code, message=said))
        yield from self._ask(request, given)

    def _ask(self, request: pb.GenerateRequest, given: _Given) -> Generator[pb.GenerateEvent, None, None]:
        """What is not given yet."""
        repeated = iter(list(given.tokens))
        for event in self.client.generate(request):
            match event.WhichOneof("event"):
                case "started":
                    if given.started:
                        continue
                    given.started = True
                case "token":
                    expected = next(repeated, None)
                    if expected is not None:
                        self._compare(expected, event.token)
                        continue
                    given.tokens.append(event.token.id)
                case "finished":
                    if next(repeated, None) is not None:
                        raise self._differs("it ends before what was shown")
            yield event

    def _compare(self, expected: int, token: pb.Token) -> None:
        if token.id != expected:
            raise self._differs(f"token {token.id} at position {token.position}, where {expected} was shown")

    def _differs(self, how: str) -> RemoteError:
        return RemoteError(
            f"the node at {self.client.address} answers otherwise than the one before it ({how}): ask again, and "
            "compare the models that they serve"
        )

    def _served(self, door: Client) -> pb.InfoReply:
        info = door.info()
        if not info.model_id.startswith(self._model):
            raise WrongModel(f"the node at {door.address} serves model {info.model_id}, not {self._model}")
        return info

    def _moved_on(self, error: ShoalError) -> str:
        """Goes to the next door; says why."""
        self._clients.append(self._clients.pop(0))
        happened = error.message.partition(": ")[0]  # what to do about it, behind the colon, is being done
        return f"{happened}; now asking {self.client.address}"
