"""A wrong command line, told in one line as every other failure.

Law: whatever typer says about the arguments ends as `error: ...` on stderr and exit code 2, never as a box.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_USAGE = 2


class Commands(TyperGroup):
    """typer's group of commands, which tells its own errors differently."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Always ends the process, with the exit code that the command gave."""
        try:
            exit_code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except TyperException as error:
            typer.echo(f"error: {told(error)}", err=True)
            sys.exit(EXIT_USAGE)
        except typer.Abort:
            sys.exit(1)
        sys.exit(exit_code or 0)


def told(error: TyperException) -> str:
    """What is wrong, and where help is."""
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "shoal"
    return f"{text[:1].lower()}{text[1:]}; see {command} --help"
