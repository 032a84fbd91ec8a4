"""node.distance: round-trip times, smoothed and least."""

from __future__ import annotations

import pytest

from node.distance import GAIN, SAMPLES, Distances
from protos.ids import PeerId

A, B = PeerId("a"), PeerId("b")


def test_what_was_never_measured_is_unknown() -> None:
    distances = Distances()
    distances.measured(A, 0.01)
    assert distances.smoothed_s(B) is None
    assert distances.least_s(B) is None


def test_a_slow_sample_moves_the_smoothed_time_a_little_and_the_least_not_at_all() -> None:
    distances = Distances()
    distances.measured(A, 0.010)
    distances.measured(A, 0.090)
    assert distances.smoothed_s(A) == pytest.approx(0.010 + GAIN * 0.080)
    assert distances.least_s(A) == 0.010


def test_a_peer_that_moved_away_is_far_once_the_old_samples_are_gone() -> None:
    distances = Distances()
    distances.measured(A, 0.001)
    for _ in range(SAMPLES):
        distances.measured(A, 0.050)
    assert distances.least_s(A) == 0.050


def test_who_is_forgotten_begins_anew() -> None:
    distances = Distances()
    distances.measured(A, 0.001)
    distances.forget(A)
    assert distances.least_s(A) is None
    distances.forget(A)
    distances.measured(A, 0.05)
    assert distances.smoothed_s(A) == pytest.approx(0.05)
