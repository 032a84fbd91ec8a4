"""Testnets of toys: how one is started, and what one of them does instead.

As a program: `toy_testnet.py DEED up ...`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from node import cli, testnet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.testnet_state import Member
    from node.topology import Place

TOY = Path(__file__).with_name("toy_testnet_node.py")

plan = testnet.planned


def toy_command(options: testnet.Options, nodes: int):
    def of(member: Member, seeds: Sequence[str]) -> list[str]:
        port = member.address.rpartition(":")[2]
        attached = ["--attached"] if options.attached else []
        return [sys.executable, str(TOY), "--identity", member.key, "--port", port, *attached]

    return of


def toy_planned(deed: str):
    """As testnet.planned; the nodes find the deed beside their keys."""

    def planned(folder: Path, places: Sequence[Place], free: Sequence[int]) -> list[Member]:
        (folder / "deed").write_text(deed)
        return plan(folder, places, free)

    return planned


if __name__ == "__main__":
    testnet.command, testnet.planned = toy_command, toy_planned(sys.argv[1])
    cli.app(sys.argv[2:])
