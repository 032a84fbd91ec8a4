"""The nodes that a command asks: those it names, those that run on this machine, or one started for this answer.

Law: a node that was started here ends with the block, by its pid, and cannot outlive this process: its stdin closes.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from node import child, presence
from node.client import Client
from node.doors import Doors
from node.identity import Identity
from protos.errors import BrokenInvariant, PeerLost, ShoalError, by_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A node on this machine that does not say who it is within this time is not asked.
PROBE_S = 1.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which node would do."""

    addresses: tuple[str, ...] = ()  # these and no others, the first that answers
    store: Path | None = None  # a new one, with this store
    model: str = ""  # one that serves this model: an id, or the beginning of one
    config: Path | None = None  # of the node to be started
    identity: Path | None = None  # the key to ask with; None: the user's own
    plaintext: bool = False  # the nodes speak no TLS


@contextlib.contextmanager
def connected(wanted: Wanted, tell: Callable[[str], None]) -> Iterator[Doors]:
    """Clients of such nodes, in the order in which to ask; `tell` hears what a person should know.

    Raises InvalidRequest, and whatever the start of a node does.
    """
    identity = key(wanted.identity)
    with contextlib.ExitStack() as stack:
        addresses = wanted.addresses or (() if wanted.store else _running(wanted, identity))
        if not addresses:
            tell(f"{_none_found(wanted)}: starting one for this answer ('shoal run' keeps one ready)")
            addresses = (stack.enter_context(_started(wanted)),)
        plaintext = wanted.plaintext
        clients = [stack.enter_context(Client(address, identity, plaintext=plaintext)) for address in addresses]
        yield Doors(clients, tell, wanted.model)


@contextlib.contextmanager
def known(wanted: Wanted, tell: Callable[[str], None]) -> Iterator[Doors]:
    """As connected, but only nodes that run already.  Raises PeerLost if none is named and none is here."""
    identity = key(wanted.identity)
    addresses = wanted.addresses or _running(wanted, identity)
    if not addresses:
        raise PeerLost(f"{_none_found(wanted)}: start one with 'shoal run', or name one with --node")
    with contextlib.ExitStack() as stack:
        plaintext = wanted.plaintext
        clients = [stack.enter_context(Client(address, identity, plaintext=plaintext)) for address in addresses]
        yield Doors(clients, tell, wanted.model)


def key_path() -> Path:
    """Where the key lies that this user asks with."""
    return platformdirs.user_data_path("shoal") / "client.key"


def key(path: Path | None) -> Identity:
    """The key of that file, or else the user's own, which is made on first use.

    Where it cannot be kept (a file system that is read-only) it lasts for one command: nodes that name their clients
    will refuse it, all others do not mind.
    """
    if path is not None:
        return Identity.load(path)
    try:
        return Identity.load_or_create(key_path())
    except OSError:
        return Identity.create()


def _running(wanted: Wanted, identity: Identity) -> tuple[str, ...]:
    """This user's nodes on this machine, beginning with one that answers and serves the model; none if none does."""
    addresses = presence.addresses()
    for number, address in enumerate(addresses):
        with Client(address, identity, plaintext=wanted.plaintext) as client, contextlib.suppress(ShoalError):
            if client.info(PROBE_S).model_id.startswith(wanted.model):
                return tuple(addresses[number:])
    return ()


def _none_found(wanted: Wanted) -> str:
    """Why none is used that runs already, and where it was looked for."""
    if wanted.store is not None:
        return f"--store asks for a node with {wanted.store}"
    serving = f" that serves {wanted.model}" if wanted.model else ""
    return f"no node of yours{serving} runs on this machine (looked in {presence.folder()})"


@contextlib.contextmanager
def _started(wanted: Wanted) -> Iterator[str]:
    """The address of a node in a child process.

    It has a key of its own: with the user's it would be the same peer as a node that runs already.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        identity = Path(folder) / "node.key"
        Identity.create().save(identity)
        node = child.start(_command(wanted, identity), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            yield _first_word(node)
        finally:
            child.end(node)


def _command(wanted: Wanted, identity: Path) -> list[str]:
    command = child.run_command("--attached", "--port", "0", "--log-level", "warning", "--identity", str(identity))
    for flag, value in (("--store", wanted.store), ("--model", wanted.model), ("--config", wanted.config)):
        command += [flag, str(value)] if value else []
    return command + (["--plaintext"] if wanted.plaintext else [])


def _first_word(node: subprocess.Popen[bytes]) -> str:
    assert node.stdout is not None
    line = node.stdout.readline()
    if not line:
        raise BrokenInvariant(f"the node started for this answer ended with exit code {node.wait()} and said nothing")
    said = json.loads(line)
    if "error" in said:
        error = said["error"]
        raise by_code[error["code"]](error["message"], retry_after_s=error["retry_after_s"])
    return str(said["address"])
