"""Progress of what takes long: a bar on a terminal, a line a phase elsewhere.  Always on stderr.

Law: nothing is shown for what ends within SHOWN_AFTER_S, and a bar never outlives its block.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress, TaskID

    Report = Callable[[str, int, int], None]

SHOWN_AFTER_S = 0.3


@contextlib.contextmanager
def shown(tell: Callable[[str], object]) -> Iterator[Report]:
    """A function to call with (what, done, total) as the work goes on, from one thread at a time.

    A total of 0 is of what cannot be counted: it is shown at once.  `tell` hears the phases if there is no terminal.
    """
    if not sys.stderr.isatty():
        yield _Lines(tell)
        return
    with contextlib.ExitStack() as stack:
        yield _Bars(stack)


class _Lines:
    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._phase = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._phase:
            self._phase = what
            self._tell(what)


class _Bars:
    """One bar: of the phase that runs."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._since = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None and total and time.monotonic() - self._since < SHOWN_AFTER_S:
            return
        progress = self._progress = self._progress or self._begin()
        if what != self._phase or self._task is None:
            if self._task is not None:
                progress.remove_task(self._task)
            self._phase, self._task = what, progress.add_task(what, total=total or None)
        progress.update(self._task, completed=done)

    def _begin(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._stack.callback(progress.stop)  # before the start, which a signal may cut off with the cursor hidden
        progress.start()
        return progress
