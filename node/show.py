"""What `shoal show` prints: the models of a store, or one model's units, sizes and layers.

Pure: manifests in, tables out.
"""

from __future__ import annotations

import itertools
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
        table.add_row(
            manifest.model_id[:12],
            manifest.family,
            manifest.dtype,
            str(manifest.layers),
            _range(manifest.experts),
            str(manifest.context),
            size(_bytes(manifest)),
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
        "bytes": _bytes(manifest),
        "expert_bytes": _bytes(manifest, "expert"),
        "units": {entry.name: {"sha256": entry.sha256, "bytes": entry.size} for entry in manifest.units},
    }


def head(manifest: Manifest) -> Table:
    """The model's facts, but for its units."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("model", manifest.model_id),
        ("architecture", f"{manifest.architecture} ({manifest.family})"),
        ("dtype", manifest.dtype),
        ("layers", f"{manifest.layers}, spans begin at multiples of {manifest.grain}"),
        ("experts", f"{_range(manifest.experts)} a layer, {manifest.top_k} a token"),
        ("context", f"{manifest.context} tokens"),
        ("tokenizer", "yes" if manifest.has_tokenizer else "no: use --token-ids"),
        ("answers as", f"transformers with {manifest.oracle}"),
        ("size", f"{size(_bytes(manifest))}, {_share(_bytes(manifest, 'expert'), manifest)} of it experts"),
    ):
        table.add_row(name, value)
    return table


def kinds(manifest: Manifest) -> Table:
    """Units by kind, and all of them together."""
    table = _table("unit", "count", "each", "together", "share")
    for kind in ("text", "embed", "trunk", "expert", "head"):
        sizes = [entry.size for entry in manifest.units if units.parse(entry.name).kind == kind]
        table.add_row(kind, str(len(sizes)), _sizes(sizes), size(sum(sizes)), _share(sum(sizes), manifest))
    table.add_row("total", str(len(manifest.units)), "", size(_bytes(manifest)), "100 %", style="bold")
    return table


def layers(manifest: Manifest) -> Table:
    """Layers, those in a row that are alike as one line."""
    table = _table("layers", "experts", "trunk", "expert", "layer")
    shapes = [_layer(manifest, layer) for layer in range(manifest.layers)]
    first = 0
    for shape, alike in itertools.groupby(shapes):
        last = first + len(list(alike)) - 1
        table.add_row(f"{first} to {last}" if last > first else str(first), *shape)
        first = last + 1
    return table


def _layer(manifest: Manifest, layer: int) -> tuple[str, str, str, str]:
    """A layer's cells: its experts, the sizes of its trunk, of an expert, and of all."""
    trunk = manifest.unit(units.trunk(layer)).size
    experts = [manifest.unit(units.expert(layer, e)).size for e in range(manifest.experts[layer])]
    return str(len(experts)) if experts else "dense", size(trunk), _sizes(experts), size(trunk + sum(experts))


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _bytes(manifest: Manifest, kind: str | None = None) -> int:
    return sum(entry.size for entry in manifest.units if kind is None or units.parse(entry.name).kind == kind)


def _share(count: int, manifest: Manifest) -> str:
    return f"{100 * count / _bytes(manifest):.0f} %"


def _sizes(sizes: Sequence[int]) -> str:
    """What one of them takes."""
    if not sizes:
        return ""
    low, high = size(min(sizes)), size(max(sizes))
    return low if low == high else f"{low} to {high}"


def _range(experts: Sequence[int]) -> str:
    low, high = min(experts), max(experts)
    return str(low) if low == high else f"{low} to {high}"
