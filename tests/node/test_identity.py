"""The key file, the PeerId, and signatures that hold in one domain only."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity import Identity, peer_id, taken, verify
from protos.errors import InvalidRequest, InvalidSignature
from protos.limits import KEY_FILE_BYTES_MAX, PUBLIC_KEY_BYTES, SIGNATURE_BYTES

CODE = Path(__file__).parents[2]


def test_a_peer_id_is_base32_of_the_keys_sha256() -> None:
    assert peer_id(bytes(32)) == "mzuhvlpymk6xo3epygfy5h4oeaejofefn3rdhm4qfjmr2dk7fesq"
    known = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    assert known.public_key.hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert len(known.public_key) == PUBLIC_KEY_BYTES
    assert known.peer == peer_id(known.public_key)
    assert len(known.peer) == 52


def test_a_signature_holds_for_its_key_its_domain_and_its_message() -> None:
    me, other = Identity.create(), Identity.create()
    signature = me.sign(b"one", b"words")
    assert len(signature) == SIGNATURE_BYTES
    verify(me.public_key, signature, b"one", b"words")
    for wrong in (
        (other.public_key, signature, b"one", b"words"),
        (me.public_key, signature, b"two", b"words"),
        (me.public_key, signature, b"one", b"Words"),
        (me.public_key, signature, b"onew", b"ords"),
        (me.public_key, signature[:-1] + bytes([signature[-1] ^ 1]), b"one", b"words"),
        (me.public_key, b"", b"one", b"words"),
        (b"short", signature, b"one", b"words"),
        (b"\xff" * 32, signature, b"one", b"words"),
    ):
        with pytest.raises(InvalidSignature):
            verify(*wrong)


def test_a_key_is_made_once_with_a_mode_that_others_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "node.key"
    made = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Identity.load_or_create(path).peer == Identity.load(path).peer == made.peer
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]


def test_two_that_make_a_key_at_once_get_the_same_one(tmp_path: Path) -> None:
    got: list[str] = []
    both = threading.Barrier(8)

    def make() -> None:
        both.wait(10)
        got.append(Identity.load_or_create(tmp_path / "node.key").peer)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(got) == 8
    assert len(set(got)) == 1


def test_a_key_is_one_processs_at_a_time_and_free_again_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.create().save(path)
    program = (
        "import pathlib, sys; from node.identity import taken\n"
        "with taken(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CODE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InvalidRequest, match=r"another node runs with the key .*--identity"), taken(path):
            pass
        Identity.load(path)  # whoever only looks at it may
        other.kill()
        other.wait()
    for _ in range(2):
        with taken(path):
            pass


def test_a_file_system_without_locks_keeps_no_node_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "node.key"
    Identity.create().save(path)
    monkeypatch.setattr("node.identity.fcntl.flock", flock)
    with taken(path):
        pass


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    Identity.create().save(tmp_path / "node.key")
    with pytest.raises(FileExistsError):
        Identity.create().save(tmp_path / "node.key")
    assert [file.name for file in tmp_path.iterdir()] == ["node.key"]


def test_no_key_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="shoal keygen"):
        Identity.load(tmp_path / "none.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "node.key"
    Identity.create().save(path)
    path.chmod(mode)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        Identity.load(path)


def other_keys() -> list[bytes]:
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(b"secret")
    return [
        b"",
        b"no key",
        ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, none),
        Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, locked),
        Ed25519PrivateKey.generate().public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
    ]


@pytest.mark.parametrize("content", other_keys(), ids=["empty", "text", "p256", "encrypted", "public"])
def test_what_is_no_ed25519_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidRequest, match="Ed25519"):
        Identity.load(path)


def test_a_key_file_may_have_so_many_bytes_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    made = Identity.create()
    made.save(path)
    path.write_bytes(path.read_bytes().ljust(KEY_FILE_BYTES_MAX, b"\n"))
    assert Identity.load(path).peer == made.peer
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InvalidRequest, match=str(KEY_FILE_BYTES_MAX + 1)):
        Identity.load(path)


def test_a_pipe_or_a_folder_is_no_key_and_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InvalidRequest):
            Identity.load(path)
