"""Who a node is: an Ed25519 key, its file, and the PeerId that follows from it.  PROTOCOL.md, section 13.

Law: the key is this node's alone; a file that others may read is no key.  Pure but for the key file and randomness.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from cryptography.exceptions import InvalidSignature as NoMatch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protos.errors import InvalidRequest, InvalidSignature
from protos.ids import PeerId
from protos.limits import KEY_FILE_BYTES_MAX
from protos.transcript import separated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Identity:
    """A private key.  `peer` and `public_key` (32 bytes) are what others know of it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        self.peer = peer_id(self.public_key)

    @classmethod
    def create(cls) -> Self:
        """A new one, from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises InvalidRequest: nothing there, readable by others, or no Ed25519 key."""
        try:
            key = serialization.load_pem_private_key(_read_private(path), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidRequest(f"{path} holds no unencrypted Ed25519 key (PKCS8, PEM): make one with `shoal keygen`")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """The key of that file, which is made if there is none.  Of two that make it at once both get the same one."""
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                cls.create().save(path)
        return cls.load(path)

    def save(self, path: Path) -> None:
        """Writes the key with mode 600, whole or not at all.  Raises FileExistsError: a key is never overwritten."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123  (no Path has flags)
                file.write(self._pem())
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(partial)  # unlike a rename, it fails where a file is
        finally:
            partial.unlink(missing_ok=True)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """64 bytes that are worth nothing in another domain."""
        return self._key.sign(separated(domain, message))

    def _pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


# A network's file system that knows no locks, or none of a file that cannot be written.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})


@contextlib.contextmanager
def taken(path: Path) -> Iterator[None]:
    """While the block lasts, and at the longest as long as the process, no other process is the peer of this key file.

    Raises InvalidRequest: one is it already.
    """
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(
                f"another node runs with the key {path}, and two nodes cannot be one peer: end that one, or give this "
                "one its own key with --identity"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise InvalidRequest(f"the key file {path} cannot be locked: {error.strerror}") from None
        yield


def _opened(path: Path) -> BinaryIO:
    """For writing where that may be: NFS locks no file that is open for reading alone."""
    try:
        return path.open("r+b")
    except OSError:
        return path.open("rb")


def peer_id(public_key: bytes) -> PeerId:
    """52 characters: base32 of the key's sha256, lower case, without padding."""
    return peer_of(hashlib.sha256(public_key).digest())


def peer_bytes(peer: PeerId) -> bytes:
    """The sha256 behind a PeerId, 32 bytes, as gossip has it.  For ids of this process: it trusts their form."""
    return base64.b32decode(peer.upper() + "====")


def peer_of(sha256: bytes) -> PeerId:
    """The PeerId of a key with this sha256."""
    return PeerId(base64.b32encode(sha256).decode("ascii").rstrip("=").lower())


def verify(public_key: bytes, signature: bytes, domain: bytes, message: bytes) -> None:
    """Raises InvalidSignature unless that key signed this message in this domain."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, separated(domain, message))
    except (NoMatch, ValueError):
        raise InvalidSignature(
            f"a signature in the name of {peer_id(public_key)[:8]} does not fit: it is forged, or made for another use"
        ) from None


def _read_private(path: Path) -> bytes:
    try:
        # Not blocking, because what is named could be a pipe that nobody writes to.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InvalidRequest(f"there is no key at {path}: make one with `shoal keygen`") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(f"{path} is no file: name the key's")
        if found.st_mode & 0o077:
            raise InvalidRequest(f"{path} may be read by other users: `chmod 600` it, or make a new key")
        if found.st_size > KEY_FILE_BYTES_MAX:
            raise InvalidRequest(f"{path} has {found.st_size} bytes; a key has at most {KEY_FILE_BYTES_MAX}")
        return os.read(descriptor, KEY_FILE_BYTES_MAX)
    finally:
        os.close(descriptor)
