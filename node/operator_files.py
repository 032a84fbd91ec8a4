"""The files of a permissioned network: the operator's key, its revocation list, and a node's grant.

Law: the key never leaves its file; what is signed anew replaces the old file whole or not at all.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from node import grant as grants
from node import network as networks
from node import revocations
from node.identity import Identity
from node.revocations import Revocations
from protos.errors import GrantMissing, InvalidGrant, InvalidRequest
from protos.limits import GRANT_BYTES_MAX, REVOCATIONS_BYTES_MAX

if TYPE_CHECKING:
    from node.network import Network
    from protos.ids import PeerId

KEY_SUFFIX: Final = ".key"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Admission:
    """What a node starts with.  `grant`: for its records; empty, and without an end, in an open network."""

    network: Network
    grant: bytes = b""
    ends_at_ms: int | None = None


def folder() -> Path:
    """Where the keys of this user's networks lie."""
    return platformdirs.user_data_path("shoal") / "networks"


def key_path(name: str) -> Path:
    """Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"--name is {name!r:.80}; it must be 1 to 32 of a-z, 0-9 and -")
    return folder() / f"{name}{KEY_SUFFIX}"


def choose(name: str | None, key: Path | None) -> Path:
    """The operator's key that is meant: the only one, unless it is named.  Raises InvalidRequest."""
    if key is not None or name is not None:
        return key or key_path(name or "")
    known = sorted(folder().glob(f"*{KEY_SUFFIX}"))
    if len(known) == 1:
        return known[0]
    if not known:
        raise InvalidRequest(f"there is no network's key in {folder()}: 'shoal network create' makes one")
    raise InvalidRequest(f"there are several networks: {', '.join(path.stem for path in known)}; say which with --name")


def is_path(text: str) -> bool:
    """Whether a setting `network` names a key file, and not a network by its name or id."""
    return "/" in text or text.endswith(KEY_SUFFIX)


def network_of(text: str) -> Network:
    """What a setting `network` means.  Raises InvalidRequest."""
    if is_path(text):
        return networks.permissioned(Identity.load(Path(text).expanduser()).public_key)
    return networks.parse(text)


def admission(text: str, grant: Path | None, peer: PeerId, now: float) -> Admission:
    """What the settings `network` and `grant` let this peer take part in.  `now`: seconds since 1970.

    Raises InvalidRequest, GrantMissing, GrantExpired, InvalidGrant, WrongNetwork, InvalidSignature.
    """
    network = network_of(text)
    if not network.permissioned:
        if grant is not None:
            raise InvalidRequest(
                f"grant is {grant}, but network {network} is open and wants none: leave one of them out"
            )
        return Admission(network)
    if grant is None:
        raise GrantMissing(
            f"network {str(network)[:12]} wants a grant for this node: give its operator the peer id {peer}, and say "
            "grant with the file that comes back"
        )
    data = read(grant, GRANT_BYTES_MAX)
    found = grants.read(data, network, int(now * 1000))
    if found.peer != peer:
        raise InvalidGrant(f"{grant} is the grant of {found.peer[:8]}; this node is {peer[:8]}")
    return Admission(network, data, found.expires_at_ms)


def revocations_path(key: Path) -> Path:
    """Beside the operator's key."""
    return key.with_suffix(".revocations")


def known_revocations(key: Path, network: Network) -> Revocations:
    """The list that was signed last; an empty one if there is none.  Raises InvalidGrant, InvalidSignature."""
    path = revocations_path(key)
    if not path.exists():
        return Revocations()
    return revocations.read(read(path, REVOCATIONS_BYTES_MAX), network, int(time.time() * 1000))


def read(path: Path, bytes_max: int) -> bytes:
    """At most one byte more than allowed, so that the reader refuses it.  Raises InvalidRequest."""
    try:
        with path.expanduser().open("rb") as file:
            return file.read(bytes_max + 1)
    except FileNotFoundError:
        raise InvalidRequest(f"there is no file {path}") from None


def write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
