"""The bytes that both sides of a Hello sign (PROTOCOL.md, section 13).

Pure. Law: whatever makes this connection differ from every other is in them, so a signature is worth nothing elsewhere.
"""

from typing import Final

from protos.ids import PeerId

CALLER_DOMAIN: Final = b"shoal hello caller v1"
SERVER_DOMAIN: Final = b"shoal hello server v1"
RECORD_DOMAIN: Final = b"shoal record v1"
LOAD_DOMAIN: Final = b"shoal load v1"
GRANT_DOMAIN: Final = b"shoal grant v1"
REVOCATIONS_DOMAIN: Final = b"shoal revocations v1"
MODEL_NAME_DOMAIN: Final = b"shoal model name v1"
NETWORK_DOMAIN: Final = b"shoal network v1"
CLAIM_DOMAIN: Final = b"shoal claim v1"
SUSPICION_DOMAIN: Final = b"shoal suspicion v1"
DATAGRAM_DOMAIN: Final = b"shoal datagram v1"

NO_CERTIFICATE: Final = bytes(32)
"""Stands for the certificate's sha256 where there is none (plaintext)."""


def separated(domain: bytes, message: bytes) -> bytes:
    """What Ed25519 signs: no message of one domain is one of another."""
    return len(domain).to_bytes(1, "little") + domain + message


def transcript(
    certificate_sha256: bytes | None,
    caller_nonce: bytes,
    server_nonce: bytes,
    time_ms: int,
    caller: PeerId,
    server: PeerId,
) -> bytes:
    """Six fields, each behind its length, so that none can be read as part of its neighbour."""
    fields = (
        certificate_sha256 or NO_CERTIFICATE,
        caller_nonce,
        server_nonce,
        time_ms.to_bytes(8, "little"),
        caller.encode("ascii"),
        server.encode("ascii"),
    )
    return b"".join(len(field).to_bytes(4, "little") + field for field in fields)
