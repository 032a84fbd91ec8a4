"""The checkers can fail: each way to break the core on purpose is caught, by the law that it breaks."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from node.member import Member, State
from node.membership import Membership
from node.membership_effect import Changed
from tests.sim import trials
from tests.sim.run import Run
from tests.sim.troubles import Crash, Evil, Leave, Malice, Pause, Split

if TYPE_CHECKING:
    from node.claim import Claim, PeerHash, Suspicion
    from tests.sim.troubles import Trouble


class BelievesEverySignature(Membership):
    __slots__ = ()

    def _fits(self, item: Any, teller: PeerHash) -> bool:
        return True


class BelievesADeath(Membership):
    """Another's suspicion is taken for a death."""

    __slots__ = ()

    def _suspect(self, held: Member, suspicion: Suspicion, now: float) -> None:
        super()._suspect(held, suspicion, now)
        if suspicion.accuser != self._voice.peer:
            self._bury(suspicion.subject, now)


class RaisesAnother(Membership):
    """Refutes for somebody else, as a friend would."""

    __slots__ = ()

    def _suspect(self, held: Member, suspicion: Suspicion, now: float) -> None:
        raised = replace(held.claim, incarnation=held.claim.incarnation + 1)
        self._adopt(raised, held, now)


class NeverRefutes(Membership):
    __slots__ = ()

    def _meet_accusation(self, suspicion: Suspicion, teller: PeerHash, now: float) -> bool:
        return False


class GoesBack(Membership):
    """Takes the last word that it hears for the newest."""

    __slots__ = ()

    def _take_claim(self, claim: Claim, teller: PeerHash, now: float, told: int | None = None) -> bool:
        held = self._table.get(claim.peer)
        if held is not None and claim.rank < held.claim.rank and self._fits(claim, teller):
            self._adopt(claim, held, now)
            return True
        return super()._take_claim(claim, teller, now, told)


class LeavesTheDeadAlone(Membership):
    """Tells nobody that it is thought dead."""

    __slots__ = ()

    def _probe_dead(self, now: float) -> None:
        self._dead_probe_at = now + 10.0


class TakesAFarewellForADeath(Membership):
    __slots__ = ()

    def _change(self, before: State | None, after: Member, now: float) -> None:
        state = State.DEAD if after.state == State.LEFT else after.state
        self._suspicions.keep_notice(self._voice.accuse(after.claim))
        super()._change(before, Member(after.claim, state), now)


class GoesBackItself(Membership):
    __slots__ = ()

    def _raise_above(self, incarnation: int, now: float) -> None:
        self._issue(incarnation - 1, self._voice.claim.sequence, now)


class PassesOnWhatItHears(Membership):
    """Gossips first and verifies later."""

    __slots__ = ()

    def _take_claim(self, claim: Claim, teller: PeerHash, now: float, told: int | None = None) -> bool:
        self._tell(claim, now)
        return super()._take_claim(claim, teller, now, told)


class KeepsItToItself(Membership):
    """Believes deaths and does not say so to its driver."""

    __slots__ = ()

    def handle(self, event: Any, now: float) -> list[Any]:
        effects = super().handle(event, now)
        return [effect for effect in effects if not (isinstance(effect, Changed) and effect.after == State.DEAD)]


def _evil(malice: Malice) -> Evil:
    return Evil(10.0, 20.0, 3, malice)


SPLIT = Split(10.0, 40.0, frozenset({0, 1, 2}), frozenset({3, 4, 5}))
DEATH = Crash(10.0, math.inf, 4)

MUTANTS: dict[type[Membership], tuple[tuple[Trouble, ...], str]] = {
    BelievesEverySignature: ((_evil(Malice.FORGE),), "never signed"),
    BelievesADeath: ((_evil(Malice.ACCUSE),), "of suspicion"),
    RaisesAnother: ((DEATH,), "never signed"),
    NeverRefutes: ((_evil(Malice.ACCUSE),), "buries .* alive"),
    GoesBack: ((Pause(10.0, 15.0, 2), _evil(Malice.REPLAY)), "goes back"),
    LeavesTheDeadAlone: ((SPLIT,), "beliefs are wrong|buries .* alive"),
    TakesAFarewellForADeath: ((Leave(10.0, math.inf, 4),), "who did not claim that"),
    GoesBackItself: ((_evil(Malice.ACCUSE),), "in its own claim"),
    PassesOnWhatItHears: ((_evil(Malice.INFLATE),), "passes on what was never signed"),
    KeepsItToItself: ((DEATH,), "does not say so"),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_core_is_caught(mutant: type[Membership]) -> None:
    troubles, law = MUTANTS[mutant]
    outcome = Run(trials.scene(*troubles), core=mutant).play()
    assert re.search(law, outcome.broken or "nothing"), outcome


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_whole_core_is_not(mutant: type[Membership]) -> None:
    troubles, _ = MUTANTS[mutant]
    outcome = Run(trials.scene(*troubles)).play()
    assert outcome.broken is None
