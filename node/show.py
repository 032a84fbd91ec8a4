"""What `shoal show` prints: the models of a store, or one model's units, sizes and layers.

Pure: manifests in, tables out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from protos import units

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from protos.manifest import Manifest


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def models(manifests: Iterable[Manifest]) -> Table:
    """One line a model."""
    table = Table(box=None, pad_edge=False)
    for column in ("model", "family", "dtype", "layers", "experts", "context", "size"):
        table.add_column(column, justify="left" if column in ("model", "family", "dtype") else "right")
    for manifest in manifests:
        whole = manifest.size(entry.name for entry in manifest.units)
        table.add_row(
            manifest.model_id[:12],
            manifest.family,
            manifest.dtype,
            str(manifest.layers),
            _range(manifest.experts),
            str(manifest.context),
            size(whole),
        )
    return table


def facts(manifest: Manifest) -> dict[str, Any]:
    """A model as one JSON object."""
    return {
        "model": manifest.model_id,
        "family": manifest.family,
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "layers": manifest.layers,
        "experts": list(manifest.experts),
        "top_k": manifest.top_k,
        "hidden": manifest.hidden,
        "vocab": manifest.vocab,
        "context": manifest.context,
        "grain": manifest.grain,
        "recompute_at": manifest.recompute_at,
        "oracle": manifest.oracle,
        "has_tokenizer": manifest.has_tokenizer,
        "tied": manifest.tied,
        "units": {entry.name: {"sha256": entry.sha256, "bytes": entry.size} for entry in manifest.units},
    }


def head(manifest: Manifest) -> Table:
    """The model's facts, but for its units."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    experts = [entry.size for entry in manifest.units if units.parse(entry.name).kind == "expert"]
    whole = manifest.size(entry.name for entry in manifest.units)
    for name, value in (
        ("model", manifest.model_id),
        ("architecture", f"{manifest.architecture} ({manifest.family})"),
        ("dtype", manifest.dtype),
        ("layers", f"{manifest.layers}, spans begin at multiples of {manifest.grain}"),
        ("experts", f"{_range(manifest.experts)} a layer, {manifest.top_k} a token"),
        ("context", f"{manifest.context} tokens"),
        ("tokenizer", "yes" if manifest.has_tokenizer else "no: use --token-ids"),
        ("answers as", f"transformers with {manifest.oracle}"),
        ("size", f"{size(whole)}, {100 * sum(experts) / whole:.0f} % of it experts"),
    ):
        table.add_row(name, value)
    return table


def layers(manifest: Manifest) -> Table:
    """Units and sizes by layer."""
    table = Table(box=None, pad_edge=False)
    for column in ("unit", "count", "each", "together", "sha256"):
        table.add_column(column, justify="left" if column in ("unit", "sha256") else "right")
    for name, sizes, digest in _groups(manifest):
        each = size(sizes[0]) if len(set(sizes)) == 1 else f"{size(min(sizes))} to {size(max(sizes))}"
        table.add_row(name, str(len(sizes)), each, size(sum(sizes)), digest)
    return table


def _groups(manifest: Manifest) -> list[tuple[str, list[int], str]]:
    """Units in order, a layer's experts as one line."""
    groups: dict[str, tuple[list[int], str]] = {}
    for entry in manifest.units:
        unit = units.parse(entry.name)
        is_expert = unit.kind == "expert"
        sizes, _ = groups.setdefault(
            f"expert.{unit.layer}.*" if is_expert else entry.name, ([], "" if is_expert else entry.sha256[:12])
        )
        sizes.append(entry.size)
    return [(name, sizes, digest) for name, (sizes, digest) in groups.items()]


def _range(experts: Sequence[int]) -> str:
    low, high = min(experts), max(experts)
    return str(low) if low == high else f"{low} to {high}"
