"""A node's TLS certificate: self-signed, made when its process starts, never stored.  PROTOCOL.md, section 13.

Law: a certificate says nothing of who somebody is; Hello does.  It only makes this connection differ from every other.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from node import address as addresses
from protos.errors import PeerLost

NAME = "shoal"
"""Every certificate's name: whom it belongs to is no matter of names."""

# Clocks of volunteers' machines differ, and a process may run for long; trust rests on the pin, not on these dates.
_BEFORE = timedelta(days=7)
_AFTER = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Certificate:
    """`sha256` is of the DER bytes: what others pin."""

    pem: bytes
    key_pem: bytes
    sha256: bytes

    @classmethod
    def make(cls, now: float) -> Self:
        """P-256, because BoringSSL takes no Ed25519 certificates.  `now`: seconds since 1970."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
        made = datetime.fromtimestamp(now, UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(made - _BEFORE)
            .not_valid_after(made + _AFTER)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            certificate.fingerprint(hashes.SHA256()),
        )


def fetch(address: str, timeout_s: float) -> tuple[bytes, bytes]:
    """The certificate that is shown at `host:port`, unverified: its PEM, and the sha256 of its DER bytes.

    Raises PeerLost, InvalidRequest (no address).
    """
    target = addresses.parse(address)
    deadline = time.monotonic() + timeout_s
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what is fetched here is pinned, and then Hello proves whose it is
    context.set_alpn_protocols(["h2"])  # or gRPC ends the handshake
    try:
        with socket.create_connection((target.host, target.port), timeout_s) as plain:
            plain.settimeout(max(deadline - time.monotonic(), 0.001))
            with context.wrap_socket(plain, server_hostname=NAME) as secured:
                der = secured.getpeercert(binary_form=True)
    except ssl.SSLError:
        raise PeerLost(
            f"what answers at {target.host_port} speaks no TLS: is it a node, and not one started with --plaintext?"
        ) from None
    except TimeoutError:
        raise PeerLost(
            f"no node answers at {target.host_port} within {timeout_s:g} s: is one running there, and has it loaded?"
        ) from None
    except OSError as error:
        raise PeerLost(
            f"no node answers at {target.host_port} ({error.strerror or error}): "
            "is one running there, and is the address right?"
        ) from None
    if not der:
        raise PeerLost(f"what answers at {target.host_port} shows no certificate: it is no node")
    return ssl.DER_cert_to_PEM_cert(der).encode("ascii"), hashlib.sha256(der).digest()
