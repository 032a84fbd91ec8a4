"""With two replicas of each expert, a peer that dies, freezes or lies in the middle of a call costs no token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from failing import DOOR, answer_while_a_peer_fails
from swarm import Swarm, ask, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deeds import What
    from failing import Moment
    from oracle import Oracle, Oracles
    from swarm import Answer, Hatchery

pytestmark = pytest.mark.e2e

NEW = 40
PROMPT = 80

MOMENTS: tuple[Moment, ...] = ("prefill", "early", "late")
FAST: list[tuple[str, What, Moment]] = [("mixtral", "kill", moment) for moment in MOMENTS] + [
    ("mixtral", "freeze", "early"),
    ("mixtral", "shape", "late"),
    ("mixtral", "nan", "prefill"),
]
ALL: list[tuple[str, What, Moment]] = [
    ("mixtral", what, moment)
    for what in ("kill", "freeze", "shape", "nan", "dtype", "bytes", "silence")
    for moment in MOMENTS
]
ALL += [
    (family, what, moment)
    for family in ("deepseek_v3", "gpt_oss")
    for what in ("kill", "freeze", "shape")
    for moment in MOMENTS
]
CASES = [
    pytest.param(case, id=" ".join(case), marks=() if case in FAST else pytest.mark.slow)
    for case in sorted(ALL, key=lambda case: (case not in FAST, case))
]


@dataclass
class Shoal:
    """Four nodes with two replicas of each expert, for as long as one family's cases last."""

    family: str
    swarm: Swarm
    oracle: Oracle

    def ask(self) -> Answer:
        return ask(self.swarm.client(DOOR), self.oracle.prompt(PROMPT), NEW)


class Shoals:
    """One at a time: the cases come sorted by family."""

    def __init__(self, hatchery: Hatchery, oracle_of: Oracles, factory: pytest.TempPathFactory) -> None:
        self._hatchery = hatchery
        self._oracle_of = oracle_of
        self._factory = factory
        self._shoal: Shoal | None = None

    def of(self, family: str) -> Shoal:
        if self._shoal is None or self._shoal.family != family:
            self.end()
            oracle = self._oracle_of(family)
            swarm = Swarm(self._hatchery, self._factory.mktemp("swarm"), oracle.store, spread(4, 2)).__enter__()
            self._shoal = Shoal(family, swarm, oracle)
        return self._shoal

    def end(self) -> None:
        if self._shoal is not None:
            self._shoal.swarm.__exit__()
        self._shoal = None


@pytest.fixture(scope="module")
def shoals(hatchery: Hatchery, oracle_of: Oracles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shoals]:
    made = Shoals(hatchery, oracle_of, tmp_path_factory)
    yield made
    made.end()


@pytest.mark.parametrize("case", CASES)
def test_a_peer_that_fails_in_the_middle_of_a_call_costs_no_token(
    shoals: Shoals, case: tuple[str, What, Moment]
) -> None:
    family, what, moment = case
    shoal = shoals.of(family)
    answers = answer_while_a_peer_fails(shoal.swarm, what, moment, shoal.ask)
    assert all(shoal.oracle.excuses(shoal.oracle.prompt(PROMPT), answer.tokens) for answer in answers)
