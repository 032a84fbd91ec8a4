"""KV state of sessions: whatever the cache seam receives, per session and layer.  A hard limit, and nothing is evicted.

Slabs are reserved for a session's last position when it opens, so an admitted answer never dies for want of KV; a
reserved page costs memory only once it is written. What is held ends at `held`: a step writes beyond it and moves it
when it has succeeded, which is all that atomicity and truncation need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.errors import BrokenInvariant, InvalidRequest, OutOfMemory, Overloaded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from protos.ids import SessionId

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class LayerKv:
    """What one layer caches for one position: key [heads, key_width], value [value_heads, value_width]."""

    heads: int
    width: int
    value_heads: int
    value_width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        values = self.heads * self.width + self.value_heads * self.value_width
        return values * self.dtype.itemsize


class SessionKv:
    """One session's slabs: per layer key [heads, positions, width] and value, of which `held` positions are valid."""

    __slots__ = ("held", "keys", "positions", "values")

    def __init__(self, layers: Mapping[int, LayerKv], positions: int, device: torch.device) -> None:
        self.positions = positions
        self.held = 0
        self.keys = {
            index: torch.empty((spec.heads, positions, spec.width), dtype=spec.dtype, device=device)
            for index, spec in layers.items()
        }
        self.values = {
            index: torch.empty((spec.value_heads, positions, spec.value_width), dtype=spec.dtype, device=device)
            for index, spec in layers.items()
        }

    def truncate(self, position: int) -> None:
        """Forgets all from `position` on.  Raises BrokenInvariant when less is held."""
        if not 0 <= position <= self.held:
            raise BrokenInvariant(f"cannot truncate KV to {position}: {self.held} positions are held")
        self.held = position

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes rows [heads, t, width] at `start`; they count once `held` passes them."""
        end = start + key.shape[1]
        self.keys[layer][:, start:end] = key
        self.values[layer][:, start:end] = value

    def export(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of key and value rows [start, end) of a layer, [heads, end - start, width]."""
        if not 0 <= start <= end <= self.held:
            raise InvalidRequest(f"KV rows {start} to {end} were asked for, {self.held} are held")
        return self.keys[layer][:, start:end].clone(), self.values[layer][:, start:end].clone()

    def restore(self, start: int, rows: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes exported rows of all layers at `start`, all or nothing; the rows before `start` must be held."""
        end = self._check_rows(start, rows)
        for layer, (key, value) in rows.items():
            self.write(layer, start, key, value)
        self.held = end

    def _check_rows(self, start: int, rows: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> int:
        if rows.keys() != self.keys.keys():
            raise InvalidRequest(f"KV for layers {sorted(rows)} was sent, this stage holds layers {sorted(self.keys)}")
        first = next(iter(rows.values()))[0]
        count = first.shape[1] if first.dim() == 3 else 0
        if not 0 <= start <= self.held or start + count > self.positions:
            raise InvalidRequest(
                f"KV rows {start} to {start + count} do not fit: {self.held} held, {self.positions} reserved"
            )
        for layer, (key, value) in rows.items():
            for name, sent, slab in (("key", key, self.keys[layer]), ("value", value, self.values[layer])):
                expected = (slab.shape[0], count, slab.shape[2])
                if tuple(sent.shape) != expected or sent.dtype != slab.dtype:
                    raise InvalidRequest(
                        f"KV {name} of layer {layer} is {sent.dtype} {tuple(sent.shape)}, expected {expected}"
                    )
        return start + count


class KvPool:
    """Reserves sessions' KV within `bytes_max`."""

    def __init__(self, layers: Mapping[int, LayerKv], bytes_max: int, device: torch.device) -> None:
        self.layers = dict(layers)
        self.bytes_max = bytes_max
        self.bytes_used = 0
        self.device = device
        self._sessions: dict[SessionId, SessionKv] = {}

    @property
    def bytes_per_position(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    def reserve(self, session: SessionId, positions: int) -> SessionKv:
        """Reserves `positions` for a new session.

        Raises Overloaded when the limit does not allow it now, InvalidRequest when it never will, and OutOfMemory when
        the limit would but the machine does not; then nothing is reserved.
        """
        if session in self._sessions:
            raise BrokenInvariant(f"session {session} has its KV already")
        needed = positions * self.bytes_per_position
        if needed > self.bytes_max:
            raise InvalidRequest(
                f"{positions} positions need {needed} bytes of KV, this node's limit is {self.bytes_max}"
            )
        if self.bytes_used + needed > self.bytes_max:
            raise Overloaded(
                f"KV is full: {positions} positions need {needed} bytes, {self.bytes_max - self.bytes_used} are free",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            kv = SessionKv(self.layers, positions, self.device)
        except RuntimeError as error:  # what torch raises when an allocation fails, on any device
            raise OutOfMemory(
                f"{positions} positions need {needed} bytes of KV, which {self.device} does not have: lower kv_limit"
            ) from error
        self._sessions[session] = kv
        self.bytes_used += needed
        return kv

    def release(self, session: SessionId) -> None:
        """Frees a session's KV; unknown sessions are ignored, so that a close may be repeated."""
        kv = self._sessions.pop(session, None)
        if kv is not None:
            self.bytes_used -= kv.positions * self.bytes_per_position


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows [first, last) of a packed batch: new positions [start, start + last - first) of one session."""

    kv: SessionKv
    start: int
    first: int
    last: int

    @property
    def end(self) -> int:
        return self.start + self.last - self.first


class RaggedCache:
    """What transformers' attention sees as `past_key_values`: the contexts of all sessions of one batch, packed.

    Layers in `direct` hand update()'s result to the attention function untouched; for these it returns the new rows,
    and the attention function reads each session's slabs itself, so that no context is copied.
    """

    is_compileable = False

    def __init__(self, slices: Sequence[Slice], direct: frozenset[int]) -> None:
        self.slices = slices
        self.direct = direct

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def reached(self, layer: int, key: torch.Tensor) -> None:
        """Told by attention which keys it was given; only a probe listens."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes key and value [1, heads, T, width] of the new rows, gives the packed contexts [1, heads, N, width]."""
        for part in self.slices:
            part.kv.write(layer_idx, part.start, key[0, :, part.first : part.last], value[0, :, part.first : part.last])
        if layer_idx in self.direct:
            return key, value
        return self._packed([p.kv.keys[layer_idx] for p in self.slices]), self._packed(
            [p.kv.values[layer_idx] for p in self.slices]
        )

    def _packed(self, slabs: list[torch.Tensor]) -> torch.Tensor:
        contexts = [slab[:, : part.end] for slab, part in zip(slabs, self.slices, strict=True)]
        packed = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=1)
        return packed.unsqueeze(0)
