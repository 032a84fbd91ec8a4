"""Ports on loopback that nobody else takes before the process that they are for listens there.

Law: a port that is held here can be bound only by who allows others beside it, as gRPC's servers do until they listen.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import TYPE_CHECKING, Final

from protos.errors import PortInUse

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST: Final = 7646
"""Behind the default of `shoal run`; below the ports that systems give to outgoing connections."""

TRIED_MAX: Final = 2000
"""Ports that are looked at."""


@contextlib.contextmanager
def reserved(count: int) -> Iterator[list[int]]:
    """So many, until the block ends: of one row, where there is room.  Raises PortInUse."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in range(FIRST, FIRST + TRIED_MAX):
            if len(found) == count:
                break
            if _hold(port, held):
                found.append(port)
        if len(found) < count:
            raise PortInUse(f"{count} ports are needed, of those from {FIRST} on {len(found)} are free; end something")
        if sys.platform != "linux":
            held.close()  # elsewhere a bound socket is in the way of any other
        yield found


def _hold(port: int, held: contextlib.ExitStack) -> bool:
    holder = socket.socket()
    try:
        holder.bind(("127.0.0.1", port))  # alone, or not at all
    except OSError:
        holder.close()
        return False
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # from now on beside others
    held.callback(holder.close)
    return True
