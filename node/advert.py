"""An advert: what a node says of itself on its LAN, and which addresses to try when another says so.

Pure.  Law: it says as little as finding it takes; it is read as anybody's word, of which nothing but an address and an
expectation comes.  PROTOCOL.md, section "Discovery"; DNS-SD is RFC 6763.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node import address
from node.record import PROTOCOL
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

    from protos.ids import PeerId

SERVICE = "_shoal._tcp.local."
"""The DNS-SD type; an instance's name is its node's PeerId."""

NETWORK_CHARS = 32
"""Hex digits of the network's id: half of them tell networks apart, and nobody looks for a network by the rest."""

ADDRESSES_MAX = 4
"""Addresses of one advert that are tried; as many as a record has."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads.  `near`: its own interfaces' addresses; what lies in their networks is tried first."""

    network: bytes
    me: PeerId
    near: Sequence[IPv4Interface | IPv6Interface] = ()


def properties(network: bytes, peer: PeerId) -> dict[str, str]:
    """The TXT record: version, network, peer, and nothing else.  About 100 bytes; RFC 6763 asks for below 200."""
    return {"v": str(PROTOCOL), "net": network.hex()[:NETWORK_CHARS], "peer": peer}


def read(reader: Reader, txt: Mapping[bytes, bytes | None], port: int, hosts: Sequence[str]) -> tuple[str, ...]:
    """Addresses to try, host:port#PEERID, near ones first.  None for junk, other networks or protocols, and oneself."""
    if txt.get(b"v") != str(PROTOCOL).encode() or txt.get(b"net") != reader.network.hex()[:NETWORK_CHARS].encode():
        return ()
    peer = (txt.get(b"peer") or b"").decode("ascii", "replace")
    if peer == reader.me:
        return ()
    dialable = [ip for text in hosts if (ip := _ip(text)) is not None and _can_be_dialled(ip, reader)]
    dialable.sort(key=lambda ip: (not _is_near(ip, reader), ip.version))
    found = (f"{f'[{ip}]' if ip.version == 6 else ip}:{port}#{peer}" for ip in dict.fromkeys(dialable))
    return tuple(text for text in found if _is_address(text))[:ADDRESSES_MAX]


def _can_be_dialled(ip: IPv4Address | IPv6Address, reader: Reader) -> bool:
    """Loopback only by who is on loopback only; an IPv6 link-local address means nothing without its interface."""
    if ip.is_multicast or ip.is_unspecified or ip.is_reserved or (ip.version == 6 and ip.is_link_local):
        return False
    return not ip.is_loopback or all(own.is_loopback for own in reader.near)


def _is_near(ip: IPv4Address | IPv6Address, reader: Reader) -> bool:
    return any(ip in own.network for own in reader.near)


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_address(text: str) -> bool:
    try:
        return address.parse(text).peer is not None
    except InvalidRequest:
        return False
