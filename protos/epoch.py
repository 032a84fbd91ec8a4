"""The fence of a session: which door speaks for it, and how often that has changed.

Pure. Law: ordered by counter, then by door (PROTOCOL.md, section 8.6); what carries a lower one is refused and dropped.
"""

from dataclasses import dataclass

from protos.ids import PeerId


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """`counter` rises with every route; two doors that raise it at once differ in `door`."""

    counter: int
    door: PeerId

    def __str__(self) -> str:
        return f"{self.counter} of {self.door}"
