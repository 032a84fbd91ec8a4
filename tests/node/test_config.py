"""Flags over environment over file over defaults; a wrong value is one line."""

import inspect
from pathlib import Path

import pytest

from node import cli, config
from protos.errors import InvalidRequest

PEER = "a" * 52


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_defaults_are_valid_and_bind_to_loopback(tmp_path: Path) -> None:
    settings = config.load()
    assert (settings.host, settings.port) == ("127.0.0.1", 7645)
    assert settings.store == tmp_path / "data" / "shoal"


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shoal.toml").write_text('port = 1\nhost = "127.0.0.2"\nqueue_max = 3\nmemory_limit = "4GiB"\n')
    monkeypatch.setenv("SHOAL_PORT", "2")
    monkeypatch.setenv("SHOAL_HOST", "127.0.0.3")
    settings = config.load({"port": 3, "host": None})
    assert (settings.port, settings.host, settings.queue_max) == (3, "127.0.0.3", 3)
    assert settings.memory_limit == 4 << 30
    assert settings.sessions_max == 8


@pytest.mark.parametrize("clients", ["bob", f"any {PEER}x", "Any", f"loopback #{PEER}"])
def test_a_client_that_is_none_is_refused(clients: str) -> None:
    with pytest.raises(InvalidRequest, match="is no client"):
        config.load({"clients": clients})
    assert config.load({"clients": f"loopback any {PEER}"}).clients == ("loopback", "any", PEER)


def test_a_named_file_replaces_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shoal.toml").write_text("port = 1\n")
    (tmp_path / "other.toml").write_text("queue_max = 2\n")
    assert config.load(file=tmp_path / "other.toml").port == 7645
    monkeypatch.setenv("SHOAL_CONFIG", str(tmp_path / "other.toml"))
    assert config.load().queue_max == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 70000}, r"port is 70000: .* TCP port, 0 to 65535"),
        ({"memory_limit": "many"}, r"memory_limit is 'many': .* such as 4GiB"),
        ({"memory_limit": "-1"}, r"memory_limit is '-1'"),
        ({"kv_limit": 0}, r"kv_limit is 0"),
        ({"sessions_max": 0}, r"sessions_max is 0: .* 1 to 256"),
        ({"sessions_max": 257}, r"sessions_max is 257"),
        ({"queue_max": 1025}, r"queue_max is 1025"),
        ({"queue_wait_s": 3601}, r"queue_wait_s is 3601"),
        ({"step_deadline_s": 0}, r"step_deadline_s is 0"),
        ({"client_wait_s": "inf"}, r"client_wait_s is 'inf'"),
        ({"threads": 1025}, r"threads is 1025"),
        ({"device": "tpu"}, r"device is 'tpu': .* cpu, cuda, cuda:N, or mps"),
        ({"log_level": "loud"}, r"log_level is 'loud'"),
        ({"log_format": "xml"}, r"log_format is 'xml'"),
        ({"host": ""}, r"host is ''"),
        ({"host": "0.0.0.0"}, r"host is 0.0.0.0, which nobody can call: say advertise"),
        ({"host": "::"}, r"host is ::, which nobody can call"),
        ({"host": "10.0.0.2", "plaintext": True}, r"plaintext is for loopback only, and host is 10.0.0.2"),
        ({"hold": ""}, r"hold is empty"),
        ({"join": "a:1 " * 65}, r"join is "),
        ({"join": "a:1 nowhere"}, r"join is .*'nowhere' is no address of a node: give host:port"),
        ({"join": ["a:1#x"]}, r"join is .*names no peer behind its '#'"),
        ({"expert_streams_max": 0}, r"expert_streams_max is 0"),
        ({"model": "a" * 65}, r"model is"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_field_and_its_range(flags: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        config.load(flags)
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port = ", "cannot be read"),
        ("pot = 1", "pot is no setting; there are store, model"),
        ("port = 'x'", "port is 'x'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=message) as error:
        config.load(file=path)
    assert str(path) in error.value.message


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="no configuration file"):
        config.load(file=Path("nowhere.toml"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_every_way_to_say_loopback_is_taken(host: str) -> None:
    assert config.load({"host": host, "plaintext": True}).host == host


def test_lists_are_words_in_the_environment_and_lists_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_JOIN", f"a:1 b:2#{PEER}")
    (tmp_path / "shoal.toml").write_text('hold = ["trunk:*", "experts:*/0,4"]\n')
    settings = config.load({"host": "0.0.0.0", "advertise": "here:7645"})
    assert (settings.join, settings.hold) == (("a:1", f"b:2#{PEER}"), ("trunk:*", "experts:*/0,4"))


def test_a_misspelt_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_MEMROY_LIMIT", "4GiB")
    with pytest.raises(InvalidRequest, match=r"SHOAL_MEMROY_LIMIT is no setting; there are .*SHOAL_MEMORY_LIMIT"):
        config.load()


def test_every_setting_is_an_option_of_run() -> None:
    assert set(config.Config.model_fields) <= set(inspect.signature(cli.run).parameters)


def test_every_setting_says_what_it_is() -> None:
    for name, field in config.Config.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("flags", "searched"),
    [
        ({}, False),
        ({"lan": "on"}, True),
        ({"lan": True}, True),
        ({"host": "10.0.0.1"}, True),
        ({"host": "0.0.0.0", "advertise": "10.0.0.1:1"}, True),
        ({"host": "10.0.0.1", "lan": "off"}, False),
        ({"host": "10.0.0.1", "lan": False}, False),
    ],
)
def test_the_lan_is_searched_unless_the_node_is_on_loopback_or_told_otherwise(
    flags: dict[str, object], searched: bool
) -> None:
    assert config.load(flags).searches_lan is searched


def test_peers_are_remembered_beside_the_key_that_they_belong_to(tmp_path: Path) -> None:
    assert config.load({"identity": tmp_path / "a.key"}).remembered == tmp_path / "a.peers"
    assert config.load({"peers_file": tmp_path / "x"}).remembered == tmp_path / "x"
