"""A census: members of a network, frozen, which any number of nodes in one process can share.

Pure data.  Law: it never changes; what a node learns later lies over it, in that node's own differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from node.member import Member, State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from node.claim import Claim, PeerHash


class Census:
    """All alive, in some order.  Their claims are believed: whoever makes a census has verified them."""

    __slots__ = ("_index", "members", "peers")

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        """One claim a peer, none of them `left`; otherwise ValueError."""
        self.members: Final = tuple(Member(claim, State.ALIVE) for claim in claims)
        self.peers: Final[tuple[PeerHash, ...]] = tuple(member.claim.peer for member in self.members)
        self._index: Final = {peer: index for index, peer in enumerate(self.peers)}
        if len(self._index) < len(self.members) or any(member.claim.left for member in self.members):
            raise ValueError("a census has one claim of each peer, and none of a peer that left")

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, peer: PeerHash) -> bool:
        return peer in self._index

    def get(self, peer: PeerHash) -> Member | None:
        index = self._index.get(peer)
        return None if index is None else self.members[index]


EMPTY: Final = Census()
