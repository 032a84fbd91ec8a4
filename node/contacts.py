"""Contacts: at which addresses to look for other nodes, and when.  PROTOCOL.md, section "Discovery".

Pure: the clock (monotonic seconds) and randomness are arguments; equal inputs give equal effects.  Law: who is wanted
is tried for ever, later each time up to a bound; no source crowds out another; and nothing that a source says is
believed before the node at the address has proven who it is.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from node import address as addresses
from node.contact import (
    Alone,
    Contact,
    Effect,
    Event,
    Failed,
    Failing,
    Found,
    Known,
    Reached,
    Resolve,
    Resolved,
    Source,
    Status,
    Tick,
    Try,
    Unresolved,
    Withdrawn,
)
from protos.errors import BrokenInvariant, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from protos.ids import PeerId

TRIES_AT_ONCE_MAX = 8
"""Dials under way; each holds a thread for a few seconds at most."""

LAN_TRIES_AT_ONCE_MAX = 4
"""Of these, such as the LAN suggested: anybody there can suggest any number of addresses."""

RESOLVES_AT_ONCE_MAX = 4
"""Look-ups of names under way; each holds a thread until the system's resolver gives up."""

SEEDS_MAX = 64
"""Seeds that a person gave; as many as the setting `join` takes."""

SEED_ADDRESSES_MAX = 8
"""Addresses of one name that are tried."""

LAN_MAX = 128
"""Addresses that the LAN suggested: more nodes than one LAN has, and below what a flood could make of it."""

REMEMBERED_MAX = 64
"""Peers of the last run."""

REMEMBERED_WANTED = 3
"""So many of the remembered peers are looked for, also where others are known: a seed cannot hide them all."""

RETRY_S_FIRST = 1.0
"""The longest wait after the first failure; it doubles with each further one."""

ALONE_S_FIRST = 10.0
"""After so long without any known peer the node says so."""

ALONE_S_MAX = 3600.0
"""Between two times of saying so."""


RETRY_S_MAX = {Source.SEED: 15.0, Source.LAN: 60.0, Source.REMEMBERED: 300.0}
"""The longest wait between two tries.  A seed that comes back is found within it; most remembered peers stay gone."""

RETRY_S_MAX_ALONE = 15.0
"""The same while no peer is known at all."""

_MAX = {Source.SEED: SEEDS_MAX * SEED_ADDRESSES_MAX, Source.LAN: LAN_MAX, Source.REMEMBERED: REMEMBERED_MAX}


@dataclass(slots=True)
class _Try:
    """Of a contact or of a name: what came of trying it."""

    misses: int = 0  # in a row
    retry_at: float = 0.0
    busy: bool = False
    why: str = ""


@dataclass(slots=True)
class _Contact(_Try):
    peer: PeerId | None = None  # who answered there; before that, who is said to be there
    withdrawn: bool = False  # while it is tried: it goes when the try ends, so that tries stay bounded


@dataclass(slots=True)
class _Name(_Try):
    peer: PeerId | None = None
    children: list[Contact] = field(default_factory=list)


class Contacts:
    """`me` is never wanted.  `searching`: the LAN is searched, so that there is hope without any address."""

    def __init__(self, me: PeerId, random: Random, now: float, *, searching: bool = False) -> None:
        self._me = me
        self._random = random
        self._searching = searching
        self._contacts: dict[Contact, _Contact] = {}
        self._names: dict[str, _Name] = {}
        self._known: frozenset[PeerId] = frozenset()
        self._said = 0
        self._alone_since = now
        self._say_at = now + ALONE_S_FIRST

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What is to be done because of it.  Raises InvalidRequest for a Found that is no address of a node."""
        effects: list[Effect] = []
        match event:
            case Found(source, text):
                self._found(source, text, now)
            case Withdrawn(source, text):
                self._drop(Contact(source, text))
            case Resolved(seed, found):
                effects += self._resolved(seed, found, now)
            case Unresolved(seed, why):
                effects += self._unresolved(seed, why, now)
            case Reached(contact, peer):
                self._reached(contact, peer, now)
            case Failed(contact, why, lasting):
                effects += self._failed(contact, why, lasting, now)
            case Known(peers):
                self._set_known(peers, now)
            case Tick():
                pass
            case _:
                _unknown(event)
        return effects + self._say(now) + self._begin(now)

    @property
    def deadline(self) -> float | None:
        """When handle(Tick(), now) is due next; None: when something happens."""
        room = {source: self._has_room(source) for source in Source}
        times = [state.retry_at for contact, state in self._waiting() if room[contact.source]]
        if self._resolving < RESOLVES_AT_ONCE_MAX:
            times += [name.retry_at for name in self._names.values() if not name.busy and self._wants_name(name)]
        if self._is_alone and self._has_hope:
            times.append(self._say_at)
        return min(times, default=None)

    def status(self, now: float) -> list[Status]:
        """Names whose addresses are not known, and all contacts, in the order of their sources."""
        names = [
            Status(Source.SEED, seed, "trying" if name.busy else "waiting", name.peer, name.why, _until(name, now))
            for seed, name in self._names.items()
            if not name.children
        ]
        enough = self._has_enough_remembered()
        ordered = sorted(self._contacts.items(), key=lambda pair: pair[0].source)
        return names + [self._status(contact, state, enough, now) for contact, state in ordered]

    # --- what happens -----------------------------------------------------------------------------------------------

    def _found(self, source: Source, text: str, now: float) -> None:
        parsed = addresses.parse(text)
        if source is Source.SEED and _is_name(parsed.host):
            if text not in self._names and len(self._names) < SEEDS_MAX:
                self._names[text] = _Name(retry_at=now, peer=parsed.peer)
        else:
            self._add(Contact(source, text), now)

    def _add(self, contact: Contact, now: float) -> None:
        if contact in self._contacts:
            self._contacts[contact].withdrawn = False
        elif self._make_room(contact.source):
            self._contacts[contact] = _Contact(retry_at=now, peer=addresses.parse(contact.address).peer)

    def _drop(self, contact: Contact) -> None:
        state = self._contacts.get(contact)
        if state is not None and state.busy:
            state.withdrawn = True
        else:
            self._contacts.pop(contact, None)

    def _ended(self, contact: Contact) -> _Contact | None:
        """The try of it has ended; None: nobody suggests it any more."""
        state = self._contacts.get(contact)
        if state is None:
            return None
        state.busy = False
        if state.withdrawn:
            del self._contacts[contact]
            return None
        return state

    def _make_room(self, source: Source) -> bool:
        """What has failed most often goes first; what was never tried, or answers, is not pushed out."""
        same = {contact: state for contact, state in self._contacts.items() if contact.source is source}
        if len(same) < _MAX[source]:
            return True
        failed = [contact for contact, state in same.items() if state.misses and not state.busy]
        if not failed:
            return False
        del self._contacts[max(failed, key=lambda contact: same[contact].misses)]
        return True

    def _resolved(self, seed: str, found: Sequence[str], now: float) -> list[Effect]:
        """Each address is tried once for each look-up: so a retry always uses what the name says now."""
        name = self._names.get(seed)
        children = [Contact(Source.SEED, text, seed) for text in _valid(found)[:SEED_ADDRESSES_MAX]]
        if name is None or not children:
            return self._unresolved(seed, "the name has no address", now)
        for contact in name.children:
            if contact not in children:
                self._drop(contact)
        for contact in children:
            self._add(contact, now)
            if contact in self._contacts:
                self._contacts[contact].retry_at = now
        name.children, name.why = children, ""
        self._wait(name, Source.SEED, now)
        return []

    def _unresolved(self, seed: str, why: str, now: float) -> list[Effect]:
        name = self._names.get(seed)
        return [] if name is None else self._missed(name, Source.SEED, seed, why, now)

    def _reached(self, contact: Contact, peer: PeerId, now: float) -> None:
        state = self._ended(contact)
        if state is None:
            return
        state.peer, state.misses, state.why = peer, 0, ""
        # One that answered and is not known for all that is not asked at once again.
        state.retry_at = now + self._jittered(RETRY_S_FIRST)
        if contact.seed:
            state.retry_at = math.inf
            self._names[contact.seed].misses = 0

    def _failed(self, contact: Contact, why: str, lasting: bool, now: float) -> list[Effect]:
        state = self._ended(contact)
        if state is None:
            return []
        effects = self._missed(state, contact.source, contact.seed or contact.address, why, now)
        if contact.seed:
            state.retry_at = math.inf  # until its name has been looked up again
        elif lasting:
            state.retry_at = now + self._jittered(self._bound(contact.source))
        return effects

    def _missed(self, tried: _Try, source: Source, text: str, why: str, now: float) -> list[Effect]:
        news = why != tried.why
        tried.why = why
        self._wait(tried, source, now)
        return [Failing(source, text, why)] if news else []

    def _wait(self, tried: _Try, source: Source, now: float) -> None:
        """Doubling, jittered and bounded, so that nodes that lost the same peer do not return in step."""
        tried.busy = False
        tried.misses = min(tried.misses + 1, 32)
        longest = min(RETRY_S_FIRST * 2.0 ** (tried.misses - 1), self._bound(source))
        tried.retry_at = now + self._jittered(longest)

    def _set_known(self, peers: frozenset[PeerId], now: float) -> None:
        lost = self._known - peers
        was_alone, self._known = self._is_alone, peers - {self._me}
        for contact, state in self._contacts.items():
            if state.peer in lost and not state.busy and not contact.seed:
                state.misses = 0
                state.retry_at = now + self._random.uniform(0.0, RETRY_S_FIRST)
        for name in self._names.values():
            if not name.busy and self._wants_name(name) and self._lost_child(name, lost):
                name.misses = 0
                name.retry_at = now + self._random.uniform(0.0, RETRY_S_FIRST)
        if self._is_alone and not was_alone:
            self._said = 0
            self._alone_since = now
            self._say_at = now + ALONE_S_FIRST

    # --- what is wanted ---------------------------------------------------------------------------------------------

    @property
    def _is_alone(self) -> bool:
        return not self._known

    @property
    def _has_hope(self) -> bool:
        return self._searching or bool(self._contacts or self._names)

    @property
    def _resolving(self) -> int:
        return sum(name.busy for name in self._names.values())

    def _is_known(self, peer: PeerId | None) -> bool:
        return peer is not None and (peer in self._known or peer == self._me)

    def _wants(self, contact: Contact, state: _Contact, enough: bool) -> bool:
        return not self._is_known(state.peer) and not (enough and contact.source is Source.REMEMBERED)

    def _has_enough_remembered(self) -> bool:
        remembered = (state for contact, state in self._contacts.items() if contact.source is Source.REMEMBERED)
        return sum(state.peer in self._known for state in remembered) >= REMEMBERED_WANTED

    def _wants_name(self, name: _Name) -> bool:
        """One of its addresses is enough: a machine may have several, and not all of them need to work from here."""
        if self._is_known(name.peer):
            return False
        return not any(self._is_known(self._contacts[child].peer) for child in name.children if child in self._contacts)

    def _lost_child(self, name: _Name, lost: frozenset[PeerId]) -> bool:
        states = (self._contacts[child] for child in name.children if child in self._contacts)
        return name.peer in lost or any(state.peer in lost for state in states)

    def _waiting(self) -> list[tuple[Contact, _Contact]]:
        enough = self._has_enough_remembered()
        return [
            (contact, state)
            for contact, state in self._contacts.items()
            if not state.busy and state.retry_at < math.inf and self._wants(contact, state, enough)
        ]

    def _has_room(self, source: Source) -> bool:
        busy = [contact.source for contact, state in self._contacts.items() if state.busy]
        if source is Source.LAN and busy.count(Source.LAN) >= LAN_TRIES_AT_ONCE_MAX:
            return False
        return len(busy) < TRIES_AT_ONCE_MAX

    # --- what is done -----------------------------------------------------------------------------------------------

    def _say(self, now: float) -> list[Effect]:
        if not self._is_alone or not self._has_hope or now < self._say_at:
            return []
        self._said += 1
        self._say_at = now + min(ALONE_S_FIRST * 6.0**self._said, ALONE_S_MAX)
        return [Alone(now - self._alone_since, len(self._contacts))]

    def _begin(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for seed, name in self._names.items():
            due = not name.busy and name.retry_at <= now and self._wants_name(name)
            if due and self._resolving < RESOLVES_AT_ONCE_MAX:
                name.busy = True
                effects.append(Resolve(seed))
        for contact, state in sorted(self._waiting(), key=_turn):
            if state.retry_at > now:
                break
            if self._has_room(contact.source):
                state.busy = True
                effects.append(Try(contact))
        return effects

    def _bound(self, source: Source) -> float:
        return min(RETRY_S_MAX[source], RETRY_S_MAX_ALONE) if self._is_alone else RETRY_S_MAX[source]

    def _jittered(self, longest_s: float) -> float:
        return longest_s * self._random.uniform(0.5, 1.0)

    def _status(self, contact: Contact, state: _Contact, enough: bool, now: float) -> Status:
        word, retry_s = "waiting", _until(state, now)
        if state.busy:
            word = "trying"
        elif not self._wants(contact, state, enough):
            word, retry_s = "known" if self._is_known(state.peer) else "spare", None
        return Status(contact.source, contact.address, word, state.peer, state.why, retry_s)


def _turn(pair: tuple[Contact, _Contact]) -> tuple[float, Source]:
    """Whoever has waited longest, so that a flood of new ones keeps nobody from his turn."""
    contact, state = pair
    return state.retry_at, contact.source


def _until(tried: _Try, now: float) -> float | None:
    return None if tried.busy or tried.retry_at == math.inf else max(0.0, tried.retry_at - now)


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return True
    return False


def _valid(found: Sequence[str]) -> list[str]:
    """Each once, in order, without what is no address."""
    good = []
    for text in dict.fromkeys(found):
        try:
            addresses.parse(text)
        except InvalidRequest:
            continue
        good.append(text)
    return good


def _unknown(event: object) -> NoReturn:
    raise BrokenInvariant(f"contacts were given {type(event).__name__}, which is no event of theirs")
