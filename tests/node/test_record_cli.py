"""`shoal record`: what a node signed about itself, and what is wrong with it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from typer.testing import CliRunner

from node import cli, record_facts
from node import grant as grants
from node import network as networks
from node.grant import Grant
from node.hello import Authentication, Callers
from node.identity import Identity
from node.network import open_network
from node.record import Held, Record, sign
from protos import peers_pb2 as pb
from protos.limits import RECORD_BYTES_MAX
from protos.peers_pb2_grpc import PeersServicer, add_PeersServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

ME, OTHER, OPERATOR = Identity.create(), Identity.create(), Identity.create()
MODEL = "ab" * 32
CLOSED = networks.permissioned(OPERATOR.public_key)


@pytest.fixture(autouse=True)
def quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def record(age_s: float = 0, **changed: Any) -> Record:
    now_ms = int((time.time() - age_s) * 1000)
    held = (Held(MODEL, True, range(4), True, False, {0: 5, 1: 5}), Held("cd" * 32))
    made = Record(
        ME.public_key, ("h:1", "h:2"), b"c" * 32, 7, now_ms, now_ms + 600_000, zone="a zone", held=held, sessions_max=8
    )
    return replace(made, **changed)


def granted() -> Record:
    now_ms = int(time.time() * 1000)
    grant = grants.sign(Grant(ME.peer, now_ms, now_ms + 900_000), OPERATOR)
    return record(network=CLOSED.id, grant=grant)


def kept(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "a.record"
    path.write_bytes(data)
    return str(path)


def shoal(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["record", *arguments])


def test_a_good_record_is_shown_and_verified(tmp_path: Path) -> None:
    path = kept(tmp_path, sign(record(), ME))
    for command in ("show", "verify"):
        result = shoal(command, path)
        assert result.exit_code == 0
        for said in (ME.peer, "shoal (open)", "h:1, h:2", "a zone", "trunk of layers 0 to 3", "4 experts in 2 layers"):
            assert said in result.stdout
        assert ("good: any node of its network takes it now" in result.stderr) == (command == "verify")


def test_as_json_it_is_one_object(tmp_path: Path) -> None:
    found = json.loads(shoal("show", kept(tmp_path, sign(granted(), ME)), "--json").stdout)
    assert found["valid"] is True
    assert (found["peer"], found["network"], found["sequence"]) == (ME.peer, str(CLOSED), 7)
    assert found["models"][0] == {
        "model": MODEL, "text": True, "first_layer": 0, "layers": 4, "embed": True, "head": False, "experts": 4,
        "expert_layers": 2,
    }  # fmt: skip
    assert found["granted_until"] > found["expires_at"]


WRONG = {
    "record_expired": lambda: sign(record(age_s=3600), ME),
    "record_from_future": lambda: sign(record(age_s=-3600), ME),
    "invalid_signature": lambda: sign(record(), OTHER),
    "grant_expired": lambda: sign(
        record(
            network=CLOSED.id,
            grant=grants.sign(Grant(ME.peer, 1, 2), OPERATOR),
        ),
        ME,
    ),
    "wrong_network": lambda: sign(replace(granted(), network=open_network("x").id), ME),
    "invalid_record": lambda: sign(record(zone="\x1b[2J"), ME),
}


@pytest.mark.parametrize("code", WRONG)
def test_what_is_wrong_is_said_exactly_and_nothing_unverified_is_shown(tmp_path: Path, code: str) -> None:
    path = kept(tmp_path, WRONG[code]())
    result = shoal("verify", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "a zone" not in result.stdout
    assert "\x1b" not in result.output
    found = shoal("verify", path, "--json")
    assert found.exit_code == 2
    assert json.loads(found.stdout)["problem"]["code"] == code
    shown = shoal("show", path)
    assert shown.exit_code == 0
    assert "nobody would take it now" in shown.stderr


def test_a_record_of_another_network_than_was_asked_for_is_wrong(tmp_path: Path) -> None:
    path = kept(tmp_path, sign(record(network=open_network("lab").id), ME))
    assert shoal("verify", path).exit_code == 0
    assert shoal("verify", path, "--network", "lab").exit_code == 0
    wrong = shoal("verify", path, "--network", "shoal")
    assert "of network" in wrong.stderr
    assert str(open_network("lab").id.hex()) in wrong.stdout, "the record's own network, not the one asked for"
    assert json.loads(shoal("verify", path, "--network", "shoal", "--json").stdout)["network"] != "shoal"
    assert "lab (open)" in shoal("verify", path, "--network", "lab").stdout


def test_the_network_that_a_record_names_is_shown_and_not_that_of_its_grant(tmp_path: Path) -> None:
    path = kept(tmp_path, WRONG["wrong_network"]())
    assert open_network("x").id.hex() in shoal("show", path).stdout


@pytest.mark.parametrize("command", ["show", "verify"])
def test_bytes_that_nobody_signed_are_said_to_be_no_part_of_a_record(tmp_path: Path, command: str) -> None:
    signed = sign(record(), ME)
    path = kept(tmp_path, signed + b"\x1a\x05hello")  # field 3, which no SignedRecord has
    result = shoal(command, path)
    assert result.exit_code == 0
    assert f"{len(signed)} bytes" in result.stdout
    assert "7 bytes in it are no part of what is signed; whoever passes it on leaves them out" in result.stderr
    found = json.loads(shoal(command, path, "--json").stdout)
    assert (found["bytes"], found["unsigned_bytes"]) == (len(signed), 7)


@pytest.mark.parametrize("data", [b"?", b"", bytes(RECORD_BYTES_MAX + 1)])
def test_what_is_no_record_is_one_line(tmp_path: Path, data: bytes) -> None:
    result = shoal("verify", kept(tmp_path, data))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "a node's record is refused" in result.stderr


def test_a_file_that_is_not_there_is_one_line() -> None:
    assert "there is no file" in shoal("verify", "nowhere").stderr
    assert "is no address of a node" in shoal("show", "nowhere").stderr


def test_times_that_no_calendar_has_are_shown_as_numbers() -> None:
    found = record_facts.examine(sign(record(issued_at_ms=1 << 63, expires_at_ms=(1 << 63) + 5), ME), 0)
    assert record_facts.facts(found)["issued_at"] == f"{1 << 63} ms after 1970"


class Peers(PeersServicer):
    def __init__(self, callers: Callers, signed: bytes) -> None:
        self._callers = callers
        self._signed = signed
        self.asked: list[str] = []

    def Challenge(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._callers.challenge(time.time())

    def Hello(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._callers.hello(request, time.time())

    def Record(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.asked.append(request.peer_id)
        return pb.SignedRecord.FromString(self._signed)


@pytest.fixture
def node() -> Iterator[tuple[str, Peers]]:
    callers = Callers(ME, None)
    service = Peers(callers, sign(record(), ME))
    pool = ThreadPoolExecutor(2)
    server = grpc.server(pool, interceptors=[Authentication(callers)])
    add_PeersServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", service
    server.stop(None).wait(20)
    pool.shutdown(wait=True)


def test_a_node_is_asked_for_its_record_and_for_others(tmp_path: Path, node: tuple[str, Peers]) -> None:
    address, service = node
    result = shoal("show", address, "--plaintext", "--out", "their.record")
    assert result.exit_code == 0
    assert ME.peer in result.stdout
    assert shoal("verify", "their.record").exit_code == 0
    shoal("show", address, "--plaintext", "--peer", OTHER.peer)
    assert service.asked == ["", OTHER.peer]


def test_a_node_that_does_not_answer_is_unavailable() -> None:
    assert shoal("show", "127.0.0.1:9", "--plaintext").exit_code == 3
