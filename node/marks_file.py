"""The file that keeps high-water marks over a restart.  PROTOCOL.md, section 14.

Law: it is written whole or not at all, its user alone reads it, and one that is damaged costs marks, never the start.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from node.identity import peer_bytes, peer_of
from node.marks import DIGEST_BYTES, Mark
from protos.errors import InvalidRequest
from protos.limits import MARKS_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from protos.ids import PeerId

_MAGIC: Final = b"SHMK\x01\x00\x00\x00"
_ENTRY: Final = struct.Struct(f"<32sQ{DIGEST_BYTES}sQ")
_CHECK_BYTES: Final = 32
FILE_BYTES_MAX: Final = len(_MAGIC) + _CHECK_BYTES + MARKS_MAX * _ENTRY.size


@dataclass(frozen=True, slots=True)
class Loaded:
    """`problem`: why there are none, to be told as a warning."""

    marks: Mapping[PeerId, Mark] = field(default_factory=dict)
    problem: InvalidRequest | None = None


def load(path: Path) -> Loaded:
    """Nothing where there is no file; nothing and a problem where it is damaged, too large, or cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return Loaded()
    except OSError as error:
        return _nothing(path, error.strerror or str(error))
    content, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if len(data) > FILE_BYTES_MAX:
        return _nothing(path, "it is too large")
    if not content.startswith(_MAGIC) or (len(content) - len(_MAGIC)) % _ENTRY.size:
        return _nothing(path, "it is no file of marks")
    if hashlib.sha256(content).digest() != check:
        return _nothing(path, "it is damaged")
    entries = _ENTRY.iter_unpack(content[len(_MAGIC) :])
    return Loaded({peer_of(peer): Mark(*rest) for peer, *rest in entries})


def save(path: Path, marks: Mapping[PeerId, Mark]) -> None:
    """With mode 600, whole or not at all.  Of more than MARKS_MAX those stay that end last.  Raises OSError."""
    newest = sorted(marks.items(), key=lambda item: item[1].ends_at_ms)[-MARKS_MAX:]
    content = _MAGIC + b"".join(
        _ENTRY.pack(peer_bytes(peer), mark.sequence, mark.digest, mark.ends_at_ms) for peer, mark in newest
    )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123  (no Path has flags)
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _nothing(path: Path, why: str) -> Loaded:
    return Loaded(
        problem=InvalidRequest(
            f"the marks in {path} are lost ({why}): until records arrive again, old ones are not told from new ones"
        )
    )
