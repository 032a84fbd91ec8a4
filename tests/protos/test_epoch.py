"""Epochs are a fence: any two of them are ordered the same way everywhere."""

import pytest

from protos.epoch import Epoch
from protos.ids import PeerId


def test_the_counter_decides_and_then_the_door():
    a, b = PeerId("a"), PeerId("b")
    assert Epoch(1, b) < Epoch(2, a) < Epoch(2, b)
    assert Epoch(2, a) == Epoch(2, PeerId("a"))


def test_an_epoch_is_never_changed_in_place():
    with pytest.raises(AttributeError):
        Epoch(1, PeerId("a")).counter = 2  # type: ignore[misc]


def test_an_error_names_both_parts():
    assert f"at epoch {Epoch(3, PeerId('door'))}" == "at epoch 3 of door"
