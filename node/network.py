"""Network: whose records belong together.  PROTOCOL.md, section 16.

Pure.  Law: the id is in all that is signed; what carries another is refused.  An open network is a name; a permissioned
one is an operator's key, and whoever takes part in it has a grant of that key.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, NoReturn

from protos.errors import InvalidRequest, WrongNetwork
from protos.limits import NAME_CHARS_MAX, NETWORK_ID_BYTES
from protos.transcript import NETWORK_DOMAIN

NAME: Final = "shoal"
"""Of the network that nodes are in by default."""

_NAME = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{NAME_CHARS_MAX - 1}}}")
_ID = re.compile(rf"[0-9a-f]{{{2 * NETWORK_ID_BYTES}}}")
# Too long to be a word: whoever loses some digits of an id must not be in an open network without knowing.
_PART_OF_ID = re.compile(r"[0-9a-f]{12,}")


@dataclass(frozen=True, slots=True)
class Network:
    """`id`: 32 bytes.  `name`: empty for a permissioned one."""

    id: bytes
    name: str = ""

    @property
    def permissioned(self) -> bool:
        return not self.name

    def __str__(self) -> str:
        """As people write it: the name, or the id in hex."""
        return self.name or self.id.hex()

    def check(self, id: bytes, what: str) -> None:
        """Raises WrongNetwork unless `id`, which `what` carries, is this network's."""
        if id != self.id:
            raise WrongNetwork(f"{what} is of network {id.hex()[:12] or 'none'}; this one is {str(self)[:12]}")


def open_network(name: str = NAME) -> Network:
    """Everybody may take part who knows the name.  Raises InvalidRequest."""
    if not _NAME.fullmatch(name) or _ID.fullmatch(name):
        _refuse(name)
    return Network(hashlib.sha256(NETWORK_DOMAIN + name.encode("ascii")).digest(), name)


def permissioned(operator_key: bytes) -> Network:
    """Whoever has a grant signed by this key may take part."""
    return Network(hashlib.sha256(operator_key).digest())


def parse(text: str) -> Network:
    """An open network's name, or a permissioned one's id: 64 hex digits.  Raises InvalidRequest."""
    if _ID.fullmatch(text):
        return Network(bytes.fromhex(text))
    if _PART_OF_ID.fullmatch(text):
        _refuse(text)
    return open_network(text)


def _refuse(text: str) -> NoReturn:
    raise InvalidRequest(
        f"{text!r:.100} is no network: give a name (1 to {NAME_CHARS_MAX} of a-z, 0-9 and -), or the id that "
        "'shoal network create' printed (64 hex digits)"
    )
