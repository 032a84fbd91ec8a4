"""Newcomers by themselves; how the routing table bounds them is tested there."""

from __future__ import annotations

from node.newcomers import Newcomers
from protos.ids import PeerId
from protos.limits import NEWCOMER_S_MAX

A, B = PeerId("a" * 52), PeerId("b" * 52)


def test_who_is_renewed_ages_anew_and_who_is_no_newcomer_is_none_afterwards() -> None:
    newcomers = Newcomers()
    newcomers.add(A, "10.0.0.1", 0.0)
    newcomers.renew(A, 5.0)
    newcomers.renew(B, 5.0)
    assert (A in newcomers, B in newcomers, len(newcomers)) == (True, False, 1)
    assert newcomers.aged(NEWCOMER_S_MAX) == []
    assert newcomers.aged(NEWCOMER_S_MAX + 5.0) == [A]
