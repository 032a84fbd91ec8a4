import re
from pathlib import Path

import pytest

from protos import limits
from protos.expert_pb2 import ComputeRequest
from protos.inference_pb2 import GenerateRequest, TokenIds
from protos.stage_pb2 import OpenRequest, Peer, Route, RouteStage, Step

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [name for name in vars(limits) if name.isupper() and name not in ("KIB", "MIB", "GIB", "TIB")]


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_is_used_by_the_code_and_reached_by_a_test(name: str):
    rooms = [ROOT / room for room in ("protos", "shard", "coordinator", "node")]
    users = [path for room in rooms for path in room.glob("*.py") if path.name != "limits.py"]
    tests = (ROOT / "tests").rglob("test_*.py")
    assert any(mentions(path, name) for path in tests), f"no test reaches {name}"
    if not name.endswith("MESSAGE_BYTES_MAX"):  # what a server of the service passes to gRPC
        assert any(mentions(path, name) for path in users), f"nothing uses {name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_ends_in_what_it_limits_and_has_a_reason(name: str):
    text = (ROOT / "protos" / "limits.py").read_text()
    assert re.search(rf'^{name}: Final = .*\n"""[^"]+"""$', text, re.MULTILINE), f"{name} has no reason"
    assert name.endswith(("_MAX", "_MIN", "_BYTES"))


def mentions(path: Path, name: str) -> bool:
    return re.search(rf"\b{name}\b", path.read_text()) is not None


def longest_ids(count: int) -> list[int]:
    return [limits.TOKEN_ID_MAX] * count


def test_the_largest_prompt_fits_a_clients_message():
    request = GenerateRequest(token_ids=TokenIds(ids=longest_ids(limits.LOG_TOKENS_MAX)))
    assert request.ByteSize() < limits.INFERENCE_MESSAGE_BYTES_MAX


def test_the_largest_step_and_the_largest_opening_fit_a_stages_message():
    step = Step(token_ids=longest_ids(limits.STEP_ROWS_MAX), allowed=bytes(limits.VOCAB_MAX // 8))
    assert step.ByteSize() + limits.FRAME_BYTES_MAX + 1024 < limits.STAGE_MESSAGE_BYTES_MAX
    peer = Peer(peer_id="p" * limits.ID_CHARS_MAX, address="a" * limits.ADDRESS_CHARS_MAX)
    route = Route(stages=[RouteStage(peer=peer, standby=peer)] * limits.ROUTE_STAGES_MAX)
    opening = OpenRequest(prompt_ids=longest_ids(limits.LOG_TOKENS_MAX), route=route)
    assert opening.ByteSize() < limits.STAGE_MESSAGE_BYTES_MAX


def test_the_largest_expert_call_fits_its_message():
    request = ComputeRequest(
        unit_hashes=["f" * limits.ID_CHARS_MAX] * limits.EXPERTS_MAX,
        pair_rows=[limits.STEP_ROWS_MAX] * limits.PAIRS_MAX,
        pair_experts=[limits.EXPERTS_MAX] * limits.PAIRS_MAX,
    )
    assert request.ByteSize() + limits.FRAME_BYTES_MAX + 1024 < limits.EXPERT_MESSAGE_BYTES_MAX


def test_a_message_between_peers_has_room_for_many_records_of_the_largest_size():
    assert limits.PEERS_MESSAGE_BYTES_MAX >= 16 * limits.RECORD_BYTES_MAX
