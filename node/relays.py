"""Relays: probes under way for others, who had no answer themselves.

Pure.  Law: an asker gets its Nack in time, and an answer that is later than that is passed on all the same, for a
period and while there is room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.claim import PeerHash
    from node.profile import Profile


@dataclass(frozen=True, slots=True)
class Relay:
    """A probe for `asker`, who knows it by `nonce`."""

    asker: PeerHash
    nonce: int
    target: PeerHash
    nack_at: float


class Relays:
    """By the nonce of this node's own ping."""

    __slots__ = ("_late", "_profile", "_waiting")

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._waiting: dict[int, Relay] = {}  # the oldest first
        self._late: dict[int, Relay] = {}  # whose time for a Nack has come

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._profile.relays_max

    @property
    def deadline(self) -> float:
        """When the next Nack is due."""
        return next(iter(self._waiting.values())).nack_at if self._waiting else math.inf

    def add(self, own_nonce: int, relay: Relay) -> None:
        self._waiting[own_nonce] = relay

    def take_answer(self, sender: PeerHash, own_nonce: int) -> Relay | None:
        """The one that this answer ends, if it is the target's."""
        relays = self._waiting if own_nonce in self._waiting else self._late
        relay = relays.get(own_nonce)
        if relay is None or sender != relay.target:
            return None
        del relays[own_nonce]
        return relay

    def take_overdue(self, now: float) -> Iterator[Relay]:
        """Those whose Nack is due; from then on they are late."""
        while self._waiting:
            nonce, relay = next(iter(self._waiting.items()))
            if relay.nack_at > now:
                return
            del self._waiting[nonce]
            self._late[nonce] = relay
            yield relay

    def drop_late(self, now: float) -> None:
        """Those that are over, and those without room."""
        while self._late:
            nonce, relay = next(iter(self._late.items()))
            is_over = relay.nack_at + self._profile.probe_period_s <= now
            if not is_over and len(self._late) <= self._profile.relays_max:
                return
            del self._late[nonce]
