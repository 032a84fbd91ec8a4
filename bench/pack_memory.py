"""Peak memory of `shoal pack` on a 4 GB checkpoint made on the spot, against two layers + 400 MiB; then it is served.

python -m bench.pack_memory [--layers 8] [--experts 32] [--folder DIR]

The checkpoint is a random Mixtral in bfloat16, two layers a file, written file by file into a temporary folder (twice
its size is needed there).  It is packed in a child process; what counts is that process's VmHWM, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shard.pack import pack
from shard.unit_file import chunks
from shard.weights import UnitStore

MIB = 1 << 20
ALLOWANCE_BYTES = 400 * MIB
HIDDEN, FFN, VOCAB, KV = 1024, 2560, 8192, 256
LAYERS_A_FILE = 2


def main() -> int:
    arguments = _arguments()
    if arguments.child is not None:
        return _child(arguments.child)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint = Path(folder) / "checkpoint"
        total = _make(checkpoint, arguments.layers, arguments.experts)
        layer = _layer_bytes(arguments.experts)
        print(f"checkpoint: {total / 1e9:.2f} GB in {arguments.layers} layers of {layer / MIB:.0f} MiB")
        started = time.monotonic()
        command = [sys.executable, "-m", "bench.pack_memory", "--child", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report = json.loads(done.stdout.splitlines()[-1])
        seconds = time.monotonic() - started
        answer = _ask(Path(folder) / "store")
    limit = 2 * layer + ALLOWANCE_BYTES
    print(f"imports alone: {report['imports'] / MIB:.0f} MiB")
    print(f"peak: {report['peak'] / MIB:.0f} MiB; two layers + 400 MiB: {limit / MIB:.0f} MiB; {seconds:.0f} s")
    print(f"served: 8 tokens, the first after {answer['timings']['prefill_s']:.1f} s: {answer['token_ids']}")
    print("passed" if report["peak"] < limit else "FAILED")
    return 0 if report["peak"] < limit else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32, help="in each layer, 15 MiB each")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(folder: Path) -> int:
    imports = _peak()
    pack(folder / "checkpoint", UnitStore(folder / "store"))
    print(json.dumps({"imports": imports, "peak": _peak()}))
    return 0


def _ask(store: Path) -> dict[str, Any]:
    options = ["--token-ids", "5,17,9", "--max-tokens", "8", "--ignore-eos", "--temperature", "0", "--json"]
    command = [sys.executable, "-m", "node.cli", "generate", "--store", str(store), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert len(answer["token_ids"]) == 8
    return answer


def _peak() -> int:
    """VmHWM where there is one: what the operating system counts at the worst moment, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _make(folder: Path, layers: int, experts: int) -> int:
    folder.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    groups = [range(first, min(first + LAYERS_A_FILE, layers)) for first in range(0, layers, LAYERS_A_FILE)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        shapes = {name: shape for layer in group for name, shape in _shapes(layer, experts).items()}
        if number == 0:
            shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
            shapes |= {"model.norm.weight": (HIDDEN,)}
        _write(folder / file, shapes)
        weight_map |= dict.fromkeys(shapes, file)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(len(path.name))
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator) for name, shape in shapes.items()
    }
    with path.open("wb") as file:
        for chunk in chunks(tensors):
            file.write(chunk)


def _shapes(layer: int, experts: int) -> dict[str, tuple[int, ...]]:
    stem = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{stem}.self_attn.k_proj.weight": (KV, HIDDEN),
        f"{stem}.self_attn.v_proj.weight": (KV, HIDDEN),
        f"{stem}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{stem}.input_layernorm.weight": (HIDDEN,),
        f"{stem}.post_attention_layernorm.weight": (HIDDEN,),
        f"{stem}.block_sparse_moe.gate.weight": (experts, HIDDEN),
    }
    for expert in range(experts):
        for name, shape in (("w1", (FFN, HIDDEN)), ("w2", (HIDDEN, FFN)), ("w3", (FFN, HIDDEN))):
            shapes[f"{stem}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def _layer_bytes(experts: int) -> int:
    """As torch counts, 2 bytes a value."""
    return sum(2 * torch.Size(shape).numel() for shape in _shapes(0, experts).values())


if __name__ == "__main__":
    sys.exit(main())
