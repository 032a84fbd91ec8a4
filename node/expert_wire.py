"""Expert calls between shard's parts and the messages of expert.proto (PROTOCOL.md, section 10).

Pure.  Law: what another node sent is checked whole before anything is allocated for it or computed with it; a message
of ours stays within the frame's limit, either way.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from protos import expert_pb2 as pb
from protos import frame, messages, units
from protos.errors import FrameTooLarge, InvalidFrame, InvalidRequest, NonFinite, UnitMissing, WrongModel
from protos.limits import FRAME_BYTES_MAX, FRAME_HEADER_BYTES_MAX, PAIRS_MAX
from shard.experts import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from protos.manifest import Manifest
    from shard.experts import ExpertBank, Pairs

_BITS: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.int16),
}
_BFLOAT16_EXPONENT: Final = np.int16(0x7F80)


def raw(rows: torch.Tensor) -> npt.NDArray[np.generic]:
    """The bits of rows [n, H], from whatever device; on a CPU they are not copied.  bfloat16 comes as int16."""
    bits = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
    array: npt.NDArray[np.generic] = np.ascontiguousarray((bits if bits.is_cpu else bits.cpu()).numpy())
    return array


def _is_finite(rows: npt.NDArray[np.generic]) -> bool:
    """Of bits as `raw` gives them: an exponent of ones is NaN or infinity."""
    if rows.dtype == np.int16:
        exponents = np.bitwise_and(rows.view(np.int16), _BFLOAT16_EXPONENT)
        return not bool((exponents == _BFLOAT16_EXPONENT).any())
    return bool(np.isfinite(rows).all())


class ExpertWire:
    """The calls of one model."""

    def __init__(self, manifest: Manifest, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        """`frame_bytes_max` is for tests, which would else need much memory to reach it."""
        self._model_id, self._dtype, self._hidden = manifest.model_id, manifest.dtype, manifest.hidden
        self._row_bytes = manifest.hidden * frame.ITEM_BYTES[manifest.dtype]
        self._frame_bytes_max = frame_bytes_max
        self._pairs_max = min(PAIRS_MAX, (frame_bytes_max - FRAME_HEADER_BYTES_MAX) // self._row_bytes)
        self._hashes = [
            [manifest.unit(units.expert(layer, expert)).sha256 for expert in range(count)]
            for layer, count in enumerate(manifest.experts)
        ]
        # Experts with equal weights are one unit.
        self._experts: list[dict[str, list[int]]] = [{} for _ in self._hashes]
        for known, hashes in zip(self._experts, self._hashes, strict=True):
            for expert, sha256 in enumerate(hashes):
                known.setdefault(sha256, []).append(expert)

    def split(self, pairs: Pairs, experts: Sequence[int]) -> Iterator[list[int]]:
        """The experts in calls whose frames, either way, stay within the limit."""
        call: list[int] = []
        room = self._pairs_max
        for expert in experts:
            count = pairs.count(expert)
            if call and count > room:
                yield call
                call, room = [], self._pairs_max
            call.append(expert)
            room -= count
        if call:
            yield call

    def request(
        self, call: int, layer: int, rows: npt.NDArray[np.generic], part: Part, wait_s: float
    ) -> pb.ComputeRequest:
        """The call for a part of a layer; `rows` are all rows that enter the layer, as `raw` gives them."""
        wanted, pair_rows = np.unique(part.rows, return_inverse=True) if len(rows) > 1 else (part.rows[:1], part.rows)
        sent = rows if len(wanted) == len(rows) else rows[wanted]
        numbers: dict[str, int] = {}
        hashes = self._hashes[layer]
        pair_experts: list[int] = []
        for expert, count in zip(part.experts, part.counts, strict=True):
            pair_experts += [numbers.setdefault(hashes[expert], len(numbers))] * count
        return pb.ComputeRequest(
            call=call,
            model_id=self._model_id,
            layer=layer,
            unit_hashes=numbers,
            rows=frame.encode(self._dtype, sent.shape, sent.data),
            pair_rows=pair_rows.tolist(),
            pair_experts=pair_experts,
            wait_ms_max=max(1, int(wait_s * 1000)),
        )

    def replies(self, message: bytes, count: int, *, finite: bool = True) -> torch.Tensor:
        """The reply to a call of `count` pairs, [count, H] on the CPU.  Raises InvalidFrame or NonFinite."""
        rows = self._array(message)
        if rows.shape[0] != count:
            raise InvalidFrame(f"a reply of {rows.shape[0]} rows to {count} pairs")
        if finite and not _is_finite(rows):
            raise NonFinite(f"a reply of {count} rows holds NaN or infinity")
        return self._tensor(rows)

    def read(self, request: pb.ComputeRequest, bank: ExpertBank) -> tuple[torch.Tensor, Part]:
        """Rows, and what is to be computed with them.  Raises WrongModel, InvalidRequest, InvalidFrame, UnitMissing."""
        messages.check_compute(request)
        if request.model_id != self._model_id:
            raise WrongModel(f"this node serves experts of model {self._model_id[:12]}, not {request.model_id[:12]}")
        if request.layer >= len(self._hashes):
            raise InvalidRequest(f"layer {request.layer} of a model with {len(self._hashes)}")
        if len(request.pair_rows) > self._pairs_max:
            raise FrameTooLarge(
                f"the reply to {len(request.pair_rows)} pairs exceeds a frame; at most {self._pairs_max}"
            )
        hidden = self._tensor(self._array(request.rows))
        rows = np.array(request.pair_rows[:], dtype=np.int64)
        if rows.max() >= hidden.shape[0]:
            raise InvalidRequest(f"pair_rows points beyond the {hidden.shape[0]} rows of the call")
        experts = [self._held(request.layer, sha256, bank) for sha256 in request.unit_hashes]
        chosen = request.pair_experts[:]
        if chosen == sorted(chosen):  # as our own requests are
            pairs, groups = np.arange(len(chosen)), Counter(chosen)
            return hidden, Part(experts, [groups[number] for number in range(len(experts))], pairs, rows)
        numbers = np.array(chosen, dtype=np.int64)
        order = numbers.argsort(kind="stable")
        return hidden, Part(experts, np.bincount(numbers, minlength=len(experts)).tolist(), order, rows[order])

    def reply(self, call: int, part: Part, rows: torch.Tensor) -> pb.ComputeReply:
        """`rows` [n, H] are in the part's order, and go back in the request's."""
        there = raw(rows)
        pairs = part.pairs
        if not bool((pairs[:-1] < pairs[1:]).all()):
            ordered = np.empty_like(there)
            ordered[pairs] = there
            there = ordered
        return pb.ComputeReply(call=call, rows=frame.encode(self._dtype, there.shape, there.data))

    def _held(self, layer: int, sha256: str, bank: ExpertBank) -> int:
        for expert in self._experts[layer].get(sha256, ()):
            if bank.holds(layer, expert):
                return expert
        raise UnitMissing(f"unit {sha256[:12]} of layer {layer} is not held here")

    def _array(self, data: bytes) -> npt.NDArray[np.generic]:
        """Rows [n, H] as bits, not copied."""
        found = frame.decode(data, bytes_max=self._frame_bytes_max, rank_max=2)
        if found.dtype != self._dtype or len(found.shape) != 2 or found.shape[1] != self._hidden or not found.shape[0]:
            raise InvalidFrame(f"rows are {found.dtype} {found.shape}; expected {self._dtype} (rows, {self._hidden})")
        return np.frombuffer(found.data, dtype=_BITS[self._dtype]).reshape(found.shape)

    def _tensor(self, rows: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy, since torch takes no memory that may not be written to."""
        tensor = torch.from_numpy(rows.copy())
        return tensor.view(torch.bfloat16) if self._dtype == "bfloat16" else tensor
