"""The store: nothing is used before its hash was compared, nothing is visible before it is whole."""

import errno
import hashlib
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from protos import units
from protos.errors import InvalidManifest, InvalidRequest, StoreFull, UnitMismatch, UnitMissing
from protos.ids import UnitHash
from protos.manifest import Manifest, TensorEntry, UnitEntry
from shard import catalogue
from shard.weights import UnitStore


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(name: str = "config.json", data: bytes = b"{}\n") -> dict[str, torch.Tensor]:
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def packed(
    store: UnitStore, *, seed: int = 0, tied: bool = False, files: dict[str, torch.Tensor] | None = None
) -> Manifest:
    """A model of one layer with two experts, in the store."""
    head = store.add_unit(units.HEAD, {"norm.weight": noise(4, seed=seed)})
    if tied:
        lent = TensorEntry("embed_tokens.weight", "float32", (8, 4), units.EMBED)
        head = replace(head, tensors=(lent, *head.tensors))
    manifest = Manifest(
        family="mixtral",
        architecture="MixtralForCausalLM",
        dtype="float32",
        layers=1,
        experts=(2,),
        top_k=1,
        hidden=4,
        vocab=8,
        grain=1,
        context=16,
        has_tokenizer=False,
        units=(
            store.add_unit(units.TEXT, files or text()),
            store.add_unit(units.EMBED, {"embed_tokens.weight": noise(8, 4, seed=seed)}),
            store.add_unit(units.trunk(0), {"b": noise(4, 4, seed=seed), "a": noise(3, seed=seed).bfloat16()}),
            store.add_unit(units.expert(0, 0), {"down_proj": noise(4, 6, seed=seed)}),
            store.add_unit(units.expert(0, 1), {"down_proj": noise(4, 6, seed=seed + 1)}),
            head,
        ),
    )
    store.add_manifest(manifest)
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> UnitStore:
    return UnitStore(tmp_path / "store")


def test_what_was_added_comes_back(store: UnitStore) -> None:
    manifest = packed(store)
    again = UnitStore(store.root)
    assert again.models() == [manifest.model_id]
    assert again.manifest() == again.manifest(manifest.model_id[:6]) == manifest
    trunk = again.tensors(manifest, units.trunk(0))
    assert torch.equal(trunk["b"], noise(4, 4))
    assert torch.equal(trunk["a"], noise(3).bfloat16())
    assert again.text(manifest) == {"config.json": b"{}\n"}


def test_a_tied_head_gives_embed_s_table_without_a_copy_on_the_disk(store: UnitStore) -> None:
    manifest = packed(store, tied=True)
    assert manifest.tied
    head = store.tensors(manifest, units.HEAD)
    assert head.keys() == {"norm.weight", "embed_tokens.weight"}
    assert torch.equal(head["embed_tokens.weight"], noise(8, 4))


def test_tensors_on_the_cpu_are_views_of_the_file_s_mapping(store: UnitStore) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list a process's mappings")
    manifest = packed(store)
    path = store.path(manifest.unit(units.trunk(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = store.tensors(manifest, units.trunk(0))
    (line,) = [line for line in maps.read_text().splitlines() if path.name in line]
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    assert all(low <= tensor.data_ptr() < high for tensor in tensors.values())
    del tensors
    assert path.name not in maps.read_text()


@pytest.mark.parametrize("device", ["meta"])
def test_tensors_go_to_the_device_that_is_asked_for(device: str, store: UnitStore) -> None:
    assert store.tensors(packed(store), units.EMBED, device)["embed_tokens.weight"].device.type == device


def test_an_empty_store_says_how_to_fill_it(store: UnitStore) -> None:
    assert store.models() == []
    with pytest.raises(InvalidRequest, match=r"shoal pack .*\$\(shoal demo-model\)"):
        store.manifest()


def test_one_of_several_models_must_be_named(store: UnitStore) -> None:
    ids = sorted({packed(store).model_id, packed(store, seed=5).model_id})
    assert store.models() == ids
    with pytest.raises(InvalidRequest, match="2 models"):
        store.manifest()
    with pytest.raises(InvalidRequest, match=r"no model in .* begins with"):
        store.manifest("0" * 64)
    assert [store.manifest(model).model_id for model in ids] == ids


@pytest.mark.parametrize("prefix", ["", "../..", "xyz", "A" * 64, "a" * 65, "*"])
def test_a_prefix_that_is_no_id_is_refused(prefix: str, store: UnitStore) -> None:
    packed(store)
    with pytest.raises(InvalidRequest, match="no model id"):
        store.manifest(prefix)


def test_a_manifest_under_another_model_s_name_is_refused(store: UnitStore) -> None:
    manifest = packed(store)
    path = store.root / "models" / f"{manifest.model_id}.json"
    path.rename(path.with_name("0" * 64 + ".json"))
    with pytest.raises(InvalidManifest, match=f"another model, {manifest.model_id}"):
        store.manifest()


def test_a_damaged_manifest_is_refused_with_its_path(store: UnitStore) -> None:
    path = store.root / "models" / f"{packed(store).model_id}.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidManifest, match=str(path)):
        store.manifest()


def test_a_manifest_above_the_limit_is_refused_unread(store: UnitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(store)
    monkeypatch.setattr(catalogue, "MANIFEST_BYTES_MAX", 10)
    with pytest.raises(InvalidManifest, match="at most 10"):
        store.manifest()


def test_a_missing_unit_is_named(store: UnitStore) -> None:
    manifest = packed(store)
    entry = manifest.unit(units.expert(0, 1))
    store.path(entry).unlink()
    assert not store.holds(entry)
    with pytest.raises(UnitMissing, match=f"expert.0.1 .{entry.sha256}"):
        store.tensors(manifest, entry.name)


def damage_cut(data: bytes) -> bytes:
    return data[:-1]


def damage_flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [damage_cut, damage_flip])
def test_a_damaged_unit_is_refused_with_both_hashes(damage: Any, store: UnitStore) -> None:
    manifest = packed(store)
    entry = manifest.unit(units.expert(0, 0))
    path = store.path(entry)
    path.write_bytes(damage(path.read_bytes()))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UnitMismatch, match=f"unit expert.0.0 .*{found}.*{entry.sha256}"):
        store.tensors(manifest, entry.name)


def test_a_unit_is_hashed_once_and_again_when_its_file_changes(
    store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = packed(store)
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counting(file: Any, name: Any) -> Any:
        hashed.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    entry = manifest.unit(units.trunk(0))
    for _ in range(3):
        store.tensors(manifest, entry.name)
    assert len(hashed) == 1
    path = store.path(entry)
    path.write_bytes(damage_flip(path.read_bytes()))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UnitMismatch):
        store.tensors(manifest, entry.name)
    assert len(hashed) == 2


def with_unit(manifest: Manifest, entry: UnitEntry) -> Manifest:
    return replace(manifest, units=tuple(entry if entry.name == unit.name else unit for unit in manifest.units))


def test_a_manifest_that_lists_other_tensors_than_the_file_holds_is_refused(store: UnitStore) -> None:
    manifest = packed(store)
    entry = manifest.unit(units.expert(0, 0))
    lying = with_unit(manifest, replace(entry, tensors=(TensorEntry("down_proj", "float32", (6, 4)),)))
    with pytest.raises(InvalidManifest, match="other tensors than the manifest lists"):
        store.tensors(lying, entry.name)


def test_a_unit_that_is_no_tensor_file_is_refused_though_its_hash_is_right(store: UnitStore) -> None:
    manifest = packed(store)
    data = b"no tensors in here"
    entry = replace(manifest.unit(units.EMBED), sha256=UnitHash(hashlib.sha256(data).hexdigest()), size=len(data))
    store.path(entry).parent.mkdir(parents=True, exist_ok=True)
    store.path(entry).write_bytes(data)
    with pytest.raises(InvalidManifest, match="no unit file"):
        store.tensors(with_unit(manifest, entry), units.EMBED)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", ".ssh", "a/b", "a\\b", ""])
def test_a_text_unit_with_a_file_name_that_leads_elsewhere_is_refused(name: str, store: UnitStore) -> None:
    with pytest.raises(InvalidManifest, match="plainly named"):
        store.text(packed(store, files=text(name)))


def test_a_text_unit_that_holds_tensors_is_refused(store: UnitStore) -> None:
    with pytest.raises(InvalidManifest, match="plainly named"):
        store.text(packed(store, files={"config.json": noise(3)}))


def test_a_unit_that_is_here_is_not_written_again(store: UnitStore) -> None:
    entry = store.add_unit(units.EMBED, {"w": noise(3)})
    before = store.path(entry).stat()
    assert store.add_unit(units.EMBED, {"w": noise(3)}) == entry
    assert store.path(entry).stat().st_ino == before.st_ino


def files_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_of_the_unit_and_keeps_the_others(
    number: int, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store.add_unit(units.EMBED, {"w": noise(3)})

    def full(file: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreFull, match="free some space"):
            store.add_unit(units.HEAD, {"w": noise(4)})
    assert files_in(store.root) == [store.path(kept)]
    assert store.holds(store.add_unit(units.HEAD, {"w": noise(4)}))


def test_another_failure_of_the_disk_is_not_taken_for_a_full_one(
    store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output"):
        store.add_unit(units.HEAD, {"w": noise(4)})
    assert files_in(store.root) == []


def test_leftovers_of_writers_that_are_gone_are_removed(store: UnitStore) -> None:
    folder = store.root / "partial"
    folder.mkdir(parents=True)
    (folder / "0123456789abcdef").touch()
    store.remove_leftovers()
    assert list(folder.iterdir()) == []
