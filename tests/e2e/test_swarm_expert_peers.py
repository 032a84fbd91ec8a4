"""With two replicas of each expert, a peer that dies, freezes or lies in the middle of a call costs no token.

A case counts only if the peer had a call in its hands at that moment, and the door says that the call went elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from deeds import Deed
from swarm import Swarm, ask, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deeds import What
    from oracle import Oracle, Oracles
    from swarm import Answer, Hatchery, Node

pytestmark = pytest.mark.e2e

NEW = 40
PROMPT = 80
DOOR = 0

MOMENTS = ("prefill", "early", "late")
FAST = [("mixtral", "kill", moment) for moment in MOMENTS] + [
    ("mixtral", "freeze", "early"),
    ("mixtral", "shape", "late"),
    ("mixtral", "nan", "prefill"),
]
ALL: list[tuple[str, What, str]] = [
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

    def calls(self) -> dict[str, int]:
        """To other nodes, for the door's stage, since it started."""
        mine = self.swarm[DOOR].peer
        return {peer: work.calls for peer, work in self.swarm.work(DOOR).items() if peer != mine}


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
def test_a_peer_that_fails_in_the_middle_of_a_call_costs_no_token(shoals: Shoals, case: tuple[str, What, str]) -> None:
    family, what, moment = case
    shoal = shoals.of(family)
    well = shoal.ask()
    assert shoal.oracle.excuses(shoal.oracle.prompt(PROMPT), well.tokens)
    victim, calls = _busiest(shoal)
    # Served well before: half a prompt's layers, the first calls after it, or half of what it had (others share).
    after = {"prefill": 1, "early": 2, "late": calls // 2}[moment]
    victim.order(Deed(what, "prefill" if moment == "prefill" else "decode", after))
    try:
        retried = _retried(shoal, victim)
        answer = shoal.ask()
        assert len(victim.done) == 1, "the peer was in use at that moment"
        assert _retried(shoal, victim) > retried, "a call went elsewhere, and the door counted it"
        assert victim.peer in [notice.peer_id for notice in answer.notices], "the client was told"
        assert shoal.oracle.excuses(shoal.oracle.prompt(PROMPT), answer.tokens)
    finally:
        _mend(shoal, victim)


def _busiest(shoal: Shoal) -> tuple[Node, int]:
    """The node, not the door, that got the most calls of an answer, and how many."""
    before = shoal.calls()
    shoal.ask()
    gained = {peer: count - before.get(peer, 0) for peer, count in shoal.calls().items()}
    peer = max(gained, key=lambda peer: gained[peer])
    return shoal.swarm.by_peer(peer), gained[peer]


def _retried(shoal: Shoal, victim: Node) -> int:
    work = shoal.swarm.work(DOOR)
    return work[victim.peer].retried if victim.peer in work else 0


def _mend(shoal: Shoal, victim: Node) -> None:
    """The peer is well again, and the door has forgotten what it knew of it: the next case is as the first one."""
    victim.kill()
    shoal.swarm[DOOR].kill()
    shoal.swarm.restart(victim, shoal.swarm[DOOR])
