"""node.rates: who sends too much is held back, and nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.rates import Rates


def test_a_burst_is_let_through_and_then_so_many_a_second() -> None:
    rates = Rates[str](per_s=2.0, burst=5.0, senders_max=10)
    assert [rates.admit("a", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [rates.admit("a", 1.0) for _ in range(3)] == [True, True, False]


def test_a_flood_costs_nobody_else_anything() -> None:
    rates = Rates[str](per_s=1.0, burst=2.0, senders_max=10)
    assert not all(rates.admit("flood", 0.0) for _ in range(1000))
    assert rates.admit("other", 0.0)


def test_of_more_senders_than_buckets_the_one_heard_longest_ago_is_forgotten() -> None:
    rates = Rates[int](per_s=0.0, burst=1.0, senders_max=2)
    assert rates.admit(1, 0.0)
    assert rates.admit(2, 0.0)
    assert not rates.admit(1, 0.0), "heard again: 2 is the oldest now"
    assert rates.admit(3, 0.0)
    assert len(rates) == 2
    assert not rates.admit(1, 0.0)
    assert rates.admit(2, 0.0), "it was forgotten"


def test_ten_thousand_senders_leave_no_more_than_the_limit() -> None:
    rates = Rates[int](per_s=1.0, burst=1.0, senders_max=100)
    for sender in range(10_000):
        rates.admit(sender, 0.0)
    assert len(rates) == 100


@given(st.lists(st.floats(0, 5), max_size=60))
def test_no_more_than_the_burst_and_the_rate_is_ever_let_through(gaps: list[float]) -> None:
    rates = Rates[str](per_s=3.0, burst=4.0, senders_max=1)
    now, admitted = 0.0, 0
    for gap in gaps:
        now += gap
        admitted += rates.admit("a", now)
    assert admitted <= 4.0 + 3.0 * now + 1e-6
