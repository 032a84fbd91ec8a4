"""The outbox: the effects of the event that is being handled, in order of execution.

Pure.  Law: each event begins a new list, so that what an earlier one wanted is never wanted twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.membership_effect import Refused, Send

if TYPE_CHECKING:
    from node.claim import PeerHash
    from node.membership_effect import Effect, Refusal
    from node.message import Message


class Outbox:
    """Shared by the parts of one membership."""

    __slots__ = ("_effects",)

    def __init__(self) -> None:
        self._effects: list[Effect] = []

    def begin(self) -> list[Effect]:
        """What all that follows is added to."""
        self._effects = []
        return self._effects

    def add(self, effect: Effect) -> None:
        self._effects.append(effect)

    def send(self, message: Message, to: PeerHash) -> None:
        self._effects.append(Send(to, message))

    def refuse(self, peer: PeerHash, reason: Refusal) -> None:
        if not any(isinstance(effect, Refused) and effect.reason is reason for effect in self._effects):
            self._effects.append(Refused(peer, reason))
