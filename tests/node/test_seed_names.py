"""A name with several addresses, with none, and a resolver that does not answer."""

from __future__ import annotations

import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from node import seeds
from node.contacts import SEED_ADDRESSES_MAX
from node.identity import peer_id
from protos.errors import DeadlineExceeded, PeerLost

if TYPE_CHECKING:
    from collections.abc import Callable

ANNA = peer_id(bytes(32))


def _patch(patch: pytest.MonkeyPatch, answer: Callable[[], list[str]]) -> list[str]:
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answer()]

    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def resolve(seed: str) -> list[str]:
    return trio.run(partial(seeds.resolve, seed))


def test_a_name_with_several_addresses_gives_each_once_with_port_and_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _patch(monkeypatch, lambda: ["10.0.0.1", "fd00::1", "10.0.0.1"])
    assert sorted(resolve(f"shoal.example:7645#{ANNA}")) == [f"10.0.0.1:7645#{ANNA}", f"[fd00::1]:7645#{ANNA}"]
    assert sorted(resolve("shoal.example:7645")) == ["10.0.0.1:7645", "[fd00::1]:7645"]
    assert asked == ["shoal.example"] * 2  # anew each time


def test_its_addresses_are_bounded_and_not_always_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    _patch(monkeypatch, lambda: [f"10.0.0.{n}" for n in range(1, 101)])
    found = [tuple(resolve("shoal.example:1")) for _ in range(5)]
    assert {len(each) for each in found} == {SEED_ADDRESSES_MAX}
    assert len(set(found)) > 1


@pytest.mark.parametrize("error", [socket.gaierror(-2, "unknown"), UnicodeError("label too long"), OSError("broken")])
def test_a_name_that_cannot_be_looked_up_says_which(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> list[str]:
        raise error

    _patch(monkeypatch, fail)
    with pytest.raises(PeerLost, match=r"shoal\.example"):
        resolve("shoal.example:1")


def test_a_resolver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()

    def wait() -> list[str]:
        silent.wait(30)
        return []

    _patch(monkeypatch, wait)
    monkeypatch.setattr(seeds, "RESOLVE_S", 0.05)
    try:
        with pytest.raises(DeadlineExceeded, match=r"shoal\.example"):
            resolve("shoal.example:1")
    finally:
        silent.set()


def test_the_systems_own_resolver_knows_this_machine() -> None:
    assert "127.0.0.1:7645" in resolve("localhost:7645")
