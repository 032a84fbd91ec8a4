"""A process on a LAN that announces itself and says what it hears: one JSON object a line, until its stdin closes.

python neighbour.py PEER PORT NETWORK TTL_S [HOST]
"""

from __future__ import annotations

import json
import sys

import trio

from node.bridge import in_thread
from node.contact import Found
from node.lan import Announcement, Lan


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def _main(peer: str, port: str, network: str, ttl_s: str, host: str = "0.0.0.0") -> None:
    announcement = Announcement(bytes.fromhex(network), peer, host, int(port))  # type: ignore[arg-type]
    send, receive = trio.open_memory_channel[object](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Lan(announcement, ttl_s=int(ttl_s)).run, send)
        nursery.start_soon(_leave_with_stdin, nursery)
        async for event in receive:
            _say(**{"found" if isinstance(event, Found) else "gone": event.address})  # type: ignore[attr-defined]


async def _leave_with_stdin(nursery: trio.Nursery) -> None:
    await in_thread(sys.stdin.buffer.read, abandon=True)
    nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, *sys.argv[1:])
