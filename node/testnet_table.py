"""A testnet's nodes as a table, or as JSON."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from node import process
from node.client import Client
from node.peer_table import SHORT
from node.show import size
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.testnet_state import Member, Record

_ASK_S = 2.0
_STYLES: dict[process.State, str] = {"frozen": "yellow", "dead": "red"}


def show(table: Table) -> None:
    """On stdout."""
    Console().print(table)


def members(record: Record, sees: Mapping[int, int | None] | None = None) -> Table:
    """One line a node.  sees: how many others each sees alive, None where it does not answer."""
    table = Table(box=None, pad_edge=False)
    for name in ("node", "state", "peer", "address", *(["sees"] if sees is not None else []), "memory"):
        table.add_column(name, justify="right" if name in ("node", "sees", "memory") else "left", no_wrap=True)
    table.add_column("holds")
    for member in record.members:
        state = member.state
        seen = [] if sees is None else [_seen(sees[member.number], len(record.members) - 1)]
        used = size(process.memory(member.pid)) if state != "dead" else ""
        holds = " ".join(member.hold) + (f" ({member.zone})" if len({each.zone for each in record.members}) > 1 else "")
        table.add_row(
            str(member.number), state, member.peer[:SHORT], member.address, *seen, used, holds, style=_STYLES.get(state)
        )
    return table


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
            "peer": member.peer,
            "address": member.address,
            "zone": member.zone,
            "hold": list(member.hold),
            "log": member.log,
        }
        for member in record.members
    ]
    return {"name": record.name, "model": record.model, "folder": record.folder, "ready": record.ready, "nodes": nodes}
