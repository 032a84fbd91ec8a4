"""Files say where a node may be; only live processes count."""

import json
import os
import sys
import warnings
from pathlib import Path

import psutil
import pytest

from node import presence


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "folder", lambda: tmp_path / "shoal")


def test_a_node_is_found_while_it_is_announced() -> None:
    assert presence.addresses() == []
    with presence.announced("127.0.0.1:1"):
        assert presence.addresses() == ["127.0.0.1:1"]
    assert presence.addresses() == []


def test_only_its_owner_may_look_into_the_folder_and_its_files() -> None:
    presence.folder().mkdir(mode=0o755)
    with presence.announced("127.0.0.1:1"):
        assert presence.folder().stat().st_mode & 0o777 == 0o700
        (file,) = presence.folder().iterdir()
        assert file.stat().st_mode & 0o777 == 0o600


def test_the_file_of_a_dead_process_is_removed() -> None:
    with presence.announced("127.0.0.1:1"):
        stale = presence.folder() / "node-999999999.json"
        stale.write_text(json.dumps({"pid": 999999999, "created": 1.0, "address": "127.0.0.1:2"}))
        assert presence.addresses() == ["127.0.0.1:1"]
        assert not stale.exists()


def test_a_pid_that_another_process_has_now_is_not_the_node() -> None:
    with presence.announced("127.0.0.1:1"):
        stale = presence.folder() / "node-1.json"
        stale.write_text(json.dumps({"pid": os.getpid(), "created": 1.0, "address": "127.0.0.1:2"}))
        assert presence.addresses() == ["127.0.0.1:1"]
        assert not stale.exists()


def test_a_node_that_starts_sweeps_what_killed_ones_left() -> None:
    presence.folder().mkdir(mode=0o700)
    stale = presence.folder() / "node-999999999.json"
    stale.write_text(json.dumps({"pid": 999999999, "created": 1.0, "address": "127.0.0.1:2"}))
    with presence.announced("127.0.0.1:1"):
        assert not stale.exists()


def test_a_folder_that_somebody_else_made_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    presence.folder().mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with presence.announced("127.0.0.1:1"):
        assert list(presence.folder().iterdir()) == []


def test_the_newest_node_comes_first_and_what_is_no_entry_is_passed_over() -> None:
    created = psutil.Process().create_time()
    with presence.announced("127.0.0.1:1"):
        newer = presence.folder() / "node-1.json"
        newer.write_text(json.dumps({"pid": os.getpid(), "created": created, "address": "127.0.0.1:2"}))
        os.utime(newer, ns=(2**62, 2**62))
        (presence.folder() / "node-2.json").write_text("[]")
        (presence.folder() / "node-3.json").write_text("{")
        assert presence.addresses() == ["127.0.0.1:2", "127.0.0.1:1"]


def test_a_node_that_cannot_announce_itself_serves_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "shoal").write_text("no folder")
    with presence.announced("127.0.0.1:1"):
        assert presence.addresses() == []


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert presence.folder() == tmp_path / "shoal"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    warnings.simplefilter("error")
    assert str(os.getuid()) in str(presence.folder()) or sys.platform != "linux"


def test_so_many_nodes_are_listed_and_they_are_the_newest() -> None:
    created = psutil.Process().create_time()
    presence.folder().mkdir(mode=0o700)
    for number in range(presence._NODES_MAX + 2):
        entry = presence.folder() / f"node-{number}.json"
        entry.write_text(json.dumps({"pid": os.getpid(), "created": created, "address": f"127.0.0.1:{number + 1}"}))
        os.utime(entry, ns=(number, number))
    assert presence.addresses() == [f"127.0.0.1:{number + 1}" for number in range(presence._NODES_MAX + 1, 1, -1)]
