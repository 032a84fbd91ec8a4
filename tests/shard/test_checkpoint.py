"""Reading checkpoint folders: lazily, exactly, and refusing what is damaged or cannot be read exactly."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from protos.errors import UnsupportedModel
from shard.checkpoint import Checkpoint

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}


def folder(
    path: Path, files: Mapping[str, Mapping[str, torch.Tensor]], config: Any = None, index: dict[str, str] | None = None
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "mixtral"}))
    for name, tensors in files.items():
        save_file(dict(tensors), path / name, metadata={"format": "pt"})
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_tensor_is_read_as_it_was_saved_and_cast_on_demand(tmp_path: Path) -> None:
    saved = {
        "a": noise(3, 5),
        "b": noise(4, seed=1).bfloat16(),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor(2.5),
    }
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": saved}))
    assert {name: source.shape for name, source in checkpoint.sources.items()} == {
        n: tuple(t.shape) for n, t in saved.items()
    }
    for name, tensor in saved.items():
        assert torch.equal(checkpoint.sources[name].read(tensor.dtype), tensor)
    assert torch.equal(checkpoint.sources["a"].read(torch.bfloat16), saved["a"].bfloat16())


def test_many_files_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    index = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    files = {"model-1.safetensors": {"a": noise(2)}, "model-2.safetensors": {"b": noise(3)}}
    checkpoint = Checkpoint(folder(tmp_path, files, index=index))
    assert checkpoint.sources.keys() == {"a", "b"}
    assert [path.name for path in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]


def test_one_large_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": {"a": noise(2)}}, index={"b": "gone.safetensors"}))
    assert checkpoint.sources.keys() == {"a"}


def test_a_read_goes_on_where_a_system_call_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": {"a": noise(100)}}))
    monkeypatch.setattr("shard.stored.READ_BYTES", 33)
    assert torch.equal(checkpoint.sources["a"].read(torch.float32), noise(100))
    assert checkpoint.same("a", "a")


def test_equal_bytes_are_told_from_unequal_ones(tmp_path: Path) -> None:
    tensors = {"a": noise(40), "b": noise(40), "c": noise(40, seed=1), "d": noise(5, 8)}
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": tensors}))
    assert checkpoint.same("a", "b")
    assert not checkpoint.same("a", "c")
    assert not checkpoint.same("a", "d")


def fp8(rows: int, columns: int, block: int = 128) -> dict[str, torch.Tensor]:
    grid = (-(-rows // block), -(-columns // block))
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(2)) + 0.1
    return {"w.weight": noise(rows, columns).to(torch.float8_e4m3fn), "w.weight_scale_inv": scale}


@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (576, 64), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_is_each_value_times_its_block_s_scale(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    saved = fp8(*shape)
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": saved | {"n": noise(3)}}, FP8))
    assert checkpoint.sources.keys() == {"w.weight", "n"}
    assert checkpoint.sources["w.weight"].dtype == torch.bfloat16
    read = checkpoint.sources["w.weight"].read(dtype)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        scale = saved["w.weight_scale_inv"][row // 128, column // 128]
        assert read[row, column] == (saved["w.weight"][row, column].float() * scale).to(dtype)


def test_fp8_gives_what_transformers_gives(tmp_path: Path) -> None:
    saved = fp8(256, 384)
    read = Checkpoint(folder(tmp_path, {"model.safetensors": saved}, FP8)).sources["w.weight"].read(torch.bfloat16)
    theirs = Fp8Dequantize(None)._dequantize_one(*saved.values(), output_dtype=torch.bfloat16)
    assert torch.equal(read, theirs)


def mxfp4(experts: int = 3, rows: int = 8, groups: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (experts, rows, groups), generator=generator, dtype=torch.uint8)
    return {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_gives_what_transformers_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = mxfp4()
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": saved | {"e.down_proj_bias": noise(3, 8)}}, MXFP4))
    assert checkpoint.sources.keys() == {"e.down_proj", "e.down_proj_bias"}
    assert checkpoint.sources["e.down_proj"].shape == (3, 64, 8)
    read = checkpoint.sources["e.down_proj"].read(dtype)
    assert torch.equal(read, convert_moe_packed_tensors(*saved.values(), dtype=dtype))


def test_mxfp4_holds_two_values_a_byte_the_low_half_first(tmp_path: Path) -> None:
    saved = mxfp4()
    read = Checkpoint(folder(tmp_path, {"model.safetensors": saved}, MXFP4)).sources["e.down_proj"].read(torch.float32)
    byte = int(saved["e.down_proj_blocks"][1, 5, 1, 7])
    factor = 2.0 ** (int(saved["e.down_proj_scales"][1, 5, 1]) - 127)
    assert read[1, 32 + 14, 5] == FP4_VALUES[byte & 15] * factor
    assert read[1, 32 + 15, 5] == FP4_VALUES[byte >> 4] * factor


A = {"a": torch.zeros(2)}
ONE = {"model.safetensors": A}
SPLIT = {"1.safetensors": A}
E4M3 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "no weights": ({}, None, None, "never read"),
    "an index that leaves the folder": (SPLIT, None, {"a": "../1.safetensors"}, "of this folder"),
    "an index that names a pickle": (SPLIT, None, {"a": "1.bin"}, "of this folder"),
    "an empty index": (SPLIT, None, {}, "of this folder"),
    "an index that names a file that is not there": (
        SPLIT,
        None,
        {"a": "2.safetensors"},
        "2.safetensors, which is not there",
    ),
    "an index that names a tensor that is not there": (
        SPLIT,
        None,
        {"b": "1.safetensors"},
        "tensor b, which is in no file",
    ),
    "a tensor in two files": (
        {"1.safetensors": A, "2.safetensors": A | {"b": torch.zeros(1)}},
        None,
        {"a": "1.safetensors", "b": "2.safetensors"},
        "tensor a is in",
    ),
    "another quantisation": (ONE, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "'gptq'"),
    "a quantisation without a name": (ONE, {"quantization_config": {"bits": 4}}, None, "quantised with None"),
    "a quantisation that is no object": (ONE, {"quantization_config": "fp8"}, None, "quantised with None"),
    "FP8 without blocks": (ONE, {"quantization_config": {"quant_method": "fp8"}}, None, "weight_block_size"),
    "FP8 with static activations": (
        ONE,
        {"quantization_config": FP8["quantization_config"] | {"activation_scheme": "static"}},
        None,
        "dynamic",
    ),
    "FP8 without a scale": ({"model.safetensors": {"w.weight": E4M3}}, FP8, None, "has no w.weight_scale_inv"),
    "FP8 with a scale of another shape": (
        {"model.safetensors": {"w.weight": E4M3, "w.weight_scale_inv": torch.ones(2, 1)}},
        FP8,
        None,
        r"scales of shape \(1, 1\)",
    ),
    "FP8 with integer scales": (
        {"model.safetensors": {"w.weight": E4M3, "w.weight_scale_inv": torch.ones(1, 1, dtype=torch.uint8)}},
        FP8,
        None,
        "floating-point scales",
    ),
    "MXFP4 without scales": (
        {"model.safetensors": {"e_blocks": mxfp4()["e.down_proj_blocks"]}},
        MXFP4,
        None,
        "e_scales",
    ),
    "MXFP4 of other shapes": (
        {
            "model.safetensors": {
                "e_blocks": torch.zeros(1, 2, 3, 8, dtype=torch.uint8),
                "e_scales": torch.zeros(1, 2, 3),
            }
        },
        MXFP4,
        None,
        "needs bytes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    files, config, index, reason = REFUSED[what]
    with pytest.raises(UnsupportedModel, match=reason):
        Checkpoint(folder(tmp_path, files, config, index))


@pytest.mark.parametrize("config", ["{", "[]", "[" * 100_000, '"\\ud800', ""])
def test_a_configuration_that_is_no_json_object_is_refused(config: str, tmp_path: Path) -> None:
    folder(tmp_path, ONE)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no Hugging Face checkpoint folder"):
        Checkpoint(tmp_path / "nothing")


def test_a_file_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path, {"model.safetensors": {"a": noise(100)}}) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors is damaged.*truncated"):
        Checkpoint(tmp_path)


def test_a_file_cut_short_while_it_is_read_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": {"a": noise(100)}}))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UnsupportedModel, match="ends inside tensor a"):
        checkpoint.sources["a"].read(torch.float32)


def test_the_small_files_are_the_text_s_and_no_others(tmp_path: Path) -> None:
    folder(tmp_path, ONE)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "modeling_evil.py"):
        (tmp_path / name).write_text(name)
    assert Checkpoint(tmp_path).small_files().keys() == {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_a_small_file_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(folder(tmp_path, ONE))
    (tmp_path / "tokenizer.json").write_text("x" * 65)
    monkeypatch.setattr("shard.checkpoint.SMALL_FILE_BYTES_MAX", 64)
    with pytest.raises(UnsupportedModel, match="65 bytes; at most 64"):
        checkpoint.small_files()


def test_nothing_is_mapped_while_tensors_are_read(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list a process's mappings")
    checkpoint = Checkpoint(folder(tmp_path, {"model.safetensors": load_example()}))
    held = SimpleNamespace(tensor=checkpoint.sources["a"].read(torch.float32))
    assert str(tmp_path) not in maps.read_text()
    assert torch.equal(held.tensor, load_file(tmp_path / "model.safetensors")["a"])


def load_example() -> dict[str, torch.Tensor]:
    return {"a": noise(64, 64)}
