"""A bar on a terminal, lines elsewhere, and nothing left of either."""

import io
import sys

import pytest

from node import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: pytest puts its own stderr in place between a fixture and its test."""
    stderr = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def test_without_a_terminal_each_phase_is_told_once() -> None:
    told: list[str] = []
    with progress.shown(told.append) as report:
        for what, done, total in [("loading", 0, 0), ("packing", 1, 3), ("packing", 3, 3)]:
            report(what, done, total)
    assert told == ["loading", "packing"]


def test_what_ends_soon_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with progress.shown(print) as report:
        report("packing", 1, 3)
        report("packing", 3, 3)
    assert stderr.getvalue() == ""


def test_what_takes_long_is_a_bar_of_the_phase_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    with progress.shown(print) as report:
        report("packing", 1, 4)
        assert "packing" in stderr.getvalue()
        report("checking", 1, 2)
    assert "50%" in stderr.getvalue()
    assert stderr.getvalue().endswith("\x1b[2K")  # the line is erased


def test_what_cannot_be_counted_is_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with progress.shown(print) as report:
        report("loading", 0, 0)
    assert "loading" in stderr.getvalue()
