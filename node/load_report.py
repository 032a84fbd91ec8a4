"""LoadReport: how busy a node says that it is.  PROTOCOL.md, section 14.

Pure: bytes in, verified state out; the clock is an argument.  Law: it holds for seconds from its arrival, is never
stored, and a later one is never replaced by an earlier one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from google.protobuf.message import DecodeError

from node.identity import peer_id, verify
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    LOAD_BYTES_MAX,
    LOAD_HOTTEST_MAX,
    LOAD_S_MAX,
    PUBLIC_KEY_BYTES,
    RECORDS_MAX,
    SIGNATURE_BYTES,
)
from protos.transcript import LOAD_DOMAIN

if TYPE_CHECKING:
    from node.identity import Identity
    from node.network import Network
    from protos.ids import PeerId

_MODEL_BYTES = 32


@dataclass(frozen=True, slots=True)
class Hot:
    """An expert, and how many rows a second it gets."""

    layer: int
    expert: int
    rows_per_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """`time_ms`: since 1970.  `model_id`: whose experts `hottest` names; empty: nobody's."""

    network: bytes
    public_key: bytes
    time_ms: int
    queue: int = 0
    kv_bytes_free: int = 0
    tokens_per_s: float = 0.0
    model_id: str = ""
    hottest: tuple[Hot, ...] = ()

    @property
    def peer(self) -> PeerId:
        return peer_id(self.public_key)


def sign(report: LoadReport, identity: Identity) -> bytes:
    """The bytes of a SignedLoad."""
    content = pb.LoadReport(
        network=report.network,
        public_key=report.public_key,
        time_ms=report.time_ms,
        queue=report.queue,
        kv_bytes_free=report.kv_bytes_free,
        tokens_per_s=report.tokens_per_s,
        model=bytes.fromhex(report.model_id),
        hottest=[pb.HotExpert(layer=hot.layer, expert=hot.expert, rows_per_s=hot.rows_per_s) for hot in report.hottest],
    ).SerializeToString(deterministic=True)
    signed = pb.SignedLoad(report=content, signature=identity.sign(LOAD_DOMAIN, content))
    return signed.SerializeToString(deterministic=True)


def read(data: bytes, network: Network, now: float) -> LoadReport:
    """Checked in this order: size; protobuf; lengths of key and signature; network; signature; time; fields.

    Raises InvalidRequest, WrongNetwork, InvalidSignature.
    """
    if len(data) > LOAD_BYTES_MAX:
        _refuse(f"it has {len(data)} bytes; at most {LOAD_BYTES_MAX} are allowed")
    try:
        signed = pb.SignedLoad.FromString(data)
        message = pb.LoadReport.FromString(signed.report)
    except DecodeError:
        _refuse("it is none")
    if len(message.public_key) != PUBLIC_KEY_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        _refuse("its key or its signature has not the length of one")
    network.check(message.network, "a load report")
    verify(message.public_key, signed.signature, LOAD_DOMAIN, signed.report)
    if abs(message.time_ms / 1000 - now) > CLOCK_DIFFERENCE_S_MAX:
        _refuse(f"it was made {message.time_ms / 1000 - now:.0f} s from now: a clock is wrong, or it is an old one")
    return _checked(message)


@dataclass(frozen=True, slots=True)
class _Arrived:
    at: float
    report: LoadReport
    sha256: bytes


class LoadReports:
    """The newest of each peer, for LOAD_S_MAX.  Times are kept longer, so that none is replayed."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._newest: dict[PeerId, _Arrived] = {}  # the oldest first
        self._known: set[bytes] = set()  # their sha256: what comes again is not verified again

    def merge(self, data: bytes, wall: float, now: float) -> LoadReport | None:
        """Takes one in.  None: one as new is known.  Raises as `read`; then nothing has changed.

        `wall`: seconds since 1970, which its time is held against; `now`: monotonic, of which its age is counted.
        """
        sha256 = hashlib.sha256(data).digest()
        if sha256 in self._known:
            return None
        report = read(data, self._network, wall)
        peer = report.peer
        known = self._newest.get(peer)
        if known is not None and report.time_ms <= known.report.time_ms:
            return None
        self.forget(peer)
        self._newest[peer] = _Arrived(now, report, sha256)
        self._known.add(sha256)
        if len(self._newest) > RECORDS_MAX:
            self.forget(next(iter(self._newest)))
        return report

    def get(self, peer: PeerId, now: float) -> LoadReport | None:
        """None: it said nothing lately.  `now`: as in `merge`."""
        newest = self._newest.get(peer)
        return newest.report if newest is not None and now - newest.at < LOAD_S_MAX else None

    def forget(self, peer: PeerId) -> None:
        gone = self._newest.pop(peer, None)
        if gone is not None:
            self._known.discard(gone.sha256)


def _checked(message: pb.LoadReport) -> LoadReport:
    if len(message.hottest) > LOAD_HOTTEST_MAX or len(message.model) not in (0, _MODEL_BYTES):
        _refuse(f"it names more than {LOAD_HOTTEST_MAX} experts, or a model by what is no model id")
    hottest = tuple(Hot(hot.layer, hot.expert, hot.rows_per_s) for hot in message.hottest)
    if any(hot.layer >= LAYERS_MAX or hot.expert >= EXPERTS_MAX for hot in hottest) or (hottest and not message.model):
        _refuse("it names experts that cannot be")
    figures = (message.tokens_per_s, *(hot.rows_per_s for hot in hottest))
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
        _refuse("a figure in it is negative, or none")
    return LoadReport(
        network=message.network,
        public_key=message.public_key,
        time_ms=message.time_ms,
        queue=message.queue,
        kv_bytes_free=message.kv_bytes_free,
        tokens_per_s=message.tokens_per_s,
        model_id=message.model.hex(),
        hottest=hottest,
    )


def _refuse(why: str) -> NoReturn:
    raise InvalidRequest(f"a load report is refused: {why}")
