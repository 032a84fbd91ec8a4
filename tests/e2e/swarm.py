"""Real nodes on loopback, forked by a hatchery: started together, asked, killed, frozen, and always taken down.

Law: everything that was started ends by its pid with the fixture, also after a failing test or a killed test run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import deeds
import psutil

from node.client import Client
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CODE = Path(__file__).parents[2]
START_S = 60.0
END_S = 20.0
POLL_S = 0.01
QUICK: dict[str, object] = {"probe_period_s": 0.2}  # nodes learn of each other sooner than they otherwise would


class Hatchery:
    """The process that forks nodes, as the tests see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hatchery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(CODE), str(Path(__file__).parent)))} | ONE_THREAD,
            start_new_session=True,
        )
        self._numbers = itertools.count()
        self._started: dict[int, Future[int]] = {}
        self._ended: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        self._ready: Future[int] = Future()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(END_S)
        self._reader.join(END_S)
        self._process.stdout.close()

    def hatch(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        *,
        naughty: bool = False,
        namespace: str = "",
    ) -> int:
        """The pid of a new `shoal` with these arguments, whose stdout and stderr are files in `folder`.

        `namespace`: of the network, by its name; empty: this process's own.
        """
        self._ready.result(START_S)
        number = next(self._numbers)
        started = self._started[number] = Future()
        order = {
            "number": number,
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": environment,
            "deeds": str(folder) if naughty else "",
            "namespace": namespace,
        }
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        return started.result(START_S)

    def ended(self, pid: int) -> Future[int]:
        """The exit code, once it has ended; below 0: the signal that killed it."""
        return self._ended[pid]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = json.loads(line)
            if "ready" in report:
                self._ready.set_result(0)
            elif "pid" in report:
                self._ended[report["pid"]] = Future()
                self._started.pop(report["started"]).set_result(report["pid"])
            else:
                self._ended[report["ended"]].set_result(report["exit_code"])
        if not self._ready.done():
            self._ready.set_exception(RuntimeError("the hatchery could not import what a node imports"))


ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Node:
    """One place of a swarm: a folder, a port and an identity, which outlive the process that runs there now."""

    number: int
    folder: Path
    arguments: list[str]
    address: str
    naughty: bool
    hatchery: Hatchery
    environment: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    pid: int = 0
    peer: str = ""
    pids: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Returns before it is ready."""
        (self.folder / "stdout").write_bytes(b"")
        environment = _environment(self.folder) | self.environment
        self.pid = self.hatchery.hatch(
            self.arguments, self.folder, environment, naughty=self.naughty, namespace=self.namespace
        )
        self.pids.append(self.pid)

    def wait_ready(self) -> None:
        until(lambda: b"serving" in (self.folder / "stdout").read_bytes() or self.has_ended, START_S, self._why)
        assert not self.has_ended, self._why()

    @property
    def has_ended(self) -> bool:
        return self.hatchery.ended(self.pid).done()

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Lines of its log that begin so."""
        lines = [json.loads(line) for line in self.errors.splitlines() if line.startswith("{")]
        return [line for line in lines if str(line["event"]).startswith(event)]

    def send(self, number: signal.Signals) -> None:
        assert not self.has_ended
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As if its power was cut; returns when it is gone."""
        if not self.has_ended:
            os.kill(self.pid, signal.SIGKILL)
        self.hatchery.ended(self.pid).result(END_S)

    def freeze(self) -> None:
        """Its sockets stay open, and nobody is at home; `thaw` ends that."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def end(self) -> int:
        """Leaves as it should; the exit code."""
        if not self.has_ended:
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGTERM)
        try:
            return self.hatchery.ended(self.pid).result(END_S)
        except TimeoutError:
            self.kill()
            raise AssertionError(f"node {self.number} did not end\n{self.errors}") from None

    def order(self, deed: deeds.Deed) -> None:
        assert self.naughty
        (self.folder / "done").unlink(missing_ok=True)
        deeds.order(self.folder, deed)

    def withdraw(self) -> None:
        deeds.withdraw(self.folder)

    @property
    def done(self) -> list[str]:
        return deeds.done(self.folder)

    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def _why(self) -> str:
        return f"node {self.number}, {' '.join(self.arguments)}:\n{self.errors}"


class Swarm:
    """Nodes that know each other; use as a context manager."""

    def __init__(
        self,
        hatchery: Hatchery,
        folder: Path,
        store: Path,
        holds: Sequence[Sequence[str]],
        *options: str,
        naughty: Sequence[int] | None = None,
        settings: dict[str, object] | None = None,
        ports: Sequence[int] | None = None,
        advertise: Sequence[str] | None = None,
        joins: Sequence[Sequence[int]] | None = None,
        plaintext: bool = False,
    ) -> None:
        """naughty: the nodes that can be ordered to misbehave; None: all.  settings: SHOAL_* of every node.

        advertise: what the others call each node by, where that is not the port that it listens on.  joins: the nodes
        that each is told to join, itself perhaps among them; None: all before it.
        """
        ports = ports or free_ports(len(holds))
        called = advertise or [f"127.0.0.1:{port}" for port in ports]
        self.nodes = []
        for number, hold in enumerate(holds):
            place = folder / f"node-{number}"
            place.mkdir(parents=True)
            arguments = ["run", "--store", str(store), "--port", str(ports[number]), "--advertise", called[number]]
            arguments += ["--threads", "1", "--identity", str(place / "node.key"), "--log-format", "json", *options]
            arguments += ["--plaintext"] * plaintext
            arguments += [word for part in hold for word in ("--hold", part)]
            known = range(number) if joins is None else joins[number]
            arguments += [word for other in known for word in ("--join", called[other])]
            able = naughty is None or number in naughty
            environment = {f"SHOAL_{name.upper()}": str(value) for name, value in (QUICK | (settings or {})).items()}
            address = f"127.0.0.1:{ports[number]}"
            self.nodes.append(Node(number, place, arguments, address, able, hatchery, environment))
        self._plaintext = plaintext
        self._clients: dict[str, Client] = {}
        self._calls = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            self.settle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.close()
        for node in self.nodes:
            if node.pid:
                node.kill()

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    def settle(self) -> None:
        """Waits until every node is there and sees every other one alive."""
        running = [node for node in self.nodes if node.pid and not node.has_ended]
        for node in running:
            self.meet(node)
        for node in running:
            until(lambda node=node: self._sees_all(node), START_S, lambda node=node: self._unseen(node))  # type: ignore[misc]

    def meet(self, node: Node) -> None:
        """Waits until it is there, and asks who it is."""
        node.wait_ready()
        node.peer = node.peer or self.peers(node.number).peer_id

    def move(self, node: Node) -> None:
        """From now on its place is another port, where it has not been started yet."""
        assert node.has_ended
        self._forget(node)
        (port,) = free_ports(1)
        for option, value in (("--port", str(port)), ("--advertise", f"127.0.0.1:{port}")):
            node.arguments[node.arguments.index(option) + 1] = value
        node.address = f"127.0.0.1:{port}"

    def status(self, number: int, of: Node) -> pb.PeerStatus:
        """What node `number` says of another; empty: it does not know it."""
        return next((peer for peer in self.peers(number).peers if peer.peer_id == of.peer), pb.PeerStatus())

    def restart(self, *nodes: Node) -> None:
        """Killed nodes come back with the same identities and addresses."""
        for node in nodes:
            assert node.has_ended
            self._forget(node)
            node.withdraw()
            node.start()
        self.settle()

    def client(self, number: int) -> Client:
        """Of that node; stays open until the swarm ends."""
        address = self.nodes[number].address
        if address not in self._clients:
            self._clients[address] = self._calls.enter_context(Client(address, plaintext=self._plaintext))
        return self._clients[address]

    def peers(self, number: int) -> pb.PeersReply:
        return self.client(number).peers()

    def work(self, number: int) -> dict[str, pb.LayerWork]:
        """By node's peer id, summed over the layers: what each computed for the stages of node `number`."""
        sums: dict[str, pb.LayerWork] = {}
        for entry in self.peers(number).work:
            total = sums.setdefault(entry.peer_id, pb.LayerWork(peer_id=entry.peer_id))
            for name in ("calls", "pairs", "retried", "steps"):
                setattr(total, name, getattr(total, name) + getattr(entry, name))
        return sums

    def by_peer(self, peer: str) -> Node:
        return next(node for node in self.nodes if node.peer == peer)

    def _forget(self, node: Node) -> None:
        """A client of a node that has restarted would hold its old certificate."""
        client = self._clients.pop(node.address, None)
        if client is not None:
            client.__exit__(None, None, None)

    def _states(self, node: Node) -> dict[str, str]:
        return {status.peer_id: status.state for status in self.peers(node.number).peers}

    def _sees_all(self, node: Node) -> bool:
        states = self._states(node)
        others = [other.peer for other in self.nodes if other is not node and other.pid and not other.has_ended]
        return all(states.get(peer) == "alive" for peer in others)

    def _unseen(self, node: Node) -> str:
        return f"node {node.number} sees {self._states(node)}\n{node.errors}"


def request(prompt: Sequence[int], new: int, **more: Any) -> pb.GenerateRequest:
    """Greedy, so many tokens, whatever they are."""
    sampling = pb.Sampling(max_tokens=new, temperature=0.0, repetition_penalty=1.0, **more)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, ignore_eos=True)


@dataclass
class Answer:
    """What a client got."""

    tokens: list[int] = field(default_factory=list)
    notices: list[pb.Notice] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def ask(
    client: Client,
    prompt: Sequence[int],
    new: int,
    on_token: Callable[[int], None] = lambda _: None,
    on_notice: Callable[[pb.Notice], None] = lambda _: None,
    **more: Any,
) -> Answer:
    """The whole answer; `on_token` hears how many tokens there are by now."""
    answer = Answer()
    for event in client.generate(request(prompt, new, **more)):
        if event.HasField("token"):
            answer.times.append(time.perf_counter())
            answer.tokens.append(event.token.id)
            on_token(len(answer.tokens))
        elif event.HasField("notice"):
            answer.notices.append(event.notice)
            on_notice(event.notice)
    return answer


def spread(nodes: int, replicas: int = 1) -> list[list[str]]:
    """Every node has the trunk of all layers, and experts are dealt out."""
    return [["trunk:*", *(f"experts:*/{(n + r) % nodes}%{nodes}" for r in range(replicas))] for n in range(nodes)]


def spans(layers: int, count: int) -> list[list[str]]:
    """Each node has contiguous layers with their experts."""
    return [[f"span:{n * layers // count}-{(n + 1) * layers // count - 1}"] for n in range(count)]


def spans_with_experts_elsewhere(layers: int, trunks: int, leaves: int) -> list[list[str]]:
    """Trunk nodes without any expert, and leaves without any trunk."""
    bounds = [(n * layers // trunks, (n + 1) * layers // trunks - 1) for n in range(trunks)]
    return [[f"trunk:{a}-{b}"] for a, b in bounds] + [[f"experts:*/{n}%{leaves}"] for n in range(leaves)]


def until(condition: Callable[[], bool], deadline_s: float, why: Callable[[], str]) -> None:
    """Other processes cannot be waited for but by asking again."""
    deadline, pause = time.monotonic() + deadline_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {why()}"
        pause.wait(POLL_S)


def free_ports(count: int) -> list[int]:
    """Free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def says(hatchery: Hatchery, folder: Path, *command: str, namespace: str = "", exit_code: int = 0) -> str:
    """What a `shoal` that ends by itself prints on stdout.  Its homes are in `folder`."""
    for name in ("stdout", "stderr"):
        (folder / name).write_bytes(b"")
    pid = hatchery.hatch(command, folder, _environment(folder), namespace=namespace)
    ended = hatchery.ended(pid).result(START_S)
    assert ended == exit_code, f"{ended}: {(folder / 'stderr').read_text()}"
    return (folder / "stdout").read_text().strip()


def _environment(folder: Path) -> dict[str, str]:
    (folder / "runtime").mkdir(mode=0o700, exist_ok=True)
    homes = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CONFIG", "DATA", "CACHE")}
    return homes | ONE_THREAD | {"PYTHONPATH": str(CODE), "XDG_RUNTIME_DIR": str(folder / "runtime")}


@contextlib.contextmanager
def hatchery() -> Iterator[Hatchery]:
    with Hatchery() as running:
        yield running
