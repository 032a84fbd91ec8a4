"""The certificate, and fetching what another shows."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from toy_peers import PeerNode

from node.certificate import NAME, Certificate, fetch
from protos.errors import InvalidRequest, PeerLost

NOW = 1_800_000_000.0


def test_a_certificate_is_p256_and_named_after_nobody() -> None:
    made = Certificate.make(NOW)
    parsed = x509.load_pem_x509_certificate(made.pem)
    assert isinstance(parsed.public_key(), ec.EllipticCurvePublicKey)
    assert parsed.subject.rfc4514_string() == f"CN={NAME}"
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    assert made.sha256 == hashlib.sha256(ssl.PEM_cert_to_DER_cert(made.pem.decode())).digest()
    assert parsed.not_valid_before_utc < datetime.fromtimestamp(NOW, UTC) - timedelta(days=1)
    assert parsed.not_valid_after_utc > datetime.fromtimestamp(NOW, UTC) + timedelta(days=365)


def test_each_process_has_another_one() -> None:
    assert Certificate.make(NOW).sha256 != Certificate.make(NOW).sha256


def test_what_a_node_shows_is_fetched() -> None:
    with PeerNode() as node:
        pem, sha256 = fetch(node.address, 5.0)
    assert sha256 == node.sha256
    assert ssl.PEM_cert_to_DER_cert(pem.decode()) == ssl.PEM_cert_to_DER_cert(node.certificate.pem.decode())


def test_where_nothing_listens_the_peer_is_lost_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(PeerLost, match=str(taken.getsockname()[1])):
            fetch(f"127.0.0.1:{taken.getsockname()[1]}", 5.0)
        assert time.monotonic() - began < 1.0


def test_who_accepts_and_says_nothing_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(PeerLost, match="within"):
        fetch(f"127.0.0.1:{silent.getsockname()[1]}", 0.2)


def test_what_speaks_no_tls_is_told_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(PeerLost, match="no TLS"):
            fetch(f"127.0.0.1:{server.getsockname()[1]}", 5.0)
        thread.join(10)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        fetch("nowhere", 1.0)
