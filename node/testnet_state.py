"""What is known of testnets between commands: one file for each that is up, and the folders of those that were.

Law: the file is there exactly while its nodes may be; what a machine's restart left behind is seen by the processes,
which are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs
import psutil

from node import process
from protos.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDERS_KEPT_MAX: Final = 8
"""Folders with logs of earlier testnets of one name."""

LOCK_S: Final = 5.0
"""For what others do under the lock, which takes milliseconds."""

NAME: Final = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Member:
    """One node's process.  `key` is the file of its identity, and the mark in its command line."""

    number: int  # from 1
    pid: int
    address: str
    peer: str
    hold: tuple[str, ...]
    zone: str
    key: str
    log: str

    @property
    def state(self) -> process.State:
        return process.state(self.pid, self.key)

    @property
    def where(self) -> str:
        """Address and id, for clients that take nobody else."""
        return f"{self.address}#{self.peer}"


@dataclass(slots=True)
class Record:
    """A testnet that is up, or is being started or ended."""

    name: str
    folder: str
    model: str
    starter: int  # pid of the command that starts it
    ready: bool = False
    members: list[Member] = field(default_factory=list)

    def living(self) -> list[Member]:
        return [member for member in self.members if member.state != "dead"]


def base() -> Path:
    return platformdirs.user_state_path("shoal") / "testnet"


def claim(name: str, model: str) -> Record:
    """A new testnet's file and folder.  Raises InvalidRequest if one of that name is up."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"--name is {name!r:.80}; it must be 1 to 32 of a-z, 0-9 and -")
    base().mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone():
        _sweep(name)
        if _file(name).exists():
            raise InvalidRequest(f"testnet {name} is being started elsewhere; give this one another --name")
        record = Record(name, str(_new_folder(name)), model, os.getpid())
        save(record)
    return record


def save(record: Record) -> None:
    """Whole or not at all."""
    partial = _file(record.name).with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(record)))
    partial.replace(_file(record.name))


def load(name: str) -> Record | None:
    """None: no testnet of that name.  Raises InvalidRequest for a file that is none of ours."""
    try:
        text = _file(name).read_text()
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        members = [Member(**{**entry, "hold": tuple(entry["hold"])}) for entry in found.pop("members")]
        return Record(**found, members=members)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InvalidRequest(f"{_file(name)} is no testnet's state; end its nodes by hand, and remove it") from None


def names() -> list[str]:
    """Of the testnets that have a file."""
    return sorted(path.stem for path in base().glob("*.json")) if base().is_dir() else []


def choose(name: str | None) -> str:
    """The one that is meant: the only one that is up, unless it is named."""
    known = names()
    if name is not None or len(known) == 1:
        return name or known[0]
    if NAME in known or not known:
        return NAME
    raise InvalidRequest(f"several testnets are up: {', '.join(known)}; say which with --name")


def forget(record: Record) -> None:
    """Its nodes are gone: what is left are logs."""
    with _alone():
        _forget(record)


def _forget(record: Record) -> None:
    """The file is another's if the name was claimed again meanwhile."""
    for member in record.members:
        Path(member.key).unlink(missing_ok=True)
    for pattern in ("*.key", "*.peers", "*.marks"):  # keys, and what the nodes remembered of each other
        for kept in Path(record.folder).glob(pattern):
            kept.unlink(missing_ok=True)
    now = load(record.name)
    if now is not None and now.folder == record.folder:
        _file(record.name).unlink(missing_ok=True)


def _sweep(name: str) -> None:
    """Removes what a killed command or a restart of the machine left."""
    record = load(name)
    if record is None:
        return
    if living := record.living():
        raise InvalidRequest(
            f"testnet {name} is up already, with {len(living)} of {len(record.members)} nodes alive: "
            f"end it with 'shoal testnet down{_flag(name)}', or give this one another --name"
        )
    if not record.ready and record.starter != os.getpid() and psutil.pid_exists(record.starter):
        raise Unavailable(
            f"testnet {name} is being started by process {record.starter}: wait for it, "
            f"or 'shoal testnet down{_flag(name)}'"
        )
    _forget(record)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A block in which no other command claims or forgets a testnet.  Raises Unavailable if one takes too long."""
    with base().with_suffix(".lock").open("ab") as file:
        gives_up_at = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the file is closed
                break
            except BlockingIOError:
                if time.monotonic() > gives_up_at:
                    raise Unavailable("another command is starting or ending a testnet; try again") from None
                time.sleep(0.01)
            except OSError:  # a file system without locks: then two commands at one moment are the user's to avoid
                break
        yield


def _flag(name: str) -> str:
    return "" if name == NAME else f" --name {name}"


def _new_folder(name: str) -> Path:
    """`name.N`, N rising; of the older ones the newest few stay."""
    taken = sorted(_numbered(name))
    for number in taken[: max(len(taken) - FOLDERS_KEPT_MAX + 1, 0)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(base() / f"{name}.{number}")
    folder = base() / f"{name}.{max(taken, default=0) + 1}"
    folder.mkdir(mode=0o700)
    return folder


def _numbered(name: str) -> list[int]:
    suffixes = (path.name.removeprefix(f"{name}.") for path in base().glob(f"{name}.*") if path.is_dir())
    return [int(suffix) for suffix in suffixes if suffix.isdecimal()]


def _file(name: str) -> Path:
    return base() / f"{name}.json"
