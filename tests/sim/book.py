"""Book: the records that a host knows, as far as the virtual network needs them: who is at which address.

It stands for node/routing_table, which table.py puts in its place: a record is signed by its subject, the higher
sequence wins, and sequences never go back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from protos.errors import InvalidSignature
from protos.transcript import RECORD_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.sim.notary import Pen

RECORDS_MAX = 512


@dataclass(frozen=True, slots=True)
class Page:
    """A record: `key` says that it is at `address`."""

    key: bytes
    sequence: int
    address: int
    signature: bytes
    peer: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "peer", hashlib.sha256(self.key).digest())

    @property
    def signed(self) -> bytes:
        return page_bytes(self.sequence, self.address)


def page_bytes(sequence: int, address: int) -> bytes:
    return sequence.to_bytes(8, "little") + address.to_bytes(8, "little", signed=True)


def sign_page(pen: Pen, sequence: int, address: int) -> Page:
    return Page(pen.key, sequence, address, pen.sign(RECORD_DOMAIN, page_bytes(sequence, address)))


@dataclass(slots=True)
class Book:
    verify: Callable[[bytes, bytes, bytes, bytes], None]
    pages: dict[bytes, Page] = field(default_factory=dict)

    def issue(self, pen: Pen, sequence: int, address: int, _wall_s: float) -> Page:
        return sign_page(pen, sequence, address)

    def forge(self, pen: Pen, key: bytes, sequence: int, address: int, _wall_s: float) -> Page:
        """In the name of `key`, signed by `pen`."""
        return replace(sign_page(pen, sequence, address), key=key)

    def keep(self, page: Page, _wall_s: float) -> None:
        """Its own."""
        self.pages[page.peer] = page

    def merge(self, pages: Iterable[Page], _wall_s: float) -> None:
        for page in pages:
            known = self.pages.get(page.peer)
            if page == known or (known is not None and page.sequence <= known.sequence):
                continue
            if known is None and len(self.pages) >= RECORDS_MAX:
                continue
            try:
                self.verify(page.key, page.signature, RECORD_DOMAIN, page.signed)
            except InvalidSignature:
                continue
            self.pages[page.peer] = page

    def address_of(self, peer: bytes) -> int | None:
        page = self.pages.get(peer)
        return None if page is None else page.address

    def sequence_of(self, peer: bytes) -> int:
        page = self.pages.get(peer)
        return 0 if page is None else page.sequence
