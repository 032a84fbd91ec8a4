"""`shoal demo`: one question, asked twice of four nodes; the second time one of them is killed in the middle.

Law: whatever happens, no node outlives the demo; the answers are compared token by token, and a difference is said.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from node import answer, peer_table, ports, progress, testnet
from node.demo.paragraph import WIDTH_MAX, Paragraph
from node.demo.tally import Tally, shares
from node.topology import Topology, places
from protos import inference_pb2 as pb
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.testnet import Testnet
    from node.testnet_state import Member
    from protos.manifest import Manifest

NODES_MIN: Final = 3
REPLICAS: Final = 2
_END_S = 3.0


def run(
    manifest: Manifest, store: Path, prompt: str, *, nodes: int, max_tokens: int, tell: Callable[[str], None]
) -> bool:
    """Whether both answers were the same.  Progress goes to stderr, all else to stdout."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    console = Console(width=None, highlight=False)
    console.print(f"[bold]{nodes} nodes answer together; one of them is killed in the middle.[/bold]\n")
    # The door holds all trunks, so what dies is a node of experts: its loss costs no token.
    dealt = places(Topology(nodes, replicas=REPLICAS, trunks=1), manifest.layers, manifest.grain)
    launch = testnet.command(testnet.Options(store, manifest.model_id, attached=True), nodes)
    with ports.reserved(nodes) as free:
        net = testnet.Testnet(testnet.planned(folder, dealt, free), launch, attached=True)
        try:
            with progress.shown(tell) as report:
                net.start()
                net.wait_ready(report)
            same = Outage(net, console, sum(manifest.experts)).play(_request(manifest, prompt, max_tokens), prompt)
        except BaseException:
            _tell_ended(net, tell)
            net.end(_END_S)
            tell(f"logs: {folder}")
            raise
        net.end(_END_S)
    shutil.rmtree(folder, ignore_errors=True)
    return same


def _tell_ended(net: Testnet, tell: Callable[[str], None]) -> None:
    for member in net.ended():
        for line in testnet.log_end(member):
            tell(f"  node {member.number}: {line}")


def _request(manifest: Manifest, prompt: str, max_tokens: int) -> pb.GenerateRequest:
    """Greedy, so that there is one right answer."""
    return pb.GenerateRequest(
        chat=pb.Messages(messages=[pb.Message(role="user", content=prompt)]),
        sampling=pb.Sampling(max_tokens=max_tokens, temperature=0.0),
        model=manifest.model_id,
    )


@dataclass(slots=True)
class Told:
    """An answer as it came."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    notices: list[pb.Notice] = field(default_factory=list)
    shown: answer.Shown = field(default_factory=answer.Shown)


class Outage:
    """The play.  Node 1 is the door."""

    def __init__(self, net: Testnet, console: Console, experts: int) -> None:
        self._net = net
        self._console = console
        self._experts = experts
        self._door = net.members[0]
        self._clients = {member.peer: net.client(member) for member in net.members}
        self._victim: Member | None = None

    def play(self, request: pb.GenerateRequest, prompt: str) -> bool:
        """Whether both answers were the same."""
        self._console.print(self._cast())
        self._console.print(f"\n[bold]In peace.[/bold] Node 1 is asked: {prompt}\n")
        first = self._ask(request)
        count = len(first.tokens)
        if count < 2:
            raise InvalidRequest(f"the answer has {count} tokens, so it has no middle; ask something else")
        self._say(_pace(first))
        self._console.print("[bold]Again,[/bold] and in the middle a node is killed.\n")
        tally = Tally(self._clients)
        second = self._ask(request, at=max(1, count // 3), then=lambda: self._kill(tally))
        tally.look()
        self._say(f"{_pace(second)}; {_delay(second, max(1, count // 3))}")
        same = self._compare(first, second)
        self._show_work(tally)
        return same

    def _cast(self) -> Table:
        replies = {peer.peer_id: peer for peer in self._clients[self._door.peer].peers().peers}
        table = Table(box=None, pad_edge=False)
        for name in ("node", "peer", "address", "holds"):
            table.add_column(name)
        for member in self._net.members:
            found = replies.get(member.peer, pb.PeerStatus())
            trunk = "all attention layers, " if found.layers else ""
            holds = f"{trunk}{found.experts} of {self._experts} experts"
            role = f"{member.number}" + (" (door)" if member is self._door else "")
            table.add_row(role, member.peer[: peer_table.SHORT], member.address, holds)
        return table

    def _ask(self, request: pb.GenerateRequest, at: int | None = None, then: Callable[[], str] = lambda: "") -> Told:
        """Streams the answer; calls `then` once `at` tokens are there, and shows what it says."""
        told, paragraph = Told(), Paragraph()
        with closing(self._clients[self._door.peer].generate(request)) as events:
            for event in events:
                match event.WhichOneof("event"):
                    case "token":
                        told.times.append(time.perf_counter())
                        told.tokens.append(event.token.id)
                        paragraph.add(event.token.text)
                        if len(told.tokens) == at:
                            self._interject(paragraph, then(), "red")
                            told.times[-1] = time.perf_counter()
                    case "notice":
                        told.notices.append(event.notice)
                        if event.notice.late:
                            told.shown.late[event.notice.peer_id] += 1
                        else:
                            self._interject(paragraph, answer.note(event.notice), "yellow")
                    case "finished":
                        told.shown.finished = event.finished
                    case "started":
                        told.shown.started = event.started
        paragraph.end_line()
        answer.tell_late(told.shown.late, lambda line: self._interject(paragraph, line, "dim"))
        return told

    def _interject(self, paragraph: Paragraph, line: str, style: str) -> None:
        paragraph.end_line()
        self._console.print(f"  {line}", style=style, markup=False, soft_wrap=not self._console.is_terminal)

    def _kill(self, tally: Tally) -> str:
        """The node that is not the door and computed most so far.  What is said of it."""
        tally.look()
        work = shares(tally.work())
        others = [member for member in self._net.members if member is not self._door]
        victim = self._victim = max(others, key=lambda member: work.get(member.peer, 0.0))
        self._net.kill(victim)
        return (
            f"kill -9: node {victim.number} ({victim.peer[: peer_table.SHORT]}), which computed "
            f"{100 * work.get(victim.peer, 0.0):.0f} % of the experts' rows so far"
        )

    def _compare(self, first: Told, second: Told) -> bool:
        if first.tokens == second.tokens:
            self._console.print(
                f"[bold green]The same answer:[/bold green] all {len(first.tokens)} tokens are equal.\n"
            )
            return True
        at = _difference(first.tokens, second.tokens)
        self._console.print(f"[bold red]Another answer:[/bold red] it differs from token {at + 1} on.\n")
        return False

    def _show_work(self, tally: Tally) -> None:
        """As many blocks of layers side by side as there is room for."""
        work = tally.work()
        self._console.print("[bold]Where the layers of the second answer were computed:[/bold] rows through experts\n")
        names = {member.peer: self._column(member) for member in self._net.members}
        layers = sorted({entry.layer for entry in work})
        whole = peer_table.layers(work, names)
        room = min(self._console.width, WIDTH_MAX + 20)
        blocks = max(1, min(room // (self._console.measure(whole).maximum + _GAP), -(-len(layers) // _ROWS_MIN)))
        rows = -(-len(layers) // blocks)
        grid = Table.grid(padding=(0, _GAP))
        parts = [set(layers[at : at + rows]) for at in range(0, len(layers), rows)]
        grid.add_row(*(peer_table.layers([e for e in work if e.layer in part], names) for part in parts))
        self._console.print(grid)
        self._console.print("\n* this node also computed the layer's attention and router", style="dim")

    def _column(self, member: Member) -> str:
        if member is self._door:
            return f"{member.number} door"
        return f"{member.number} killed" if member is self._victim else f"{member.number}"

    def _say(self, line: str) -> None:
        self._console.print(f"\n  {line}\n", style="dim", markup=False)


_GAP = 4
_ROWS_MIN = 10


def _difference(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _pace(told: Told) -> str:
    gaps = _gaps(told)
    return f"{len(told.tokens)} tokens, {1 / statistics.median(gaps):.1f} tokens/s" if gaps else "1 token"


def _delay(told: Told, at: int) -> str:
    gaps = _gaps(told)
    if len(gaps) < at:
        return "it ended there"
    return (
        f"the token after the kill took {1000 * gaps[at - 1]:.0f} ms, usually {1000 * statistics.median(gaps):.0f} ms"
    )


def _gaps(told: Told) -> list[float]:
    return [later - earlier for earlier, later in zip(told.times, told.times[1:], strict=False)]
