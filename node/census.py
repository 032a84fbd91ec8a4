"""A census: claims of many peers, frozen, which any number of nodes in one process can share.

Pure data.  Law: it never changes; what a node learns later lies over it, in that node's own differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from node.claim import Claim, PeerHash


class Census:
    """Claims by index and by peer.  They are believed: whoever makes a census has verified them."""

    __slots__ = ("_index", "claims")

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        """One claim a peer, none of them `left`; a second one of a peer raises ValueError."""
        self.claims: Final = tuple(claims)
        self._index: Final = {claim.peer: index for index, claim in enumerate(self.claims)}
        if len(self._index) < len(self.claims) or any(claim.left for claim in self.claims):
            raise ValueError("a census has one claim of each peer, and none of a peer that left")

    def __len__(self) -> int:
        return len(self.claims)

    def __contains__(self, peer: PeerHash) -> bool:
        return peer in self._index

    def claim_of(self, peer: PeerHash) -> Claim | None:
        index = self._index.get(peer)
        return None if index is None else self.claims[index]


EMPTY: Final = Census()
