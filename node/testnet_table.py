"""A testnet's nodes as a table, or as JSON."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rich.table import Table

from node import process
from node.client import Client
from node.peer_table import SHORT
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from node.testnet_state import Member, Record

_ASK_S = 2.0
_STYLES: dict[process.State, str] = {"frozen": "yellow", "dead": "red"}


def members(record: Record, sees: Mapping[int, int | None] | None = None) -> Table:
    """One line a node.  sees: how many others each sees alive, None where it does not answer."""
    zoned = len({member.zone for member in record.members}) > 1
    table = Table(box=None, pad_edge=False)
    for name in ("node", "state", "peer", "address", *(["sees"] if sees is not None else [])):
        table.add_column(name, justify="right" if name in ("node", "sees") else "left", no_wrap=True)
    for name in (*(["zone"] if zoned else []), "holds"):
        table.add_column(name)
    for member in record.members:
        state = member.state
        cells = [str(member.number), state, member.peer[:SHORT], member.address]
        cells += [] if sees is None else [_seen(sees[member.number], len(record.members) - 1)]
        cells += [member.zone] if zoned else []
        table.add_row(*cells, holds(member.hold), style=_STYLES.get(state))
    return table


def holds(what: Sequence[str]) -> str:
    """As --hold says it, shorter: experts of all layers once."""
    experts = [text.removeprefix("experts:*/") for text in what if text.startswith("experts:*/")]
    others = [text.removesuffix(":*").replace(":", " ") for text in what if not text.startswith("experts:*/")]
    return ", ".join([*others, *([f"experts {' '.join(experts)}"] if experts else [])])


def _seen(count: int | None, others: int) -> str:
    return "" if count is None else f"{count} of {others}"


def seen(record: Record) -> dict[int, int | None]:
    """Asks all nodes at once."""
    with ThreadPoolExecutor(max(len(record.members), 1)) as threads:
        return dict(zip((member.number for member in record.members), threads.map(_ask, record.members), strict=True))


def _ask(member: Member) -> int | None:
    if member.state != "running":
        return None
    try:
        with Client(member.where) as client:
            return sum(peer.state == "alive" for peer in client.peers(_ASK_S).peers)
    except ShoalError:
        return None


def facts(record: Record) -> dict[str, Any]:
    """As one JSON object."""
    nodes = [
        {
            "node": member.number,
            "state": member.state,
            "pid": member.pid,
            "memory_bytes": process.memory(member.pid) if member.state != "dead" else 0,
            "peer": member.peer,
            "address": member.address,
            "zone": member.zone,
            "hold": list(member.hold),
            "log": member.log,
        }
        for member in record.members
    ]
    return {"name": record.name, "model": record.model, "folder": record.folder, "ready": record.ready, "nodes": nodes}
