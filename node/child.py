"""`shoal run` as a child process of a command.

Law: the child runs this very code in a session of its own, so that Ctrl-C reaches only the command; it is ended by
the process that is held here, never by a name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

# Wherever the command was called.
_CODE = str(Path(__file__).parents[1])

# What a node that was told to end gets before it is killed.
END_S = 10.0


def run_command(*arguments: str) -> list[str]:
    """`shoal run` with such arguments, as this interpreter starts it."""
    return [sys.executable, "-m", "node.cli", "run", *arguments]


def start(
    command: Sequence[str], *, stdin: int = subprocess.DEVNULL, stdout: int | IO[bytes], stderr: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """`stdin` PIPE: with --attached the node ends when this process does."""
    return subprocess.Popen(  # noqa: S603  (our own interpreter and module)
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [_CODE, os.environ.get("PYTHONPATH")]))},
    )


def end(child: subprocess.Popen[bytes]) -> None:
    """Tells it to end, and kills it if it does not within END_S; closes the pipes."""
    child.terminate()
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
