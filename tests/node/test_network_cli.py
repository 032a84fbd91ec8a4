"""`shoal network`: what an operator signs, and where it lies."""

from __future__ import annotations

import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from node import cli, config, model_name, operator_files, revocations
from node import grant as grants
from node import network as networks
from node.identity import Identity
from node.revocations import Revocations
from protos.errors import GrantExpired, GrantMissing, InvalidGrant, InvalidRequest, WrongNetwork

if TYPE_CHECKING:
    from click.testing import Result

PEER, OTHER = Identity.create(), Identity.create()
MODEL = "ab" * 32


@pytest.fixture(autouse=True)
def quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def shoal(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["network", *arguments])


def now_ms() -> int:
    return int(time.time() * 1000)


def created(*arguments: str) -> networks.Network:
    result = shoal("create", *arguments)
    assert result.exit_code == 0
    return networks.parse(result.stdout.strip())


def test_a_network_is_a_key_that_only_its_user_can_read_and_an_id_to_hand_on() -> None:
    network = created()
    path = operator_files.key_path("default")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert networks.permissioned(Identity.load(path).public_key) == network == operator_files.network_of(str(path))
    result = shoal("create")
    assert result.exit_code == 2
    assert str(network) in result.stderr


def test_a_grant_is_a_file_that_lets_one_node_in() -> None:
    network = created()
    result = shoal("grant", PEER.peer, "--days", "30", "--zone", "rack-7", "--owner", "anna")
    path = Path(result.stdout.strip())
    found = grants.read(path.read_bytes(), network, now_ms())
    assert (found.peer, found.zone, found.owner) == (PEER.peer, "rack-7", "anna")
    assert found.expires_at_ms - found.issued_at_ms == 30 * 86_400_000
    admitted = operator_files.admission(str(network), path, PEER.peer, time.time())
    assert (admitted.network, admitted.grant) == (network, path.read_bytes())
    assert admitted.ends_at_ms == found.expires_at_ms


def test_a_node_is_told_what_its_grant_lacks() -> None:
    network = created()
    shoal("grant", PEER.peer, "--out", "my.grant")
    grant = Path("my.grant")
    for text, file, peer, later_s, error in (
        (str(network), None, PEER.peer, 0, GrantMissing),
        (str(network), grant, OTHER.peer, 0, InvalidGrant),
        (str(network), grant, PEER.peer, 91 * 86_400, GrantExpired),
        (str(networks.permissioned(OTHER.public_key)), grant, PEER.peer, 0, WrongNetwork),
        (str(network), Path("no.grant"), PEER.peer, 0, InvalidRequest),
        ("shoal", grant, PEER.peer, 0, InvalidRequest),
        ("no/such.key", grant, PEER.peer, 0, InvalidRequest),
    ):
        with pytest.raises(error):
            operator_files.admission(text, file, peer, time.time() + later_s)
    assert operator_files.admission("shoal", None, PEER.peer, time.time()).network == networks.open_network()


def test_each_revocation_is_the_next_version_of_one_list() -> None:
    network = created()
    key = operator_files.key_path("default")
    assert operator_files.known_revocations(key, network) == Revocations()
    for version, one in enumerate((PEER, OTHER, PEER), start=1):
        result = shoal("revoke", one.peer, "--out", "copy")
        path = Path(result.stdout.strip())
        data = operator_files.revocations_path(key).read_bytes()
        assert path.read_bytes() == data
        found = revocations.read(data, network, now_ms())
        assert found.version == version
    assert set(found.at_ms) == {PEER.peer, OTHER.peer}


def test_a_damaged_list_is_not_replaced_by_one_that_has_forgotten() -> None:
    created()
    shoal("revoke", PEER.peer)
    path = operator_files.revocations_path(operator_files.key_path("default"))
    path.write_bytes(path.read_bytes()[:-3])
    damaged = path.read_bytes()
    assert shoal("revoke", OTHER.peer).exit_code == 2
    assert path.read_bytes() == damaged


def test_a_models_name_is_signed() -> None:
    network = created("--name", "lab")
    result = shoal("name", "mixtral", MODEL, "--name", "lab")
    found = model_name.read(Path(result.stdout.strip()).read_bytes(), network)
    assert (found.name, found.model_id) == ("mixtral", MODEL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("grant", "nobody"), "is no peer id"),
        (("grant", PEER.peer), "shoal network create"),
        (("grant", PEER.peer, "--name", "Not A Name"), "--name"),
        (("grant", PEER.peer, "--days", "0"), "--days"),
        (("grant", PEER.peer, "--days", "400"), "--days"),
        (("revoke", PEER.peer, "--key", "no.key"), "there is no key"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    result = shoal(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_of_several_networks_one_must_be_named() -> None:
    created("--name", "one")
    two = created("--name", "two", "--out", str(operator_files.key_path("two")))
    result = shoal("grant", PEER.peer)
    assert result.exit_code == 2
    assert "one, two" in result.stderr
    assert shoal("grant", PEER.peer, "--name", "two", "--out", "g").exit_code == 0
    assert grants.read(Path("g").read_bytes(), two, now_ms())


def test_a_network_that_is_none_is_refused_before_anything_starts() -> None:
    assert config.load().network == "shoal"
    assert config.load({"network": "lab"}).network == "lab"
    assert config.load({"network": "~/lab.key"}).network == "~/lab.key"
    with pytest.raises(InvalidRequest, match="network is 'My Lab'"):
        config.load({"network": "My Lab"})
