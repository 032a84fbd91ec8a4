"""A TCP proxy that makes loopback as long as a WAN: each direction comes RTT / 2 later, at full bandwidth.

python -m bench.delay_proxy [--rtt-ms 20] LISTEN=HOST:PORT...

For each LISTEN (a port of 127.0.0.1; 0: any free one) it prints the port, on one line; each number read from stdin is
the new RTT in milliseconds; it ends with stdin.  Law: bytes keep their order and none is lost; what is under way is
bounded, and beyond that the sender waits as it would for a full window.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import socket
import sys
import threading
import time
from typing import Self

# A gigabit for the longest RTT that is measured, several times over.
BYTES_UNDER_WAY_MAX = 64 << 20
CHUNK_BYTES = 1 << 18
CONNECT_S = 5.0


class DelayProxy:
    """Listens on loopback from construction on, for one target; `rtt_s` may change while it runs."""

    def __init__(self, target: str, rtt_s: float, port: int = 0) -> None:
        host, _, number = target.rpartition(":")
        self._target = (host, int(number))
        self.rtt_s = rtt_s
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        with self._lock:
            for each in self._open:
                _hang_up(each)

    def _accept(self) -> None:
        while not self._closed:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(caller,), daemon=True).start()

    def _join(self, caller: socket.socket) -> None:
        """Both directions of one connection, until both have ended."""
        try:
            called = socket.create_connection(self._target, CONNECT_S)
        except OSError:
            caller.close()
            return
        called.settimeout(None)
        pair = (caller, called)
        with self._lock:
            self._open.update(pair)
        for each in pair:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = _Direction(self, called, caller)
        forth = _Direction(self, caller, called)
        for direction in (back, forth):
            direction.join()
        with self._lock:
            self._open.difference_update(pair)
        for each in pair:
            each.close()


class _Direction:
    """Bytes from one socket to another, each RTT / 2 after it came."""

    def __init__(self, proxy: DelayProxy, source: socket.socket, sink: socket.socket) -> None:
        self._proxy = proxy
        self._source = source
        self._sink = sink
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self._bytes = 0
        self._broken = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        due = 0.0
        while True:
            try:
                data = self._source.recv(CHUNK_BYTES)
            except OSError:
                data = b""
            with self._changed:
                while self._bytes > BYTES_UNDER_WAY_MAX and not self._broken:
                    self._changed.wait()
                due = max(due, time.monotonic() + self._proxy.rtt_s / 2)
                self._queue.append((due, data))
                self._bytes += len(data)
                self._changed.notify_all()
            if not data:
                return

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                due, data = self._queue.popleft()
                self._bytes -= len(data)
                self._changed.notify_all()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            try:
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(data)
            except OSError:
                self._break()
                return

    def _break(self) -> None:
        """Nobody reads any more: the sender must hear it."""
        _hang_up(self._source)
        with self._changed:
            self._broken = True
            self._changed.notify_all()


def _hang_up(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("routes", nargs="+", metavar="LISTEN=HOST:PORT")
    arguments = parser.parse_args()
    sys.setswitchinterval(0.0002)  # a chunk that is due must not wait for a thread that copies another
    with contextlib.ExitStack() as stack:
        proxies = []
        for route in arguments.routes:
            port, _, target = route.partition("=")
            proxies.append(stack.enter_context(DelayProxy(target, arguments.rtt_ms / 1000, int(port))))
        print(*(proxy.port for proxy in proxies), flush=True)
        for line in sys.stdin:
            for proxy in proxies:
                proxy.rtt_s = float(line) / 1000
            print(line.strip(), flush=True)


if __name__ == "__main__":
    main()
