"""The UDP socket of a node, on the port number that its gRPC server has.

Law: `send` is for any thread and never blocks, not even for a name that must be looked up: what cannot be sent now is
dropped, as the network might drop it.  What is read has at most DATAGRAM_BYTES_MAX bytes; anything longer is dropped.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

import trio

from node import address as addresses
from node.bridge import Inbox, in_thread
from protos.errors import InvalidRequest, PortInUse, ShoalError
from protos.limits import DATAGRAM_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    SocketAddress = tuple[Any, ...]

# What a name was looked up to holds so long; one that was never found is looked up again after as long.
LOOKUP_S: Final = 60.0
# A look-up that takes longer has failed; a name that was found before keeps its place, and is asked for again after it.
LOOKUP_S_MAX: Final = 5.0
# Each holds a thread, until the resolver gives up: after 20 s or so, when LOOKUP_S_MAX is long over.
LOOKUPS_AT_ONCE_MAX: Final = 3
# Names that are remembered; of more, the one that was added first is forgotten.
NAMES_MAX: Final = 4096
# Names that wait to be looked up.
_WAITING_MAX: Final = 64
_HOSTS: Final = "give one of its own with --host, or 0.0.0.0 for all; where others reach it from outside is --advertise"
# Datagrams read before others get their turn.
_READ_AT_ONCE: Final = 64


class Udp:
    """Bound from construction on."""

    def __init__(self, host: str, port: int) -> None:
        """Raises PortInUse, when another program has this port number for datagrams; InvalidRequest, when this machine
        has no such address or keeps the port for the system."""
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(self._family, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind((host, port))
        except (OSError, UnicodeError) as error:
            self._socket.close()
            raise _refused(host, port, error) from None
        self.port: int = self._socket.getsockname()[1]
        self._names: dict[str, tuple[float, SocketAddress | None]] = {}
        self._names_lock = threading.Lock()  # of whoever adds one
        self._wanted: Inbox[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, address: str, data: bytes) -> bool:
        """To `host:port`.  False: dropped, since the name is being looked up or the system did not take it."""
        where = self._where(address)
        if where is None:
            return False
        try:
            self._socket.sendto(data, where)
        except OSError:  # full, unreachable, closed: as if it were lost on the way
            return False
        return True

    async def run(
        self,
        read: Callable[[bytes, str, int], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hands (data, host and port that sent it) to `read`, and looks names up, until it is cancelled."""
        self._wanted = Inbox(_WAITING_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_up_names, self._wanted, nursery)
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                for _ in range(_READ_AT_ONCE):
                    try:
                        data, where = self._socket.recvfrom(DATAGRAM_BYTES_MAX + 1)
                    except BlockingIOError:
                        break
                    except OSError:  # an ICMP error of something that was sent before
                        continue
                    if len(data) <= DATAGRAM_BYTES_MAX:
                        read(data, where[0], where[1])

    def _where(self, address: str) -> SocketAddress | None:
        now = time.monotonic()
        known = self._names.get(address)
        if known is not None and now < known[0]:
            return known[1]
        literal = self._literal(address)
        if literal is not None:
            self._remember(address, now + LOOKUP_S, literal)
            return literal
        if self._wanted is not None:
            self._remember(address, now + LOOKUP_S_MAX, known[1] if known else None)  # asked for once, not each time
            self._wanted.put(address)
        return known[1] if known else None

    def _literal(self, address: str) -> SocketAddress | None:
        """None: a name, or an address of a kind that this socket does not reach."""
        try:
            found = addresses.parse(address)
            version = ipaddress.ip_address(found.host).version
        except (ShoalError, ValueError):
            return None
        if self._family == socket.AF_INET:
            return (found.host, found.port) if version == 4 else None
        return (found.host if version == 6 else f"::ffff:{found.host}", found.port)

    def _remember(self, address: str, until: float, where: SocketAddress | None) -> None:
        with self._names_lock:
            if len(self._names) >= NAMES_MAX and address not in self._names:
                del self._names[next(iter(self._names))]
            self._names[address] = (until, where)

    async def _look_up_names(self, wanted: Inbox[str], nursery: trio.Nursery) -> None:
        free = trio.Semaphore(LOOKUPS_AT_ONCE_MAX)
        while True:
            await free.acquire()
            nursery.start_soon(self._look_up_name, await wanted.get(), free)

    async def _look_up_name(self, address: str, free: trio.Semaphore) -> None:
        try:
            where: SocketAddress | None = None
            with trio.move_on_after(LOOKUP_S_MAX):
                where = await in_thread(partial(self._look_up, address), abandon=True)
            before = self._names.get(address, (0.0, None))[1]
            again_s = LOOKUP_S_MAX if where is None and before is not None else LOOKUP_S
            self._remember(address, time.monotonic() + again_s, where or before)
        finally:
            free.release()

    def _look_up(self, address: str) -> SocketAddress | None:
        try:
            found = addresses.parse(address)
            flags = socket.AI_V4MAPPED if self._family == socket.AF_INET6 else 0
            places = socket.getaddrinfo(found.host, found.port, self._family, socket.SOCK_DGRAM, flags=flags)
        except (ShoalError, OSError):
            return None
        return places[0][4] if places else None


def _refused(host: str, port: int, error: OSError | UnicodeError) -> ShoalError:
    """Why a socket could not be bound there."""
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return InvalidRequest(f"host is {host}, which is no name that can be looked up ({error}): {_HOSTS}")
    reason = os.strerror(error.errno or 0)
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidRequest(f"host is {host}, which is no address of this machine ({reason}): {_HOSTS}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return InvalidRequest(f"cannot take port {port} on {host} ({reason}): choose another with --port, above 1023")
    return PortInUse(
        f"cannot take datagrams on {host} port {port} ({reason}): stop the process that holds the port, or "
        "choose another with --port (0: any free one)"
    )
