"""PROTOCOL.md section 16: whose records belong together."""

from __future__ import annotations

import hashlib

import pytest

from node.identity import Identity, peer_bytes, peer_of
from node.network import Network, open_network, parse, permissioned
from protos.errors import InvalidRequest, WrongNetwork
from protos.limits import NAME_CHARS_MAX, NETWORK_ID_BYTES

KEY = Identity.create().public_key


def test_an_open_network_is_the_hash_of_its_name() -> None:
    assert open_network() == open_network("shoal") == parse("shoal")
    assert open_network("x").id == hashlib.sha256(b"shoal network v1x").digest()
    assert not open_network().permissioned
    assert str(open_network("my-lab")) == "my-lab"


def test_a_permissioned_network_is_the_hash_of_its_operators_key() -> None:
    network = permissioned(KEY)
    assert network == Network(hashlib.sha256(KEY).digest())
    assert network.permissioned
    assert parse(str(network)) == network
    assert len(network.id) == NETWORK_ID_BYTES


@pytest.mark.parametrize(
    "text",
    ["", "Shoal", "-x", "a b", "a" * (NAME_CHARS_MAX + 1), "ab" * 31 + "AB", "ab" * 6, "0123456789ab" * 3, "\x1b[2J"],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no network"):
        parse(text)


def test_no_name_looks_like_an_id() -> None:
    assert open_network("a" * (NAME_CHARS_MAX - 1)).name
    with pytest.raises(InvalidRequest):
        open_network("a" * 64)


def test_what_carries_another_id_is_refused_by_name() -> None:
    open_network().check(open_network().id, "a record")
    for other in (open_network("x").id, b"", permissioned(KEY).id):
        with pytest.raises(WrongNetwork, match="a record is of network"):
            open_network().check(other, "a record")


def test_a_peer_id_and_its_bytes_are_the_same() -> None:
    identity = Identity.create()
    assert peer_bytes(identity.peer) == hashlib.sha256(identity.public_key).digest()
    assert peer_of(peer_bytes(identity.peer)) == identity.peer
