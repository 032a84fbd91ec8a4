"""Errors cross the wire as themselves; the table is PROTOCOL.md's."""

import errno
import re
from pathlib import Path
from urllib.parse import quote

import grpc
import pytest

from node import status
from protos.errors import (
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


def instance(kind: type[ShoalError]) -> ShoalError:
    return kind("what happened", held=3) if issubclass(kind, Gap) else kind("what happened")


class Call(grpc.RpcError, grpc.Call):
    """A failed call as a client sees it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()) -> None:
        self._answer = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._answer[2]

    initial_metadata = is_active = time_remaining = cancel = add_callback = None


def test_statuses_and_exit_codes_are_those_of_the_protocol() -> None:
    page = Path(__file__).parents[2].joinpath("protos", "PROTOCOL.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (\w+) \| \d+ \| (\d) \|", page, re.MULTILINE)
    assert {code for code, _, _ in rows} == set(by_code)
    for code, name, exit_code in rows:
        error = instance(by_code[code])
        assert status.status_of(error).name == name, code
        assert status.exit_code(error) == int(exit_code), code


@pytest.mark.parametrize("kind", [kind for kind in by_code.values() if not issubclass(kind, LocalError)])
def test_an_error_arrives_as_its_own_class(kind: type[ShoalError]) -> None:
    error = instance(kind)
    error.retry_after_s = 1.5
    call = Call(status.status_of(error), error.message, status.metadata_of(error))
    arrived = status.from_rpc(call, "here")
    assert (type(arrived), arrived.message, arrived.retry_after_s) == (kind, "what happened", 1.5)
    if isinstance(arrived, Gap):
        assert arrived.held == 3


@pytest.mark.parametrize("kind", [kind for kind in by_code.values() if issubclass(kind, LocalError)])
def test_another_processs_bug_is_not_ours(kind: type[ShoalError]) -> None:
    error = kind("broken")
    arrived = status.from_rpc(Call(grpc.StatusCode.INTERNAL, "broken", status.metadata_of(error)), "here")
    assert type(arrived) is RemoteError
    assert arrived.message == "broken"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable),
        (grpc.StatusCode.ABORTED, RemoteError),
        (grpc.StatusCode.INTERNAL, RemoteError),
    ],
)
def test_a_code_of_a_later_version_becomes_its_family(code: grpc.StatusCode, kind: type[ShoalError]) -> None:
    trailing = (("shoal-code", "invented_later"), ("shoal-retry-after-s", "2.500"))
    arrived = status.from_rpc(Call(code, "something new", trailing), "here")
    assert type(arrived) is kind
    assert (arrived.message, arrived.retry_after_s) == ("something new", 2.5)


def test_a_long_message_is_cut_by_who_sends_it_and_by_who_receives_it() -> None:
    assert status.details_of(InvalidRequest("x" * 2000)) == "x" * ERROR_MESSAGE_CHARS_MAX
    arrived = status.from_rpc(Call(grpc.StatusCode.INTERNAL, "x" * 2000, (("shoal-code", "gap"),)), "here")
    assert arrived.message == "x" * ERROR_MESSAGE_CHARS_MAX


@pytest.mark.parametrize("text", ["🙂" * 2000, "\ud800" * 2000, "é%\n" * 700])
def test_a_message_fits_the_trailers_however_it_is_encoded(text: str) -> None:
    details = status.details_of(InvalidRequest(text))
    assert details
    assert text.startswith(details)
    assert len(quote(details, errors="replace")) <= status.DETAILS_BYTES_MAX


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerLost),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.CANCELLED, Unavailable),
        (grpc.StatusCode.UNIMPLEMENTED, RemoteError),
        (grpc.StatusCode.UNKNOWN, RemoteError),
    ],
)
def test_what_grpc_says_by_itself_is_named_too(code: grpc.StatusCode, kind: type[ShoalError]) -> None:
    arrived = status.from_rpc(Call(code, "socket closed"), "127.0.0.1:1")
    assert type(arrived) is kind
    assert "127.0.0.1:1" in arrived.message
    assert "socket closed" in arrived.message


@pytest.mark.parametrize("said", ["soon", "", "nan", "inf", "-inf", "1e999", "-1"])
def test_metadata_that_is_no_number_is_ignored(said: str) -> None:
    trailing = (("shoal-code", "gap"), ("shoal-retry-after-s", said), ("shoal-held", said))
    error = status.from_rpc(Call(grpc.StatusCode.FAILED_PRECONDITION, "full", trailing), "here")
    assert isinstance(error, Gap)
    assert (error.held, error.retry_after_s) == (0, None)


def test_an_error_without_a_call_is_ours() -> None:
    assert isinstance(status.from_rpc(grpc.RpcError("odd"), "here"), LocalError)


def test_a_class_without_an_entry_has_its_parents_status() -> None:
    class Special(Overloaded):
        code = "special"

    assert status.status_of(Special("x")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status.status_of(ShoalError("x")) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), InvalidRequest, "a/b: Not a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), InvalidRequest, "a/b: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a"), InvalidRequest, "a: Read-only file system"),
        (OSError(errno.EIO, "Input/output error", "a"), Unavailable, "a: Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), Unavailable, "Too many open files"),
    ],
)
def test_what_the_system_refuses_is_the_callers_path_or_weather(
    error: OSError, kind: type[ShoalError], says: str
) -> None:
    found = status.from_system(error)
    assert type(found) is kind
    assert says in found.message


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ("Stream removed (recvmsg:Connection reset by peer (104))", "to h:1 broke .Connection reset by peer."),
        ("Socket closed", "to h:1 broke .it was closed."),
        ("last error: UNKNOWN: connect: Connection refused (111)", "no node answers at h:1 .Connection refused"),
    ],
)
def test_a_connection_that_broke_is_told_from_one_that_was_never_there(details: str, says: str) -> None:
    error = status._foreign(grpc.StatusCode.UNAVAILABLE, details, "h:1")
    assert isinstance(error, PeerLost)
    assert re.search(says, error.message), error.message
