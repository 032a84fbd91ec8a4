"""The mixed-fault scenario over node/routing_table: real records, real signatures, and clocks that records allow.

A record from a clock that is more than five minutes ahead is refused, so clocks are only a minute off here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim import trials
from tests.sim.run import Run
from tests.sim.troubles import ClockStep, Evil, Malice

SEEDS = 10
CLOCKS_PART = 60  # of the scenario's skews


def _mild(seed: int) -> trials.Scenario:
    scenario = trials.draw(seed)
    return replace(
        scenario,
        skews_s={host: by_s / CLOCKS_PART for host, by_s in scenario.skews_s.items()},
        troubles=tuple(
            replace(trouble, by_s=trouble.by_s / CLOCKS_PART) if isinstance(trouble, ClockStep) else trouble
            for trouble in scenario.troubles
        ),
    )


@pytest.mark.sim
@pytest.mark.parametrize("seed", range(1000, 1000 + SEEDS))
def test_every_law_holds_over_the_real_routing_table(seed: int) -> None:
    outcome = Run(_mild(seed), real_records=True).play()
    assert outcome.broken is None, (seed, outcome.broken)


def test_forged_records_are_refused_by_the_real_table() -> None:
    run = Run(trials.scene(Evil(10.0, 15.0, 3, Malice.FORGE)), real_records=True)
    assert run.play().broken is None


def test_a_clock_that_is_an_hour_ahead_keeps_its_node_out_and_harms_nobody_else() -> None:
    scenario = replace(trials.scene(hosts=4), skews_s={0: 0.0, 1: 0.0, 2: 0.0, 3: 3600.0})
    run = Run(scenario, real_records=True)
    outcome = run.play()
    assert "3" in (outcome.broken or "")
    late = run.network.machines[3].host
    for machine in run.network.machines[:3]:
        assert machine.host is not None
        assert late is not None
        assert late.peer not in machine.host.disk.book.pages
        assert len(list(machine.host.beliefs())) == 2
