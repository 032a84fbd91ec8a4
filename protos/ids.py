"""The names of things that cross rooms and machines.

Plain strings at run time; to the type checker they never mix.
"""

from typing import NewType

PeerId = NewType("PeerId", str)
"""A node: a hash of its Ed25519 public key."""

ModelId = NewType("ModelId", str)
"""A model: 64 hex digits, the sha256 of its manifest's bytes."""

SessionId = NewType("SessionId", str)
"""One answer, named by the door that coordinates it."""

UnitHash = NewType("UnitHash", str)
"""A unit's bytes: 64 hex digits, their sha256."""

UnitName = NewType("UnitName", str)
"""A unit's place in its model: see protos.units."""
