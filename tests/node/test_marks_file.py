"""PROTOCOL.md section 14: high-water marks over a restart."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from node import marks_file
from node.identity import peer_of
from node.marks import Mark
from protos.errors import InvalidRequest
from protos.limits import MARKS_MAX

if TYPE_CHECKING:
    from pathlib import Path

MARKS = {peer_of(bytes([n]) * 32): Mark(n + 1, bytes([n]) * 16, 1_800_000_000_000 + n) for n in range(9)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "marks"


def test_what_was_kept_comes_back_and_nobody_else_reads_it(path: Path) -> None:
    marks_file.save(path, MARKS)
    assert marks_file.load(path) == marks_file.Loaded(MARKS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    marks_file.save(path, {})
    assert marks_file.load(path) == marks_file.Loaded()
    assert [one.name for one in path.parent.iterdir()] == ["marks"]


def test_where_no_file_is_there_are_no_marks_and_no_problem(path: Path) -> None:
    assert marks_file.load(path) == marks_file.Loaded()


def test_a_damaged_file_is_a_problem_and_no_marks(path: Path) -> None:
    marks_file.save(path, MARKS)
    good = path.read_bytes()
    for damaged in (b"", b"?", good[:-1], good[:100], good + b"x", good[:50] + b"\xff" + good[51:], good[40:]):
        path.write_bytes(damaged)
        found = marks_file.load(path)
        assert found.marks == {}
        assert isinstance(found.problem, InvalidRequest)
        assert str(path) in found.problem.message


def test_a_file_is_bounded_when_it_is_written_and_when_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few marks, with as many bytes for each as the real limits have."""
    few = 100
    bytes_max = marks_file.FILE_BYTES_MAX - (MARKS_MAX - few) * marks_file._ENTRY.size
    monkeypatch.setattr(marks_file, "FILE_BYTES_MAX", bytes_max)
    monkeypatch.setattr(marks_file, "MARKS_MAX", few)
    many = {peer_of(n.to_bytes(32, "big")): Mark(1, bytes(16), n) for n in range(few + 1)}
    marks_file.save(path, many)
    kept = marks_file.load(path).marks
    assert len(kept) == few
    assert peer_of(bytes(32)) not in kept
    assert path.stat().st_size == bytes_max
    with path.open("ab") as file:
        file.write(b"x")
    assert "too large" in marks_file.load(path).problem.message


def test_what_cannot_be_read_is_a_problem(path: Path) -> None:
    path.mkdir(parents=True)
    assert isinstance(marks_file.load(path).problem, InvalidRequest)
    with pytest.raises(OSError):
        marks_file.save(path, MARKS)
    assert list(path.parent.iterdir()) == [path]
