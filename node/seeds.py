"""Seeds: the addresses behind the name of a seed, as the system's resolver gives them now.

Law: a name is looked up in a thread that nobody waits for longer than a deadline; what it gives is bounded.
"""

from __future__ import annotations

import random
import socket
from functools import partial

import trio

from node import address
from node.bridge import in_thread
from node.contacts import SEED_ADDRESSES_MAX
from protos.errors import DeadlineExceeded, PeerLost

RESOLVE_S = 10.0
"""A resolver asks a server for 5 s, and then the next one (resolv.conf(5)); what takes longer brings nothing."""


async def resolve(seed: str) -> list[str]:
    """Of host:port or host:port#PEERID, the same with IP addresses: each once, in random order, a bounded number.

    Raises InvalidRequest, PeerLost, DeadlineExceeded.
    """
    parsed = address.parse(seed)
    with trio.move_on_after(RESOLVE_S):
        ips = await in_thread(partial(_look_up, parsed.host, parsed.port), abandon=True)
        random.shuffle(ips)  # so that the seeds behind one name share the load
        peer = f"#{parsed.peer}" if parsed.peer else ""
        return [f"{f'[{ip}]' if ':' in ip else ip}:{parsed.port}{peer}" for ip in ips[:SEED_ADDRESSES_MAX]]
    raise DeadlineExceeded(f"the name {parsed.host} could not be looked up within {RESOLVE_S:g} s: is DNS reachable?")


def _look_up(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PeerLost(f"the name {host} cannot be looked up: {error}") from None
    return list(dict.fromkeys(str(info[4][0]) for info in found))
