"""Which models a store has: their manifests, and where their units lie.

Law: no torch, so that a look into a store costs a moment; a manifest is used under its own id or not at all.
The layout: models/<model id>.json, units/<first two digits>/<sha256>.safetensors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from protos.errors import InvalidManifest, InvalidRequest
from protos.ids import ModelId
from protos.limits import MANIFEST_BYTES_MAX
from protos.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path

    from protos.manifest import UnitEntry

_MANIFEST_FILE = re.compile(r"[0-9a-f]{64}\.json")
_PREFIX = re.compile(r"[0-9a-f]{1,64}")


class Catalogue:
    """Of one directory, which need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def models(self) -> list[ModelId]:
        """The ids of the models whose manifest is here, sorted."""
        folder = self.root / "models"
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [ModelId(name.removesuffix(".json")) for name in names if _MANIFEST_FILE.fullmatch(name)]

    def manifest(self, prefix: str | None = None) -> Manifest:
        """The manifest whose id begins with `prefix`, or the only one.

        Raises InvalidRequest (none, several, or no id), InvalidManifest (damaged, or another model's).
        """
        path = self.root / "models" / f"{self._choose(prefix)}.json"
        if path.stat().st_size > MANIFEST_BYTES_MAX:
            raise InvalidManifest(f"{path} has {path.stat().st_size} bytes; at most {MANIFEST_BYTES_MAX} are allowed")
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
        except InvalidManifest as error:
            raise InvalidManifest(f"{path}: {error}; remove it and pack or fetch the model again") from error
        if manifest.model_id != path.stem:
            raise InvalidManifest(f"{path} is the manifest of another model, {manifest.model_id}; remove or rename it")
        return manifest

    def _choose(self, prefix: str | None) -> ModelId:
        if prefix is not None and not _PREFIX.fullmatch(prefix):
            raise InvalidRequest(f"{prefix!r:.80} is no model id: give its first hex digits")
        models = self.models()
        found = [model for model in models if model.startswith(prefix or "")]
        if not models:
            raise InvalidRequest(self._why_empty())
        if not found:
            raise InvalidRequest(f"no model in {self.root} begins with {prefix}; it holds {_short(models)}")
        if len(found) > 1:
            raise InvalidRequest(f"{len(found)} models in {self.root} fit: {_short(found)}; give more digits of one id")
        return found[0]

    def _why_empty(self) -> str:
        if self.root.exists() and not self.root.is_dir():
            return f"the store {self.root} is no folder; name the folder that models were packed into"
        why = "holds no model" if self.root.exists() else "does not exist, so it holds no model"
        demo = f'shoal pack "$(shoal demo-model)" {self.root}'
        return f"the store {self.root} {why}; pack one with: shoal pack CHECKPOINT {self.root} (or, to try it: {demo})"

    def path(self, entry: UnitEntry) -> Path:
        return self.root / "units" / entry.sha256[:2] / f"{entry.sha256}.safetensors"

    def holds(self, entry: UnitEntry) -> bool:
        """True if the unit's file is here with the right size; its bytes are compared when they are used."""
        path = self.path(entry)
        return path.is_file() and path.stat().st_size == entry.size


def _short(models: list[ModelId]) -> str:
    return ", ".join(model[:12] for model in models)
