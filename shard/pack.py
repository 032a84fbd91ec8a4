"""A Hugging Face checkpoint becomes units and a manifest: `shoal pack`.

Law: what cannot be answered exactly is refused by name before anything is written; at no time are two layers in memory;
equal checkpoints give equal bytes; units come before the manifest, and a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import torch

from protos import units
from protos.errors import InvalidRequest, UnsupportedModel
from protos.manifest import DTYPES, Manifest, TensorEntry, UnitEntry
from shard import heap, packed
from shard.anatomy import Anatomy, Part
from shard.checkpoint import CONFIG, Checkpoint
from shard.conversion import Conversion, listed
from shard.family import choose_dtype, facts, meta_model, read_config, refuse_recurrent
from shard.generation import check_generation
from shard.journal import Journal
from shard.weights import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from protos.ids import UnitName
    from shard.weights import UnitStore

    Progress = Callable[[int, int, str], None]

TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
OUTPUT_PROJECTION: Final = "lm_head.weight"


def pack(
    checkpoint: Path, store: UnitStore, *, grain: int = 1, dtype: str | None = None, progress: Progress | None = None
) -> Manifest:
    """Packs the folder `checkpoint` into `store`; `progress` hears (bytes done, bytes in all, the unit just finished).

    `dtype`: a name such as "bfloat16"; None: the checkpoint's own.  Raises UnsupportedModel (with the family and the
    reason), InvalidRequest (grain, dtype), StoreFull (finished units are kept; run it again).
    """
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequest(f"dtype is {dtype!r:.80}; it must be one of {', '.join(DTYPES)}")
    packing = _Packing(Checkpoint(checkpoint), store, grain, dtype)
    with heap.lean():
        manifest = packing.run(progress or (lambda done, total, name: None))
    packed.note(checkpoint, store, manifest.model_id, grain=grain, dtype=dtype)
    return manifest


class _Packing:
    """One run: everything is checked when this is made, everything is written in run()."""

    def __init__(self, checkpoint: Checkpoint, store: UnitStore, grain: int, dtype: str | None) -> None:
        self.checkpoint, self.store, self.grain = checkpoint, store, grain
        self.config = read_config(checkpoint)
        check_generation(checkpoint.small_files(), checkpoint.config)
        self.dtype = choose_dtype(checkpoint, self.config, dtype)
        self._plan()
        if self.anatomy.tied and not self._is_tied():
            self.config.tie_word_embeddings = False
            self._plan()
        if not 1 <= grain <= self.anatomy.layers:
            raise InvalidRequest(f"grain is {grain}; it must be from 1 to the model's {self.anatomy.layers} layers")
        self.facts = facts(self.config, self.anatomy)
        self.batches = self._batches()

    def _plan(self) -> None:
        self.anatomy = Anatomy(meta_model(self.config, self.dtype))
        refuse_recurrent(self.config, self.anatomy)
        self.conversion = Conversion(self.anatomy.model, self.dtype, self.checkpoint.sources)
        self.table = self._tied_table()
        self._refuse_missing()

    def _tied_table(self) -> str | None:
        """The embedding table whose bytes are the output projection's too, if the model ties the two."""
        ties = dict(self.anatomy.model.all_tied_weights_keys)
        table: str | None = ties.pop(OUTPUT_PROJECTION, None)
        if ties:
            raise UnsupportedModel(
                f"{self.config.model_type} ties {listed(sorted(ties))}; shoal ties {OUTPUT_PROJECTION}"
            )
        return table

    def _is_tied(self) -> bool:
        """False where from_pretrained does not tie in spite of the configuration: no rule for it, or unequal tables."""
        if self.table is None:
            return False
        steps = self.conversion.steps
        if self.table not in steps or OUTPUT_PROJECTION not in steps:
            return True
        table, projection = steps[self.table], steps[OUTPUT_PROJECTION]
        plain = table.converter is None and projection.converter is None
        return plain and self.checkpoint.same(table.inputs[0].key, projection.inputs[0].key)

    def _refuse_missing(self) -> None:
        missing = self.conversion.missing()
        if self.table is not None and not {self.table, OUTPUT_PROJECTION} <= missing:
            missing -= {self.table, OUTPUT_PROJECTION}
        if missing:
            architecture = type(self.anatomy.model).__name__
            raise UnsupportedModel(
                f"{self.checkpoint.folder} lacks tensors of {architecture}: {listed(sorted(missing))}"
            )

    def _origin(self, source: str) -> str:
        """The tensor to make for a unit's: a tied checkpoint may hold the table as the output projection only."""
        if source == self.table and source not in self.conversion.steps:
            return OUTPUT_PROJECTION
        return source

    def _batches(self) -> list[dict[UnitName, list[Part]]]:
        """The units that are made together, in order: embed; a layer's trunk; all experts of a layer; head."""
        batches: dict[tuple[str, int | None], dict[UnitName, list[Part]]] = {}
        for part in self.anatomy.parts():
            unit = units.parse(part.unit)
            batches.setdefault((unit.kind, unit.layer), {}).setdefault(part.unit, []).append(part)
        return sorted(batches.values(), key=lambda batch: min(map(units.order, batch)))

    def run(self, progress: Progress) -> Manifest:
        recompute_at = _self_check(self)
        self.store.remove_leftovers()
        journal = Journal(self.store, self.checkpoint, dtype_name(self.dtype))
        total = sum(self._nbytes(parts) for batch in self.batches for parts in batch.values())
        done = 0
        entries = [self._pack_text()]
        for batch in self.batches:
            for entry in self._pack_batch(batch, journal):
                entries.append(entry)
                done += self._nbytes(batch[entry.name])
                progress(done, total, entry.name)
            heap.trim()
        manifest = self._manifest(entries, recompute_at)
        self.store.add_manifest(manifest)
        journal.remove()
        return manifest

    def _pack_batch(self, batch: dict[UnitName, list[Part]], journal: Journal) -> Iterator[UnitEntry]:
        finished = {name: journal.finished(name) for name in batch}
        made: dict[str, torch.Tensor] = {}
        if None in finished.values():
            made = self.conversion.make({self._origin(part.source) for parts in batch.values() for part in parts})
        for name in sorted(batch, key=units.order):
            entry = finished[name]
            if entry is None:
                entry = self.store.add_unit(name, {part.local: self._cut(made, part) for part in batch[name]})
                journal.add(entry)
            yield entry

    def _cut(self, made: dict[str, torch.Tensor], part: Part) -> torch.Tensor:
        tensor = made[self._origin(part.source)]
        return tensor if part.expert is None else tensor[part.expert]

    def _nbytes(self, parts: list[Part]) -> int:
        origins = {self._origin(part.source) for part in parts}
        outputs = {origin: self.conversion.steps[origin].outputs[origin] for origin in origins}
        return sum(self._cut(outputs, part).nbytes for part in parts)

    def _pack_text(self) -> UnitEntry:
        files = self.checkpoint.small_files() | {CONFIG: self._config_file()}
        octets = {name: _octets(data) for name, data in files.items()}
        return self.store.add_unit(units.TEXT, octets)

    def _config_file(self) -> bytes:
        """The checkpoint's configuration as what is packed: its dtype, not quantised; in canonical JSON."""
        dropped = ("quantization_config", "torch_dtype")
        fields = {key: value for key, value in self.checkpoint.config.items() if key not in dropped}
        fields |= {"dtype": dtype_name(self.dtype), "tie_word_embeddings": self.config.tie_word_embeddings}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"

    def _manifest(self, entries: list[UnitEntry], recompute_at: int | None) -> Manifest:
        by_name = {entry.name: entry for entry in entries}
        by_name[units.HEAD] = self._with_table(by_name[units.HEAD], by_name[units.EMBED])
        return Manifest(
            **self.facts,
            dtype=dtype_name(self.dtype),
            grain=self.grain,
            recompute_at=recompute_at,
            has_tokenizer=any((self.checkpoint.folder / name).is_file() for name in TOKENIZERS),
            units=tuple(by_name[name] for name in sorted(by_name, key=units.order)),
        )

    def _with_table(self, head: UnitEntry, embed: UnitEntry) -> UnitEntry:
        """The head of a tied model lists embed's table, whose bytes it shares."""
        lent = [
            TensorEntry(tensor.name, tensor.dtype, tensor.shape, units.EMBED)
            for tensor in embed.tensors
            if self.anatomy.source(units.EMBED, tensor.name) == self.table
        ]
        tensors = sorted([*head.tensors, *lent], key=lambda tensor: tensor.name)
        return UnitEntry(head.name, head.sha256, head.size, tuple(tensors))


def _self_check(packing: _Packing) -> int | None:
    # Imported late: it brings the whole stage along, which a refused checkpoint does not need.
    from shard.selfcheck import check

    return check(packing.config).recompute_at


def _octets(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
