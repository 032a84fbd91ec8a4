"""A swarm in one process: hosts of spans of a tiny random model, over real gRPC on loopback with Hello, and doors.

Law: what computes, what carries and what judges is the node's own; only the exchange of records is a table here.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import chain
import grpc
import tiny
import torch
import trio

from coordinator.admission import Admission
from coordinator.health import PeerHealth
from coordinator.view import Record, View
from node import request
from node.config import Config
from node.gate import Gate
from node.generate import Door
from node.hello import Authentication, Callers, caller_of
from node.identity import Identity
from node.link import SERVER_OPTIONS, Links
from node.stage_host import StageHost
from node.stage_service import Lanes, StageServices
from node.text import Text
from protos import inference_pb2 as pb
from protos import peers_pb2, units
from protos.ids import PeerId, UnitHash
from protos.manifest import Manifest, UnitEntry
from protos.peers_pb2_grpc import PeersServicer, add_PeersServicer_to_server
from protos.stage_pb2 import Peer
from shard.anatomy import Anatomy
from shard.body import Body
from shard.stage import Stage
from shard.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from protos.errors import ShoalError

LAYERS = 4
THREADS = 4


@cache
def model() -> Any:
    return tiny.model("mixtral", num_hidden_layers=LAYERS)


@cache
def manifest() -> Manifest:
    config = model().config
    experts = (config.num_local_experts,) * LAYERS
    names = [units.TEXT, units.EMBED]
    for layer, count in enumerate(experts):
        names += [units.trunk(layer), *(units.expert(layer, e) for e in range(count))]
    return Manifest(
        family="mixtral",
        architecture="MixtralForCausalLM",
        dtype="float32",
        layers=LAYERS,
        experts=experts,
        top_k=2,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        grain=1,
        context=config.max_position_embeddings,
        recompute_at=None,
        has_tokenizer=False,
        units=tuple(UnitEntry(name, UnitHash("ab" * 32), 1000, ()) for name in [*names, units.HEAD]),
    )


def worker(span: range) -> Worker:
    anatomy = Anatomy(model())
    weights = anatomy.tensors()
    experts = chain.Holders(anatomy, weights, 1)
    body = Body(model().config, torch.float32, span, weights.__getitem__, experts, torch.device("cpu"))
    return Worker(Stage(body, 1 << 26))


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """What transformers answers, greedily."""
    ids = torch.tensor([list(prompt)])
    # With a mask, or generate would take the prompt's zeros for padding.
    mask = torch.ones_like(ids)
    out = model().generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


class Swarm:
    """Nodes that know each other's records."""

    def __init__(self) -> None:
        self.records: dict[PeerId, Record] = {}
        self.nodes: list[Node] = []

    def node(self, span: range = range(0), **settings: Any) -> Node:
        self.nodes.append(Node(self, span, **settings))
        return self.nodes[-1]

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.stop()


class Known:
    """A door's view.  `called_at`: empty if nobody can call it."""

    def __init__(self, swarm: Swarm, me: PeerId, called_at: str) -> None:
        self.me = me
        self.called_at = called_at
        self._swarm = swarm
        self.health = PeerHealth()

    def view(self, _: object) -> View:
        now = time.monotonic()
        return View(
            dict(self._swarm.records), health={peer: self.health.standing(peer, now) for peer in self._swarm.records}
        )

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        self.health.failed(peer, error, time.monotonic())

    def heard(self, peer: PeerId) -> None:
        self.health.heard(peer, time.monotonic())


class Node:
    """Listens from construction on, until it is stopped; `kill` closes its connections without a word."""

    def __init__(
        self,
        swarm: Swarm,
        span: range,
        *,
        streams_max: int = 16,
        known: bool = True,
        called: bool = True,
        **settings: Any,
    ) -> None:
        self.identity = Identity.create()
        self.peer = self.identity.peer
        self.links = Links(self.identity, plaintext=True)
        self.worker = worker(span) if span else None
        self.pools = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(streams_max + 2)
        callers = Callers(self.identity, None)
        self._server = grpc.server(self.pools[0], options=SERVER_OPTIONS, interceptors=[Authentication(callers)])
        add_PeersServicer_to_server(Hello(callers), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        me = Peer(peer_id=self.peer, address=self.address)
        self.host = StageHost(me, manifest(), self.worker, span, self.links)
        self.known = Known(swarm, self.peer, self.address if called else "")
        config = Config(**{"repair_wait_s": 1.0, "step_deadline_s": 20.0, "sessions_max": 32, **settings})
        gate = Gate(Admission(config.sessions_max, config.queue_max, config.queue_wait_s))
        self.door = Door(self.known, manifest(), Text({}), self.host, self.links, gate, config)
        lanes = Lanes(self.pools[1], self.pools[0], streams_max)
        self.services = StageServices(self.host, self.door.mail, lanes, lambda context: caller_of(context).peer)
        self.services.add_to(self._server)
        self._server.start()
        self._stopped = False
        if known:
            swarm.records[self.peer] = record(self, span)

    def kill(self) -> None:
        """As if the process were gone: nobody listens, and all connections are closed, in both directions."""
        self._server.stop(None)
        self.links.close()

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.door.shutdown()
        self.host.shutdown()
        self._server.stop(0.5).wait()
        self.links.close()
        if self.worker is not None:
            self.worker.shutdown()
        for pool in self.pools:
            pool.shutdown(wait=True)

    @property
    def sessions(self) -> int:
        return self.worker.sessions if self.worker is not None else 0


def record(node: Node, span: range) -> Record:
    """What a node says that it holds.  The swarm hears of a spare one when a test says so."""
    embed, head = bool(span) and span.start == 0, bool(span) and span.stop == LAYERS
    experts = {layer: (1 << manifest().experts[layer]) - 1 for layer in span}
    return Record(address=node.address, layers=span, embed=embed, head=head, text=True, experts=experts)


class Hello(PeersServicer):
    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    def Challenge(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._callers.challenge(time.time())

    def Hello(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._callers.hello(request, time.time())

    def Record(self, request: Any, context: Any) -> Any:  # noqa: N802
        return peers_pb2.SignedRecord()


async def ask(
    door: Door,
    prompt: Sequence[int],
    count: int,
    on_token: Callable[[int], None] | None = None,
    **sampling: Any,
) -> list[pb.GenerateEvent]:
    """The events of an answer; `on_token` hears how many tokens have come."""
    events: list[pb.GenerateEvent] = []
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(max_tokens=count, **sampling), ignore_eos=True
    )

    async def send(event: pb.GenerateEvent) -> None:
        await trio.lowlevel.checkpoint()
        events.append(event)
        if on_token is not None and event.HasField("token"):
            on_token(len(ids(events)))

    await door.generate(request.read(message, door.manifest, door.text), send)
    return events


def ids(events: Sequence[pb.GenerateEvent]) -> list[int]:
    return [event.token.id for event in events if event.HasField("token")]


def notices(events: Sequence[pb.GenerateEvent]) -> list[pb.Notice]:
    return [event.notice for event in events if event.HasField("notice")]


def eventually(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits for what another thread does, without a clock of our own deciding how fast it must be."""
    waiting = threading.Event()
    for _ in range(int(timeout_s / 0.005)):
        if holds():
            return
        waiting.wait(0.005)
    raise AssertionError("it never came to hold")
