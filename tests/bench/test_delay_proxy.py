"""The proxy delays, and does nothing else: no byte lost or out of order, no limit on bandwidth, ends are passed on."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench import delay_proxy
from bench.delay_proxy import DelayProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

RTT_S = 0.05
WAIT_S = 20.0


class Echo:
    """Sends back what it reads; an end too."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                with caller, contextlib.suppress(OSError):
                    while data := caller.recv(1 << 16):
                        caller.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    running = Echo()
    yield running
    running.close()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), WAIT_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def exactly(source: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        data = source.recv(count - len(found))
        assert data, f"ended after {len(found)} of {count} bytes"
        found += data
    return found


def test_a_round_trip_takes_the_rtt_and_not_much_more(echo: Echo) -> None:
    with DelayProxy(echo.address, RTT_S) as proxy, connect(proxy.address) as caller:
        times = []
        for _ in range(8):
            asked = time.monotonic()
            caller.sendall(b"x" * 100)
            assert exactly(caller, 100) == b"x" * 100
            times.append(time.monotonic() - asked)
        proxy.rtt_s = 0.0
        caller.sendall(b"y")
        exactly(caller, 1)
    assert min(times) >= RTT_S
    assert sorted(times)[4] < RTT_S + 0.02


def test_many_bytes_are_under_way_at_once_and_keep_their_order(echo: Echo) -> None:
    """32 messages a millisecond apart would take 32 RTT one after the other; they take about one."""
    with DelayProxy(echo.address, 0.2) as proxy, connect(proxy.address) as caller:
        sent = b"".join(n.to_bytes(4, "big") * 16384 for n in range(32))
        asked = time.monotonic()
        sender = threading.Thread(target=caller.sendall, args=(sent,))
        sender.start()
        found = exactly(caller, len(sent))
        sender.join(WAIT_S)
        took = time.monotonic() - asked
    assert found == sent
    assert took < 1.0


def test_an_end_is_passed_on_after_what_was_sent(echo: Echo) -> None:
    with DelayProxy(echo.address, RTT_S) as proxy, connect(proxy.address) as caller:
        caller.sendall(b"last words")
        caller.shutdown(socket.SHUT_WR)
        assert exactly(caller, 10) == b"last words"
        assert caller.recv(1) == b""


def test_where_nobody_listens_the_caller_is_hung_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    with DelayProxy(address, RTT_S) as proxy, connect(proxy.address) as caller:
        assert caller.recv(1) == b""


def test_a_sender_waits_when_too_much_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delay_proxy, "BYTES_UNDER_WAY_MAX", 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        with DelayProxy(address, 0.0) as proxy, connect(proxy.address) as caller:
            caller.settimeout(0.5)
            sent = 0
            with pytest.raises(TimeoutError):
                while sent < 256 << 20:
                    sent += caller.send(b"x" * 65536)
    assert sent < 64 << 20


def test_as_a_command_it_says_its_ports_and_takes_a_new_rtt(echo: Echo) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.delay_proxy", "--rtt-ms", "1", f"0={echo.address}", f"0={echo.address}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ports = process.stdout.readline().split()
        assert len(set(ports)) == 2
        process.stdin.write("60\n")
        process.stdin.flush()
        assert process.stdout.readline() == "60\n"
        with connect(f"127.0.0.1:{ports[1]}") as caller:
            asked = time.monotonic()
            caller.sendall(b"z")
            exactly(caller, 1)
            assert time.monotonic() - asked >= 0.06
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
