"""Sightings: the names that were seen on the LAN, which addresses stand behind them, and when to look again.

Pure: the clock (monotonic seconds) and randomness are arguments.  Law: what nobody repeats is gone after its time; a
flood of names costs a bounded table and a bounded number of questions, and pushes out no node that was found.

A name's pointer lives for at least 19 minutes in zeroconf, whatever its TTL says, so its end tells nothing of a node
that was killed.  Its SRV record does: it is looked for again when its time is over, and asked for if it is not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

NAMES_MAX = 256
"""Names of all networks on the LAN."""

NAME_CHARS_MAX = 255
"""A DNS name."""

ASK_S = 1.0
"""Between two questions for one name; RFC 6762, section 5.2, allows no less."""

ASKS_MAX = 3
"""Questions without an answer after which nobody stands behind the name."""

ASKS_A_SECOND_MAX = 20
"""Questions for all names together."""

GIVEN_UP_S = 300.0
"""A name without an answer is asked for again after so long, as long as its pointer lives."""

_SPREAD = 1.3  # of the times at which nodes look, so that one asks and all hear the answer


@dataclass(slots=True)
class _Sighting:
    look_at: float
    addresses: tuple[str, ...] = ()
    asks: int = 0  # since it was last read


class Sightings:
    """`ttl_s`: how long an SRV record holds."""

    def __init__(self, ttl_s: float, random: Random) -> None:
        self._ttl_s = ttl_s
        self._random = random
        self._names: dict[str, _Sighting] = {}
        self._second = -math.inf  # the one in which these questions were asked
        self._asked = 0

    def noticed(self, name: str, now: float) -> None:
        """Something about it is new: it is due."""
        known = self._names.get(name)
        if known is not None:
            known.look_at, known.asks = min(known.look_at, now), 0
        elif len(name) <= NAME_CHARS_MAX and self._make_room():
            self._names[name] = _Sighting(now)

    def withdrawn(self, name: str) -> None:
        """It said farewell, or its pointer has ended."""
        self._names.pop(name, None)

    def due(self, now: float) -> list[str]:
        """Names to read; say `read` of each."""
        return [name for name, seen in self._names.items() if seen.look_at <= now]

    def read(self, name: str, addresses: tuple[str, ...] | None, now: float) -> bool:
        """What stands behind it, nothing if it is no node of this network.  None: unknown; then, whether to ask."""
        seen = self._names.get(name)
        if seen is None:
            return False
        if addresses is None:
            return self._missing(seen, now)
        seen.addresses, seen.asks = addresses, 0
        # Of no use: nothing is asked until something about it is new.
        seen.look_at = now + self._ttl_s * self._random.uniform(1.0, _SPREAD) if addresses else math.inf
        return False

    @property
    def addresses(self) -> dict[str, None]:
        """All of them, in the order in which they were seen."""
        return dict.fromkeys(address for seen in self._names.values() for address in seen.addresses)

    @property
    def deadline(self) -> float:
        """When a name is due next."""
        return min((seen.look_at for seen in self._names.values()), default=math.inf)

    def _missing(self, seen: _Sighting, now: float) -> bool:
        if seen.asks >= ASKS_MAX:
            seen.addresses, seen.asks = (), 0
            seen.look_at = now + GIVEN_UP_S * self._random.uniform(1.0, _SPREAD)
            return False
        seen.look_at = now + ASK_S * self._random.uniform(1.0, _SPREAD)
        if now - self._second >= 1.0:
            self._second, self._asked = now, 0
        if self._asked >= ASKS_A_SECOND_MAX:
            return False
        self._asked += 1
        seen.asks += 1
        return True

    def _make_room(self) -> bool:
        if len(self._names) < NAMES_MAX:
            return True
        useless = next((name for name, seen in self._names.items() if not seen.addresses), None)
        if useless is not None:
            del self._names[useless]
        return useless is not None
