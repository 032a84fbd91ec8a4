"""Errors to and from gRPC status and exit codes: the one table.  (In a stream they travel as protos.messages.failed.)

Law: an error crosses the wire by its `code`; whoever receives it raises the same class, except that another process's
bug is not ours.  A code that this version does not know becomes a family, by the gRPC status beside it.  PROTOCOL.md,
section 11.
"""

from __future__ import annotations

import errno
import math
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

import grpc

from protos.errors import (
    DeadlineExceeded,
    Gap,
    InvalidRequest,
    LocalError,
    Overloaded,
    PeerLost,
    RemoteError,
    ShoalError,
    Unavailable,
    by_code,
)
from protos.limits import ERROR_MESSAGE_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable

CODE_KEY = "shoal-code"
RETRY_AFTER_KEY = "shoal-retry-after-s"
HELD_KEY = "shoal-held"

# Of a status message as it is encoded in a trailer, where other trailers need room too.
DETAILS_BYTES_MAX = 4096

EXIT_OK = 0
EXIT_LOCAL = 1
EXIT_REMOTE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

# A class that is not listed has its parent's status.
STATUS: dict[str, grpc.StatusCode] = {
    "local_error": grpc.StatusCode.INTERNAL,
    "remote_error": grpc.StatusCode.INVALID_ARGUMENT,
    "wrong_model": grpc.StatusCode.NOT_FOUND,
    "unit_mismatch": grpc.StatusCode.DATA_LOSS,
    "unsupported_model": grpc.StatusCode.UNIMPLEMENTED,
    "context_too_long": grpc.StatusCode.OUT_OF_RANGE,
    "unknown_session": grpc.StatusCode.NOT_FOUND,
    "fenced": grpc.StatusCode.ABORTED,
    "gap": grpc.StatusCode.FAILED_PRECONDITION,
    "non_finite": grpc.StatusCode.DATA_LOSS,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "permission_denied": grpc.StatusCode.PERMISSION_DENIED,
    "invalid_signature": grpc.StatusCode.UNAUTHENTICATED,
    "grant_missing": grpc.StatusCode.PERMISSION_DENIED,
    "grant_expired": grpc.StatusCode.PERMISSION_DENIED,
    "grant_revoked": grpc.StatusCode.PERMISSION_DENIED,
    "wrong_peer": grpc.StatusCode.FAILED_PRECONDITION,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "out_of_memory": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "store_full": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
}

# Beside a code that this version does not know, these say that another time or node may do.
_WEATHER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)

# What is wrong with a path, until somebody changes it or names another.
_PATHS = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

# What gRPC says of a connection that it had: `Stream removed (recvmsg:Connection reset by peer (104))`.
_BROKE = re.compile(r"(?:recvmsg|sendmsg|Socket closed)[: ]*([^()\]]*)")

# What gRPC itself says, when no code of ours came with it.
_FOREIGN: dict[grpc.StatusCode, type[ShoalError]] = {
    grpc.StatusCode.UNAVAILABLE: PeerLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.INVALID_ARGUMENT: RemoteError,
    grpc.StatusCode.NOT_FOUND: RemoteError,
    grpc.StatusCode.UNIMPLEMENTED: RemoteError,
    grpc.StatusCode.OUT_OF_RANGE: RemoteError,
    grpc.StatusCode.FAILED_PRECONDITION: RemoteError,
    grpc.StatusCode.PERMISSION_DENIED: RemoteError,
    grpc.StatusCode.UNAUTHENTICATED: RemoteError,
    grpc.StatusCode.DATA_LOSS: RemoteError,
}


def status_of(error: ShoalError) -> grpc.StatusCode:
    """The gRPC status of an error: its own, or its nearest parent's."""
    for ancestor in type(error).__mro__:
        if issubclass(ancestor, ShoalError) and ancestor is not ShoalError and ancestor.code in STATUS:
            return STATUS[ancestor.code]
    return grpc.StatusCode.INTERNAL


def exit_code(error: ShoalError) -> int:
    """What a command that ended with this error gives to the shell."""
    if isinstance(error, RemoteError):
        return EXIT_REMOTE
    return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_LOCAL


def from_system(error: OSError) -> ShoalError:
    """The error behind a failed call to the system: a path that cannot be used is the caller's, the rest is weather."""
    where = f"{error.filename}: " if error.filename is not None else ""
    said = f"{where}{error.strerror or error}"
    if error.errno in _PATHS:
        return InvalidRequest(f"{said}; name another path, or make this one usable")
    return Unavailable(f"the system refused: {said}; try again later")


def metadata_of(error: ShoalError) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that carries what a status cannot."""
    pairs = [(CODE_KEY, error.code)]
    if error.retry_after_s is not None:
        pairs.append((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"))
    if isinstance(error, Gap):
        pairs.append((HELD_KEY, str(error.held)))
    return tuple(pairs)


def details_of(error: ShoalError) -> str:
    """The message as a status carries it: gRPC percent-encodes it, and receivers take 8 KiB of trailers in all."""
    text = error.message[:ERROR_MESSAGE_CHARS_MAX]
    while len(quote(text, errors="replace")) > DETAILS_BYTES_MAX:
        text = text[: len(text) * 3 // 4]
    return text


def from_rpc(error: grpc.RpcError, address: str) -> ShoalError:
    """The error behind a failed call to `address`."""
    if not isinstance(error, grpc.Call):
        return LocalError(f"the call to {address} failed: {error}")
    sent = _texts(error.trailing_metadata() or ())
    details = (error.details() or "")[:ERROR_MESSAGE_CHARS_MAX]
    if CODE_KEY not in sent:
        return _foreign(error.code(), details, address)
    kind = _received(sent[CODE_KEY], error.code())
    return _build(kind, details, _number(sent.get(RETRY_AFTER_KEY)), int(_number(sent.get(HELD_KEY)) or 0))


def _received(code: str, status: grpc.StatusCode) -> type[ShoalError]:
    kind = by_code.get(code)
    if kind is None:
        return Unavailable if status in _WEATHER else RemoteError
    return RemoteError if issubclass(kind, LocalError) else kind


def _foreign(status: grpc.StatusCode, details: str, address: str) -> ShoalError:
    kind = _FOREIGN.get(status, RemoteError)
    if kind is PeerLost:
        if broke := _BROKE.search(details):
            return PeerLost(f"the connection to {address} broke ({broke[1].strip() or 'it was closed'})")
        return PeerLost(
            f"no node answers at {address} ({_reason(details)}): is one running there, and is the address right?"
        )
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return RemoteError(f"what answers at {address} is no shoal node, or an older one ({details})")
    if kind is Overloaded:
        return Overloaded(f"the node at {address} takes no more calls now: {details}", retry_after_s=1.0)
    return kind(f"the call to {address} failed ({status.name}): {details}")


def _reason(details: str) -> str:
    """The end of gRPC's chain of causes, which is the system's own word."""
    return details.rpartition(": ")[2].strip(" ]") or "no reason given"


def _build(kind: type[ShoalError], message: str, retry_after_s: float | None, held: int) -> ShoalError:
    if issubclass(kind, Gap):
        return kind(message, held=held, retry_after_s=retry_after_s)
    return kind(message, retry_after_s=retry_after_s)


def _texts(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}


def _number(text: str | None) -> float | None:
    """Another node's word: nothing where it is no number, or none that makes sense."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
