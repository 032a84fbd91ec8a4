"""The attention seam: each session's rows attend to its own context alone.  Registered with transformers as "shoal".

Causality follows from positions, so no mask tensor crosses the model's forward: what a base model builds in its place
is the width of the layer's window. That word counts, not an attention module's own: not every family passes one on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from protos.errors import UnsupportedModel

if TYPE_CHECKING:
    from shard.kv import RaggedCache, Slice


SCORES_MAX = (
    1 << 23
)  # attention scores that exist at once where sinks are added by hand: 32 MiB in float32, some copies of it
# What modules hand on that changes nothing here: positions are the batch's, masks are the window's, nothing is dropped.
IGNORED = frozenset({"dropout", "is_causal", "position_ids", "sliding_window", "use_cache", "output_attentions"})


def window(*, local_size: int | None = None, use_vmap: bool = False, **_: object) -> int | None:
    """transformers' mask interface: the width of a layer's sliding window, None where it sees all that came before."""
    if use_vmap:
        raise UnsupportedModel(
            "the model masks attention in a way of its own; shoal knows causal and sliding attention"
        )
    return local_size


def visible(start: int, end: int, first_key: int, width: int | None, device: torch.device) -> torch.Tensor:
    """Bool mask [end - start, end - first_key]: query position sees key positions (query - width, query]."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(first_key, end, device=device)[None, :]
    mask = keys <= queries
    return mask & (keys > queries - width) if width is not None else mask


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Softmax over the scores and one learned sink per head, whose share is then dropped (GPT-OSS).

    query [1, Hq, t, D], key and value [1, Hkv, n, D], mask [t, n], sinks [Hq]; returns [1, Hq, t, D].
    Rows go in blocks of SCORES_MAX scores, so that a long context costs time and not memory.
    """
    block = max(1, SCORES_MAX // (query.shape[1] * key.shape[2]))
    parts = [
        _block_with_sinks(
            query[:, :, at : at + block], key, value, None if mask is None else mask[at : at + block], scaling, sinks
        )
        for at in range(0, query.shape[2], block)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _block_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """The heads of a group share their keys: they are multiplied as more rows, so that no key is copied."""
    _, heads, rows, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(1, groups, heads // groups * rows, width)
    scores = (torch.matmul(grouped, key.transpose(2, 3)) * scaling).view(1, heads, rows, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    column = sinks.reshape(1, -1, 1, 1).expand(1, -1, rows, 1).to(scores.dtype)
    combined = torch.cat([scores, column], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    weights = functional.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
    out = torch.matmul(weights.reshape(1, groups, heads // groups * rows, -1), value)
    return out.view(1, heads, rows, -1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    scaling: float | None,
    width: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One session: query [1, Hq, t, D] at positions from `start`, context [1, Hkv, start + t, D]; [1, Hq, t, Dv]."""
    rows, end = query.shape[2], key.shape[2]
    first_key = 0
    if width is not None and end > width:
        first_key = max(0, start - width + 1)
        key, value = key[:, :, first_key:], value[:, :, first_key:]
    narrow = width if width is not None and end - first_key > width else None
    if rows == 1:
        mask, causal = None, False  # one query sees all that is left
    elif start == 0 and narrow is None:
        mask, causal = None, True
    else:
        mask, causal = visible(start, end, first_key, narrow, query.device), False
    if sinks is not None:
        mask = visible(start, end, first_key, narrow, query.device) if causal else mask
        return attend_with_sinks(query, key, value, mask, scaling or query.shape[-1] ** -0.5, sinks)
    return functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a packed batch: query [1, Hq, T, D] to [1, T, Hq, Dv].

    In a layer whose keys arrive as they left the cache, key and value are the new rows and contexts are read from the
    slabs; elsewhere (latents that were expanded) they are the packed contexts of all sessions.  attention_mask is what
    `window` gave for the layer.
    """
    unknown = [name for name, given in others.items() if given is not None and name not in IGNORED]
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} hands {unknown[0]} to attention; shoal does not know what it means"
        )
    cache: RaggedCache = module.shoal_cache
    layer: int = module.layer_idx
    cache.reached(layer, key)
    outputs, offset = [], 0
    for part in cache.slices:
        if layer in cache.direct:
            context_key, context_value = _held(part, layer)
        else:
            context_key, context_value = key[:, :, offset : offset + part.end], value[:, :, offset : offset + part.end]
            offset += part.end
        rows = query[:, :, part.first : part.last]
        outputs.append(attend(rows, context_key, context_value, part.start, scaling, attention_mask, s_aux))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return packed.transpose(1, 2).contiguous(), None


def _held(part: Slice, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = part.kv.keys[layer], part.kv.values[layer]
    return key[:, : part.end].unsqueeze(0), value[:, : part.end].unsqueeze(0)


AttentionInterface.register("shoal", attention)
AttentionMaskInterface.register("shoal", window)
