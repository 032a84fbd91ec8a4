"""The store of a node: manifests by model id, unit files by the hash of their bytes.

Law: a file appears under its name whole or not at all; no byte of a unit is used before its sha256 was compared with
the manifest's.  The layout: models/<model id>.json, units/<first two digits>/<sha256>.safetensors, partial/ for what is
being written.  Hashes are computed on what read() gives, since pages of a mapping would count as this process's memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from typing import TYPE_CHECKING, Final

import torch

from protos import units
from protos.errors import InvalidManifest, StoreFull, UnitMismatch, UnitMissing
from protos.ids import UnitHash
from protos.manifest import Manifest, TensorEntry, UnitEntry
from shard import partial
from shard.catalogue import Catalogue
from shard.unit_file import DamagedFileError, chunks, mapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from protos.ids import UnitName

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


def dtype_name(dtype: torch.dtype) -> str:
    """A manifest's spelling of a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


class UnitStore(Catalogue):
    """One directory, made on first writing.  Safe to use from several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._verified: set[tuple[str, int, int, int]] = set()
        self._lock = threading.Lock()

    def verify(self, entry: UnitEntry) -> None:
        """Compares the file's sha256 with the manifest's, once per process unless the file changes.

        Raises UnitMissing, UnitMismatch.
        """
        path = self.path(entry)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (entry.sha256, status.st_ino, status.st_size, status.st_mtime_ns)
                if self._is_verified(seen):
                    return
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise UnitMissing(f"unit {entry.name} ({entry.sha256}) is not in {self.root}; pack or fetch it") from error
        if found != entry.sha256 or status.st_size != entry.size:
            raise UnitMismatch(
                f"unit {entry.name} in {path} has sha256 {found} and {status.st_size} bytes, the manifest says"
                f" {entry.sha256} and {entry.size}: it is damaged; remove the file and pack or fetch it again"
            )
        with self._lock:
            self._verified.add(seen)

    def _is_verified(self, seen: tuple[str, int, int, int]) -> bool:
        with self._lock:
            return seen in self._verified

    def tensors(
        self, manifest: Manifest, name: UnitName, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """A unit's tensors by name, those that it lists from another unit included; on the CPU mapped, without a copy.

        Raises UnitMissing, UnitMismatch, InvalidManifest (the file's tensors are not the manifest's).
        """
        entry = manifest.unit(name)
        found = self._mapped(entry)
        for other in {tensor.unit for tensor in entry.tensors if tensor.unit is not None}:
            owner = self._mapped(manifest.unit(other))
            found |= {tensor.name: owner[tensor.name] for tensor in entry.tensors if tensor.unit == other}
        return {key: tensor.to(device) for key, tensor in found.items()}

    def text(self, manifest: Manifest) -> dict[str, bytes]:
        """The files of the text unit (config.json, tokenizer.json, ...) by name.  Raises as tensors() does."""
        return {name: tensor.numpy().tobytes() for name, tensor in self._mapped(manifest.unit(units.TEXT)).items()}

    def _mapped(self, entry: UnitEntry) -> dict[str, torch.Tensor]:
        self.verify(entry)
        try:
            tensors = mapped(self.path(entry))
        except DamagedFileError as error:
            raise InvalidManifest(f"unit {entry.name} ({entry.sha256}) is no unit file: {error}") from error
        own = tuple(tensor for tensor in entry.tensors if tensor.unit is None)
        if entry.name == units.TEXT:
            if not all(_is_file(name, tensor) for name, tensor in tensors.items()):
                raise InvalidManifest(f"the text unit {entry.sha256} holds something else than plainly named files")
        elif own != tensor_entries(tensors):
            raise InvalidManifest(f"unit {entry.name} ({entry.sha256}) holds other tensors than the manifest lists")
        return tensors

    def add_unit(self, name: UnitName, tensors: Mapping[str, torch.Tensor]) -> UnitEntry:
        """Writes a unit in canonical bytes, unless it is here.  Raises StoreFull; then nothing of it remains."""
        digest = hashlib.sha256()
        size = 0
        for chunk in chunks(tensors):
            digest.update(chunk)
            size += chunk.nbytes
        listed = () if name == units.TEXT else tensor_entries(tensors)
        entry = UnitEntry(name, UnitHash(digest.hexdigest()), size, listed)
        if not self.holds(entry):
            self._write(self.path(entry), chunks(tensors))
        return entry

    def add_manifest(self, manifest: Manifest) -> None:
        """Writes the manifest; its units come before it.  Raises StoreFull."""
        self._write(self.root / "models" / f"{manifest.model_id}.json", [memoryview(manifest.to_bytes())])

    def _write(self, path: Path, pieces: Iterable[memoryview]) -> None:
        with self.room(), partial.writing(self.root / "partial") as (unnamed, file):
            path.parent.mkdir(parents=True, exist_ok=True)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            unnamed.replace(path)
            _sync_folder(path.parent)

    def remove_leftovers(self) -> None:
        """Removes what processes that are gone had begun to write."""
        partial.sweep(self.root / "partial")

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Turns a full disk into StoreFull."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StoreFull(
                f"the disk of the store {self.root} is full; finished units are kept: free some space and run it again"
            ) from error


def tensor_entries(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorEntry, ...]:
    """A manifest's list of a unit's own tensors, by ascending name."""
    return tuple(
        TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())
    )


def _is_file(name: str, tensor: torch.Tensor) -> bool:
    """Names are checked since somebody may write the files to a folder."""
    return _FILE.fullmatch(name) is not None and tensor.dtype == torch.uint8 and tensor.dim() == 1


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
