"""A node without a network around it, and five peers that it may know: what the tests of gossip begin with."""

from __future__ import annotations

import pytest
from toy_gossip import Clock, One, Person


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def one(clock: Clock) -> One:
    return One(clock)


@pytest.fixture
def people() -> list[Person]:
    return [Person.create(f"10.0.0.{n}:7645") for n in range(1, 6)]


@pytest.fixture
def known(one: One, people: list[Person]) -> One:
    """Knows all of them, and has greeted them."""
    one.knows(*people)
    one.sent()
    return one
