"""Which units of a checkpoint are already packed: a list that outlives the process, so that packing can be resumed.

Law: a line is written after its unit is on the disk under its name; a line that does not read well is as good as none.
The file's name is a digest of everything that the units depend on, so a changed checkpoint never meets an old journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any

import transformers

from protos.ids import UnitHash, UnitName
from protos.manifest import TensorEntry, UnitEntry

if TYPE_CHECKING:
    from pathlib import Path

    from shard.checkpoint import Checkpoint
    from shard.weights import UnitStore


class Journal:
    """The finished units of one checkpoint in one dtype, in one store."""

    def __init__(self, store: UnitStore, checkpoint: Checkpoint, dtype: str) -> None:
        self._store = store
        self._path: Path = store.root / "packing" / f"{_digest(checkpoint, dtype)}.jsonl"
        self._entries = {entry.name: entry for entry in self._read()}

    def finished(self, name: UnitName) -> UnitEntry | None:
        """The unit's entry, if it was packed before and its file still has the right size."""
        entry = self._entries.get(name)
        return entry if entry is not None and self._store.holds(entry) else None

    def add(self, entry: UnitEntry) -> None:
        """Raises StoreFull."""
        tensors = [[tensor.name, tensor.dtype, tensor.shape, tensor.unit] for tensor in entry.tensors]
        line = json.dumps([entry.name, entry.sha256, entry.size, tensors]) + "\n"
        with self._store.room():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(line)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _read(self) -> list[UnitEntry]:
        if not self._path.is_file():
            return []
        entries = []
        for line in self._path.read_text(encoding="ascii", errors="replace").splitlines():
            # The last line may be torn: the disk was full, or the machine went down.
            with contextlib.suppress(ValueError, TypeError):
                entries.append(_entry(json.loads(line)))
        return entries


def _entry(fields: Any) -> UnitEntry:
    name, sha256, size, tensors = fields
    listed = tuple(TensorEntry(n, dtype, tuple(shape), unit) for n, dtype, shape, unit in tensors)
    return UnitEntry(UnitName(name), UnitHash(sha256), size, listed)


def _digest(checkpoint: Checkpoint, dtype: str) -> str:
    """Of the weight files' names, sizes and times, the configuration, the dtype, and the version that converts."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    made_of = [str(checkpoint.folder.resolve()), files, checkpoint.config, dtype, transformers.__version__]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
