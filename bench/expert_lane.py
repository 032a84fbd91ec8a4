"""What a remote MoE layer costs beyond compute: ways to carry a decode-sized call, and the port itself.

python -m bench.expert_lane [--peers 1] [--rows 1] [--rounds 5] [--plaintext] [--hold 8]

How to read it.  Peers are processes of their own on loopback, with TLS unless --plaintext, one torch thread each.  All
ways carry the same messages, and peers compute the same Mixtral-shaped layer (512 wide, 8 experts, top-2), of which
this process holds the last --hold experts less than all, so that --hold 0 makes every expert remote.  Each figure is
microseconds a layer without the longest compute that a peer reported: 10th, 50th and 90th percentile of all rounds, in
which the ways take turns.  "port" is the product's own path, splitting and joining included.  The last table takes
the port's calls apart: "serialisation" is what either side needs to make and to read messages, "wait" what a call
waited at the peer for its turn, "compute" the peer's experts, and "wire" all the rest between sending and having the
reply: gRPC, TLS, the kernel, and the hops between threads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from bench.rounds import conditions, interleaved, table
from coordinator.dispatch import Dispatch
from coordinator.health import PeerHealth
from coordinator.view import Record, View
from node import certificate
from node.expert_port import ExpertPort
from node.expert_service import ExpertService
from node.expert_streams import Replied
from node.expert_wire import ExpertWire, raw
from node.link import SERVER_OPTIONS, Lane, Pin, channel_options, server_credentials
from node.runtime import SWITCH_INTERVAL_S
from protos import expert_pb2 as pb
from protos import units
from protos.ids import PeerId, UnitHash
from protos.manifest import Manifest, UnitEntry
from shard.experts import ExpertBank, Pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

HIDDEN, FFN, EXPERTS, TOP_K = 512, 1024, 8, 2
ME = PeerId("me")
CALLS_A_TURN = 100
WARM = 20


def manifest() -> Manifest:
    names = [units.TEXT, units.EMBED, units.trunk(0), *(units.expert(0, e) for e in range(EXPERTS)), units.HEAD]
    entries = [UnitEntry(name, UnitHash(hashlib.sha256(name.encode()).hexdigest()), 1, ()) for name in names]
    return Manifest(
        family="mixtral",
        architecture="MixtralForCausalLM",
        dtype="float32",
        layers=1,
        experts=(EXPERTS,),
        top_k=TOP_K,
        hidden=HIDDEN,
        vocab=64,
        grain=1,
        context=64,
        has_tokenizer=False,
        units=tuple(entries),
    )


def bank(held: Sequence[int]) -> ExpertBank:
    module: Any = MixtralExperts(MixtralConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS))
    made, chance = ExpertBank(), torch.Generator().manual_seed(1)
    made.add_layer(0, module)
    weights = {name: torch.randn(w.shape, generator=chance) / 32 for name, w in module.named_parameters()}
    for expert in held:
        made.add(0, expert, {name: weight[expert] for name, weight in weights.items()})
    return made


# The peers


class Toy:
    """Ways that the product does not go: the same work behind a queue and a thread, or as unary calls."""

    def __init__(self, service: ExpertService) -> None:
        self._answer = service._answer
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            request, replies = self._jobs.get()
            replies.put(self._answer(request))

    def hop(self, requests: Iterator[pb.ComputeRequest], _: Any) -> Iterator[pb.ComputeReply]:
        replies: queue.SimpleQueue[pb.ComputeReply] = queue.SimpleQueue()
        for request in requests:
            self._jobs.put((request, replies))
            yield replies.get()

    def unary(self, request: pb.ComputeRequest, _: Any) -> pb.ComputeReply:
        return self._answer(request)

    def add_to(self, server: grpc.Server) -> None:
        codec = {
            "request_deserializer": pb.ComputeRequest.FromString,
            "response_serializer": pb.ComputeReply.SerializeToString,
        }
        methods = {
            "Hop": grpc.stream_stream_rpc_method_handler(self.hop, **codec),
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary, **codec),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))


def serve(plaintext: bool) -> None:
    """A peer: prints its port and its certificate, and ends with its parent's pipe."""
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server = grpc.server(ThreadPoolExecutor(16), options=SERVER_OPTIONS)
    service = ExpertService(manifest(), bank(range(EXPERTS)), lambda context: PeerId(context.peer()))
    service.add_to(server)
    Toy(service).add_to(server)
    own = certificate.Certificate.make(time.time())
    address = "127.0.0.1:0"
    port = server.add_insecure_port(address) if plaintext else server.add_secure_port(address, server_credentials(own))
    server.start()
    print(port, own.pem.hex(), own.sha256.hex(), flush=True)
    sys.stdin.read()
    os._exit(0)


@contextlib.contextmanager
def peers(count: int, plaintext: bool) -> Iterator[list[tuple[str, Pin | None]]]:
    command = [sys.executable, "-m", "bench.expert_lane", "--serve", *(["--plaintext"] if plaintext else [])]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        found: list[tuple[str, Pin | None]] = []
        for process in running:
            assert process.stdout is not None
            port, pem, sha256 = process.stdout.readline().split()
            pin = None if plaintext else Pin(bytes.fromhex(pem), bytes.fromhex(sha256))
            found.append((f"127.0.0.1:{port}", pin))
        yield found
    finally:
        for process in running:
            process.kill()
            process.wait()


# The caller


class Wire:
    """A link and its links at once: one channel a peer, without Hello, which costs nothing once a stream is open."""

    def __init__(self, found: Sequence[tuple[str, Pin | None]]) -> None:
        self.channels: dict[PeerId, grpc.Channel] = {}
        for number, (address, pin) in enumerate(found):
            self.channels[PeerId(f"peer{number}")] = _channel(address, pin)

    def to(self, peer: PeerId, address: str = "") -> _Link:
        return _Link(self.channels[peer])

    def check(self, peer: PeerId, timeout_s: float) -> bool:
        return False


class _Link:
    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def channel(self, lane: Lane) -> grpc.Channel:
        return self._channel

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


def _channel(address: str, pin: Pin | None) -> grpc.Channel:
    if pin is None:
        return grpc.insecure_channel(address, options=channel_options(Lane.EXPERTS))
    options = [*channel_options(Lane.EXPERTS), ("grpc.ssl_target_name_override", certificate.NAME)]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificates=pin.pem), options=options)


class Layer:
    """A decode step's layer: rows, their experts, and what each peer is asked for."""

    def __init__(self, rows: int, count: int, hold: int) -> None:
        chance = torch.Generator().manual_seed(2)
        self.hidden = torch.randn(rows, HIDDEN, generator=chance)
        self.index = torch.stack([torch.randperm(EXPERTS, generator=chance)[:TOP_K] for _ in range(rows)])
        self.own = list(range(EXPERTS - hold, EXPERTS))
        self.of = {PeerId(f"peer{n}"): [e for e in range(EXPERTS - hold) if e % count == n] for n in range(count)}
        self.wire = ExpertWire(manifest())

    def requests(self, number: int) -> Iterator[tuple[PeerId, pb.ComputeRequest]]:
        """What is asked of whom, as the port would, except that it is encoded in the caller's thread."""
        pairs = Pairs(self.index)
        for peer, held in self.of.items():
            wanted = [expert for expert in pairs.experts if expert in held]
            if wanted:
                yield peer, self.wire.request(number, 0, raw(self.hidden), pairs.part(wanted), 10.0)


class StreamWay:
    """One bidirectional stream a peer, and one inbox of all its reader threads."""

    def __init__(self, wire: Wire, method: str, *, in_reader: bool = False) -> None:
        self._inbox: queue.SimpleQueue[pb.ComputeReply] = queue.SimpleQueue()
        self._out: dict[PeerId, queue.SimpleQueue[Any]] = {}
        for peer, channel in wire.channels.items():
            self._out[peer] = queue.SimpleQueue()
            read = self._said if in_reader else pb.ComputeReply.FromString
            call = channel.stream_stream(method, pb.ComputeRequest.SerializeToString, read)
            replies = call(iter(self._out[peer].get, None))
            threading.Thread(target=self._read, args=(replies, in_reader), daemon=True).start()

    def _said(self, data: bytes) -> bool:
        self._inbox.put(pb.ComputeReply.FromString(data))
        return True

    def _read(self, replies: Any, in_reader: bool) -> None:
        with contextlib.suppress(grpc.RpcError):
            for reply in replies:
                if not in_reader:
                    self._inbox.put(reply)

    def __call__(self, asked: Sequence[tuple[PeerId, pb.ComputeRequest]]) -> list[pb.ComputeReply]:
        for peer, request in asked:
            self._out[peer].put(request)
        return [self._inbox.get(timeout=10) for _ in asked]


class UnaryWay:
    def __init__(self, wire: Wire, *, futures: bool) -> None:
        self._futures = futures
        self._keep = StreamWay(wire, "/bench/Hop")  # or every .future() on the idle channel would start a thread
        self._methods = {
            peer: channel.unary_unary("/bench/Unary", pb.ComputeRequest.SerializeToString, pb.ComputeReply.FromString)
            for peer, channel in wire.channels.items()
        }

    def __call__(self, asked: Sequence[tuple[PeerId, pb.ComputeRequest]]) -> list[pb.ComputeReply]:
        if not self._futures:
            return [self._methods[peer](request, timeout=10) for peer, request in asked]
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for peer, request in asked:
            self._methods[peer].future(request, timeout=10).add_done_callback(inbox.put)
        return [inbox.get(timeout=10).result() for _ in asked]


def turn(layer: Layer, way: Callable[[Any], list[pb.ComputeReply]]) -> list[float]:
    """Microseconds a layer beyond the longest compute of a peer."""
    found = []
    for number in range(CALLS_A_TURN):
        began = time.perf_counter()
        asked = list(layer.requests(number))
        replies = way(asked)
        counts = {len(request.pair_rows) for _, request in asked}
        for reply in replies:
            rows = next(c for c in counts if len(reply.rows) == 32 + 4 * HIDDEN * c)
            layer.wire.replies(reply.rows, rows)
        took = (time.perf_counter() - began) * 1e6 - max(reply.compute_us for reply in replies)
        if number >= WARM:
            found.append(took)
    return found


class Parts:
    """What the port's calls spend their time on, in microseconds, one entry a call."""

    NAMES = ("serialisation", "wire", "wait", "compute", "the whole call")

    def __init__(self, port: ExpertPort) -> None:
        self.calls: list[tuple[float, ...]] = []
        self.longest_compute = 0.0
        self._encode_us: dict[int, float] = {}
        self._open: list[tuple[float, float, float, float]] = []
        self._wait, self._request, self._replies = port.streams.wait, port.wire.request, port.wire.replies
        port.streams.wait = self.wait  # type: ignore[method-assign]
        port.wire.request = self.request  # type: ignore[method-assign]
        port.wire.replies = self.replies  # type: ignore[method-assign]

    def request(self, call: int, *given: Any) -> pb.ComputeRequest:
        began = time.perf_counter()
        made = self._request(call, *given)
        self._encode_us[call] = (time.perf_counter() - began) * 1e6
        return made

    def wait(self, timeout_s: float) -> Any:
        event = self._wait(timeout_s)
        if isinstance(event, Replied):
            reply, encode_us = event.reply, self._encode_us.pop(event.call.number, 0.0)
            whole_us = (time.monotonic() - event.call.sent_at) * 1e6
            there_us = reply.served_us - reply.waited_us - reply.compute_us
            wire_us = whole_us - encode_us - reply.served_us
            self.longest_compute = max(self.longest_compute, reply.compute_us)
            self._open.append((encode_us + there_us, wire_us, reply.waited_us, reply.compute_us))
        return event

    def replies(self, *given: Any) -> torch.Tensor:
        began = time.perf_counter()
        rows = self._replies(*given)
        decode_us = (time.perf_counter() - began) * 1e6
        codec_us, *others = self._open.pop()
        self.calls.append((codec_us + decode_us, *others, codec_us + decode_us + sum(others)))
        return rows


def port_turn(layer: Layer, port: ExpertPort, parts: Parts) -> list[float]:
    found = []
    for number in range(CALLS_A_TURN):
        parts.longest_compute = 0.0
        began = time.perf_counter()
        with torch.inference_mode():
            port(0, layer.hidden, layer.index)
        took = (time.perf_counter() - began) * 1e6 - parts.longest_compute
        if number >= WARM:
            found.append(took)
    return found


def build_port(layer: Layer, wire: Wire) -> ExpertPort:
    masks = {peer: sum(1 << e for e in held) for peer, held in layer.of.items()} | {ME: sum(1 << e for e in layer.own)}
    records = {peer: Record(address="", experts={0: mask}) for peer, mask in masks.items()}
    return ExpertPort(
        manifest(),
        bank(layer.own),
        Dispatch(ME, (EXPERTS,)),
        PeerHealth(),
        wire,
        lambda: View(records),
        me=ME,  # type: ignore[arg-type]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--plaintext", action="store_true")
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hold", type=int, default=0)
    given = parser.parse_args()
    if given.serve:
        serve(given.plaintext)
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with peers(given.peers, given.plaintext) as found:
        layer, wire = Layer(given.rows, given.peers, given.hold), Wire(found)
        port = build_port(layer, wire)
        parts = Parts(port)
        stream = "/shoal.v1.Expert/Compute"
        ways: dict[str, Callable[[Any], list[pb.ComputeReply]]] = {
            "stream, computed in its thread": StreamWay(wire, stream),
            "the same, inbox filled while gRPC decodes": StreamWay(wire, stream, in_reader=True),
            "stream, computed in another thread": StreamWay(wire, "/bench/Hop"),
            "unary futures": UnaryWay(wire, futures=True),
            "unary, one after another": UnaryWay(wire, futures=False),
        }
        turns = {name: (lambda way=way: turn(layer, way)) for name, way in ways.items()}
        turns["port"] = lambda: port_turn(layer, port, parts)
        figures = interleaved(turns, given.rounds)
        port.close()
    print(conditions(1))
    wire_name = "plaintext" if given.plaintext else "TLS"
    print(f"{given.peers} peers, {given.rows} rows, {EXPERTS - given.hold} of {EXPERTS} experts remote, {wire_name}")
    merged = {name: itertools.chain.from_iterable(rounds) for name, rounds in figures.items()}
    print(table(["microseconds a layer beyond compute", *_SHARES], [_row(n, values) for n, values in merged.items()]))
    print()
    columns = zip(*parts.calls, strict=True)
    names = zip(Parts.NAMES, columns, strict=True)
    print(table(["microseconds a call of the port", *_SHARES], [_row(name, values) for name, values in names]))


_SHARES = ("p10", "p50", "p90")


def _row(name: str, values: Iterable[float]) -> list[str]:
    us = sorted(values)
    return [name, *(f"{us[int(len(us) * share)]:.0f}" for share in (0.1, 0.5, 0.9))]


if __name__ == "__main__":
    main()
