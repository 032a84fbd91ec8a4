"""What a node says on its LAN, and what is made of what others say there."""

from __future__ import annotations

import ipaddress

import pytest
import zeroconf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from node import address, advert
from node.identity import peer_id

NETWORK, OTHER = b"\x01" * 32, b"\x02" * 32
ME, ANNA = (peer_id(bytes([n]) * 32) for n in (1, 2))
NEAR = (ipaddress.ip_interface("192.168.1.7/24"), ipaddress.ip_interface("fd00::7/64"))
READER = advert.Reader(NETWORK, ME, NEAR)
LOOPBACK = advert.Reader(NETWORK, ME, (ipaddress.ip_interface("127.0.0.1/8"),))


def txt(network: bytes = NETWORK, peer: str = ANNA, **more: str) -> dict[bytes, bytes | None]:
    said = advert.properties(network, peer) | more  # type: ignore[arg-type]
    return {key.encode(): value.encode() for key, value in said.items()}


def test_it_says_version_network_and_peer_and_nothing_else() -> None:
    assert advert.properties(NETWORK, ANNA) == {"v": "1", "net": "01" * 16, "peer": ANNA}


def test_near_addresses_come_first_then_ipv4() -> None:
    hosts = ["fd01::1", "10.1.1.1", "fd00::1", "192.168.1.1", "192.168.1.1"]
    assert advert.read(READER, txt(), 7645, hosts) == tuple(
        f"{host}:7645#{ANNA}" for host in ("192.168.1.1", "[fd00::1]", "10.1.1.1", "[fd01::1]")
    )


@pytest.mark.parametrize(
    "said",
    [
        {},
        txt(OTHER),
        txt(v="2"),
        txt(peer="short"),
        txt(peer=ANNA.upper()),
        txt(peer=ANNA + "a"),
        txt(peer=ME),
        {**txt(), b"peer": None},
        {**txt(), b"peer": b"\xff" * 52},
        {**txt(), b"net": None},
    ],
)
def test_junk_other_networks_and_oneself_are_nobody(said: dict[bytes, bytes | None]) -> None:
    assert advert.read(READER, said, 7645, ["192.168.1.1"]) == ()


@pytest.mark.parametrize(
    "host",
    [
        "224.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "127.0.0.1",
        "::",
        "::1",
        "ff02::1",
        "fe80::1",
        "fe80::1%2",
        "name",
        "",
    ],
)
def test_what_cannot_be_dialled_from_here_is_left_out(host: str) -> None:
    assert advert.read(READER, txt(), 7645, [host]) == ()


def test_loopback_is_for_those_on_loopback() -> None:
    assert advert.read(LOOPBACK, txt(), 7645, ["127.0.0.1"]) == (f"127.0.0.1:7645#{ANNA}",)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_that_is_none_is_nobody(port: int) -> None:
    assert advert.read(READER, txt(), port, ["192.168.1.1"]) == ()


def test_addresses_are_bounded() -> None:
    assert len(advert.read(READER, txt(), 1, [f"192.168.1.{n}" for n in range(1, 200)])) == advert.ADDRESSES_MAX


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=400),
    st.integers(-1, 70_000),
    st.lists(st.text(max_size=40) | st.ip_addresses().map(str), max_size=8),
)
@example(b"\x04v=1\x00\x00", 7645, ["192.168.1.1"])
def test_no_text_record_whatever_its_bytes_gives_more_than_addresses_of_a_node(
    raw: bytes, port: int, hosts: list[str]
) -> None:
    """Through zeroconf's own parser, and with a valid beginning too, so that what follows is reached."""
    info = zeroconf.ServiceInfo(advert.SERVICE, f"{ANNA}.{advert.SERVICE}", properties=advert.properties(NETWORK, ANNA))  # type: ignore[arg-type]
    for content in (raw, info.text + raw, raw + info.text):
        read = zeroconf.ServiceInfo(advert.SERVICE, f"{ANNA}.{advert.SERVICE}", properties=content)
        found = advert.read(READER, read.properties, port, hosts)
        assert len(found) <= advert.ADDRESSES_MAX
        assert all(address.parse(each).peer for each in found)
