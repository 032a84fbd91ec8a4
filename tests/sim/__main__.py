"""The virtual network from the command line: one seed in words, or thousands in figures.

python -m tests.sim --seed 7              one run, readable; fails if a law breaks
python -m tests.sim --seeds 5000 [--first 0] [--jobs 2]

Law: a run depends on its seed alone, so a seed that fails here fails again by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING

from tests.sim import trials
from tests.sim.run import DEAD_S_MAX, SETTLE_S_MAX, Run, play

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.sim.run import Outcome
    from tests.sim.trials import Scenario

REPORT_EVERY = 500


def main() -> int:
    arguments = _arguments()
    if arguments.seed is not None:
        return _tell(arguments.seed)
    return _many(range(arguments.first, arguments.first + arguments.seeds), arguments.jobs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="run this one, and tell what happens")
    parser.add_argument("--seeds", type=int, default=200, help="run so many (200)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    return parser.parse_args()


def _tell(seed: int) -> int:
    scenario = trials.draw(seed)
    print(_cast(scenario))
    outcome = Run(scenario, tells=True).play()
    print("\n".join(outcome.story))
    print(verdict(outcome))
    return int(outcome.broken is not None)


def _cast(scenario: Scenario) -> str:
    skewed = {host: f"{by_s:+.0f} s" for host, by_s in scenario.skews_s.items() if by_s}
    return (
        f"seed {scenario.seed}: {scenario.hosts} hosts, {scenario.quality}, islands {scenario.between_s * 1000:.0f} ms"
        f" apart, evil {sorted(scenario.evil) or 'nobody'}, clocks off: {skewed or 'none'}"
    )


def verdict(outcome: Outcome) -> str:
    """One line; of a failure, with the command that repeats it."""
    if outcome.broken is not None:
        return f"seed {outcome.seed} FAILED {outcome.broken}\n  again: make sim SEED={outcome.seed}"
    return (
        f"seed {outcome.seed}: all laws hold; {outcome.steps} steps; agreed {outcome.settled_s:.0f} s after the last"
        f" trouble (bound {SETTLE_S_MAX:.0f}); longest a live peer was thought dead {outcome.longest_dead_s:.1f} s"
        f" (bound {DEAD_S_MAX:.0f}); digest {outcome.digest}"
    )


def _many(seeds: Iterable[int], jobs: int) -> int:
    began = time.monotonic()
    failed, settled_s, dead_s, steps = [], [], [], 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for count, outcome in enumerate(pool.imap_unordered(play, seeds, chunksize=4), 1):
            steps += outcome.steps
            dead_s.append(outcome.longest_dead_s)
            if outcome.broken is None and outcome.settled_s is not None:
                settled_s.append(outcome.settled_s)
            else:
                failed.append(outcome.seed)
                print(verdict(outcome), flush=True)
            if count % REPORT_EVERY == 0:
                print(f"{count} seeds in {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    print(
        f"{len(dead_s)} seeds, {steps} steps, {time.monotonic() - began:.0f} s; {len(failed)} failed {sorted(failed)}\n"
        f"agreement after the last trouble: {_spread(settled_s)}\n"
        f"longest a live peer was thought dead: {_spread(dead_s)}"
    )
    return int(bool(failed))


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    ordered = sorted(values)
    middle, late = (ordered[len(ordered) * part // 100] for part in (50, 99))
    return f"p50 {middle:.1f} s, p99 {late:.1f} s, most {ordered[-1]:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
