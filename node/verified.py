"""Items whose signatures are known to fit, so that none is verified twice.

Pure; the check of a signature is an argument.  Law: only an identical item is spared its verification, and of more than
there is room for the oldest is forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.claim import verify_item
from protos.errors import InvalidSignature

if TYPE_CHECKING:
    from node.claim import Item, Verify


class Verified:
    """Of one network; `items_max` are remembered."""

    __slots__ = ("_items", "_items_max", "_network", "_verify")

    def __init__(self, verify: Verify, network: bytes, items_max: int) -> None:
        self._verify = verify
        self._network = network
        self._items_max = items_max
        self._items: dict[bytes, Item] = {}  # by signature, the oldest first

    def fits(self, item: Item) -> bool:
        """Whether its signer said it."""
        if self._items.get(item.signature) == item:
            return True
        try:
            verify_item(self._verify, self._network, item)
        except InvalidSignature:
            return False
        if len(self._items) >= self._items_max:
            del self._items[next(iter(self._items))]
        self._items[item.signature] = item
        return True
