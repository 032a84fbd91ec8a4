"""Golden vectors: bytes that every version and every other implementation must read and write. They are never rewritten
by a test; a vector that has to change is a new version of the protocol."""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from specimen import manifest

from protos import expert_pb2, frame, inference_pb2, stage_pb2
from protos.manifest import Manifest
from shard.sampler import uniform

ROOT = Path(__file__).resolve().parent.parent.parent
VECTORS = ROOT / "tests" / "vectors"
PROTOCOL = (ROOT / "protos" / "PROTOCOL.md").read_text()


def entries(name: str) -> list[Any]:
    found: list[Any] = json.loads((VECTORS / name).read_text())
    return found


@pytest.mark.parametrize("entry", entries("frames.json"), ids=lambda entry: entry["file"])
def test_golden_frames_are_written_and_read_to_the_byte(entry: dict[str, Any]):
    golden = (VECTORS / entry["file"]).read_bytes()
    data = bytes.fromhex(entry["data"])
    assert frame.encode(entry["dtype"], entry["shape"], data) == golden
    found = frame.decode(golden, bytes_max=len(golden))
    assert (found.dtype, list(found.shape), bytes(found.data)) == (entry["dtype"], entry["shape"], data)


def test_the_golden_manifest_is_written_and_read_to_the_byte():
    golden = (VECTORS / "manifest.json").read_bytes()
    assert manifest().to_bytes() == golden
    assert Manifest.from_bytes(golden) == manifest()


def test_the_golden_model_id_is_the_sha256_of_the_golden_manifest():
    golden = (VECTORS / "manifest.id").read_text().strip()
    assert manifest().model_id == golden
    assert hashlib.sha256((VECTORS / "manifest.json").read_bytes()).hexdigest() == golden


def new_message(kind: str) -> Message:
    found: Message = next(getattr(m, kind) for m in (inference_pb2, stage_pb2, expert_pb2) if hasattr(m, kind))()
    return found


@pytest.mark.parametrize("entry", entries("messages.json"), ids=lambda entry: entry["message"])
def test_golden_messages_are_written_and_read_to_the_byte(entry: dict[str, Any]):
    golden = (VECTORS / entry["file"]).read_bytes()
    message = json_format.ParseDict(entry["fields"], new_message(entry["message"]))
    assert message.SerializeToString(deterministic=True) == golden
    assert json_format.MessageToDict(type(message).FromString(golden)) == entry["fields"]


@pytest.mark.parametrize("entry", entries("uniform.json"), ids=lambda e: f"{e['seed']}-{e['choice']}-{e['position']}")
def test_golden_random_numbers_follow_from_the_text_of_section_6(entry: dict[str, Any]):
    key = struct.pack("<QQQ", entry["seed"], entry["choice"], entry["position"])
    digest = hashlib.blake2b(key, digest_size=8, person=b"shoal-sample").digest()
    assert ((int.from_bytes(digest, "big") >> 11) / 2**53).hex() == entry["u"]
    assert uniform(entry["seed"], entry["choice"], entry["position"]).hex() == entry["u"]


def test_every_file_of_vectors_belongs_to_a_test():
    listed = {entry["file"] for name in ("frames.json", "messages.json") for entry in entries(name)}
    listed |= {"frames.json", "messages.json", "uniform.json", "manifest.json", "manifest.id"}
    assert {path.name for path in VECTORS.iterdir()} >= listed
    assert {path.name for path in VECTORS.glob("*.bin")} <= listed


def test_the_golden_frame_in_the_protocol_is_the_file():
    block = PROTOCOL.split("<!-- golden frame -->")[1].split("```")[1]
    digits = "".join(re.findall(r"^[0-9a-f]{4}: +((?:[0-9a-f]{2} ?)+)", block, re.MULTILINE))
    assert bytes.fromhex(digits) == (VECTORS / "frame_float32.bin").read_bytes()


def test_the_golden_random_numbers_in_the_protocol_are_the_file():
    for entry in entries("uniform.json"):
        assert f"| {entry['seed']} | {entry['choice']} | {entry['position']} | `{entry['u']}` |" in PROTOCOL
