"""PROTOCOL.md says what the code does: its tables are compared with the code, row by row."""

import re
from pathlib import Path

import pytest

from node import status
from protos import limits
from protos.errors import Gap, LocalError, RemoteError, ShoalError, Unavailable, by_code

ROOT = Path(__file__).resolve().parent.parent.parent
PROTOCOL = (ROOT / "protos" / "PROTOCOL.md").read_text()
FAMILIES = {"local": LocalError, "remote": RemoteError, "unavailable": Unavailable}


def rows(title: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    section = re.split(rf"^## .*{title}.*$", PROTOCOL, flags=re.MULTILINE)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return table[2:]


ERRORS = {row[0]: row for row in rows("Errors")}


def test_the_error_table_has_every_code_once():
    assert sorted(ERRORS) == sorted(by_code)
    assert len(rows("Errors")) == len(by_code)


def made(code: str) -> ShoalError:
    kind = by_code[code]
    return kind("why", held=0) if issubclass(kind, Gap) else kind("why")


@pytest.mark.parametrize("code", sorted(by_code))
def test_an_error_has_the_family_the_status_and_the_exit_code_of_the_table(code: str):
    _, family, grpc_status, _, exit_code = ERRORS[code][:5]
    assert issubclass(by_code[code], FAMILIES[family])
    assert status.status_of(made(code)).name == grpc_status
    assert str(status.exit_code(made(code))) == exit_code


def test_the_limits_table_has_every_limit_with_its_number():
    names = {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and name not in ("KIB", "MIB", "GIB", "TIB")
    }
    table = {row[0]: row[1] for row in rows("Limits")}
    assert sorted(table) == sorted(names)
    for name, value in names.items():
        assert number_in(table[name]) == value, name


def number_in(text: str) -> float:
    """`64 MiB`, `2^17`, `2^64 - 1`, `0.01`, `1e-6`, `32`."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    if power := re.fullmatch(r"2\^(\d+)( - 1)?", text):
        return 2 ** int(power[1]) - bool(power[2])
    number, _, unit = text.partition(" ")
    return float(number) * units.get(unit, 1)
