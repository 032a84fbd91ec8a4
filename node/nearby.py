"""The node that a command asks: the one it names, one that runs on this machine, or one started for this answer.

Law: a node that was started here ends with the block, by its pid, and cannot outlive this process: its stdin closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node import presence
from node.client import Client
from protos.errors import BrokenInvariant, ShoalError, WrongModel, by_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A node on this machine that does not say who it is within this time is not asked.
PROBE_S = 1.0
# What a node that was told to end gets before it is killed.
END_S = 10.0
# So that the child runs this very code, wherever the command was called.
_CODE = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which node would do."""

    address: str | None = None  # this one, and no other
    store: Path | None = None  # a new one, with this store
    model: str = ""  # one that serves this model: an id, or the beginning of one
    config: Path | None = None  # of the node to be started


@contextlib.contextmanager
def connected(wanted: Wanted, tell: Callable[[str], None]) -> Iterator[Client]:
    """A client of such a node; `tell` hears what a person should know.

    Raises PeerLost, WrongModel, and whatever the start of a node does.
    """
    if wanted.address is not None:
        with Client(wanted.address) as client:
            _check_model(client, wanted.model)
            yield client
        return
    address = None if wanted.store is not None else _find(wanted.model)
    with contextlib.ExitStack() as stack:
        if address is None:
            tell(f"{_none_found(wanted)}: starting one for this answer ('shoal run' keeps one ready)")
            address = stack.enter_context(_started(wanted))
        yield stack.enter_context(Client(address))


def _check_model(client: Client, model: str) -> None:
    served = client.reach().model_id
    if not served.startswith(model):
        raise WrongModel(f"the node at {client.address} serves model {served}, not {model}")


def _find(model: str) -> str | None:
    for address in presence.addresses():
        with Client(address) as client, contextlib.suppress(ShoalError):
            if client.info(PROBE_S).model_id.startswith(model):
                return address
    return None


def _none_found(wanted: Wanted) -> str:
    """Why none is used that runs already, and where it was looked for."""
    if wanted.store is not None:
        return f"--store asks for a node with {wanted.store}"
    serving = f" that serves {wanted.model}" if wanted.model else ""
    return f"no node of yours{serving} runs on this machine (looked in {presence.folder()})"


@contextlib.contextmanager
def _started(wanted: Wanted) -> Iterator[str]:
    """The address of a node in a child process.  Its own session, so that Ctrl-C reaches only this process."""
    child = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
        _command(wanted),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [_CODE, os.environ.get("PYTHONPATH")]))},
    )
    try:
        yield _first_word(child)
    finally:
        _end(child)


def _command(wanted: Wanted) -> list[str]:
    command = [sys.executable, "-m", "node.cli", "run", "--attached", "--port", "0", "--log-level", "warning"]
    for flag, value in (("--store", wanted.store), ("--model", wanted.model), ("--config", wanted.config)):
        command += [flag, str(value)] if value else []
    return command


def _first_word(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise BrokenInvariant(f"the node started for this answer ended with exit code {child.wait()} and said nothing")
    said = json.loads(line)
    if "error" in said:
        error = said["error"]
        raise by_code[error["code"]](error["message"], retry_after_s=error["retry_after_s"])
    return str(said["address"])


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
