"""Table: the book of records kept by node/routing_table, with real records and real Ed25519 signatures.

Law: what it says of a record it read in the record that the table accepted, never on the envelope that brought it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from node.identity import Identity
from node.record import Record, opened, sign
from node.routing_table import Accepted, RoutingTable
from protos.errors import ShoalError
from tests.sim.book import Page

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.sim.notary import Notary, Pen

RECORD_S = 3600 * 20
# Addresses of the virtual network are whole numbers; the ports of one machine stand for them, moved ones below.
PORT = 30_000


@dataclass(frozen=True, slots=True)
class RealPage(Page):
    """`data` is the signed record; `content` is what its signature covers."""

    data: bytes = b""
    content: bytes = field(default=b"", repr=False)

    @property
    def signed(self) -> bytes:
        return self.content


class Table:
    """The same face as Book."""

    def __init__(self, notary: Notary) -> None:
        self.pages: dict[bytes, Page] = {}
        self.table = RoutingTable()
        self._notary = notary

    def issue(self, pen: Pen, sequence: int, address: int, wall_s: float) -> Page:
        page = self._page(_record(pen.key, sequence, address, wall_s), pen)
        self._notary.remember(page.signature, pen.key, page.content)
        return page

    def forge(self, pen: Pen, key: bytes, sequence: int, address: int, wall_s: float) -> Page:
        """In the name of `key`, signed by `pen`."""
        return self._page(_record(key, sequence, address, wall_s), pen)

    def keep(self, page: Page, wall_s: float) -> None:
        """Its own."""
        assert isinstance(page, RealPage)
        self.table.merge(page.data, wall_s)
        self.pages[page.peer] = page

    def merge(self, pages: Iterable[Page], wall_s: float) -> None:
        for page in pages:
            assert isinstance(page, RealPage)
            if page is self.pages.get(page.peer):
                continue
            try:
                outcome = self.table.merge(page.data, wall_s, sender="10.0.0.1")
            except ShoalError:
                continue
            if isinstance(outcome, Accepted):
                record = outcome.record
                known = RealPage(
                    record.public_key, record.sequence, _number(record), page.signature, page.data, page.content
                )
                self.pages[known.peer] = known

    def address_of(self, peer: bytes) -> int | None:
        page = self.pages.get(peer)
        return None if page is None else page.address

    def sequence_of(self, peer: bytes) -> int:
        page = self.pages.get(peer)
        return 0 if page is None else page.sequence

    def _page(self, record: Record, pen: Pen) -> RealPage:
        data = sign(record, Identity(pen.private))
        envelope = opened(data)
        return RealPage(record.public_key, record.sequence, _number(record), envelope.signature, data, envelope.content)


def _record(key: bytes, sequence: int, address: int, wall_s: float) -> Record:
    wall_ms = int(wall_s * 1000)
    return Record(
        public_key=key,
        addresses=(f"10.0.0.1:{PORT + address}",),
        certificate_sha256=None,
        sequence=sequence,
        issued_at_ms=wall_ms,
        expires_at_ms=wall_ms + RECORD_S * 1000,
    )


def _number(record: Record) -> int:
    return int(record.address.rpartition(":")[2]) - PORT
