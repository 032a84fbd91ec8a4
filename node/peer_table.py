"""What `shoal peers` prints: whom a node knows, and where the layers of its answers were computed.

Pure but for `show`: a reply in, tables out.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from node.show import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    from protos import inference_pb2 as pb

SHORT = 8
"""Characters of a peer id, or of a network's, that people see."""

_ID_CHARS = 64

_STYLES = {"self": "bold", "suspect": "yellow", "dead": "red", "left": "dim", "new": "dim"}
_FIELDS = (
    "peer_id", "address", "zone", "state", "model_id", "first_layer", "layers", "experts", "bytes", "queue",
    "island",
)  # fmt: skip


def show(table: RenderableType) -> None:
    """On stdout.  Where it is no terminal, nothing is cut off."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def whole(reply: pb.PeersReply, *, work: bool = False) -> RenderableType:
    """All that there is to say, for people.  `work`: also where layers were computed."""
    parts: list[RenderableType] = [peers(reply)]
    if reply.unreached:
        parts += ["", Text(f"no other node counts on this one: {reply.unreached}", style="yellow")]
    if failed := failures(reply):
        parts += ["", *failed]
    if len(reply.peers) == 1:
        parts += ["", *_alone(reply)]
    if work and reply.work:
        parts += ["", layers(reply.work, names(reply))]
    elif work:
        parts += ["", Text(f"the stages of {reply.peer_id[:SHORT]} have computed no answer yet")]
    return Group(*parts)


def _alone(reply: pb.PeersReply) -> list[RenderableType]:
    network = reply.network if len(reply.network) < _ID_CHARS else reply.network[:SHORT]
    if not reply.contacts:
        said = (
            f"no other node of network {network} is known, and nothing suggests one: give one with --join, or --lan on"
        )
        return [Text(said)]
    return [Text(f"no other node of network {network} is known yet; it is looked for here:"), contacts(reply.contacts)]


def contacts(found: Iterable[pb.ContactStatus]) -> Table:
    """Where the node looks for others, and what came of it."""
    table = Table(box=None, pad_edge=False)
    for name in ("address", "from", "state", "again in"):
        table.add_column(name, no_wrap=True)
    table.add_column("the last try", overflow="fold")
    for one in found:
        again = f"{one.retry_s:.0f} s" if one.HasField("retry_s") else ""
        address, _, peer = one.address.partition("#")
        table.add_row(address + (f"#{peer[:SHORT]}" if peer else ""), one.source, one.state, again, one.why)
    return table


def peers(reply: pb.PeersReply) -> Table:
    """One line a peer: the node itself first, then by address.  Columns that say nothing are left out."""
    zoned = len({peer.zone for peer in reply.peers}) > 1
    islands = any(peer.island != "home" for peer in reply.peers)
    failed = any(peer.calls_failed for peer in reply.peers)
    table = Table(box=None, pad_edge=False)
    for name in ("peer", "address", "state"):
        table.add_column(name, no_wrap=True)
    if zoned:
        table.add_column("zone", overflow="fold")
    if islands:
        table.add_column("island")
    for name in ("RTT", "trunk", "experts", "size", "queue", "heard"):
        table.add_column(name, justify="right", overflow="fold")
    if failed:
        table.add_column("failed", justify="right")
    for peer in sorted(reply.peers, key=lambda peer: (peer.state != "self", peer.address)):
        cells = [peer.peer_id[:SHORT], peer.address, peer.state, *([peer.zone] if zoned else [])]
        cells += [*([peer.island or "-"] if islands else []), *_figures(peer)]
        table.add_row(*cells, *([str(peer.calls_failed or "")] if failed else []), style=_STYLES.get(peer.state))
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


def failures(reply: pb.PeersReply) -> list[RenderableType]:
    """What the last failed call to each peer came to, a line each."""
    return [
        Text(f"the last call to {peer.peer_id[:SHORT]} that failed: {peer.last_error}", style="yellow")
        for peer in reply.peers
        if peer.last_error
    ]


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
        "network": reply.network,
        "unreached": reply.unreached,
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
        "contacts": [_contact_facts(one) for one in reply.contacts],
        "counts": dict(reply.counts),
    }


def _contact_facts(one: pb.ContactStatus) -> dict[str, Any]:
    return {
        "address": one.address,
        "source": one.source,
        "state": one.state,
        "peer": one.peer_id or None,
        "why": one.why,
        "retry_s": one.retry_s if one.HasField("retry_s") else None,
    }


def _facts(peer: pb.PeerStatus) -> dict[str, Any]:
    plain = {name.removesuffix("_id"): getattr(peer, name) for name in _FIELDS}
    return plain | {
        "rtt_s": peer.rtt_s if peer.HasField("rtt_s") else None,
        "age_s": peer.age_s if peer.HasField("age_s") else None,
        "calls_failed": peer.calls_failed,
        "last_error": peer.last_error,
    }
