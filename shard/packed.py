"""Which checkpoints a store has packed, so that packing one again takes a moment.

Law: no torch; a record counts only while its manifest and all units are in the store, and a checkpoint that changed
never meets an old record: its name is a digest of everything that the manifest depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from protos.ids import ModelId
    from protos.manifest import Manifest
    from shard.catalogue import Catalogue

RULES: Final = 2
"""Rises when the same checkpoint would become other bytes, or meet another verdict, than before."""


def find(checkpoint: Path, store: Catalogue, *, grain: int = 1, dtype: str | None = None) -> Manifest | None:
    """What pack() with these arguments gave before, if nothing changed since.  Raises what Catalogue.manifest does."""
    try:
        model = _record(checkpoint, store, grain, dtype).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if model not in store.models():
        return None
    manifest = store.manifest(model)
    return manifest if all(store.holds(entry) for entry in manifest.units) else None


def note(checkpoint: Path, store: Catalogue, model: ModelId, *, grain: int, dtype: str | None) -> None:
    """Remembers it, if it can: without a record the next time only takes longer."""
    with contextlib.suppress(OSError):
        record = _record(checkpoint, store, grain, dtype)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(model + "\n", encoding="ascii")


def _record(checkpoint: Path, store: Catalogue, grain: int, dtype: str | None) -> Path:
    files = [(path.name, path.stat()) for path in sorted(checkpoint.iterdir()) if path.is_file()]
    listed = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    made_of = [str(checkpoint.resolve()), listed, grain, dtype, version("transformers"), RULES]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    return store.root / "packed" / digest
