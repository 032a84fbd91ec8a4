"""The voice: what this node signs, its claim of itself and its suspicions of others.

Pure; the signing is an argument.  Law: its claims only go up in rank, and what it has said of itself is in force until
it says something newer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.claim import peer_hash, sign_claim, sign_suspicion

if TYPE_CHECKING:
    from node.claim import Claim, PeerHash, Sign, Suspicion


class Voice:
    """`claim` is the one in force; `left`: it has said good-bye, or is about to."""

    __slots__ = ("_key", "_network", "_sign", "claim", "left", "peer")

    def __init__(
        self, public_key: bytes, network: bytes, sign: Sign, incarnation: int, sequence: int, known: Claim | None
    ) -> None:
        """`known`: what the others hold of this node; it is not signed again where it says the same."""
        self._key = public_key
        self._network = network
        self._sign = sign
        self.peer: PeerHash = peer_hash(public_key)
        self.left = False
        if known is not None and known.rank == (incarnation, False, sequence):
            self.claim = known
        else:
            self.issue(incarnation, sequence)

    def issue(self, incarnation: int, sequence: int) -> None:
        """A new claim."""
        self.claim = sign_claim(self._sign, self._network, self._key, incarnation, sequence, left=self.left)

    def accuse(self, claim: Claim) -> Suspicion:
        """Its subject, in the incarnation of that claim."""
        return sign_suspicion(self._sign, self._network, claim.peer, claim.incarnation, self._key)
