"""A probe: the question of one period whether one member lives, and how far it is.

Pure data.  Law: it is answered by its nonce alone, by its target or by a helper that was asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.claim import PeerHash


class Probe:
    """Direct until `helpers_at`, then through helpers until `ends_at`.  Times move when the process stood still;
    `sent_at` is then None."""

    __slots__ = ("asked", "ends_at", "helpers", "helpers_at", "nacked", "nonce", "sent_at", "target")

    def __init__(self, target: PeerHash, nonce: int, sent_at: float, helpers_at: float, ends_at: float) -> None:
        self.target = target
        self.nonce = nonce
        self.sent_at: float | None = sent_at
        self.helpers_at = helpers_at
        self.ends_at = ends_at
        self.asked = False
        self.helpers: list[PeerHash] = []
        self.nacked: list[PeerHash] = []

    @property
    def deadline(self) -> float:
        """When its next step is due."""
        return self.ends_at if self.asked else self.helpers_at

    def postpone(self, late_s: float) -> None:
        self.sent_at = None
        self.helpers_at += late_s
        self.ends_at += late_s
