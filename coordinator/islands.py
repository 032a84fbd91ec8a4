"""Islands: peers within a low round-trip time of each other, as far as one node can know it.

Pure.  A node measures only its own round-trip times.  What they say of two others is the triangle's inequality: the way
between a and b is at most rtt(a) + rtt(b), and at least |rtt(a) - rtt(b)|.  So two peers are surely near where the sum
is small, surely not where the difference is large, and in between their zones decide.

Law: every peer is on exactly one island; a peer of unknown distance and zone is on one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from protos.ids import PeerId

NEAR_S: Final = 0.005
"""Where experts of every layer may be remote: 16 layers at 5 ms leave 12 tokens a second at best."""

STAY_FACTOR: Final = 1.5
"""Who was together stays so up to this many times the bound: one slow sample moves nobody, and nobody flaps."""


@dataclass(frozen=True, slots=True)
class Place:
    """What is known of a peer.  `rtt_s`: the least of the last samples, since load only adds to it; None: unknown."""

    rtt_s: float | None = None
    zone: str = ""


def islands(
    places: Mapping[PeerId, Place], before: Iterable[frozenset[PeerId]] = (), near_s: float = NEAR_S
) -> list[frozenset[PeerId]]:
    """The peers of `places` by island, largest first, then by name.  The node itself is a place with `rtt_s` 0.

    before: the last result, for whom the bound is wider.  O(n log n) for n peers: whoever is within the bound of the
    node itself forms one island, zones the others.
    """
    together = {peer: number for number, island in enumerate(before) for peer in island}
    found: list[set[PeerId]] = []
    home: set[PeerId] = set()
    homes = {together[peer] for peer, place in places.items() if place.rtt_s == 0 and peer in together}
    for peer in sorted(places):
        bound = near_s * (STAY_FACTOR if together.get(peer) in homes else 1.0)
        rtt_s = places[peer].rtt_s
        if rtt_s is not None and rtt_s <= bound:
            home.add(peer)
    if home:
        found.append(home)
    for zone_peers in _by_zone({peer: place for peer, place in places.items() if peer not in home}).values():
        found.extend(_runs(zone_peers, places, together, near_s))
    return sorted((frozenset(island) for island in found), key=lambda island: (-len(island), min(island)))


def island_of(peer: PeerId, found: Iterable[frozenset[PeerId]]) -> frozenset[PeerId]:
    """The island that `peer` is on; alone where it is on none."""
    return next((island for island in found if peer in island), frozenset([peer]))


def _by_zone(places: Mapping[PeerId, Place]) -> dict[str, list[PeerId]]:
    """Without a zone, or of unknown distance: a key of one's own."""
    zones: dict[str, list[PeerId]] = {}
    for peer, place in places.items():
        zones.setdefault(f"zone {place.zone}" if place.zone else f"peer {peer}", []).append(peer)
    return zones


def _runs(
    peers: list[PeerId], places: Mapping[PeerId, Place], together: Mapping[PeerId, int], near_s: float
) -> list[set[PeerId]]:
    """A zone's peers, cut where their distances from here differ so much that they cannot be near each other."""
    unknown = [peer for peer in peers if places[peer].rtt_s is None]
    known = sorted((rtt_s, peer) for peer in peers if (rtt_s := places[peer].rtt_s) is not None)
    runs: list[set[PeerId]] = []
    first_s = 0.0
    for rtt_s, peer in known:
        if runs and rtt_s - first_s <= near_s * _slack(peer, runs[-1], together):
            runs[-1].add(peer)
        else:
            runs.append({peer})
            first_s = rtt_s
    if unknown:  # nothing contradicts their zone
        largest = max(runs, key=len, default=None)
        if largest is None:
            runs.append(set(unknown))
        else:
            largest.update(unknown)
    return runs


def _slack(peer: PeerId, run: set[PeerId], together: Mapping[PeerId, int]) -> float:
    was = together.get(peer)
    return STAY_FACTOR if was is not None and any(together.get(other) == was for other in run) else 1.0
