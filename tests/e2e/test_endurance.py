"""Hundreds of answers, some given up and some never possible: the node is then as it was after the first few."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from test_processes import Node, environment, home, store  # noqa: F401  (fixtures)

from node.client import Client
from protos import inference_pb2 as pb
from protos.errors import ContextTooLong, InvalidRequest, Overloaded, RemoteError, WrongModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]

SESSIONS_MAX, QUEUE_MAX = 4, 16
AT_ONCE = 12
ANSWERS = 100
SETTLE_S = 20.0
STARTS = 5


@dataclass(frozen=True, slots=True)
class Level:
    """What a process holds, and what its node says of its sessions."""

    threads: int
    files: int
    connections: int
    sessions: int
    kv_bytes: int


@pytest.fixture(scope="module")
def node(home: Path, store: Path) -> Iterator[Node]:  # noqa: F811
    running = Node(home, store, "--sessions-max", str(SESSIONS_MAX), "--queue-max", str(QUEUE_MAX), "--threads", "1")
    yield running
    assert running.end() == 0


def request(n: int, max_tokens: int = 8, **more: Any) -> pb.GenerateRequest:
    """The n-th of seven prompts, from 3 to 39 tokens."""
    ids = [(11 * n + 5 * i) % 200 + 3 for i in range(3 + 6 * (n % 7))]
    sampling = pb.Sampling(max_tokens=max_tokens)
    return pb.GenerateRequest(**({"token_ids": pb.TokenIds(ids=ids), "sampling": sampling, "ignore_eos": True} | more))


def tokens(client: Client, n: int) -> list[int]:
    return [event.token.id for event in client.generate(request(n % 7)) if event.HasField("token")]


def leave(client: Client, n: int) -> None:
    """Goes away after n % 4 events of an answer that would be long."""
    stream = client.generate(request(n, max_tokens=400))
    for _ in range(n % 4):
        next(stream)
    stream.close()


BAD: list[tuple[type[RemoteError], Callable[[], pb.GenerateRequest]]] = [
    (InvalidRequest, lambda: request(0, token_ids=pb.TokenIds())),
    (InvalidRequest, lambda: request(0, token_ids=pb.TokenIds(ids=[5, 1 << 40]))),
    (InvalidRequest, lambda: request(0, sampling=pb.Sampling(max_tokens=8, temperature=-1.0))),
    (ContextTooLong, lambda: request(0, max_tokens=1 << 20)),
    (WrongModel, lambda: request(0, model="0" * 64)),
]


def be_refused(client: Client, n: int) -> None:
    error, make = BAD[n % len(BAD)]
    with pytest.raises(error):
        list(client.generate(make()))


def send_garbage(address: str) -> None:
    """Bytes that are no message, past the client that would never send them."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream("/shoal.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError):
            list(call(b"\xff\xff\xff\xff", timeout=SETTLE_S))


def level(node: Node, client: Client) -> Level:
    """Waits until no session is left; asking is what it waits with."""
    deadline = time.monotonic() + SETTLE_S
    process = psutil.Process(node.process.pid)
    while (info := client.info()).sessions_running or info.kv_bytes_used:
        assert time.monotonic() < deadline, f"after {SETTLE_S} s there are sessions or KV left: {info}"
    return Level(
        process.num_threads(),
        process.num_fds(),
        len(process.net_connections()),
        info.sessions_running,
        info.kv_bytes_used,
    )


def warm_up(client: Client) -> None:
    """As many calls at once as the node has threads for, so that its pools are as large as they will ever be."""
    streams = [client.generate(request(n, max_tokens=400)) for n in range(SESSIONS_MAX + QUEUE_MAX + 8)]
    with ThreadPoolExecutor(len(streams)) as pool:
        firsts = [pool.submit(next, stream) for stream in streams]
        refused = sum(isinstance(first.exception(SETTLE_S * 3), Overloaded) for first in firsts)
    assert refused == 8
    for stream in streams:
        stream.close()


def assert_no_more(after: Level, before: Level) -> None:
    """gRPC's own threads and wake-up pipes come and go by a few; a leak would be one for each answer."""
    assert after.threads <= before.threads + 4, (before, after)
    assert after.files <= before.files + 4, (before, after)
    assert (after.sessions, after.kv_bytes) == (0, 0)


def some_of_everything(client: Client, expected: list[list[int]], n: int) -> str:
    match n % 5:
        case 0:
            leave(client, n // 5)
            return "left"
        case 1:
            be_refused(client, n // 5)
            return "refused"
        case _:
            assert tokens(client, n) == expected[n % 7]
            return "answered"


def test_a_hundred_answers_in_a_row_and_a_hundred_at_once_leave_nothing_behind(node: Node) -> None:
    with Client(node.address) as client:
        expected = [tokens(client, n) for n in range(7)]
        warm_up(client)
        before = level(node, client)
        in_a_row = [some_of_everything(client, expected, n) for n in range(ANSWERS)]
        after_a_row = level(node, client)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(some_of_everything, client, expected, n) for n in range(ANSWERS)]
            at_once = [job.result(SETTLE_S * 3) for job in jobs]
        for _ in range(5):
            send_garbage(node.address)
        after = level(node, client)
        assert [tokens(client, n) for n in range(7)] == expected
    print(f"before {before}, after a row {after_a_row}, at the end {after}")
    for done in (in_a_row, at_once):
        assert {kind: done.count(kind) for kind in set(done)} == {"left": 20, "refused": 20, "answered": 60}
    assert_no_more(after_a_row, before)
    assert_no_more(after, before)
    assert "Traceback" not in node.log.read_text()


def test_clients_that_come_and_go_leave_no_connection_behind(node: Node) -> None:
    with Client(node.address) as client:
        tokens(client, 0)
        before = level(node, client)
        for n in range(20):
            with Client(node.address) as visitor:
                leave(visitor, n)
        deadline = time.monotonic() + SETTLE_S
        while (after := level(node, client)).connections > before.connections:
            assert time.monotonic() < deadline, (before, after)
    assert_no_more(after, before)


def test_a_node_that_is_started_and_stopped_again_and_again_leaves_nothing_behind(home: Path, store: Path) -> None:  # noqa: F811
    """On the same port, with an answer under way each time."""
    files = sorted(store.rglob("*"))
    runtime = environment(home)["XDG_RUNTIME_DIR"]
    present = entries(runtime)
    port, answers = "0", []
    for _ in range(STARTS):
        running = Node(home, store, "--port", port, "--threads", "1")
        port = running.address.rpartition(":")[2]
        children = psutil.Process(running.process.pid).children(recursive=True)
        with Client(running.address) as client:
            answers.append(tokens(client, 3))
            stream = client.generate(request(0, max_tokens=900))
            next(stream)
            assert running.end() == 0
            stream.close()
        assert not psutil.pid_exists(running.process.pid)
        assert not any(child.is_running() for child in children)
        assert entries(runtime) == present
        assert "Traceback" not in running.log.read_text()
    assert answers == answers[:1] * STARTS
    assert sorted(store.rglob("*")) == files


def entries(runtime: str) -> list[str]:
    return sorted(str(path) for path in Path(runtime).rglob("*") if path.is_file())
