"""Golden vectors: what nodes and operators sign, to the byte.

They are never rewritten by a test; one that has to change is a new version of the protocol.  Ed25519 signatures of one
key over equal bytes are equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node import grant as grants
from node import load_report, model_name, revocations
from node import network as networks
from node import record as records
from node.expert_sets import encode
from node.grant import Grant
from node.identity import Identity
from node.load_report import Hot, LoadReport
from node.model_name import ModelName
from node.reconcile import Digest
from node.record import Held, Record
from node.revocations import Revocations

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS: dict[str, Any] = json.loads((Path(__file__).resolve().parent.parent / "vectors" / "signed.json").read_text())
NOW_MS = 1_800_000_000_000


def identity(seed: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


NODE, OPERATOR = identity(1), identity(2)
OPEN, CLOSED = networks.open_network(), networks.permissioned(OPERATOR.public_key)
GRANT = Grant(NODE.peer, NOW_MS, NOW_MS + 7_776_000_000, "rack-7", "anna")
# Bitsets side by side, one set for two layers, and runs.
HELD = Held(
    "ab" * 32, True, range(4), True, False, {0: 0b1010_0101, 1: 0b0110_0110, 3: 1 << 255, 4: 1 << 255, 9: 7 << 900}
)
RECORD = Record(
    NODE.public_key,
    ("10.0.0.2:7645", "[2001:db8::2]:7645"),
    bytes(range(32)),
    NOW_MS,
    NOW_MS,
    NOW_MS + 3_600_000,
    zone="rack-7",
    owner="anna",
    version="0.1.0",
    held=(HELD,),
    sessions_max=8,
    kv_bytes_max=1 << 34,
)
GRANTED = Record(**{name: getattr(RECORD, name) for name in RECORD.__slots__} | {
    "network": CLOSED.id, "grant": grants.sign(GRANT, OPERATOR),
})  # fmt: skip
LIST = Revocations(3, NOW_MS, {NODE.peer: NOW_MS - 1, OPERATOR.peer: 5})
NAME = ModelName("mixtral", "ab" * 32, NOW_MS)
LOAD = LoadReport(OPEN.id, NODE.public_key, NOW_MS, 3, 1 << 33, 12.5, "ab" * 32, (Hot(3, 200, 1.5), Hot(0, 7, 0.25)))

WRITE: dict[str, Callable[[], bytes]] = {
    "record": lambda: records.sign(RECORD, NODE),
    "granted_record": lambda: records.sign(GRANTED, NODE),
    "grant": lambda: grants.sign(GRANT, OPERATOR),
    "revocations": lambda: revocations.sign(LIST, OPERATOR),
    "model_name": lambda: model_name.sign(NAME, OPERATOR),
    "load_report": lambda: load_report.sign(LOAD, NODE),
}
READ: dict[str, Callable[[bytes], object]] = {
    "record": lambda data: records.read(data, NOW_MS, OPEN) == RECORD,
    "granted_record": lambda data: records.read(data, NOW_MS, CLOSED) == GRANTED,
    "grant": lambda data: grants.read(data, CLOSED, NOW_MS) == GRANT,
    "revocations": lambda data: revocations.read(data, CLOSED, NOW_MS) == LIST,
    "model_name": lambda data: model_name.read(data, CLOSED) == NAME,
    "load_report": lambda data: load_report.read(data, OPEN, NOW_MS / 1000) == LOAD,
}


@pytest.mark.parametrize("name", WRITE)
def test_what_is_signed_is_written_and_read_to_the_byte(name: str) -> None:
    golden = bytes.fromhex(VECTORS[name])
    assert WRITE[name]() == golden
    assert READ[name](golden)


def test_the_golden_record_says_experts_in_all_three_ways() -> None:
    sets = encode(HELD.experts)
    assert [bool(one.each) for one in sets] == [True, False, False]
    assert [bool(one.bits) or bool(one.runs) for one in sets] == [False, True, True]


def test_ids_are_written_to_the_byte() -> None:
    assert OPEN.id.hex() == VECTORS["open_network"]
    assert CLOSED.id.hex() == VECTORS["permissioned_network"]
    assert NODE.peer == VECTORS["peer"]


def test_digests_of_a_push_pull_are_written_to_the_byte() -> None:
    digest = Digest()
    for n in range(40):
        digest.put(bytes([n * 6]) * 32, NOW_MS + n)
    for count in (1, 16, 256):
        assert b"".join(digest.digests(count)).hex() == VECTORS[f"digests_{count}"]
