"""What the tests of swarms share: one hatchery, one oracle a family, and a client's key in a folder of its own."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import oracle
import pytest
from swarm import Hatchery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oracle import Oracle, Oracles

# A run in a shell's background is born with Ctrl-C ignored, and would hand that on to each command that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def hatchery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatchery]:
    with pytest.MonkeyPatch.context() as patch, Hatchery() as running:
        for name in ("DATA", "CONFIG"):
            patch.setenv(f"XDG_{name}_HOME", str(tmp_path_factory.mktemp(f"client-{name.lower()}")))
        yield running


@pytest.fixture(scope="session")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """Of families, made when first asked for."""
    known: dict[str, Oracle] = {}

    def find(family: str) -> Oracle:
        if family not in known:
            known[family] = oracle.of_family(family, tmp_path_factory.mktemp(family))
        return known[family]

    return find
