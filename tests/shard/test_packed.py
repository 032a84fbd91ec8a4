"""What was packed is found again, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from shard import packed, selfcheck
from shard.pack import pack
from shard.weights import UnitStore


@pytest.fixture
def store(tmp_path: Path) -> UnitStore:
    return UnitStore(tmp_path / "store")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(selfcheck, "check", lambda config: SimpleNamespace(recompute_at=None))
    return tiny.save("mixtral", tmp_path / "checkpoint")


def test_what_is_packed_is_found_again_with_the_same_arguments_only(checkpoint: Path, store: UnitStore) -> None:
    assert packed.find(checkpoint, store) is None
    manifest = pack(checkpoint, store)
    assert packed.find(checkpoint, store) == manifest
    assert packed.find(checkpoint, store, grain=2) is None
    assert packed.find(checkpoint, store, dtype="bfloat16") is None
    assert packed.find(checkpoint, UnitStore(store.root.with_name("other"))) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint, store: (checkpoint / "generation_config.json").write_text("{}"),
        lambda checkpoint, store: (checkpoint / "added.txt").touch(),
        lambda checkpoint, store: (checkpoint / "config.json").rename(checkpoint / "config.old"),
        lambda checkpoint, store: next((store.root / "models").iterdir()).unlink(),
        lambda checkpoint, store: next((store.root / "units").rglob("*.safetensors")).unlink(),
        lambda checkpoint, store: next((store.root / "units").rglob("*.safetensors")).write_bytes(b""),
        lambda checkpoint, store: next((store.root / "packed").iterdir()).write_bytes(b"\xff"),
    ],
)
def test_a_change_on_either_side_means_packing_again(
    change: Callable[[Path, UnitStore], object], checkpoint: Path, store: UnitStore
) -> None:
    pack(checkpoint, store)
    change(checkpoint, store)
    assert packed.find(checkpoint, store) is None


def test_a_record_that_cannot_be_written_is_no_failure(checkpoint: Path, store: UnitStore) -> None:
    store.root.mkdir()
    (store.root / "packed").write_text("no folder")
    assert pack(checkpoint, store).layers
    assert packed.find(checkpoint, store) is None
