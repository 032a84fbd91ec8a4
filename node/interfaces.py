"""Interfaces: this machine's addresses through which a node that listens on `host` can be found.

Law: the system is asked anew each time, because laptops change networks.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

import ifaddr

if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv6Interface

INTERFACES_MAX = 16
"""Addresses of this machine that are used; containers' bridges come on top of the few that a machine has."""


def of_host(host: str) -> tuple[IPv4Interface | IPv6Interface, ...]:
    """For 0.0.0.0 every IPv4 address but loopback's, for :: IPv6 too, else `host`'s own.  Sorted; may be none."""
    own = sorted(_own(), key=lambda each: (each.version, each.packed))
    if host in ("0.0.0.0", "::"):  # noqa: S104  (compared with, not bound to)
        return tuple(each for each in own if not each.is_loopback and (host == "::" or each.version == 4))[
            :INTERFACES_MAX
        ]
    wanted = _addresses_of(host)
    return tuple(each for each in own if str(each.ip) in wanted)


def _own() -> set[IPv4Interface | IPv6Interface]:
    """IPv6 link-local ones are left out: they mean nothing to others."""
    found = set()
    for adapter in ifaddr.get_adapters():
        for own in adapter.ips:
            text = own.ip if isinstance(own.ip, str) else own.ip[0]
            each = ipaddress.ip_interface(f"{text}/{own.network_prefix}")
            if each.version == 4 or not each.is_link_local:
                found.add(each)
    return found


def _addresses_of(host: str) -> set[str]:
    """Of an own name such as localhost, which the system knows without asking anybody."""
    try:
        return {str(ipaddress.ip_address(host))}
    except ValueError:
        pass
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()
