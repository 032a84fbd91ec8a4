"""What a node does to its callers' experts on order: dies, freezes, answers garbage, or never.  Runs inside the node.

Law: a deed happens while a call of the phase that was ordered is in the node's hands, so the node was in use then;
what was done stands in the file `done`, one line each, before it happens.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protos import expert_pb2 as pb
from protos import frame
from protos.limits import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

What = Literal["kill", "freeze", "shape", "dtype", "nan", "bytes", "silence", "nothing"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Deed:
    """`after`: so many calls of the phase (prefill: more than one row) are served well before.

    `claim`: a file that does not exist; of several nodes with this order, the one that makes it does the deed.
    """

    what: What
    phase: Phase
    after: int = 0
    claim: str = ""


def order(folder: Path, deed: Deed) -> None:
    """From the test: takes effect with the node's next call of an expert."""
    partial = folder / "order.partial"
    partial.write_text(json.dumps(asdict(deed)))
    partial.replace(folder / "order")


def withdraw(folder: Path) -> None:
    """From the test: the node answers well again."""
    (folder / "order").unlink(missing_ok=True)


def done(folder: Path) -> list[str]:
    """From the test: what the node did, oldest first."""
    path = folder / "done"
    return path.read_text().splitlines() if path.exists() else []


def install(folder: str) -> None:
    """From the node, before it starts: every stream of expert calls goes through here."""
    from node.expert_service import ExpertService

    doer = _Doer(Path(folder))
    honest = ExpertService.compute

    def compute(self: Any, requests: Iterable[pb.ComputeRequest], context: Any) -> Iterator[pb.ComputeReply]:
        return doer.spoiled(honest(self, doer.watched(requests), context))

    ExpertService.compute = compute  # type: ignore[method-assign]


class _Doer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = 0.0
        self._deed: Deed | None = None
        self._seen = 0
        self._at_it = False

    def watched(self, requests: Iterable[pb.ComputeRequest]) -> Iterator[pb.ComputeRequest]:
        for request in requests:
            self._look(request)
            yield request

    def spoiled(self, replies: Iterable[pb.ComputeReply]) -> Iterator[pb.ComputeReply]:
        for reply in replies:
            if not self._at_it or self._deed is None or not reply.HasField("rows"):
                yield reply
            elif self._deed.what != "silence":
                yield _garbage(reply, self._deed.what)

    def _look(self, request: pb.ComputeRequest) -> None:
        self._reread()
        deed = self._deed
        if deed is None or deed.phase != _phase(request):
            return
        self._seen += 1
        if self._seen <= deed.after or self._at_it:
            return
        if not _claimed(deed):
            self._deed = None
            return
        self._at_it = True
        with (self._folder / "done").open("a") as file:
            file.write(f"{deed.what} at call {self._seen} of {deed.phase}, layer {request.layer}\n")
        if deed.what in ("kill", "freeze"):
            os.kill(os.getpid(), signal.SIGKILL if deed.what == "kill" else signal.SIGSTOP)
            self._at_it, self._deed = False, None  # frozen once, and thawed

    def _reread(self) -> None:
        try:
            written = (self._folder / "order").stat().st_mtime_ns
        except FileNotFoundError:
            self._read, self._deed, self._at_it = 0.0, None, False
            return
        if written != self._read:
            self._read, self._seen, self._at_it = written, 0, False
            self._deed = Deed(**json.loads((self._folder / "order").read_text()))


def _claimed(deed: Deed) -> bool:
    try:
        if deed.claim:
            Path(deed.claim).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _phase(request: pb.ComputeRequest) -> Phase:
    rows = frame.decode(request.rows, bytes_max=FRAME_BYTES_MAX).shape[0]
    return "prefill" if rows > 1 else "decode"


def _garbage(reply: pb.ComputeReply, what: What) -> pb.ComputeReply:
    rows = frame.decode(reply.rows, bytes_max=FRAME_BYTES_MAX)
    data = bytes(rows.data)
    pairs, hidden = rows.shape
    match what:
        case "shape":
            reply.rows = frame.encode(rows.dtype, (pairs, hidden - 1), data[: pairs * (hidden - 1) * 4])
        case "dtype":
            reply.rows = frame.encode("bfloat16", (pairs, hidden), data[: pairs * hidden * 2])
        case "nan":
            reply.rows = frame.encode(rows.dtype, rows.shape, b"\xff" * len(data))
        case "bytes":
            reply.rows = b"no frame at all"
    return reply
