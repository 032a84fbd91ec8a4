"""The demo's text on the terminal."""

import os
import shutil

import pytest

from node.demo.paragraph import WIDTH_MAX, Paragraph


@pytest.mark.parametrize(("columns", "width"), [(500, WIDTH_MAX), (40, 40)])
def test_lines_are_as_wide_as_the_terminal_and_not_wider_than_can_be_read(
    columns: int, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    assert WIDTH_MAX < 500
    paragraph = Paragraph()
    paragraph.add("a " * 300)
    paragraph.end_line()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) in (width - 1, width)
