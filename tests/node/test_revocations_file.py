"""A revocation list in a file: read when it changes, kept whole.  PROTOCOL.md, section 16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from node.config import Config
from node.revocations_file import RevocationsFile
from protos.errors import InvalidRequest
from protos.limits import REVOCATIONS_BYTES_MAX

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_in_a_file_is_news_once(tmp_path: Path) -> None:
    file = RevocationsFile(tmp_path / "list")
    assert file.news() is None
    file.path.write_bytes(b"one")
    assert (file.news(), file.news()) == (b"one", None)
    (tmp_path / "next").write_bytes(b"two")
    (tmp_path / "next").replace(file.path)
    assert (file.news(), file.news()) == (b"two", None)
    file.path.unlink()
    assert file.news() is None


def test_what_the_node_keeps_is_no_news_to_it_and_is_written_once(tmp_path: Path) -> None:
    file = RevocationsFile(tmp_path / "folder" / "list")
    file.keep(b"one")
    written = file.path.stat()
    file.keep(b"one")
    assert file.path.stat() == written
    assert file.news() is None
    assert RevocationsFile(file.path).news() == b"one"
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(bytes(2 * REVOCATIONS_BYTES_MAX))
    assert len(RevocationsFile(tmp_path / "list").news() or b"") == REVOCATIONS_BYTES_MAX + 1


def test_one_that_cannot_be_read_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    file = RevocationsFile(tmp_path / "list")
    with pytest.raises(InvalidRequest, match="list cannot be read"):
        file.news()
    assert file.news() is None


def test_the_operators_list_is_what_is_set_or_lies_beside_the_key(tmp_path: Path) -> None:
    key = tmp_path / "lab.key"
    assert Config(network=str(key)).operators_list == tmp_path / "lab.revocations"
    assert Config(network=str(key), revocations=tmp_path / "other").operators_list == tmp_path / "other"
    assert Config(network="a" * 64).operators_list is None
    assert Config(identity=tmp_path / "node.key").revocations_file == tmp_path / "node.revocations"
