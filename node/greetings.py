"""Greetings: which of the members that have not answered at their address are pinged in this round.

Pure; `now` is an argument.  Law: whoever never answers is asked ever more rarely, and no host is sent more than a few
in a round, whoever says that it is there: a record may name the address of a bystander.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from protos.ids import PeerId

GREETINGS_AT_ONCE_MAX: Final = 16
"""In a round; the others wait for the next."""

GREETINGS_OF_HOST_MAX: Final = 4
"""Of these, to one host."""

GREET_AGAIN_S: Final = 1.0
"""After the first greeting; doubled with each further one, up to GREET_AGAIN_S_MAX."""

GREET_AGAIN_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Greeted:
    address: str
    wait_s: float
    again_at: float


class Greetings:
    def __init__(self, random: Random) -> None:
        self._random = random
        self._greeted: dict[PeerId, _Greeted] = {}

    def due(self, unanswered: Mapping[PeerId, str], now: float) -> list[PeerId]:
        """Some of these peers, at these addresses; they count as greeted.  All others are forgotten."""
        self._greeted = {
            peer: before for peer, before in self._greeted.items() if unanswered.get(peer) == before.address
        }
        waiting = [peer for peer in unanswered if peer not in self._greeted or self._greeted[peer].again_at <= now]
        chosen: list[PeerId] = []
        of_host: Counter[str] = Counter()
        for peer in self._random.sample(waiting, len(waiting)):
            host = unanswered[peer].rpartition(":")[0]
            if of_host[host] < GREETINGS_OF_HOST_MAX:
                of_host[host] += 1
                chosen.append(peer)
                self._count(peer, unanswered[peer], now)
            if len(chosen) == GREETINGS_AT_ONCE_MAX:
                break
        return chosen

    def _count(self, peer: PeerId, address: str, now: float) -> None:
        before = self._greeted.get(peer)
        wait_s = GREET_AGAIN_S if before is None else min(2 * before.wait_s, GREET_AGAIN_S_MAX)
        self._greeted[peer] = _Greeted(address, wait_s, now + wait_s)
