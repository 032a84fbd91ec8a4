"""Files that are being written: whoever writes one keeps it, and what a writer leaves behind is removed."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shard import partial

CODE = Path(__file__).parents[2]
WRITER = """
import sys
from pathlib import Path
from shard import partial
with partial.writing(Path(sys.argv[1])) as (path, file):
    print(path, flush=True)
    sys.stdin.read()
"""


def test_a_file_that_is_renamed_stays_and_another_is_gone_afterwards(tmp_path: Path) -> None:
    folder, kept = tmp_path / "partial", tmp_path / "kept"
    with partial.writing(folder) as (path, file):
        file.write(b"whole")
        path.rename(kept)
    with pytest.raises(ZeroDivisionError), partial.writing(folder):
        raise ZeroDivisionError
    assert kept.read_bytes() == b"whole"
    assert list(folder.iterdir()) == []


def test_sweeping_removes_what_has_no_writer_and_keeps_what_has(tmp_path: Path) -> None:
    with partial.writing(tmp_path) as (path, file):
        (tmp_path / "4194999.bb").touch()  # a name that says a process, living or not, says nothing
        (tmp_path / "1.aa").touch()
        partial.sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
        assert not file.closed


def test_a_folder_that_is_not_there_needs_no_sweeping(tmp_path: Path) -> None:
    partial.sweep(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_writing_process_keeps_its_file_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CODE) as writer:
        assert writer.stdout is not None
        path = Path(writer.stdout.readline().decode().rstrip("\n"))
        partial.sweep(tmp_path)
        assert path.exists()
        writer.kill()
        writer.wait()
        assert path.exists()
        partial.sweep(tmp_path)
        assert not path.exists()


def test_a_file_that_was_swept_before_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock
    swept: list[Path] = []

    def late(file: Any, operation: int) -> None:
        monkeypatch.undo()
        swept.extend(tmp_path.iterdir())
        partial.sweep(tmp_path)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with partial.writing(tmp_path) as (path, _):
        assert list(tmp_path.iterdir()) == [path]
        assert [old for old in swept if old != path] == swept != []


def test_where_files_cannot_be_locked_they_are_written_and_never_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: Any, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with partial.writing(tmp_path) as (path, _):
        partial.sweep(tmp_path)
        assert path.exists()
