import inspect

import pytest

from protos import errors
from protos.errors import Gap, LocalError, Overloaded, RemoteError, ShoalError, Unavailable, by_code


def all_errors() -> list[type[ShoalError]]:
    return [
        e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, ShoalError) and e is not ShoalError
    ]


def test_every_error_is_found_by_its_own_code():
    assert set(by_code.values()) == set(all_errors())
    assert all(by_code[error.code] is error and "code" in vars(error) for error in all_errors())


def test_every_error_is_of_exactly_one_family():
    for error in all_errors():
        assert sum(issubclass(error, family) for family in (LocalError, RemoteError, Unavailable)) == 1


def test_an_error_says_its_message_and_when_to_retry():
    error = Overloaded("the queue holds 64 requests; try again later", retry_after_s=1.5)
    assert str(error) == "the queue holds 64 requests; try again later"
    assert error.retry_after_s == 1.5


def test_a_gap_knows_what_is_held_and_says_what_to_do():
    assert Gap(held=7).held == 7
    assert "feed the log from 7" in str(Gap(held=7))
    assert str(Gap("own words", held=7)) == "own words"


def test_codes_are_never_changed():
    assert sorted(by_code) == [
        "broken_invariant", "context_too_long", "deadline_exceeded", "equivocation", "experts_unreachable", "fenced",
        "frame_too_large", "gap", "grant_expired", "grant_missing", "grant_revoked", "illegal_transition",
        "invalid_datagram", "invalid_frame", "invalid_grant", "invalid_manifest", "invalid_record", "invalid_request",
        "invalid_signature", "local_error", "non_finite", "out_of_memory", "overloaded", "peer_lost",
        "permission_denied", "port_in_use", "record_expired", "record_from_future", "record_rolled_back",
        "record_too_large", "remote_error", "shutting_down", "store_full", "unauthenticated", "unavailable",
        "unit_mismatch", "unit_missing", "unknown_session", "unsupported_model", "wrong_model", "wrong_network",
        "wrong_peer",
    ]  # fmt: skip


def test_errors_can_be_raised_from_one_another():
    with pytest.raises(Unavailable) as caught:
        raise Unavailable("no") from KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
