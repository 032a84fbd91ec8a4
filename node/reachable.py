"""Reachable: whether others can call this node, as they say who have tried.  PROTOCOL.md, section 14.

Thread-safe, pure but for its lock; `now` is an argument.  Law: one peer that says so is enough to be reachable, and one
that cannot reach this node is believed only while no other says that it can.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from protos.ids import PeerId

ASK_AGAIN_S: Final = 60.0
"""A peer that could not reach this node is asked again after so long: somebody may have opened the port."""

BELIEVED_S: Final = 1800.0
"""What a peer said holds so long."""

PEERS_ASKED: Final = 3
"""Peers whose word is wanted; a node that many can reach asks nobody more."""

RENEWED_S: Final = BELIEVED_S / 2
"""A good word that is older is asked for again, of the same peer or of another: before it ends there is time for it."""

ASKED_S: Final = 20.0
"""A peer that is being asked is not asked again meanwhile."""

PEERS_MAX: Final = 64
"""Whose words are remembered; of more, the oldest is forgotten."""


@dataclass(frozen=True, slots=True)
class _Word:
    reached: bool
    why: str
    at: float


class Reachable:
    """`address`: where this node says that it is."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._words: dict[PeerId, _Word] = {}
        self._asked: dict[PeerId, float] = {}
        self._lock = threading.Lock()

    def wants(self, peer: PeerId, now: float) -> bool:
        """Whether this peer's word is wanted, or wanted again; then it counts as being asked."""
        with self._lock:
            if not self._is_due(peer, now):
                return False
            self._asked = {other: at for other, at in self._asked.items() if now - at < ASKED_S}
            self._asked[peer] = now
            return True

    def said(self, peer: PeerId, reached: bool, why: str, now: float) -> None:
        with self._lock:
            self._asked.pop(peer, None)
            self._words.pop(peer, None)
            self._words[peer] = _Word(reached, why, now)
            if len(self._words) > PEERS_MAX:
                del self._words[next(iter(self._words))]

    def refuted(self, now: float) -> str | None:
        """Why nobody reaches this node; None: somebody does, or nobody has said anything."""
        with self._lock:
            words = [word for word in self._words.values() if now - word.at < BELIEVED_S]
        if not words or any(word.reached for word in words):
            return None
        return words[-1].why

    def _is_due(self, peer: PeerId, now: float) -> bool:
        if now - self._asked.get(peer, -ASKED_S) < ASKED_S:
            return False
        word = self._words.get(peer)
        if word is not None:
            return now - word.at >= (RENEWED_S if word.reached else ASK_AGAIN_S)
        fresh = [word for word in self._words.values() if word.reached and now - word.at < RENEWED_S]
        return len(fresh) < PEERS_ASKED
