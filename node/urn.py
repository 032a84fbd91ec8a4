"""An urn: different things, of which any can be drawn by chance or taken out by name.

Pure; which place is drawn is an argument.  Law: putting in, taking out and drawing take the same short time, however
many are in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

    Thing = TypeVar("Thing", bound=Hashable)
else:
    Thing = TypeVar("Thing")


class Urn(Generic[Thing]):
    """Places are 0 to len - 1, without a hole; whoever is taken out leaves its place to the last one."""

    __slots__ = ("_places", "_things")

    def __init__(self) -> None:
        self._things: list[Thing] = []
        self._places: dict[Thing, int] = {}

    def __len__(self) -> int:
        return len(self._things)

    def __getitem__(self, place: int) -> Thing:
        return self._things[place]

    def add(self, thing: Thing) -> None:
        """One that is there stays where it is."""
        if thing not in self._places:
            self._places[thing] = len(self._things)
            self._things.append(thing)

    def discard(self, thing: Thing) -> None:
        """One that is not there is no error."""
        place = self._places.pop(thing, None)
        if place is None:
            return
        last = self._things.pop()
        if last != thing:
            self._things[place] = last
            self._places[last] = place

    def take(self, place: int) -> Thing:
        """It is not there any more."""
        thing = self._things[place]
        self.discard(thing)
        return thing

    def clear(self) -> None:
        self._things.clear()
        self._places.clear()
