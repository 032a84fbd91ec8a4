"""Newcomers: peers of an open network that others have told of, and that this node has not reached yet.

Pure.  Law: identities cost nothing, so whoever invents them competes with himself: each sender introduces so many a
minute, and where there is no room, the one that has taken most of it gives way.  PROTOCOL.md, section 14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from protos.errors import Overloaded
from protos.limits import NEWCOMER_S_MAX, NEWCOMER_SENDERS_MAX, NEWCOMERS_OF_SENDER_MAX

if TYPE_CHECKING:
    from protos.ids import PeerId

WINDOW_S: Final = 60.0


class Newcomers:
    """By who introduced them.  `sender`: the host that they came from, as the driver names it."""

    def __init__(self) -> None:
        self._sender_of: dict[PeerId, str] = {}
        self._of_sender: dict[str, dict[PeerId, float]] = {}  # since when, the oldest first
        self._introduced: dict[str, tuple[float, int]] = {}  # the window's begin and count, the oldest window first

    def __len__(self) -> int:
        return len(self._sender_of)

    def __contains__(self, peer: object) -> bool:
        return peer in self._sender_of

    def count(self, sender: str, now: float) -> None:
        """One more that this sender speaks of; counted before it is looked at.  Raises Overloaded."""
        self._forget_windows(now)
        began, count = self._introduced.get(sender, (now, 0))
        if count >= NEWCOMERS_OF_SENDER_MAX or (not count and len(self._introduced) >= NEWCOMER_SENDERS_MAX):
            wait_s = max(began + WINDOW_S - now, 1.0)
            raise Overloaded(
                f"{sender} has introduced {count} unknown peers within a minute, and may go on later",
                retry_after_s=wait_s,
            )
        self._introduced[sender] = (began, count + 1)

    def giving_way(self, sender: str) -> PeerId:
        """Whose place one more of this sender takes.  Raises Overloaded if nobody has more of them than the sender."""
        greedy = max(self._of_sender, key=lambda one: len(self._of_sender[one]))
        if len(self._of_sender[greedy]) <= len(self._of_sender.get(sender, {})):
            raise Overloaded(
                f"there is no room for peers that nobody reached, and {sender} has introduced most of them",
                retry_after_s=WINDOW_S,
            )
        return next(iter(self._of_sender[greedy]))

    def add(self, peer: PeerId, sender: str, now: float) -> None:
        self._sender_of[peer] = sender
        self._of_sender.setdefault(sender, {})[peer] = now

    def renew(self, peer: PeerId, now: float) -> None:
        """It answered, and stays one all the same: its time begins anew."""
        sender = self._sender_of.get(peer)
        if sender is not None:
            del self._of_sender[sender][peer]
            self._of_sender[sender][peer] = now

    def discard(self, peer: PeerId) -> None:
        sender = self._sender_of.pop(peer, None)
        if sender is None:
            return
        del self._of_sender[sender][peer]
        if not self._of_sender[sender]:
            del self._of_sender[sender]

    def aged(self, now: float) -> list[PeerId]:
        """Those that nobody reached for too long."""
        found = []
        for peers in self._of_sender.values():
            for peer, since in peers.items():
                if since + NEWCOMER_S_MAX > now:
                    break
                found.append(peer)
        return found

    def _forget_windows(self, now: float) -> None:
        while self._introduced and next(iter(self._introduced.values()))[0] + WINDOW_S <= now:
            del self._introduced[next(iter(self._introduced))]
