"""node.udp: a real socket on loopback, names that a patched resolver knows, and what is dropped."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from node import udp
from node.udp import LOOKUP_S, LOOKUP_S_MAX, LOOKUPS_AT_ONCE_MAX, NAMES_MAX, Udp
from protos.errors import InvalidRequest, PortInUse
from protos.limits import DATAGRAM_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

WAIT_S = 20.0


class Inbox:
    """What a socket read, and a way to wait for it."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[tuple[bytes, str, int]](1000)

    def read(self, data: bytes, host: str, port: int) -> None:
        self.send.send_nowait((data, host, port))

    async def next(self) -> tuple[bytes, str, int]:
        with trio.fail_after(WAIT_S):
            return await self.receive.receive()


@contextlib.asynccontextmanager
async def running(of: Udp) -> AsyncIterator[Inbox]:
    inbox = Inbox()
    async with trio.open_nursery() as nursery:
        await nursery.start(of.run, inbox.read)
        yield inbox
        nursery.cancel_scope.cancel()


async def eventually(holds: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_S):
        while not holds():  # noqa: ASYNC110  (a thread and the system do it, and tell nobody)
            await trio.sleep(0.001)


@pytest.fixture
def one() -> Iterator[Udp]:
    with Udp("127.0.0.1", 0) as made:
        yield made


@pytest.fixture
def two() -> Iterator[Udp]:
    with Udp("127.0.0.1", 0) as made:
        yield made


class Resolver:
    """Stands for getaddrinfo; `answers` go from host to numeric host, all else is not found."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.asked: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, host: str, port: int, family: int, kind: int, *, flags: int) -> list[Any]:
        self.asked.append(host)
        assert self.may_answer.wait(WAIT_S)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        assert kind == socket.SOCK_DGRAM
        return [(family, kind, 17, "", (self.answers[host], port))]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    made = Resolver()
    monkeypatch.setattr("node.udp.socket.getaddrinfo", made)
    return made


class Time:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("node.udp.time.monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_a_datagram_arrives_with_where_it_came_from(one: Udp, two: Udp) -> None:
    async def main() -> None:
        async with running(two) as inbox:
            assert one.send(f"127.0.0.1:{two.port}", b"hello")
            assert await inbox.next() == (b"hello", "127.0.0.1", one.port)

    trio.run(main)


def test_the_longest_is_read_an_empty_one_too_and_a_longer_one_is_dropped(one: Udp, two: Udp) -> None:
    async def main() -> None:
        async with running(two) as inbox:
            for size in (DATAGRAM_BYTES_MAX + 1, 65_000, DATAGRAM_BYTES_MAX, 0):
                assert one.send(f"127.0.0.1:{two.port}", bytes(size))
            assert [len((await inbox.next())[0]) for _ in range(2)] == [DATAGRAM_BYTES_MAX, 0]

    trio.run(main)


def test_more_than_are_read_at_once_arrive_all_the_same(one: Udp, two: Udp) -> None:
    async def main() -> None:
        async with running(two) as inbox:
            for n in range(udp._READ_AT_ONCE + 6):
                assert one.send(f"127.0.0.1:{two.port}", bytes([n]))
            assert [(await inbox.next())[0][0] for _ in range(70)] == list(range(70))

    trio.run(main)


def test_an_error_of_the_network_is_a_datagram_that_was_lost(one: Udp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there: what an ICMP says of it ends nothing."""

    class Failing:
        """A socket whose first read brings the error of an earlier send."""

        def __init__(self, real: socket.socket) -> None:
            self.real = real
            self.failed = 0

        def fileno(self) -> int:
            return self.real.fileno()

        def sendto(self, data: bytes, where: object) -> int:
            return self.real.sendto(data, where)

        def recvfrom(self, size: int) -> object:
            self.failed += 1
            if self.failed == 1:
                raise ConnectionRefusedError
            return self.real.recvfrom(size)

        def close(self) -> None:
            self.real.close()

    one._socket = Failing(one._socket)

    async def main() -> None:
        async with running(one) as inbox:
            assert one.send(f"127.0.0.1:{one.port}", b"to itself")
            assert (await inbox.next())[0] == b"to itself"

    trio.run(main)
    assert one._socket.failed > 1


def test_what_the_system_does_not_take_is_dropped(one: Udp) -> None:
    assert not one.send("127.0.0.1:9", bytes(70_000))
    one.close()
    assert not one.send("127.0.0.1:9", b"x")


def test_a_port_that_is_taken_is_a_typed_error(one: Udp) -> None:
    with pytest.raises(PortInUse, match=f"port {one.port}"):
        Udp("127.0.0.1", one.port)


def test_an_address_that_is_not_this_machines_is_no_matter_of_its_port() -> None:
    with pytest.raises(InvalidRequest, match=r"host is 192\.0\.2\.1, which is no address of this machine.*--host"):
        Udp("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "host is h, which is no name .*--host"),
        (UnicodeError("label too long"), "host is h, which is no name"),
        (OSError(errno.EACCES, "Permission denied"), "cannot take port 80 on h .*--port, above 1023"),
    ],
)
def test_why_nothing_can_be_bound_is_said(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unbound(socket.socket):
        def bind(self, _: object) -> None:
            raise error

    monkeypatch.setattr("node.udp.socket.socket", Unbound)
    with pytest.raises(InvalidRequest, match=says):
        Udp("h", 80)


def test_a_name_is_looked_up_in_the_background_and_sent_to_then(one: Udp, two: Udp, resolver: Resolver) -> None:
    resolver.answers["node.example"] = "127.0.0.1"
    resolver.may_answer.clear()
    address = f"node.example:{two.port}"

    async def main() -> None:
        async with running(one), running(two) as inbox:
            assert not one.send(address, b"early"), "it waits for nobody"
            assert not one.send(address, b"early too")
            resolver.may_answer.set()
            await eventually(lambda: one.send(address, b"late"))
            assert (await inbox.next())[0] == b"late"
            assert resolver.asked == ["node.example"], "once, not each time"

    trio.run(main)


def test_a_name_that_moved_is_found_again_and_goes_to_its_old_place_until_then(
    one: Udp, resolver: Resolver, time: Time
) -> None:
    resolver.answers["node.example"] = "127.0.0.1"
    address = "node.example:7645"

    async def main() -> None:
        async with running(one):
            await eventually(lambda: one.send(address, b"x"))
            resolver.answers["node.example"] = "127.0.0.2"
            time.now += LOOKUP_S - 1
            assert one._where(address) == ("127.0.0.1", 7645)
            time.now += 1
            assert one._where(address) == ("127.0.0.1", 7645)
            await eventually(lambda: one._where(address) == ("127.0.0.2", 7645))
            assert resolver.asked == ["node.example"] * 2

    trio.run(main)


def test_a_name_that_was_found_once_keeps_its_place_while_the_resolver_fails_and_is_asked_for_again_soon(
    one: Udp, resolver: Resolver, time: Time
) -> None:
    resolver.answers["node.example"] = "127.0.0.1"
    address = "node.example:7645"

    async def main() -> None:
        async with running(one):
            await eventually(lambda: one.send(address, b"x"))
            del resolver.answers["node.example"]
            time.now += LOOKUP_S
            for asked in (2, 3):
                assert one._where(address) == ("127.0.0.1", 7645)
                await eventually(lambda asked=asked: len(resolver.asked) == asked)
                await trio.testing.wait_all_tasks_blocked()
                assert one._where(address) == ("127.0.0.1", 7645)
                time.now += LOOKUP_S_MAX
            resolver.answers["node.example"] = "127.0.0.2"
            await eventually(lambda: one._where(address) == ("127.0.0.2", 7645))

    trio.run(main)


def test_a_resolver_that_is_slow_with_one_name_does_not_hold_up_others(
    one: Udp, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver.answers["other.example"] = "127.0.0.1"
    stuck = threading.Event()

    def answer(host: str, *given: Any, **named: Any) -> list[Any]:
        if host.startswith("stuck"):
            assert stuck.wait(WAIT_S)
        return resolver(host, *given, **named)

    monkeypatch.setattr("node.udp.socket.getaddrinfo", answer)

    async def main() -> None:
        async with running(one):
            for n in range(LOOKUPS_AT_ONCE_MAX - 1):
                assert not one.send(f"stuck{n}.example:7645", b"x")
            await eventually(lambda: one.send("other.example:7645", b"x"))
            assert resolver.asked == ["other.example"], "the others are not done"
            stuck.set()

    trio.run(main)


def test_a_name_that_is_not_found_is_asked_for_again_much_later(one: Udp, resolver: Resolver, time: Time) -> None:
    address = "nowhere.example:7645"

    async def main() -> None:
        async with running(one):
            assert not one.send(address, b"x")
            await eventually(lambda: one._names[address][0] == time.now + LOOKUP_S)
            time.now += LOOKUP_S - 1
            assert not one.send(address, b"x")
            assert resolver.asked == ["nowhere.example"]
            time.now += 1
            assert not one.send(address, b"x")
            await eventually(lambda: len(resolver.asked) == 2)

    trio.run(main)


def test_a_resolver_that_never_answers_is_given_up(
    one: Udp, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.udp.LOOKUP_S_MAX", 0.01)
    assert LOOKUP_S_MAX == 5.0
    resolver.answers["other.example"] = "127.0.0.1"
    real = resolver.may_answer
    stuck = threading.Event()

    def answer(host: str, *given: Any, **named: Any) -> list[Any]:
        resolver.may_answer = stuck if host == "stuck.example" else real
        return Resolver.__call__(resolver, host, *given, **named)

    monkeypatch.setattr("node.udp.socket.getaddrinfo", answer)

    async def main() -> None:
        async with running(one):
            assert not one.send("stuck.example:7645", b"x")
            await eventually(lambda: one.send("other.example:7645", b"x"))
        stuck.set()

    trio.run(main)


def test_so_many_names_wait_to_be_looked_up_and_what_exceeds_them_is_dropped(
    one: Udp, resolver: Resolver, time: Time
) -> None:
    """Those that are being looked up do not wait any more."""
    resolver.may_answer.clear()
    hosts = [f"n{n}.example" for n in range(udp._WAITING_MAX + 3)]

    async def main() -> None:
        async with running(one):
            firsts = [f"first{n}.example" for n in range(LOOKUPS_AT_ONCE_MAX)]
            for host in firsts:
                one.send(f"{host}:7645", b"x")
            await eventually(lambda: sorted(resolver.asked) == firsts)
            for host in hosts:
                assert not one.send(f"{host}:7645", b"x")
            resolver.may_answer.set()
            await eventually(lambda: len(resolver.asked) == len(firsts) + udp._WAITING_MAX)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(resolver.asked) == sorted([*firsts, *hosts[: udp._WAITING_MAX]])
            time.now += LOOKUP_S_MAX  # who was dropped is asked for again later
            assert not one.send(f"{hosts[-1]}:7645", b"x")
            await eventually(lambda: resolver.asked[-1] == hosts[-1])

    trio.run(main)


def test_before_it_runs_names_are_dropped_and_not_asked_for(one: Udp, resolver: Resolver) -> None:
    assert not one.send("node.example:7645", b"x")
    assert resolver.asked == []


@pytest.mark.parametrize("address", ["no port", "host:99999", "[::1]:7645", "", "host:7645#nobody"])
def test_what_is_no_address_of_this_family_is_dropped(one: Udp, resolver: Resolver, address: str) -> None:
    async def main() -> None:
        async with running(one):
            assert not one.send(address, b"x")
            await eventually(lambda: one._names[address][0] > udp.time.monotonic() + LOOKUP_S_MAX)
            assert not one.send(address, b"x")

    trio.run(main)


def test_as_many_names_as_the_limit_are_remembered_and_the_first_is_forgotten(one: Udp) -> None:
    for n in range(NAMES_MAX + 3):
        assert one._where(f"10.0.{n // 250}.{n % 250 + 1}:7645") is not None
    assert len(one._names) == NAMES_MAX
    assert "10.0.0.3:7645" not in one._names
    assert "10.0.0.4:7645" in one._names
    one._where("10.0.0.5:7645")
    assert len(one._names) == NAMES_MAX


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_an_ipv6_socket_reaches_ipv6_and_through_a_mapped_address_ipv4(two: Udp, resolver: Resolver) -> None:
    resolver.answers["node.example"] = "::ffff:127.0.0.1"

    async def main() -> None:
        with Udp("::", 0) as six:
            async with running(six) as inbox, running(two) as fours:
                assert six.send(f"[::1]:{six.port}", b"six")
                assert (await inbox.next())[:2] == (b"six", "::1")
                assert six.send(f"127.0.0.1:{two.port}", b"four")
                assert await fours.next() == (b"four", "127.0.0.1", six.port)
                assert two.send(f"127.0.0.1:{six.port}", b"back")
                assert (await inbox.next())[:2] == (b"back", "::ffff:127.0.0.1")
                await eventually(lambda: six.send(f"node.example:{two.port}", b"by name"))
                assert (await fours.next())[0] == b"by name"

    trio.run(main)


def test_many_threads_may_send_at_once(one: Udp) -> None:
    failed: list[BaseException] = []

    def send(first: int) -> None:
        try:
            for n in range(3000):
                one._where(f"10.{first}.{n // 250}.{n % 250 + 1}:7645")
        except BaseException as error:  # noqa: BLE001  (told to the test)
            failed.append(error)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failed
    assert len(one._names) == NAMES_MAX
