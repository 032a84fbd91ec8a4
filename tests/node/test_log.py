"""Logs: short ids for people, whole ones for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import pytest
import structlog

from node import log

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = "abcdefgh" + "i" * 44


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def said(form: Literal["console", "json"], capsys: pytest.CaptureFixture[str], peer: str | None = PEER) -> str:
    log.configure("info", form)
    log.get("gossip").info("a peer is alive", peer=peer)
    return capsys.readouterr().err


def test_people_see_short_ids(capsys: pytest.CaptureFixture[str]) -> None:
    text = said("console", capsys)
    assert "peer=abcdefgh " in text
    assert PEER not in text


def test_a_line_about_nobody_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "peer=None" in said("console", capsys, None)


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_failure_is_told_without_what_was_being_asked(
    form: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "".join(["sec", "ret"])  # not as the source has it, which a traceback may quote
    log.configure("info", form)
    try:
        raise ValueError(len(prompt))
    except ValueError:
        log.get("door").exception("an answer failed here")
    text = capsys.readouterr().err
    assert "an answer failed here" in text
    assert "ValueError: 6" in text
    assert "secret" not in text


def test_programs_get_whole_ids(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(said("json", capsys))["peer"] == PEER
