"""Wire: what a message weighs as a datagram.

The items' sizes are membership's own; the envelope is counted here and compared with the real encoding by a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.claim import encoded_bytes
from node.message import DATAGRAM_BYTES_MAX, GOSSIP_ROOM_BYTES, TARGET_BYTES, Gossip, PingRequest

if TYPE_CHECKING:
    from node.claim import Item
    from node.message import Message

NONCE_BYTES = 9
ENVELOPE_BYTES = DATAGRAM_BYTES_MAX - GOSSIP_ROOM_BYTES - NONCE_BYTES

_weights: dict[Item, int] = {}


def datagram_bytes(message: Message) -> int:
    """The payload of one UDP datagram."""
    total = ENVELOPE_BYTES + sum(map(_weight, message.gossip))
    if not isinstance(message, Gossip):
        total += NONCE_BYTES
    return total + TARGET_BYTES if isinstance(message, PingRequest) else total


def _weight(item: Item) -> int:
    found = _weights.get(item)
    if found is None:
        if len(_weights) > 100_000:
            _weights.clear()
        found = _weights[item] = encoded_bytes(item)
    return found
