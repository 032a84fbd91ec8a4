"""Marks by themselves; how the routing table uses them is tested there."""

from __future__ import annotations

from node.marks import Mark, Marks
from protos.ids import PeerId

PEER = PeerId("a" * 52)


def mark(sequence: int) -> Mark:
    return Mark(sequence, bytes(16), 1000)


def test_a_mark_never_goes_back() -> None:
    marks = Marks({})
    for sequence, stands in ((5, 5), (4, 5), (6, 6)):
        marks.raise_to(PEER, mark(sequence))
        assert marks.get(PEER) == mark(stands)


def test_a_mark_without_a_record_is_forgotten_when_it_ends() -> None:
    marks = Marks({PEER: mark(5)})
    marks.sweep(999, in_table=())
    marks.sweep(1000, in_table=(PEER,))
    assert marks.get(PEER) == mark(5)
    marks.sweep(1000, in_table=())
    assert marks.get(PEER) is None
