"""Where a node is: `host:port`, or `host:port#PEERID` where the caller knows whom to expect there.

Pure.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from protos.errors import InvalidRequest
from protos.ids import PeerId
from protos.limits import ADDRESS_CHARS_MAX

_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_PEER_ID = re.compile(r"[a-z2-7]{52}")


@dataclass(frozen=True, slots=True)
class Address:
    """`host_port` is what gRPC dials; `peer` is None where anybody may answer."""

    host_port: str
    peer: PeerId | None = None

    @property
    def host(self) -> str:
        """Without the brackets of an IPv6 address."""
        return self.host_port.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.host_port.rpartition(":")[2])


def is_peer_id(text: str) -> bool:
    return _PEER_ID.fullmatch(text) is not None


def parse(text: str) -> Address:
    """Raises InvalidRequest."""
    host_port, hash_sign, peer = text.partition("#")
    host, _, port = host_port.rpartition(":")
    bare_colon = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if (
        len(host_port) > ADDRESS_CHARS_MAX
        or not host
        or bare_colon
        or not _is_port(port)
        or not host_port.isprintable()
    ):
        raise InvalidRequest(
            f"{text!r:.80} is no address of a node: give host:port, such as 127.0.0.1:7645 or [::1]:7645"
        )
    if hash_sign and not is_peer_id(peer):
        raise InvalidRequest(
            f"{text!r:.150} names no peer behind its '#': a peer id has 52 characters, of a to z and 2 to 7"
        )
    return Address(host_port, PeerId(peer) if hash_sign else None)


def site(host: str) -> str:
    """What one party has many of is one: addresses of an IPv6 /64, names of a domain, spellings of an address."""
    if ":" not in host:
        return _ipv4(host) or ".".join(host.rstrip(".").lower().split(".")[-2:])
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _ipv4(host: str) -> str:
    """The usual form of what resolvers take for an IPv4 address, such as 127.1; empty: it is a name."""
    if host[-1:] not in _HEX_DIGITS or not host[:1].isdigit():
        return ""
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # no look-up
    except OSError:
        return ""


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) <= 65535
