"""Everything that can go wrong, in three families by what the caller does next.

Law: `code` is part of the protocol and never changes; the message is for people and says what happened, to what, and
what to do. The mapping to gRPC status, HTTP and exit codes is in PROTOCOL.md, section 11.
"""

# ruff: noqa: N818 - the names are the protocol's words (a Gap, a Fenced door); "Error" would be said thirty times.

from typing import ClassVar


class ShoalError(Exception):
    """A failure that has a name. `retry_after_s`: when trying again may help, in seconds; None: unknown or never."""

    code: ClassVar[str]

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class LocalError(ShoalError):
    """Our bug: crash loudly."""

    code = "local_error"


class RemoteError(ShoalError):
    """Their fault (a client's, a file's, a peer's): refuse, and never retry the same there."""

    code = "remote_error"


class Unavailable(ShoalError):
    """Weather: the same may work elsewhere, or here after `retry_after_s`."""

    code = "unavailable"


class IllegalTransition(LocalError):
    """An event that the state it met does not allow; the state is unchanged."""

    code = "illegal_transition"


class BrokenInvariant(LocalError):
    """Something that the code relies on does not hold."""

    code = "broken_invariant"


class InvalidRequest(RemoteError):
    """A field is missing, out of its range, or contradicts another."""

    code = "invalid_request"


class InvalidFrame(RemoteError):
    """Bytes that are no tensor frame, or not one of the shape and dtype that belong here."""

    code = "invalid_frame"


class FrameTooLarge(InvalidFrame):
    """A frame, or what its header announces, above the receiver's limit."""

    code = "frame_too_large"


class InvalidManifest(RemoteError):
    """Bytes that are no canonical manifest, or one that contradicts itself."""

    code = "invalid_manifest"


class WrongModel(RemoteError):
    """The request names another model than this node serves."""

    code = "wrong_model"


class UnitMismatch(RemoteError):
    """A unit's bytes differ from its manifest's."""

    code = "unit_mismatch"


class UnsupportedModel(RemoteError):
    """A checkpoint that shoal cannot answer exactly."""

    code = "unsupported_model"


class ContextTooLong(RemoteError):
    """Prompt and max_tokens exceed the model's positions."""

    code = "context_too_long"


class UnknownSession(RemoteError):
    """No such session here: never opened, closed, or lost in a restart."""

    code = "unknown_session"


class Fenced(RemoteError):
    """The epoch is lower than the session's: another door has taken over. The fenced door ends its session."""

    code = "fenced"


class Gap(RemoteError):
    """A step starts beyond the positions that the stage holds; the door feeds again from `held`."""

    code = "gap"

    def __init__(self, message: str | None = None, *, held: int, retry_after_s: float | None = None) -> None:
        super().__init__(
            message or f"the stage holds {held} positions, fewer than the step's start; feed the log from {held}",
            retry_after_s=retry_after_s,
        )
        self.held = held


class NonFinite(RemoteError):
    """A peer's or a model's numbers contain NaN or infinity."""

    code = "non_finite"


class Unauthenticated(RemoteError):
    """A call without a token that is in force: say Hello first, or again."""

    code = "unauthenticated"


class PermissionDenied(RemoteError):
    """Who calls is known, and may not do this."""

    code = "permission_denied"


class InvalidSignature(RemoteError):
    """A record or a Hello whose signature does not fit its key, its domain, or this connection."""

    code = "invalid_signature"


class InvalidRecord(RemoteError):
    """A node's record that contradicts itself, is too old or too new, or speaks for another."""

    code = "invalid_record"


class RecordTooLarge(InvalidRecord):
    """A record above the receiver's limit of bytes; nothing of it was read."""

    code = "record_too_large"


class WrongNetwork(InvalidRecord):
    """A record, or another signed message, of another network than the receiver's."""

    code = "wrong_network"


class RecordExpired(InvalidRecord):
    """A record whose time is over."""

    code = "record_expired"


class RecordFromFuture(InvalidRecord):
    """A record that was issued later than the receiver's clock and the allowed difference say."""

    code = "record_from_future"


class RecordRolledBack(InvalidRecord):
    """A record that is older than one that its node has signed since, and that is in force no more."""

    code = "record_rolled_back"


class Equivocation(InvalidRecord):
    """Two different things with one sequence or version, both signed by the same key; the first one stays."""

    code = "equivocation"


class InvalidGrant(InvalidRecord):
    """What an operator signed is malformed, contradicts itself, or is not for the one who shows it."""

    code = "invalid_grant"


class GrantMissing(InvalidGrant):
    """A record without a grant, in a network that wants one."""

    code = "grant_missing"


class GrantExpired(InvalidGrant):
    """A grant whose time is over: the operator must give another."""

    code = "grant_expired"


class GrantRevoked(InvalidGrant):
    """A grant that the operator took back."""

    code = "grant_revoked"


class InvalidDatagram(RemoteError):
    """Bytes that are no datagram of gossip, or one that contradicts itself."""

    code = "invalid_datagram"


class WrongPeer(RemoteError):
    """Another node, or another certificate, than the address or the record says."""

    code = "wrong_peer"


class Overloaded(Unavailable):
    """A queue, a quota or the KV memory is full."""

    code = "overloaded"


class OutOfMemory(Unavailable):
    """The machine does not have the memory that its limits allow; the message says how much was needed."""

    code = "out_of_memory"


class StoreFull(Unavailable):
    """No room on the disk of the store; nothing half-written remains."""

    code = "store_full"


class UnitMissing(Unavailable):
    """A unit that is not in this store."""

    code = "unit_missing"


class PortInUse(Unavailable):
    """Another process listens on the address."""

    code = "port_in_use"


class PeerLost(Unavailable):
    """A peer that this needs cannot be reached, or left in the middle."""

    code = "peer_lost"


class ExpertsUnreachable(Unavailable):
    """Experts that a step needs, and no replica of them answers now."""

    code = "experts_unreachable"


class DeadlineExceeded(Unavailable):
    """The time for this ran out."""

    code = "deadline_exceeded"


class ShuttingDown(Unavailable):
    """The node is leaving and takes nothing new."""

    code = "shutting_down"


by_code: dict[str, type[ShoalError]] = {
    error.code: error
    for error in (
        LocalError,
        IllegalTransition,
        BrokenInvariant,
        RemoteError,
        InvalidRequest,
        InvalidFrame,
        FrameTooLarge,
        InvalidManifest,
        WrongModel,
        UnitMismatch,
        UnsupportedModel,
        ContextTooLong,
        UnknownSession,
        Fenced,
        Gap,
        NonFinite,
        Unauthenticated,
        PermissionDenied,
        InvalidSignature,
        InvalidRecord,
        RecordTooLarge,
        WrongNetwork,
        RecordExpired,
        RecordFromFuture,
        RecordRolledBack,
        Equivocation,
        InvalidGrant,
        GrantMissing,
        GrantExpired,
        GrantRevoked,
        InvalidDatagram,
        WrongPeer,
        Unavailable,
        Overloaded,
        OutOfMemory,
        StoreFull,
        UnitMissing,
        PortInUse,
        PeerLost,
        ExpertsUnreachable,
        DeadlineExceeded,
        ShuttingDown,
    )
}
"""The class behind a code that came over the wire."""
