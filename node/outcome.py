"""How a command ends: what it says on stderr, or as JSON on stdout, and its exit code.

Law: every failure is one line that says what to do, and an exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final

import typer

from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 a bug in shoal; 2 refused: usage, input or model; "
    "3 unavailable now, try later; 130 interrupted."
)


@contextlib.contextmanager
def told(*, as_json: bool = False, interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the process with what an error says, and its exit code."""
    from node import log, status

    log.configure()
    try:
        yield
    except ShoalError as error:
        raise typer.Exit(fail(error, as_json=as_json)) from None
    except KeyboardInterrupt:
        tell(interrupted)
        raise typer.Exit(status.EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(status.EXIT_LOCAL) from None
    except OSError as error:
        if error.errno is None:  # a library's own, not the system's
            raise
        raise typer.Exit(fail(status.from_system(error), as_json=as_json)) from None


def fail(error: ShoalError, *, as_json: bool) -> int:
    """Tells it, and gives the exit code."""
    from node import status

    if as_json:
        from node import answer

        answer.write_json(answer.failure(error))
    else:
        tell(f"error: {error.message}")
    return status.exit_code(error)


def tell(line: str) -> None:
    """On stderr."""
    typer.echo(line, err=True)
