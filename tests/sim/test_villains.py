"""What each kind of malice comes to, alone: every law holds, and the network stays what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.member import State
from node.profile import LAN
from tests.sim import trials
from tests.sim.run import Run
from tests.sim.troubles import Arrival, Evil, Malice, Pause, Split

VILLAIN = 3


def _run(malice: Malice, *others: object, for_s: float = 20.0) -> Run:
    return Run(trials.scene(Evil(10.0, for_s, VILLAIN, malice), *others), tells=True)  # type: ignore[arg-type]


def _turns(run: Run, state: State) -> list[str]:
    return [line for line in run.trace.story if line.endswith(state.name)]


@pytest.mark.parametrize("malice", Malice, ids=lambda malice: malice.name.lower())
def test_no_law_is_broken(malice: Malice) -> None:
    outcome = _run(malice).play()
    assert outcome.broken is None


def test_a_forged_farewell_or_accusation_changes_nothing() -> None:
    run = _run(Malice.FORGE)
    run.play()
    assert not _turns(run, State.LEFT)
    assert not _turns(run, State.SUSPECT)


def test_higher_numbers_under_old_signatures_change_nothing() -> None:
    run = _run(Malice.INFLATE)
    run.play()
    assert not _turns(run, State.LEFT)
    assert not _turns(run, State.SUSPECT)


def test_who_is_accused_again_and_again_refutes_and_is_never_thought_dead() -> None:
    run = _run(Malice.ACCUSE)
    run.play()
    assert _turns(run, State.SUSPECT)
    assert not _turns(run, State.DEAD)


def test_what_was_heard_before_changes_nothing() -> None:
    run = _run(Malice.REPLAY)
    run.play()
    assert not _turns(run, State.SUSPECT)


def test_a_flood_of_datagrams_makes_nobody_look_dead() -> None:
    run = _run(Malice.FLOOD, for_s=5.0)
    run.play()
    assert not _turns(run, State.DEAD)


def test_a_newcomer_learns_of_all_although_one_of_its_two_seeds_hides_them() -> None:
    arrival = Arrival(15.0, 0.0, 5)
    scenario = replace(trials.scene(Evil(10.0, 60.0, VILLAIN, Malice.HIDE), arrival), ends_s=20.0)
    scenario = replace(scenario, seeds={**scenario.seeds, 5: (VILLAIN, 0)})
    run = Run(scenario)
    run.play()
    newcomer = run.network.machines[5].host
    assert newcomer is not None
    assert {member.state for member in newcomer.beliefs()} == {State.ALIVE}
    assert len(list(newcomer.beliefs())) == 5


def test_invented_identities_find_the_table_full_and_push_nobody_out() -> None:
    small = replace(LAN, members_max=8, tombstones_max=4)
    run = Run(trials.scene(Evil(10.0, 60.0, VILLAIN, Malice.INVENT)), profile=small)
    outcome = run.play()
    assert outcome.broken is None
    honest = [machine.host for machine in run.network.machines if machine.host is not None]
    assert max(len(list(host.beliefs())) for host in honest) == 8


def test_one_sided_silence_kills_nobody_for_long() -> None:
    """A hears B, and B does not hear A: helpers and refutations go around."""
    split = Split(10.0, 30.0, frozenset({1}), frozenset({2}), both_ways=False)
    outcome = Run(trials.scene(split)).play()
    assert outcome.broken is None


def test_who_was_stopped_for_long_blames_nobody_when_it_goes_on() -> None:
    run = Run(trials.scene(Pause(10.0, 40.0, 2)), tells=True)
    outcome = run.play()
    assert outcome.broken is None
    assert _turns(run, State.DEAD)
    assert not [line for line in _turns(run, State.DEAD) if "  2 about" in line]
