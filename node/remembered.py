"""Remembered peers: where the peers of the last run were, so that the next one finds them without a seed.

Law: the file is written whole or not at all, with mode 600, and stays small; what is wrong with it costs the memory and
nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node import address
from node.contacts import REMEMBERED_MAX
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from random import Random

    from protos.ids import PeerId

FILE_BYTES_MAX = 64 * 1024
"""REMEMBERED_MAX peers with the longest addresses need 30 KiB."""

AGE_S_MAX = 30 * 86_400
"""Who has not been seen for a month is not looked for."""

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Remembered:
    """`address`: host:port, as the peer's record has it.  `seen_at`: seconds since 1970."""

    peer: PeerId
    address: str
    seen_at: int


def load(path: Path, network: bytes, now: float) -> list[Remembered]:
    """Those of this network, newest first; none where there is no file.  Raises InvalidRequest for a broken one."""
    try:
        content = _read(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidRequest(f"the remembered peers in {path} cannot be read: {error}") from None
    try:
        whole = json.loads(content)
        found = [_peer(entry) for entry in whole["peers"][: REMEMBERED_MAX + 1]] if whole["format"] == _FORMAT else []
        same = whole["network"] == network.hex()
    except (ValueError, KeyError, TypeError, RecursionError, InvalidRequest):
        raise InvalidRequest(f"{path} holds no remembered peers: it is written anew") from None
    return bounded((each for each in found if same), now)


def save(path: Path, network: bytes, peers: Iterable[Remembered], now: float) -> None:
    """Replaces the file.  Raises OSError, and the old one stays."""
    entries = [{"peer": each.peer, "address": each.address, "seen_at": each.seen_at} for each in bounded(peers, now)]
    content = json.dumps({"format": _FORMAT, "network": network.hex(), "peers": entries}, indent=1) + "\n"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  (no Path has flags)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def renewed(old: Iterable[Remembered], answering: Mapping[PeerId, str], now: int, random: Random) -> list[Remembered]:
    """`old` with those that answer now.  Of these, who is in it already stays, and others fill it by chance: whoever
    invents thousands of peers must not choose whom a node asks after its next start."""
    old = list(old)
    kept = [each.peer for each in old if each.peer in answering]
    others = sorted(answering.keys() - kept)
    chosen = random.sample(others, max(0, min(REMEMBERED_MAX - len(kept), len(others))))
    seen = [Remembered(peer, answering[peer], now) for peer in kept + chosen]
    return bounded([*seen, *(each for each in old if each.peer not in answering)], now)


def bounded(peers: Iterable[Remembered], now: float) -> list[Remembered]:
    """Each peer once, where it was seen last; the newest first, and no more than fit.  What is too old is left out."""
    newest: dict[PeerId, Remembered] = {}
    for each in sorted(peers, key=lambda each: (-each.seen_at, each.peer)):
        # A clock that was ahead must not make a peer the newest for ever.
        if now - AGE_S_MAX <= each.seen_at <= now + AGE_S_MAX:
            newest.setdefault(each.peer, each)
    return list(newest.values())[:REMEMBERED_MAX]


def _peer(entry: dict[str, object]) -> Remembered:
    text, peer, seen_at = entry["address"], entry["peer"], entry["seen_at"]
    if not isinstance(text, str) or not isinstance(peer, str) or type(seen_at) is not int:
        raise TypeError
    parsed = address.parse(f"{text}#{peer}")
    assert parsed.peer is not None, "an address with a '#' names a peer, or is refused"
    return Remembered(parsed.peer, parsed.host_port, seen_at)


def _read(path: Path) -> bytes:
    """Raises OSError, InvalidRequest.  Others could send the node to their own peers, so they may not write it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > FILE_BYTES_MAX:
            raise InvalidRequest(f"{path} is no file, or larger than remembered peers are: it is not read")
        if found.st_mode & 0o022:
            raise InvalidRequest(f"{path} may be written by other users and is not read: `chmod 600` it")
        return os.read(descriptor, FILE_BYTES_MAX)
    finally:
        os.close(descriptor)
