"""Holders of a tiny model's experts that serve them over real gRPC on loopback, and a port that asks them."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import torch
from tiny import model

from coordinator.dispatch import Dispatch
from coordinator.health import PeerHealth
from coordinator.view import Record, View
from node.expert_port import ExpertPort
from node.expert_service import ExpertService
from protos import units
from protos.errors import PeerLost
from protos.ids import PeerId, UnitHash
from protos.manifest import Manifest, UnitEntry
from shard.anatomy import Anatomy
from shard.experts import ExpertBank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from node.link import Lane
    from protos import expert_pb2 as pb

ME = PeerId("me")
CALLER_KEY = "toy-caller"
WAIT_S = 20.0


class Tiny:
    """A family's tiny model, its manifest, and banks of any of its experts."""

    def __init__(self, family: str, dtype: str = "float32") -> None:
        self.anatomy = Anatomy(model(family, dtype))
        self.weights = self.anatomy.tensors()
        self.layer = max(self.anatomy.experts)
        layers = self.anatomy.layers
        self.counts = tuple(
            self.anatomy.expert_count(layer) if layer in self.anatomy.experts else 0 for layer in range(layers)
        )
        self.hidden = int(self.anatomy.model.config.hidden_size)
        self.dtype = getattr(torch, dtype)
        self.manifest = self._manifest(family, dtype, layers)

    def _manifest(self, family: str, dtype: str, layers: int) -> Manifest:
        names = [units.TEXT, units.EMBED]
        for layer, count in enumerate(self.counts):
            names += [units.trunk(layer), *(units.expert(layer, e) for e in range(count))]
        entries = [
            UnitEntry(name, UnitHash(hashlib.sha256(name.encode()).hexdigest()), 1000, ())
            for name in [*names, units.HEAD]
        ]
        return Manifest(
            family=family,
            architecture="TinyForCausalLM",
            dtype=dtype,
            layers=layers,
            experts=self.counts,
            top_k=2,
            hidden=self.hidden,
            vocab=128,
            grain=1,
            context=64,
            has_tokenizer=False,
            units=tuple(entries),
        )

    def bank(self, experts: Iterable[int]) -> ExpertBank:
        bank, wanted = ExpertBank(), list(experts)
        for layer, (_, module) in self.anatomy.experts.items():
            bank.add_layer(layer, module)
            for expert in wanted:
                bank.add(layer, expert, self.weights[units.expert(layer, expert)])
        return bank

    def rows(self, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and three experts for each."""
        chance = torch.Generator().manual_seed(seed)
        hidden = torch.randn(count, self.hidden, generator=chance).to(self.dtype)
        index = torch.stack([torch.randperm(8, generator=chance)[:3] for _ in range(count)])
        return hidden, index

    def records(self, held: Mapping[PeerId, Iterable[int]]) -> dict[PeerId, Record]:
        masks = {peer: sum(1 << expert for expert in experts) for peer, experts in held.items()}
        return {
            peer: Record(address=peer, experts={layer: mask for layer, count in enumerate(self.counts) if count})
            for peer, mask in masks.items()
        }


class Holder:
    """A node that holds experts.  `spoil` changes what it answers; while `gate` is clear it answers nothing."""

    def __init__(self, tiny: Tiny, experts: Sequence[int], **limits: Any) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.spoil: Callable[[pb.ComputeReply], pb.ComputeReply] = lambda reply: reply
        self.begun = threading.Semaphore(0)
        self.calls: list[pb.ComputeRequest] = []
        self.port = 0
        self._tiny = tiny
        self._bank = tiny.bank(experts)
        self._limits = limits
        self.start()

    def start(self) -> None:
        """Serves, also again after `stop`, at the same port."""
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        self.service = ExpertService(self._tiny.manifest, self._bank, _caller, **self._limits)
        inner = self.service.compute
        self.service.compute = lambda requests, context: self._compute(inner, requests, context)  # type: ignore[method-assign]
        self.service.add_to(self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()
        self.gate.set()
        self._pool.shutdown()

    def _compute(self, inner: Any, requests: Iterator[pb.ComputeRequest], context: Any) -> Iterator[pb.ComputeReply]:
        for reply in inner(self._seen(requests), context):
            self.gate.wait(WAIT_S)
            yield self.spoil(reply)

    def _seen(self, requests: Iterator[pb.ComputeRequest]) -> Iterator[pb.ComputeRequest]:
        for request in requests:
            self.calls.append(request)
            self.begun.release()
            yield request


def _caller(context: grpc.ServicerContext) -> PeerId:
    """Whom the call names, without proof."""
    named = dict(context.invocation_metadata())
    return PeerId(named.get(CALLER_KEY, context.peer()))


class ToyLink:
    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 100),
            ],
        )

    def channel(self, lane: Lane) -> grpc.Channel:
        return self._channel

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("shoal-token", "00"),)

    def renew(self) -> None:
        pass

    def close(self) -> None:
        self._channel.close()


class ToyLinks:
    """Links without Hello."""

    def __init__(self, holders: Mapping[PeerId, Holder]) -> None:
        self._holders = holders
        self._links: dict[PeerId, ToyLink] = {}

    def to(self, peer: PeerId, address: str = "") -> ToyLink:
        if peer not in self._holders:
            raise PeerLost(f"no address of the peer {peer}")
        if peer not in self._links:
            self._links[peer] = ToyLink(f"127.0.0.1:{self._holders[peer].port}")
        return self._links[peer]

    def check(self, peer: PeerId, timeout_s: float) -> bool:
        return False

    def close(self) -> None:
        for link in self._links.values():
            link.close()


class Shoal:
    """This node with `own` experts, and holders of others."""

    def __init__(self, tiny: Tiny, own: Sequence[int], held: Mapping[str, Sequence[int]], **settings: Any) -> None:
        self.tiny = tiny
        self.holders = {PeerId(name): Holder(tiny, experts) for name, experts in held.items()}
        self.records = tiny.records({ME: own} | {PeerId(name): experts for name, experts in held.items()})
        self.links = ToyLinks(self.holders)
        self.health = PeerHealth()
        self.bank = tiny.bank(own)
        self.all = tiny.bank(range(8))
        self.notices: list[Any] = []
        self.port = ExpertPort(
            tiny.manifest,
            self.bank,
            Dispatch(ME, tiny.counts),
            self.health,
            self.links,  # type: ignore[arg-type]
            lambda: View(self.records),
            me=ME,
            **{"expert_wait_s": WAIT_S, **settings},
        )
        self.port.on_notice = self.notices.append

    def __enter__(self) -> Shoal:
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self.holders.values():
            holder.gate.set()
        self.port.close()
        for holder in self.holders.values():
            holder.stop()
        self.links.close()

    def holder(self, name: str) -> Holder:
        return self.holders[PeerId(name)]

    @torch.inference_mode()
    def check(self, rows: int = 1, seed: int = 0) -> None:
        """What the port gives is to the bit what one bank with all experts gives."""
        hidden, index = self.tiny.rows(rows, seed)
        expected = self.all(self.tiny.layer, hidden, index)
        assert torch.equal(self.port(self.tiny.layer, hidden, index), expected)

    def retried(self, name: str) -> int:
        return sum(work.retried for work in self.port.work() if work.peer_id == name)

    def calls(self, name: str) -> int:
        return sum(work.calls for work in self.port.work() if work.peer_id == name)
