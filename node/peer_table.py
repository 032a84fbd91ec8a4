"""What `shoal peers` prints: whom a node knows, and where the layers of its answers were computed.

Pure but for `show`: a reply in, tables out.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from node.show import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from protos import inference_pb2 as pb

SHORT = 8
"""Characters of a peer id that people see."""

_STYLES = {"self": "bold", "suspect": "yellow", "dead": "red"}
_FIELDS = ("peer_id", "address", "zone", "state", "model_id", "first_layer", "layers", "experts", "bytes", "queue")


def show(table: Table) -> None:
    """On stdout.  Where it is no terminal, nothing is cut off."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def peers(reply: pb.PeersReply) -> Table:
    """One line a peer: the node itself first, then by address.  Columns that say nothing are left out."""
    zoned = len({peer.zone for peer in reply.peers}) > 1
    failed = any(peer.calls_failed for peer in reply.peers)
    table = Table(box=None, pad_edge=False)
    for name in ("peer", "address", "state"):
        table.add_column(name, no_wrap=True)
    if zoned:
        table.add_column("zone", overflow="fold")
    for name in ("RTT", "trunk", "experts", "size", "queue", "heard"):
        table.add_column(name, justify="right", overflow="fold")
    if failed:
        table.add_column("failed calls", overflow="fold")
    for peer in sorted(reply.peers, key=lambda peer: (peer.state != "self", peer.address)):
        cells = [peer.peer_id[:SHORT], peer.address, peer.state, *([peer.zone] if zoned else []), *_figures(peer)]
        table.add_row(*cells, *([_failures(peer)] if failed else []), style=_STYLES.get(peer.state))
    return table


def _figures(peer: pb.PeerStatus) -> tuple[str, ...]:
    own = peer.state == "self"
    return (
        f"{1000 * peer.rtt_s:.1f} ms" if peer.HasField("rtt_s") and not own else "",
        _span(peer),
        str(peer.experts),
        size(peer.bytes) if peer.bytes else "",
        str(peer.queue),
        _age(peer.age_s) if peer.HasField("age_s") and not own else "",
    )


def _span(peer: pb.PeerStatus) -> str:
    return f"{peer.first_layer}-{peer.first_layer + peer.layers - 1}" if peer.layers else "none"


def _age(age_s: float) -> str:
    if age_s < 120:
        return f"{age_s:.1f} s"
    return f"{age_s / 60:.0f} min" if age_s < 7200 else f"{age_s / 3600:.0f} h"


def _failures(peer: pb.PeerStatus) -> str:
    if not peer.calls_failed:
        return ""
    return f"{peer.calls_failed}, the last: {peer.last_error}" if peer.last_error else str(peer.calls_failed)


def names(reply: pb.PeersReply) -> dict[str, str]:
    """The columns of `layers`: short ids, by peer id."""
    others = sorted({entry.peer_id for entry in reply.work} - {reply.peer_id})
    return {peer: peer[:SHORT] for peer in (reply.peer_id, *others)}


def layers(work: Iterable[pb.LayerWork], names: Mapping[str, str]) -> Table:
    """One line a layer: (row, expert) pairs by who computed them; `*` where the layer's trunk was.

    names: the columns, by peer id, in order.
    """
    pairs: defaultdict[int, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    trunk: defaultdict[int, set[str]] = defaultdict(set)
    for entry in work:
        pairs[entry.layer][entry.peer_id] += entry.pairs
        if entry.steps:
            trunk[entry.layer].add(entry.peer_id)
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in names.values():
        table.add_column(name, justify="right")
    for layer in sorted(pairs):
        cells = (
            f"{pairs[layer][peer]}{'*' if peer in trunk[layer] else ' '}" if pairs[layer][peer] or peer in trunk[layer]
            else "- "
            for peer in names
        )  # fmt: skip
        table.add_row(str(layer), *cells)
    return table


def facts(reply: pb.PeersReply) -> dict[str, Any]:
    """As one JSON object."""
    return {
        "peer": reply.peer_id,
        "peers": [_facts(peer) for peer in reply.peers],
        "work": [
            {
                "layer": entry.layer,
                "peer": entry.peer_id,
                "calls": entry.calls,
                "pairs": entry.pairs,
                "retried": entry.retried,
                "steps": entry.steps,
            }
            for entry in reply.work
        ],
    }


def _facts(peer: pb.PeerStatus) -> dict[str, Any]:
    plain = {name.removesuffix("_id"): getattr(peer, name) for name in _FIELDS}
    return plain | {
        "rtt_s": peer.rtt_s if peer.HasField("rtt_s") else None,
        "age_s": peer.age_s if peer.HasField("age_s") else None,
        "calls_failed": peer.calls_failed,
        "last_error": peer.last_error,
    }
