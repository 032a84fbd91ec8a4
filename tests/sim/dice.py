"""Randomness of the virtual network: one seed, and a stream of its own for each purpose.

Law: a stream depends on the seed and on the names of its purpose, on nothing else.  So another node, or another
question asked of one stream, changes no other stream; and PYTHONHASHSEED changes none.
"""

from __future__ import annotations

import hashlib
import random


def number(seed: int, *purpose: str | int) -> int:
    """64 bits that belong to this purpose."""
    named = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8, person=b"shoal-sim").digest(), "big")


def stream(seed: int, *purpose: str | int) -> random.Random:
    return random.Random(number(seed, *purpose))
