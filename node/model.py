"""The part of a model that a node holds: loaded from its store, its trunk computed by one worker.

Law: what does not fit is refused before a weight is read, and says how much would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import torch

from node import holding
from node.show import size
from node.text import Text
from protos import units
from protos.errors import InvalidManifest, InvalidRequest
from shard.anatomy import Anatomy
from shard.body import Body, parse_config, skeleton
from shard.experts import ExpertBank
from shard.family import facts, meta_model
from shard.stage import Stage
from shard.weights import UnitStore, dtype_name
from shard.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig

    from node.config import Config
    from node.holding import Holding
    from protos.ids import UnitName
    from protos.manifest import Manifest
    from shard.experts import Experts

    Progress = Callable[[str, int, int], None]
    Port = Callable[[Manifest, ExpertBank], Experts]

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the memory that is free when a node starts, if nobody says how much KV may take.
_KV_SHARE: Final = 0.25
# Sessions that a stage takes, where the door of the same node takes few.
STAGE_SESSIONS_MIN: Final = 64
# Where a container's own limit stands (cgroup v2): psutil sees only the machine's.
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Model:
    """`worker` is None where no trunk is held: such a node computes experts only."""

    manifest: Manifest
    text: Text
    holding: Holding
    bank: ExpertBank
    worker: Worker | None

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.shutdown()


def load(config: Config, progress: Progress, port: Port | None = None) -> Model:
    """Blocks for as long as it takes to check and map the weights; `progress` hears (what, bytes done, bytes in all).

    `port` makes what the stage asks for its experts, given those that are held here; None: only these.
    Raises UnitMissing, UnitMismatch, InvalidManifest, InvalidRequest (no such model, device, layer; too low a limit).
    """
    store = UnitStore(config.store)
    manifest = store.manifest(config.model or None)
    held = holding.parse(config.hold, manifest)
    loading = _Loading(store, manifest, held, find_device(config.device), progress)
    kv_limit = kv_bytes_max(config, manifest, loading.total)
    if config.threads:
        torch.set_num_threads(config.threads)
    files = store.text(manifest)
    model_config = read_config(files, manifest)
    bank = ExpertBank()
    _fill(bank, held, model_config, loading)
    worker = None
    if held.span:
        dtype = _DTYPES[manifest.dtype]
        experts = bank if port is None else port(manifest, bank)
        body = Body(model_config, dtype, held.span, loading.tensors, experts, loading.device)
        worker = Worker(Stage(body, kv_limit), sessions_max=stage_sessions_max(config))
    return Model(manifest, Text(files), held, bank, worker)


def stage_sessions_max(config: Config) -> int:
    """Sessions of this node's stage: its own door's, and as many again of others'."""
    return max(2 * config.sessions_max, STAGE_SESSIONS_MIN)


def _fill(bank: ExpertBank, held: Holding, model_config: PretrainedConfig, loading: _Loading) -> None:
    manifest = loading.manifest
    anatomy = Anatomy(skeleton(model_config, _DTYPES[manifest.dtype]))
    for layer, mask in held.experts.items():
        bank.add_layer(layer, anatomy.experts[layer][1])
        for expert in range(manifest.experts[layer]):
            if mask >> expert & 1:
                bank.add(layer, expert, loading.tensors(units.expert(layer, expert)))


def read_config(files: Mapping[str, bytes], manifest: Manifest) -> PretrainedConfig:
    """The configuration in a text unit, which may have come from a peer.

    Raises UnsupportedModel; InvalidManifest, naming the field, where the manifest says otherwise.
    """
    if "config.json" not in files:
        raise InvalidManifest(f"the text unit of model {manifest.model_id} has no config.json; pack the model again")
    config = parse_config(files["config.json"])
    found = {"dtype": dtype_name(config.dtype)}  # before a model is made: that writes its own dtype there
    found |= facts(config, Anatomy(meta_model(config, _DTYPES[manifest.dtype])))
    for field, value in found.items():
        if getattr(manifest, field) != value:
            raise InvalidManifest(
                f"the manifest of model {manifest.model_id} says {field} {getattr(manifest, field)}, its config.json"
                f" {value}: they are not of one model; fetch it from somebody else, or pack it again"
            )
    return config


class _Loading:
    """Reads units and tells how far it is."""

    def __init__(
        self, store: UnitStore, manifest: Manifest, held: Holding, device: torch.device, progress: Progress
    ) -> None:
        self.manifest = manifest
        self.device = device
        self.total = manifest.size(held.units(manifest))
        self._store = store
        self._progress = progress
        self._done = 0

    def tensors(self, name: UnitName) -> dict[str, torch.Tensor]:
        tensors = self._store.tensors(self.manifest, name, self.device)
        self._done += self.manifest.unit(name).size
        self._progress("checking and loading weights", self._done, self.total)
        return tensors


def kv_bytes_max(config: Config, manifest: Manifest, weights: int) -> int:
    """What KV may take beside `weights` bytes.  Raises InvalidRequest, naming what is needed and what is allowed."""
    if config.memory_limit is None:
        return config.kv_limit or int(_free_bytes() * _KV_SHARE)
    needed = weights + (config.kv_limit or 0)
    if config.memory_limit <= weights or config.memory_limit < needed:
        kv = f" and {size(config.kv_limit)} for KV (kv_limit)" if config.kv_limit else ", and some for KV"
        raise InvalidRequest(
            f"what is held of model {manifest.model_id[:12]} needs {size(weights)} for its weights{kv}, but "
            f"memory_limit is {size(config.memory_limit)}: raise it, hold less, or serve a smaller model"
        )
    return config.kv_limit or config.memory_limit - weights


def _free_bytes() -> int:
    free = psutil.virtual_memory().available
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return free
    return min(free, int(limit)) if limit.isdigit() else free


def find_device(name: str) -> torch.device:
    """Raises InvalidRequest for one that this machine does not have."""
    device = torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device.type]
    if not there or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InvalidRequest(f"this machine has no device {name} that torch can use; try --device cpu")
    return device
