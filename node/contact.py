"""A contact: an address where a node may be found, what happens to it, and what is to be done about it.

Pure: the vocabulary of node.contacts, and no decision.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.ids import PeerId


class Source(enum.IntEnum):
    """Who suggested an address; of those that came together seeds are tried first."""

    SEED = 0
    LAN = 1
    REMEMBERED = 2


@dataclass(frozen=True, slots=True)
class Contact:
    """`address`: host:port or host:port#PEERID; a seed's has no name for a host, but `seed` is the one it came from."""

    source: Source
    address: str
    seed: str = ""


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """A source suggests an address; a seed's may have a name for a host.  One that is known changes nothing."""

    source: Source
    address: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The source no longer suggests it."""

    source: Source
    address: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """The name of a seed has these addresses now, host:port or host:port#PEERID; they replace those it had."""

    seed: str
    addresses: Sequence[str]


@dataclass(frozen=True, slots=True)
class Unresolved:
    """The name of a seed could not be looked up; what is known of it stays."""

    seed: str
    why: str


@dataclass(frozen=True, slots=True)
class Reached:
    """A try succeeded: this peer proved that it is there."""

    contact: Contact
    peer: PeerId


@dataclass(frozen=True, slots=True)
class Failed:
    """A try failed.  `lasting`: not for weather, so that the next one waits as long as it may."""

    contact: Contact
    why: str
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """All peers whose records are known now and that are not dead: it replaces what was said before."""

    peers: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline has come."""


Event = Found | Withdrawn | Resolved | Unresolved | Reached | Failed | Known | Tick


# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Try:
    """Dial it and exchange records with who answers; then say Reached or Failed."""

    contact: Contact


@dataclass(frozen=True, slots=True)
class Resolve:
    """Look the name of this seed up; then say Resolved or Unresolved."""

    seed: str


@dataclass(frozen=True, slots=True)
class Failing:
    """To be told to people: it fails for a reason that it did not have before."""

    source: Source
    address: str
    why: str


@dataclass(frozen=True, slots=True)
class Alone:
    """To be told to people: no peer has been known for so long, and so many addresses are tried."""

    for_s: float
    contacts: int


Effect = Try | Resolve | Failing | Alone


@dataclass(frozen=True, slots=True)
class Status:
    """What `shoal peers` shows of a contact.  `retry_s`: until it is tried again; None: busy, or not wanted now."""

    source: Source
    address: str
    state: str  # known, trying, waiting, spare
    peer: PeerId | None
    why: str
    retry_s: float | None
