"""Two hundred seeds of the mixed-fault scenario: every law at every step, and agreement after the last trouble.

A seed that fails is printed with the command that runs it alone: `make sim SEED=...`.
"""

from __future__ import annotations

import pytest

from tests.sim.__main__ import verdict
from tests.sim.run import play

SEEDS = 200
STORM = 4091  # two peers that claim the highest incarnation, and once answered each other without end

pytestmark = pytest.mark.sim


@pytest.mark.parametrize("seed", [*range(SEEDS), STORM])
def test_every_law_holds_and_everybody_agrees_in_the_end(seed: int) -> None:
    outcome = play(seed)
    assert outcome.broken is None, verdict(outcome)
    assert outcome.settled_s is not None
