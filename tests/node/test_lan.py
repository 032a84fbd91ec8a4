"""The LAN on loopback, where zeroconf's multicast reaches every process of this machine; tests/net has a real one."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import ifaddr
import pytest
import structlog.testing
import trio
import trio.testing
import zeroconf

from node import advert, interfaces, lan
from node.bridge import in_thread
from node.contact import Found, Source, Withdrawn
from node.identity import peer_id
from node.lan import Announcement, Lan, announcement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FIND_S = 20.0


def _peer() -> Any:
    return peer_id(secrets.token_bytes(32))


@pytest.fixture
def network() -> bytes:
    """Tests run beside each other on one loopback."""
    return secrets.token_bytes(32)


@contextlib.asynccontextmanager
async def running(made: Lan) -> AsyncIterator[trio.MemoryReceiveChannel[Found | Withdrawn]]:
    send, receive = trio.open_memory_channel[Found | Withdrawn](64)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run, send)
        yield receive
        nursery.cancel_scope.cancel()


def test_two_nodes_on_loopback_find_each_other_and_one_that_leaves_is_withdrawn(network: bytes) -> None:
    anna, bert = _peer(), _peer()

    async def main() -> None:
        with trio.fail_after(FIND_S):
            async with running(Lan(Announcement(network, anna, "127.0.0.1", 7001))) as heard:
                async with running(Lan(Announcement(network, bert, "127.0.0.1", 7002))) as heard_too:
                    assert await heard.receive() == Found(Source.LAN, f"127.0.0.1:7002#{bert}")
                    assert await heard_too.receive() == Found(Source.LAN, f"127.0.0.1:7001#{anna}")
                assert await heard.receive() == Withdrawn(Source.LAN, f"127.0.0.1:7002#{bert}")

    trio.run(main)


def test_junk_beside_a_node_is_nobody_and_ends_nothing(network: bytes) -> None:
    """Services of this type with text records of junk, of another network, and with a name of another kind."""
    anna, bert, junk = _peer(), _peer(), zeroconf.Zeroconf(interfaces=["127.0.0.1"])
    records = [secrets.token_bytes(100), b"", {"v": "1"}, advert.properties(secrets.token_bytes(32), _peer())]

    async def main() -> None:
        with trio.fail_after(FIND_S):
            async with running(Lan(Announcement(network, anna, "127.0.0.1", 7001))) as heard:
                async with trio.open_nursery() as nursery:
                    for said in records:
                        nursery.start_soon(in_thread, partial(announce, said))
                async with running(Lan(Announcement(network, bert, "127.0.0.1", 7002))):
                    assert await heard.receive() == Found(Source.LAN, f"127.0.0.1:7002#{bert}")

    def announce(said: Any) -> None:
        name = f"{secrets.token_hex(8)} ä.{advert.SERVICE}"
        info = zeroconf.ServiceInfo(
            advert.SERVICE, name, 7003, properties=said, parsed_addresses=["127.0.0.1"], server=f"{name[:8]}.local."
        )
        junk.register_service(info, cooperating_responders=True)

    try:
        trio.run(main)
    finally:
        junk.close()


def test_sockets_that_cannot_be_opened_are_told_once_and_tried_again(
    network: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, real = [], zeroconf.Zeroconf
    errors = [OSError(98, "Address already in use")] * 4 + [RuntimeError("No adapter found")] * 4

    def fail(**arguments: Any) -> zeroconf.Zeroconf:
        tries.append(arguments)
        if len(tries) <= len(errors):
            raise errors[len(tries) - 1]
        return real(**arguments)

    monkeypatch.setattr(zeroconf, "Zeroconf", fail)
    monkeypatch.setattr(lan, "RETRY_S", 0.0)
    anna, bert = _peer(), _peer()

    async def main() -> None:
        with trio.fail_after(FIND_S):
            async with (
                running(Lan(Announcement(network, anna, "127.0.0.1", 7001))) as heard,
                running(Lan(Announcement(network, bert, "127.0.0.1", 7002))),
            ):
                assert isinstance(await heard.receive(), Found)

    with structlog.testing.capture_logs() as said:
        trio.run(main)
    assert len(tries) == len(errors) + 2
    assert all(each["event"].startswith("the LAN cannot be searched") for each in said)
    assert len(said) <= 4  # each of the two tells each reason once


def test_an_announcement_that_fails_leaves_nothing_open(network: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    real = zeroconf.Zeroconf.close

    def refuse(*_: Any, **__: Any) -> None:
        raise zeroconf.NonUniqueNameException

    def close(self: zeroconf.Zeroconf) -> None:
        real(self)
        closed.append(True)

    monkeypatch.setattr(zeroconf.Zeroconf, "register_service", refuse)
    monkeypatch.setattr(zeroconf.Zeroconf, "close", close)
    own = interfaces.of_host("127.0.0.1")
    with pytest.raises(zeroconf.NonUniqueNameException):
        lan._Station.open(Announcement(network, _peer(), "127.0.0.1", 7001), own, lambda _: None, 60)
    assert closed == [True]


def test_a_name_that_is_none_is_nobody_and_one_that_nobody_answers_for_can_be_asked_for(network: bytes) -> None:
    own, me = interfaces.of_host("127.0.0.1"), _peer()
    reader = advert.Reader(network, me, own)
    station = lan._Station.open(Announcement(network, me, "127.0.0.1", 7001), own, lambda _: None, 60)
    try:
        for name in ("", "x", f"{'x' * 64}.{advert.SERVICE}", f"\x00.{advert.SERVICE}", "x._other._tcp.local."):
            assert station.read(name, reader) == ()
        assert station.read(f"{_peer()}.{advert.SERVICE}", reader) is None
        station.ask(f"{_peer()}.{advert.SERVICE}")
    finally:
        station.close()
    station.ask(f"{me}.{advert.SERVICE}")  # after its end: nothing


def test_a_machine_without_an_address_is_no_end(network: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It searches once it has one."""
    real, asked = interfaces.of_host, []

    def later(host: str) -> Any:
        asked.append(host)
        return real(host) if len(asked) > 3 else ()

    monkeypatch.setattr(interfaces, "of_host", later)
    monkeypatch.setattr(lan, "RETRY_S", 0.0)

    async def main() -> None:
        with trio.fail_after(FIND_S):
            async with (
                running(Lan(Announcement(network, _peer(), "127.0.0.1", 7001))) as heard,
                running(Lan(Announcement(network, _peer(), "127.0.0.1", 7002))),
            ):
                await heard.receive()

    trio.run(main)
    assert len(asked) > 4


def test_when_this_machines_addresses_change_the_lan_is_searched_anew(
    network: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real, own = [], lan._Station.open, list(interfaces.of_host("127.0.0.1"))
    monkeypatch.setattr(lan, "INTERFACES_S", 0.05)

    def counted(*arguments: Any) -> Any:
        opened.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(lan._Station, "open", counted)
    monkeypatch.setattr(interfaces, "of_host", lambda _: tuple(own) if len(opened) else tuple(own[:1]))

    async def main() -> None:
        with trio.fail_after(FIND_S):
            async with running(Lan(Announcement(network, _peer(), "127.0.0.1", 7001))):
                own.append(ipaddress.ip_interface("127.0.0.1/32"))
                while len(opened) < 2:
                    await trio.lowlevel.checkpoint()

    trio.run(main)
    assert len(opened[0]) < len(opened[1])


@pytest.mark.parametrize(
    ("advertise", "port", "ips"),
    [
        ("", 7645, ()),
        ("10.0.0.9:7700", 7700, ("10.0.0.9",)),
        ("[fd00::9]:7700", 7700, ("fd00::9",)),
        ("my-machine:7700", 7645, ()),
        ("0.0.0.0:7700", 7645, ()),
    ],
)
def test_an_advertised_ip_address_is_announced_and_a_name_is_not(
    advertise: str, port: int, ips: tuple[str, ...]
) -> None:
    made = announcement(bytes(32), _peer(), "0.0.0.0", 7645, advertise)
    assert (made.host, made.port, made.ips) == ("0.0.0.0", port, ips)


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    ips = [
        ifaddr.IP("127.0.0.1", 8, "lo"),
        ifaddr.IP(("::1", 0, 0), 128, "lo"),
        ifaddr.IP("192.168.1.7", 24, "eth0"),
        ifaddr.IP(("fd00::7", 0, 0), 64, "eth0"),
        ifaddr.IP(("fe80::7", 0, 2), 64, "eth0"),
    ]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [ifaddr.Adapter("all", "all", ips)])


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("0.0.0.0", ["192.168.1.7/24"]),
        ("::", ["192.168.1.7/24", "fd00::7/64"]),
        ("192.168.1.7", ["192.168.1.7/24"]),
        ("127.0.0.1", ["127.0.0.1/8"]),
        ("192.168.1.8", []),
        ("no-such-name.invalid", []),
    ],
)
def test_interfaces_are_those_of_the_host(
    adapters: None, monkeypatch: pytest.MonkeyPatch, host: str, found: list[str]
) -> None:
    def nobody(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    assert [str(each) for each in interfaces.of_host(host)] == found


def test_of_many_interfaces_so_many_are_used_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ips = [ifaddr.IP(f"10.{n}.0.1", 16, "bridge") for n in range(interfaces.INTERFACES_MAX + 3)]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [ifaddr.Adapter("all", "all", ips)])
    expected = [f"10.{n}.0.1/16" for n in range(interfaces.INTERFACES_MAX)]
    assert [str(each) for each in interfaces.of_host("0.0.0.0")] == expected


def test_of_names_that_nobody_has_read_so_many_wait_and_the_rest_is_dropped(
    network: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lan, "NAMES_UNREAD_MAX", 3)
    asked: list[str] = []

    class Flooded:
        """All names come while the sockets are opened, before anybody reads."""

        @staticmethod
        def open(_: object, __: object, say: Any, ___: int) -> Flooded:
            for n in range(9):
                say(lan._Said(f"{n}", removed=False))
            return Flooded()

        def read(self, name: str, _: object) -> None:
            asked.append(name)

        def ask(self, name: str) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(lan, "_Station", Flooded)

    async def main() -> None:
        async with running(Lan(Announcement(network, _peer(), "127.0.0.1", 7001))):
            with trio.fail_after(FIND_S):
                while len(asked) < 3:  # noqa: ASYNC110  (nobody tells)
                    await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()

    trio.run(main)
    assert sorted(set(asked)) == ["0", "1", "2"]


def test_a_name_of_this_machine_is_its_addresses(adapters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", 0))])
    assert [str(each) for each in interfaces.of_host("localhost")] == ["127.0.0.1/8"]
