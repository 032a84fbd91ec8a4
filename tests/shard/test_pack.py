"""Packing: the tensors that from_pretrained holds, one id whoever packs, refusals by name, no half-written store."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from protos import units
from protos.errors import InvalidRequest, StoreFull, UnsupportedModel
from protos.manifest import Manifest
from shard import selfcheck
from shard.anatomy import Anatomy
from shard.body import parse_config
from shard.conversion import NAMED_MAX, Conversion, listed
from shard.pack import pack
from shard.weights import UnitStore

Edit = Callable[[dict[str, torch.Tensor]], object]
CHECK = selfcheck.check


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check has tests of its own and takes a second; here it passes, except where a test puts it back."""
    monkeypatch.setattr(selfcheck, "check", lambda config: SimpleNamespace(recompute_at=None))


@pytest.fixture
def store(tmp_path: Path) -> UnitStore:
    return UnitStore(tmp_path / "store")


def assert_holds(store: UnitStore, manifest: Manifest, model: Any) -> None:
    """Every tensor of the model is in its unit, with the same dtype and bits, and no unit holds another."""
    state = model.state_dict()
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for part in Anatomy(model).parts():
        whole = state[part.source]
        expected.setdefault(part.unit, {})[part.local] = whole if part.expert is None else whole[part.expert]
    for entry in manifest.units[1:]:
        found = store.tensors(manifest, entry.name)
        lent = {tensor.name for tensor in entry.tensors if tensor.unit is not None}
        assert found.keys() - lent == expected.pop(entry.name).keys()
        for name in found.keys() - lent:
            origin = next(p for p in Anatomy(model).parts() if (p.unit, p.local) == (entry.name, name))
            whole = state[origin.source]
            wanted = whole if origin.expert is None else whole[origin.expert]
            assert found[name].dtype == wanted.dtype, name
            assert torch.equal(found[name], wanted), name
    assert not expected


def edit(folder: Path, change: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_units_hold_what_from_pretrained_holds(family: str, dtype: str, tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save(family, tmp_path / "checkpoint", dtype)
    manifest = pack(folder, store)
    assert manifest.dtype == dtype
    assert_holds(store, manifest, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_another_dtype_gives_what_from_pretrained_gives_with_it(
    family: str, dtype: str, tmp_path: Path, store: UnitStore
) -> None:
    """gpt_oss keeps its norms in float32 in float16, deepseek_v3 a router's bias in both."""
    folder = tiny.save(family, tmp_path / "checkpoint")
    manifest = pack(folder, store, dtype=dtype)
    assert manifest.dtype == dtype
    assert parse_config(store.text(manifest)["config.json"]).dtype == getattr(torch, dtype)
    assert_holds(store, manifest, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def test_a_checkpoint_that_names_no_dtype_has_its_first_tensor_s(tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint", "bfloat16")
    edit_config(folder, dtype=None)
    assert pack(folder, store).dtype == "bfloat16"


def test_the_manifest_tells_the_model_s_facts(tmp_path: Path, store: UnitStore) -> None:
    manifest = pack(tiny.save("deepseek_v2", tmp_path / "checkpoint"), store, grain=2)
    assert (manifest.family, manifest.architecture) == ("deepseek_v2", "DeepseekV2ForCausalLM")
    assert (manifest.layers, manifest.experts, manifest.top_k, manifest.grain) == (3, (0, 8, 8), 2, 2)
    assert (manifest.hidden, manifest.vocab, manifest.context) == (32, 128, 512)
    assert not manifest.has_tokenizer
    assert not manifest.tied
    assert store.manifest() == manifest


def test_two_packers_get_one_id_however_the_checkpoint_is_cut(tmp_path: Path) -> None:
    model = tiny.model("qwen3_moe")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    ids = {pack(tmp_path / name, UnitStore(tmp_path / f"store-{name}")).model_id for name in ("one", "many")}
    assert len(ids) == 1


def test_fused_experts_on_the_disk_give_the_same_units_as_single_ones(tmp_path: Path) -> None:
    model = tiny.model("qwen2_moe")
    model.save_pretrained(tmp_path / "single")
    shutil.copytree(tmp_path / "single", tmp_path / "fused")
    save_file(dict(model.state_dict()), tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    assert any(".experts.0." in name for name in load_file(tmp_path / "single" / "model.safetensors"))
    assert not any(".experts.0." in name for name in load_file(tmp_path / "fused" / "model.safetensors"))
    packed = [pack(tmp_path / name, UnitStore(tmp_path / f"store-{name}")) for name in ("single", "fused")]
    assert packed[0].units == packed[1].units


def test_the_text_unit_is_the_small_files_with_a_canonical_configuration(tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint")
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}", "vocab.txt": b""}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = pack(folder, store)
    text = store.text(manifest)
    assert manifest.has_tokenizer
    assert {name: text[name] for name in files} == files
    assert text["generation_config.json"] == (folder / "generation_config.json").read_bytes()
    ours, theirs = parse_config(text["config.json"]), AutoConfig.from_pretrained(folder)
    assert ours.to_dict() | {"_name_or_path": ""} == theirs.to_dict() | {"_name_or_path": ""}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()), indent=7))
    assert pack(folder, store) == manifest


# --- tied embeddings ------------------------------------------------------------------------------------------------


def test_a_tied_head_lists_embed_s_table(tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save("granitemoe", tmp_path / "checkpoint", tie_word_embeddings=True)
    manifest = pack(folder, store)
    assert manifest.tied
    assert [(tensor.name, tensor.unit) for tensor in manifest.unit(units.HEAD).tensors] == [
        ("embed_tokens.weight", units.EMBED),
        ("norm.weight", None),
    ]
    assert_holds(store, manifest, AutoModelForCausalLM.from_pretrained(folder))


def test_a_tied_checkpoint_may_hold_the_table_twice_or_under_the_head_s_name_only(tmp_path: Path) -> None:
    folder = tiny.save("qwen2_moe", tmp_path / "checkpoint", tie_word_embeddings=True)
    manifests = [pack(folder, UnitStore(tmp_path / "plain"))]
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    manifests.append(pack(folder, UnitStore(tmp_path / "twice")))
    edit(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    store = UnitStore(tmp_path / "head")
    manifests.append(pack(folder, store))
    assert manifests[0] == manifests[1] == manifests[2]
    assert_holds(store, manifests[2], AutoModelForCausalLM.from_pretrained(folder))


def test_two_unequal_tables_are_not_tied_whatever_the_configuration_says(tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save("qwen2_moe", tmp_path / "checkpoint", tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    manifest = pack(folder, store)
    assert not manifest.tied
    assert not parse_config(store.text(manifest)["config.json"]).tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(store.tensors(manifest, units.HEAD)["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(store.tensors(manifest, units.EMBED)["embed_tokens.weight"], model.model.embed_tokens.weight)


# --- quantised checkpoints ------------------------------------------------------------------------------------------


def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turns projections into block-scaled FP8 as DeepSeek publishes it; returns their true values in bfloat16."""
    values = {}
    for name in [name for name in tensors if "_proj" in name and name.endswith("weight")]:
        rows, columns = tensors[name].shape
        scale = 2.0 ** torch.randint(-3, 3, (-(-rows // 16), -(-columns // 16))) * 1.25
        wide = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        tensors[name] = (tensors[name].float() / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        values[name] = (tensors[name].float() * wide).bfloat16()
    return values


def test_block_scaled_fp8_is_dequantised_to_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    folder = tiny.save("deepseek_v3", tmp_path / "checkpoint", "bfloat16")
    plain = shutil.copytree(folder, tmp_path / "plain")
    values: dict[str, torch.Tensor] = {}
    edit(folder, lambda tensors: values.update(quantise(tensors)))
    edit(plain, lambda tensors: tensors.update(values))
    edit_config(folder, quantization_config=settings)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in values
    store = UnitStore(tmp_path / "store")
    manifest = pack(folder, store)
    assert manifest == pack(plain, UnitStore(tmp_path / "store-plain"))
    assert b"quantization_config" not in store.text(manifest)["config.json"]
    assert_holds(store, manifest, AutoModelForCausalLM.from_pretrained(plain))


def test_mxfp4_is_dequantised_to_bfloat16(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tiny.save("gpt_oss", tmp_path / "checkpoint", "bfloat16", intermediate_size=64)
    plain = shutil.copytree(folder, tmp_path / "plain")

    def quantised(tensors: dict[str, torch.Tensor], keep: bool) -> None:
        generator.manual_seed(0)
        for name in sorted(name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))):
            experts, columns, rows = tensors[name].shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 130, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
            if keep:
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
                del tensors[name]
            else:
                tensors[name] = convert_moe_packed_tensors(blocks, scales)

    edit(folder, lambda tensors: quantised(tensors, keep=True))
    edit(plain, lambda tensors: quantised(tensors, keep=False))
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    store = UnitStore(tmp_path / "store")
    manifest = pack(folder, store)
    assert manifest == pack(plain, UnitStore(tmp_path / "store-plain"))
    assert_holds(store, manifest, AutoModelForCausalLM.from_pretrained(plain))


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_that_transformers_ignores_are_skipped(tmp_path: Path) -> None:
    """DeepSeek-V3's 62nd layer predicts further tokens; old checkpoints carry RoPE frequencies."""
    folder = tiny.save("deepseek_v3", tmp_path / "checkpoint")
    before = pack(folder, UnitStore(tmp_path / "before"))
    extra = {
        "model.layers.61.eh_proj.weight": torch.zeros(2, 4),
        "model.layers.61.mlp.experts.0.up_proj.weight": torch.zeros(2, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    edit(folder, lambda tensors: tensors.update(extra))
    assert pack(folder, UnitStore(tmp_path / "after")) == before


KEYS: dict[str, tuple[Edit, str]] = {
    "an unknown tensor": (
        lambda tensors: tensors.update({"model.layers.1.self_attn.surprise": torch.zeros(2)}),
        r"no place for the checkpoint's model\.layers\.1\.self_attn\.surprise",
    ),
    "an unknown expert's tensor": (
        lambda tensors: tensors.update({"model.layers.9.mlp.experts.0.up_proj.weight": torch.zeros(2)}),
        r"no place for .*layers\.9\.mlp\.experts\.0\.up_proj",
    ),
    "a missing tensor": (
        lambda tensors: tensors.pop("model.layers.2.self_attn.q_proj.weight"),
        r"lacks tensors of .*model\.layers\.2\.self_attn\.q_proj\.weight",
    ),
    "a missing head": (lambda tensors: tensors.pop("lm_head.weight"), r"lacks tensors of .*lm_head\.weight"),
    "a missing expert": (
        lambda tensors: [tensors.pop(f"model.layers.1.mlp.experts.7.{p}_proj.weight") for p in ("up", "gate")],
        r"layers\.1\.mlp\.experts\.gate_up_proj comes out as \[7, 48, 32\], the configuration says \[8, 48, 32\]",
    ),
    "half an expert": (
        lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight"),
        r"layers\.1\.mlp\.experts\.gate_up_proj cannot be made of",
    ),
    "a tensor of another shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}),
        r"model\.norm\.weight comes out as \[31\], the configuration says \[32\]",
    ),
    "a tensor under two names": (
        lambda tensors: tensors.update({"norm.weight": torch.zeros(32)}),
        r"two tensors of the checkpoint are model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("what", KEYS)
def test_keys_that_do_not_fit_are_refused_by_name_before_anything_is_written(
    what: str, tmp_path: Path, store: UnitStore
) -> None:
    change, reason = KEYS[what]
    folder = tiny.save("qwen3_moe", tmp_path / "checkpoint")
    edit(folder, change)
    with pytest.raises(UnsupportedModel, match=reason):
        pack(folder, store)
    assert not store.root.exists()


# --- what is no model for shoal -------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
NOT_OURS: dict[str, tuple[dict[str, Any], str]] = {
    "a dense model": ({"model_type": "llama"} | SMALL, "llama is dense"),
    "a dense model of a sparse family": (
        {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]} | SMALL,
        "qwen3_moe is dense",
    ),
    "an encoder-decoder": ({"model_type": "switch_transformers"}, "switch_transformers is an encoder-decoder"),
    "a multimodal model": ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe is multimodal"),
    "a model without a head for text": ({"model_type": "clap_text_model"}, "no causal language model"),
    "a family that nobody knows": ({"model_type": "nonesuch"}, "'nonesuch' is not one"),
    "a family that is no word": ({"model_type": None}, "None is not one"),
    "linear attention": (
        {"model_type": "qwen3_next", "num_experts": 4, "layer_types": ["linear_attention", "full_attention"]} | SMALL,
        "qwen3_next has layers of another kind .*linear_attention",
    ),
    "chunked attention": (
        {"model_type": "mixtral", "num_local_experts": 4, "layer_types": ["full_attention", "chunked_attention"]}
        | SMALL,
        "mixtral has layers of another kind .*chunked_attention",
    ),
    "Mamba": (
        {"model_type": "jamba", "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1} | SMALL,
        "jamba has layers of another kind",
    ),
    "a configuration that contradicts itself": (
        {"model_type": "gpt_oss", "layer_types": ["full_attention"]} | SMALL,
        "gpt_oss: transformers cannot read its config",
    ),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_is_no_model_for_shoal_is_refused_by_name_with_the_reason(
    what: str, tmp_path: Path, store: UnitStore
) -> None:
    config, reason = NOT_OURS[what]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=reason):
        pack(tmp_path, store)
    assert not store.root.exists()


def test_code_that_a_checkpoint_brings_along_is_never_run(tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert pack(folder, store).family == "mixtral"


def test_a_failed_self_check_refuses_before_anything_is_written(
    tmp_path: Path, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> None:
        raise UnsupportedModel(f"{config.model_type}: logits differ")

    monkeypatch.setattr(selfcheck, "check", refuse)
    with pytest.raises(UnsupportedModel, match="mixtral: logits differ"):
        pack(tiny.save("mixtral", tmp_path / "checkpoint"), store)
    assert not store.root.exists()


@pytest.mark.parametrize("grain", [0, 4, -1])
def test_a_grain_beyond_the_model_s_layers_is_refused(grain: int, tmp_path: Path, store: UnitStore) -> None:
    with pytest.raises(InvalidRequest, match=f"grain is {grain}; it must be from 1 to the model's 3 layers"):
        pack(tiny.save("mixtral", tmp_path / "checkpoint"), store, grain=grain)


@pytest.mark.parametrize("dtype", ["int8", "float64", "evil", ""])
def test_a_dtype_that_models_are_not_served_in_is_refused(dtype: str, tmp_path: Path, store: UnitStore) -> None:
    with pytest.raises(InvalidRequest, match="float32, bfloat16, float16"):
        pack(tmp_path, store, dtype=dtype)


# --- cut off and resumed --------------------------------------------------------------------------------------------


class Disk:
    """Counts what is written, and is full after so many files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self.made: list[str] = []
        fsync, make = os.fsync, Conversion.make

        def limited(file: int) -> None:
            if self.room == 0:
                raise OSError(errno.ENOSPC, "no space left on device")
            self.room -= 1
            fsync(file)

        def counting(conversion: Conversion, targets: Any) -> Any:
            self.made += targets
            return make(conversion, targets)

        monkeypatch.setattr(os, "fsync", limited)
        monkeypatch.setattr(Conversion, "make", counting)


def files_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("room", [0, 1, 2, 3, 20, 21, 58])
def test_a_full_disk_keeps_finished_units_shows_nothing_half_written_and_can_be_resumed(
    room: int, tmp_path: Path, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint")
    whole = UnitStore(tmp_path / "whole")
    wanted = pack(folder, whole)
    disk = Disk(monkeypatch, room)
    with pytest.raises(StoreFull):
        pack(folder, store)
    assert store.models() == []
    kept = {name for name in files_in(store.root) if not name.startswith("packing/")}
    assert kept < files_in(whole.root)
    disk.room = -1
    assert pack(folder, store) == wanted
    assert files_in(store.root) == files_in(whole.root)


def test_what_is_packed_is_not_read_again_by_a_run_that_was_cut_off(
    tmp_path: Path, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint")
    disk = Disk(monkeypatch, 2 * 21)  # two fsyncs a unit: text, embed, trunk.0 and eight experts, trunk.1 and eight
    with pytest.raises(StoreFull):
        pack(folder, store)
    disk.room = -1
    disk.made.clear()
    heard: list[tuple[int, int, str]] = []
    pack(folder, store, progress=lambda *said: heard.append(said))
    assert {name.split(".")[2] for name in disk.made if ".layers." in name} == {"2"}
    assert [said[2] for said in heard] == [entry.name for entry in store.manifest().units[1:]]


def test_a_unit_that_was_damaged_since_is_packed_again(
    tmp_path: Path, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint")
    disk = Disk(monkeypatch, 2 * 21)
    with pytest.raises(StoreFull):
        pack(folder, store)
    (journal,) = (store.root / "packing").iterdir()
    lines = journal.read_text().splitlines()
    _, sha256, _, _ = json.loads(lines[3])
    path = store.root / "units" / sha256[:2] / f"{sha256}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    journal.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    disk.room = -1
    manifest = pack(folder, store)
    assert_holds(store, manifest, AutoModelForCausalLM.from_pretrained(folder))
    assert not list((store.root / "packing").iterdir())


def test_a_checkpoint_that_changed_since_is_packed_from_the_start(
    tmp_path: Path, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("mixtral", tmp_path / "checkpoint")
    disk = Disk(monkeypatch, 2 * 21)
    with pytest.raises(StoreFull):
        pack(folder, store)
    tiny.save("mixtral", folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(5, 5))
    disk.room = -1
    assert_holds(store, pack(folder, store), AutoModelForCausalLM.from_pretrained(folder))


def test_progress_counts_every_byte_once(tmp_path: Path, store: UnitStore) -> None:
    folder = tiny.save("olmoe", tmp_path / "checkpoint")
    heard: list[tuple[int, int, str]] = []
    pack(folder, store, progress=lambda *said: heard.append(said))
    done = [said[0] for said in heard]
    assert done == sorted(set(done))
    total = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert done[-1] == total
    assert {said[1] for said in heard} == {total}


# --- with the real self-check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "recompute_at"), [("mixtral", None), ("phimoe", 32)])
def test_the_self_check_s_finding_is_in_the_manifest(
    family: str, recompute_at: int | None, tmp_path: Path, store: UnitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "check", CHECK)
    assert pack(tiny.save(family, tmp_path / "checkpoint"), store).recompute_at == recompute_at


@pytest.mark.slow
def test_packing_4_gb_stays_below_two_layers_and_400_mib(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.pack_memory", "--folder", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_error_lists_the_first_few_tensors_and_how_many_more_there_are() -> None:
    names = [f"t{number}" for number in range(NAMED_MAX + 2)]
    assert listed(names[:NAMED_MAX]) == ", ".join(names[:NAMED_MAX])
    assert listed(names) == ", ".join(names[:NAMED_MAX]) + " and 2 more"
