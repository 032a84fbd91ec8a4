"""Notary: stands for Ed25519 in the virtual network, and remembers who signed what.

Keys are real; a signature is a hash keyed with the private one, because real ones are slow.  Only its owner's pen has
that, so nobody can sign for another; the notary knows all of them, and so can verify.

Law: what a checker asks here does not depend on what a node verified.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protos.errors import InvalidSignature
from protos.transcript import RECORD_DOMAIN

SIGNATURE_BYTES = 64
Signed = tuple[bytes, bytes, bytes]  # key, domain, data


@dataclass(frozen=True, slots=True)
class Pen:
    """A host's private key.  `key` is public."""

    key: bytes
    _secret: bytes
    _notary: Notary

    @property
    def peer(self) -> bytes:
        """The raw 32 bytes of the PeerId, as on the wire."""
        return hashlib.sha256(self.key).digest()

    @property
    def private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._secret)

    def sign(self, domain: bytes, data: bytes) -> bytes:
        signature = _mark(self._secret, domain, data)
        self._notary.signed[signature] = (self.key, domain, data)
        return signature


@dataclass(slots=True)
class Notary:
    signed: dict[bytes, Signed] = field(default_factory=dict)
    _secrets: dict[bytes, bytes] = field(default_factory=dict)

    def pen(self, name: str) -> Pen:
        """The same name has the same key in every run."""
        secret = hashlib.sha256(b"secret of " + name.encode()).digest()
        key = Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        self._secrets[key] = secret
        return Pen(key, secret, self)

    def verify(self, key: bytes, signature: bytes, domain: bytes, data: bytes) -> None:
        """What a node can find out with the public key alone; raises InvalidSignature, as node.identity.verify does."""
        secret = self._secrets.get(key)
        if secret is None or signature != _mark(secret, domain, data):
            raise InvalidSignature("the notary does not know it")

    def remember(self, signature: bytes, key: bytes, data: bytes) -> None:
        """A record that was signed for real, by `key`'s owner."""
        self.signed[signature] = (key, RECORD_DOMAIN, data)

    def did_sign(self, key: bytes, signature: bytes, domain: bytes, data: bytes) -> bool:
        """What really happened: the owner's own pen wrote just this."""
        return self.signed.get(signature) == (key, domain, data)


def _mark(secret: bytes, domain: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(
        len(domain).to_bytes(2, "little") + domain + data, digest_size=SIGNATURE_BYTES, key=secret
    ).digest()
