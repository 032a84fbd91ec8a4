"""Structured logs on stderr: for people, or one JSON object a line.

Law: no prompt, no answer and no token id is ever logged; what is, has a name and a unit.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger


_PEERS = ("peer", "door")
_SHORT = 8


def configure(level: str = "info", form: Literal["console", "json"] = "console") -> None:
    """Sets up logging for the process; may be called again."""
    structlog.configure(
        processors=[*_processors(form), _renderer(form)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: _Stderr(),
        cache_logger_on_first_use=False,
    )


def get(room: str) -> FilteringBoundLogger:
    """A logger that names the part of the node that speaks."""
    logger: FilteringBoundLogger = structlog.get_logger(room=room)
    return logger


class _Stderr:
    """Writes to what is stderr now; a terminal that is gone, or a full disk behind it, must not fail an answer."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)  # noqa: T201  (the one place that writes logs)

    debug = info = warning = error = critical = exception = msg


def _processors(form: str) -> list[Processor]:
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    more: list[Processor] = [structlog.processors.format_exc_info]
    if form == "console":
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        more = [_shorten]
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        stamp,
        structlog.processors.StackInfoRenderer(),
        *more,
    ]


def _shorten(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Peer ids as people see them everywhere."""
    return {key: value[:_SHORT] if key in _PEERS and isinstance(value, str) else value for key, value in event.items()}


def _renderer(form: str) -> Processor:
    if form == "console":
        # The renderer's own choice shows the values of variables, and a prompt may be among them.
        plain = structlog.dev.plain_traceback
        return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=plain)
    return structlog.processors.JSONRenderer()
