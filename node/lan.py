"""The LAN: announces this node by mDNS and says which addresses others of its network announce.  RFC 6762 and 6763.

The only file that knows zeroconf, which has threads of its own: they say names, through a bounded inbox, and nothing
else.  Law: a LAN that cannot be searched is told once and ends nothing; what was announced is withdrawn on leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
import zeroconf

from node import address, advert, interfaces, log
from node.bridge import Inbox, in_thread
from node.contact import Found, Source, Withdrawn
from node.sightings import Sightings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from ipaddress import IPv4Interface, IPv6Interface

    from protos.ids import PeerId

    Interfaces = Sequence[IPv4Interface | IPv6Interface]
    News = trio.MemorySendChannel[Found | Withdrawn]

TTL_S = 60
"""How long an announcement holds unless repeated.  RFC 6762 suggests 120 s; who is killed should go sooner."""

INTERFACES_S = 15.0
"""How often this machine's addresses are looked at: who comes home with a laptop waits no longer."""

RETRY_S = 60.0
"""After a failure to open the sockets."""

NAMES_UNREAD_MAX = 1024
"""What zeroconf said and nobody has read yet; what exceeds it is dropped, and said again when it is repeated."""

ASK_MS = 900
"""How long zeroconf waits for the answers to a question; the next one comes after sightings.ASK_S."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """`host`: what the node listens on.  `ips`: what others shall dial; empty: the addresses of the interfaces."""

    network: bytes
    peer: PeerId
    host: str
    port: int
    ips: tuple[str, ...] = ()


def announcement(network: bytes, peer: PeerId, host: str, port: int, advertise: str = "") -> Announcement:
    """Of a node that listens at host:port.  An IP address that it advertises is announced, not the interfaces'."""
    ip = address.parse(advertise) if advertise else None
    if ip is None or not _is_ip(ip.host):
        return Announcement(network, peer, host, port)
    return Announcement(network, peer, host, ip.port, (ip.host,))


class Lan:
    """`run` it; until then and after it nothing is announced."""

    def __init__(self, announcement: Announcement, *, ttl_s: int = TTL_S) -> None:
        self._announcement = announcement
        self._ttl_s = ttl_s
        self._random = random.Random()  # noqa: S311  (for when to look)
        self._offered: dict[str, None] = {}
        self._told = ""

    async def run(self, news: News, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Says Found and Withdrawn of Source.LAN until it is cancelled; closes the channel then."""
        task_status.started()
        async with news:
            while True:
                own = await in_thread(partial(interfaces.of_host, self._announcement.host))
                inbox: Inbox[_Said] = Inbox(NAMES_UNREAD_MAX)
                station = await self._open(own, inbox)
                if station is None:
                    await trio.sleep(RETRY_S)
                    continue
                try:
                    await self._listen(station, own, inbox, news)
                finally:
                    with trio.CancelScope(shield=True):
                        await in_thread(station.close)

    async def _open(self, own: Interfaces, inbox: Inbox[_Said]) -> _Station | None:
        """Not abandoned when it is cancelled: what it opens must be closed."""
        work = partial(_Station.open, self._announcement, own, inbox.put, self._ttl_s)
        try:
            station = await in_thread(work)
        except (OSError, RuntimeError, ValueError, zeroconf.Error) as error:
            self._tell(f"{type(error).__name__}: {error}")
            return None
        self._told = ""
        return station

    async def _listen(self, station: _Station, own: Interfaces, inbox: Inbox[_Said], news: News) -> None:
        """Until this machine's addresses are others."""
        sightings = Sightings(self._ttl_s, self._random)
        reader = advert.Reader(self._announcement.network, self._announcement.peer, own)
        look_at = trio.current_time() + INTERFACES_S
        while True:
            with trio.move_on_at(min(sightings.deadline, look_at)):
                _take(sightings, await inbox.get(), trio.current_time())
            now = trio.current_time()
            for name in sightings.due(now):
                if sightings.read(name, station.read(name, reader), now):
                    station.ask(name)
            await self._offer(sightings.addresses, news)
            if now >= look_at:
                look_at = now + INTERFACES_S
                if await in_thread(partial(interfaces.of_host, self._announcement.host)) != own:
                    log.get("lan").info("this machine's addresses have changed: the LAN is searched anew")
                    return

    async def _offer(self, addresses: dict[str, None], news: News) -> None:
        gone = [text for text in self._offered if text not in addresses]
        new = [text for text in addresses if text not in self._offered]
        self._offered = addresses
        for text in gone:
            await news.send(Withdrawn(Source.LAN, text))
        for text in new:
            await news.send(Found(Source.LAN, text))

    def _tell(self, why: str) -> None:
        if why != self._told:
            self._told = why
            log.get("lan").warning("the LAN cannot be searched for nodes; give seeds with --join", error=why)


@dataclass(frozen=True, slots=True)
class _Said:
    """Of zeroconf's threads."""

    name: str
    removed: bool


@dataclass(slots=True)
class _Station:
    """Sockets, threads and the announcement; `open` and `close` block, the others do not."""

    service: zeroconf.Zeroconf
    browser: zeroconf.ServiceBrowser | None = field(default=None)

    @classmethod
    def open(cls, announcement: Announcement, own: Interfaces, say: Callable[[_Said], None], ttl_s: int) -> _Station:
        """Raises OSError, RuntimeError, ValueError or zeroconf.Error, and leaves nothing open then."""
        if not own:
            raise OSError(f"this machine has no address for a node that listens on {announcement.host}")
        station = cls(zeroconf.Zeroconf(interfaces=[str(each.ip) for each in own], use_asyncio=False))
        try:
            station.service.register_service(_info(announcement, own, ttl_s), allow_name_change=True)
            station.browser = zeroconf.ServiceBrowser(station.service, advert.SERVICE, handlers=[partial(_hear, say)])
        except BaseException:
            station.close()
            raise
        return station

    def read(self, name: str, reader: advert.Reader) -> tuple[str, ...] | None:
        """What is known of it now; None: not all of it."""
        try:
            info = zeroconf.ServiceInfo(advert.SERVICE, name)
            if not info.load_from_cache(self.service) or info.port is None:
                return None
            return advert.read(reader, info.properties, info.port, info.parsed_addresses())
        except (zeroconf.Error, ValueError, UnicodeError):
            return ()  # what is no name, or no text, never becomes one

    def ask(self, name: str) -> None:
        """Everybody, so that everybody hears the answer.  Nothing is waited for: it is read where it is kept."""
        loop = self.service.loop
        if loop is not None and loop.is_running():
            info = zeroconf.ServiceInfo(advert.SERVICE, name)
            question = info.async_request(self.service, ASK_MS, zeroconf.DNSQuestionType.QM)
            asyncio.run_coroutine_threadsafe(question, loop)

    def close(self) -> None:
        """Says farewell, three times within 0.3 s (RFC 6762, section 10.1)."""
        if self.browser is not None:
            self.browser.cancel()
        with contextlib.suppress(zeroconf.Error, OSError, RuntimeError):
            self.service.close()


def _info(announcement: Announcement, own: Interfaces, ttl_s: int) -> zeroconf.ServiceInfo:
    """The host's name is new with each start: two processes with one key do not fight for one name's addresses."""
    return zeroconf.ServiceInfo(
        advert.SERVICE,
        f"{announcement.peer}.{advert.SERVICE}",
        port=announcement.port,
        properties=advert.properties(announcement.network, announcement.peer),
        server=f"{announcement.peer[:16]}-{secrets.token_hex(4)}.local.",
        parsed_addresses=list(announcement.ips) or [str(each.ip) for each in own],
        host_ttl=ttl_s,
        other_ttl=ttl_s,
    )


def _is_ip(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _hear(say: Callable[[_Said], None], *, name: str, state_change: zeroconf.ServiceStateChange, **_: Any) -> None:
    say(_Said(name, state_change is zeroconf.ServiceStateChange.Removed))


def _take(sightings: Sightings, said: _Said, now: float) -> None:
    if said.removed:
        sightings.withdrawn(said.name)
    else:
        sightings.noticed(said.name, now)
