"""The file with the peers of the last run: whole, private, small; and nothing in it can stop a node."""

from __future__ import annotations

import json
import os
import stat
import threading
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node import remembered
from node.identity import peer_id
from node.remembered import Remembered
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

NETWORK, OTHER = b"\x01" * 32, b"\x02" * 32
NOW = 1_800_000_000
DAY = 86_400


def one(n: int, seen_at: int = NOW, address: str = "10.0.0.1:7645") -> Remembered:
    return Remembered(peer_id(n.to_bytes(32, "big")), address, seen_at)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "node.peers"


def test_what_is_saved_is_loaded_newest_first(path: Path) -> None:
    peers = [one(1, NOW - 5), one(2, NOW, "[fd00::1]:7645"), one(3, NOW - 9, "my-machine:1")]
    remembered.save(path, NETWORK, peers, NOW)
    assert remembered.load(path, NETWORK, NOW) == [peers[1], peers[0], peers[2]]


def test_only_its_owner_may_read_it_and_no_part_of_it_stays_elsewhere(path: Path) -> None:
    remembered.save(path, NETWORK, [one(1)], NOW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_without_a_file_nobody_is_remembered(path: Path) -> None:
    assert remembered.load(path, NETWORK, NOW) == []


def test_peers_of_another_network_are_not_looked_for(path: Path) -> None:
    remembered.save(path, OTHER, [one(1)], NOW)
    assert remembered.load(path, NETWORK, NOW) == []


def test_no_more_are_kept_than_fit_and_each_once_where_it_was_last(path: Path) -> None:
    moved = [one(0, NOW - 1, "10.0.0.1:1"), one(0, NOW, "10.0.0.2:2")]
    many = [one(n, NOW - n, "a" * 248 + ".example:65535") for n in range(1, 200)]
    remembered.save(path, NETWORK, moved + many, NOW)
    loaded = remembered.load(path, NETWORK, NOW)
    assert loaded == [moved[1], *many[: remembered.REMEMBERED_MAX - 1]]
    assert path.stat().st_size <= remembered.FILE_BYTES_MAX


def test_of_many_that_answer_those_of_the_file_stay_and_others_come_by_chance() -> None:
    honest = [one(n, NOW - 60, f"10.0.0.{n}:1") for n in range(200, 210)]
    gone = one(300, NOW - 60)
    crowd = {one(n).peer: f"10.0.1.{n % 250}:1" for n in range(200)}
    answering = {each.peer: each.address for each in honest} | crowd
    picked = []
    for seed in range(2):
        kept = remembered.renewed([*honest, gone], answering, NOW, Random(seed))
        assert len(kept) == remembered.REMEMBERED_MAX
        assert {each.peer for each in honest} <= {each.peer for each in kept}
        assert {each.seen_at for each in kept} == {NOW}
        picked.append({each.peer for each in kept} - {each.peer for each in honest})
        again = remembered.renewed(kept, answering, NOW + 60, Random(seed + 10))
        assert {each.peer for each in again} == {each.peer for each in kept}
    assert picked[0] != picked[1]
    assert picked[0] != set(sorted(crowd)[: len(picked[0])])


def test_where_there_is_room_who_answers_no_more_is_remembered_as_long_as_others() -> None:
    moved = one(1, NOW - 60, "10.0.0.2:1")
    assert remembered.renewed([one(1, NOW - 60), one(2, NOW - 60)], {moved.peer: moved.address}, NOW, Random(0)) == [
        one(1, NOW, "10.0.0.2:1"),
        one(2, NOW - 60),
    ]


def test_who_was_not_seen_for_a_month_is_forgotten_and_so_is_who_was_seen_next_year() -> None:
    assert remembered.AGE_S_MAX == 30 * DAY
    kept = [one(2, NOW + remembered.AGE_S_MAX), one(1, NOW - remembered.AGE_S_MAX)]
    lost = [one(3, NOW - remembered.AGE_S_MAX - 1), one(4, NOW + remembered.AGE_S_MAX + 1), one(5, NOW + 365 * DAY)]
    assert remembered.bounded([*lost, *kept], NOW) == kept


def _content(**changes: object) -> bytes:
    entry = {"peer": one(1).peer, "address": "10.0.0.1:7645", "seen_at": NOW}
    return json.dumps({"format": 1, "network": NETWORK.hex(), "peers": [entry]} | changes).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 60_000,
        _content(peers=7),
        _content(peers=[7]),
        _content(peers=[{}]),
        _content(peers=[{"peer": "x", "address": "10.0.0.1:1", "seen_at": NOW}]),
        _content(peers=[{"peer": one(1).peer, "address": "10.0.0.1", "seen_at": NOW}]),
        _content(peers=[{"peer": one(1).peer, "address": "10.0.0.1:1#", "seen_at": NOW}]),
        _content(peers=[{"peer": one(1).peer, "address": "10.0.0.1:1", "seen_at": "now"}]),
        _content(peers=[{"peer": one(1).peer, "address": "10.0.0.1:1", "seen_at": True}]),
        _content(peers=[{"peer": 7, "address": "10.0.0.1:1", "seen_at": NOW}]),
    ],
)
def test_a_broken_file_is_named_and_can_be_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidRequest, match=path.name):
        remembered.load(path, NETWORK, NOW)
    remembered.save(path, NETWORK, [one(1)], NOW)
    assert remembered.load(path, NETWORK, NOW) == [one(1)]


def test_a_newer_format_is_read_as_nobody(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(_content(format=2))
    assert remembered.load(path, NETWORK, NOW) == []


def test_a_file_that_others_may_write_a_large_one_a_pipe_and_a_folder_are_not_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(_content())
    path.chmod(0o620)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        remembered.load(path, NETWORK, NOW)
    path.chmod(0o600)
    path.write_bytes(b" " * (remembered.FILE_BYTES_MAX + 1))
    with pytest.raises(InvalidRequest, match="larger"):
        remembered.load(path, NETWORK, NOW)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(InvalidRequest, match="no file"):
        remembered.load(path, NETWORK, NOW)
    with pytest.raises(InvalidRequest):
        remembered.load(path.parent, NETWORK, NOW)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        remembered.load(path / "under-a-pipe", NETWORK, NOW)


def test_a_disk_that_fails_leaves_the_old_file_and_no_remains(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered.save(path, NETWORK, [one(1)], NOW)

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        remembered.save(path, NETWORK, [one(2)], NOW)
    assert remembered.load(path, NETWORK, NOW) == [one(1)]
    assert list(path.parent.iterdir()) == [path]


def test_who_reads_while_it_is_written_sees_one_version_whole(path: Path) -> None:
    versions = [[one(1)], [one(2), one(3)]]
    remembered.save(path, NETWORK, versions[0], NOW)
    stop = threading.Event()

    def write() -> None:
        for n in range(60):
            remembered.save(path, NETWORK, versions[n % 2], NOW)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        assert len(remembered.load(path, NETWORK, NOW)) in (1, 2)
    writer.join()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=10),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "network", "peers", "peer", "address", "seen_at"]), inner, max_size=6
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_stands_in_the_file_it_is_peers_or_a_typed_error(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        assert len(remembered.load(path, NETWORK, NOW)) <= remembered.REMEMBERED_MAX
    except InvalidRequest as error:
        assert path.name in error.message
