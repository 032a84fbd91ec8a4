import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from protos import limits, messages
from protos import stage_pb2 as stage
from protos.errors import DeadlineExceeded, Gap, InvalidRequest, LocalError, Overloaded, RemoteError, by_code
from protos.expert_pb2 import ComputeRequest
from protos.inference_pb2 import Failed, GenerateRequest, Message, Messages, Sampling, TokenIds
from protos.sampling import SamplingParams

EPOCH = stage.Epoch(counter=1, door="door")
DOOR = stage.Peer(peer_id="door", address="127.0.0.1:1")
HASHES = ["a" * 64, "b" * 64]


def route(*spans: tuple[int, int], door: stage.Peer = DOOR, standby: stage.Peer | None = None) -> stage.Route:
    return stage.Route(
        door=door,
        stages=[stage.RouteStage(peer=DOOR, standby=standby, first_layer=a, last_layer=b) for a, b in spans],
    )


def generate(**changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"text": "hello", **changes})


def opening(**changes: Any) -> stage.OpenRequest:
    valid = {"session_id": "s", "epoch": EPOCH, "model_id": "m", "prompt_ids": [5, 6], "generated_ids": [7],
             "positions": 8, "resume_key_sha256": bytes(32), "route": route((0, 1), (2, 3)), "stage": 1}  # fmt: skip
    return stage.OpenRequest(**{**valid, **changes})


def raising(**changes: Any) -> stage.RaiseEpochRequest:
    valid = {"session_id": "s", "expected": EPOCH, "epoch": stage.Epoch(counter=2, door="a"), "resume_key": bytes(32),
             "route": route((0, 3))}  # fmt: skip
    return stage.RaiseEpochRequest(**{**valid, **changes})


def step(**changes: Any) -> stage.Step:
    valid = {"session_id": "s", "epoch": EPOCH, "start": 3, "until": 5, "token_ids": [8, 9], "reply": stage.REPLY_TOKEN}
    return stage.Step(**{**valid, **changes})


def compute(**changes: Any) -> ComputeRequest:
    valid = {
        "model_id": "m",
        "layer": 3,
        "unit_hashes": HASHES,
        "rows": b"",
        "pair_rows": [0, 0],
        "pair_experts": [0, 1],
    }
    return ComputeRequest(**{**valid, **changes})


CHECKS: list[tuple[Callable[[Any], None], Callable[..., Any], list[dict[str, Any]]]] = [
    (messages.check_generate, generate, [
        {},
        {"token_ids": TokenIds(ids=[1])},
        {"chat": Messages(messages=[Message(role="u" * limits.ROLE_CHARS_MAX)] * limits.CHAT_MESSAGES_MAX)},
        {"stop": ["x" * limits.STOP_STRING_CHARS_MAX] * limits.STOP_STRINGS_MAX},
        {"model": "m" * limits.ID_CHARS_MAX},
    ]),
    (messages.check_open, opening, [
        {},
        {"session_id": "s" * limits.ID_CHARS_MAX},
        {"prompt_ids": [1] * limits.LOG_TOKENS_MAX, "generated_ids": [], "positions": limits.LOG_TOKENS_MAX},
        {"route": route(*((n, n) for n in range(limits.ROUTE_STAGES_MAX)))},
        {"route": route((0, 0), (1, 1), standby=stage.Peer(peer_id="p", address="a" * limits.ADDRESS_CHARS_MAX))},
    ]),
    (messages.check_raise, raising, [{}, {"epoch": stage.Epoch(counter=1, door="door2")}]),
    (messages.check_step, step, [
        {},
        {"until": 2**60},
        {"token_ids": [1] * limits.STEP_ROWS_MAX, "until": limits.STEP_ROWS_MAX + 3},
        {"allowed": bytes(limits.VOCAB_MAX // 8)},
        {"reply": stage.REPLY_ROWS},
    ]),
    (messages.check_compute, compute, [
        {},
        {"pair_rows": [1] * limits.PAIRS_MAX, "pair_experts": [1] * limits.PAIRS_MAX},
        {"unit_hashes": [f"{n:064}" for n in range(limits.EXPERTS_MAX)]},
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("check", "build", "changes"), [(c, b, x) for c, b, xs in CHECKS for x in xs])
def test_messages_at_their_limits_pass(
    check: Callable[[Any], None], build: Callable[..., Any], changes: dict[str, Any]
):
    check(build(**changes))


REFUSED: list[tuple[Callable[[Any], None], Any, str]] = [
    (messages.check_generate, GenerateRequest(), "no prompt"),
    (messages.check_generate, generate(token_ids=TokenIds(ids=[1] * (limits.LOG_TOKENS_MAX + 1))), "token_ids has"),
    (
        messages.check_generate,
        generate(chat=Messages(messages=[Message()] * (limits.CHAT_MESSAGES_MAX + 1))),
        "chat has",
    ),
    (messages.check_generate, generate(chat=Messages(messages=[Message(role="r" * 65)])), "role has a length of 65"),
    (messages.check_generate, generate(stop=["x"] * (limits.STOP_STRINGS_MAX + 1)), "stop has"),
    (messages.check_generate, generate(stop=["x" * 257]), "stop string has a length of 257; at most 256"),
    (messages.check_generate, generate(stop=[""]), "a stop string is empty"),
    (messages.check_generate, generate(model="m" * 129), "model has"),
    (messages.check_open, opening(session_id=""), "session_id is empty"),
    (messages.check_open, opening(model_id="m" * 129), "model_id has"),
    (messages.check_open, opening(epoch=stage.Epoch(counter=1)), "epoch's door is empty"),
    (messages.check_open, opening(prompt_ids=[]), "prompt_ids is empty"),
    (messages.check_open, opening(prompt_ids=[1] * (limits.LOG_TOKENS_MAX + 1)), "prompt_ids has"),
    (
        messages.check_open,
        opening(generated_ids=[1] * limits.LOG_TOKENS_MAX, positions=2**40),
        "a log of 2097154 tokens",
    ),
    (messages.check_open, opening(positions=2), "a log of 3 tokens for 2 positions"),
    (
        messages.check_open,
        opening(resume_key_sha256=bytes(limits.RESUME_KEY_BYTES - 1)),
        "resume_key_sha256 has a length of 31",
    ),
    (messages.check_open, opening(route=route()), "route is empty"),
    (messages.check_open, opening(route=route(*((n, n) for n in range(1025)))), "route has a length of 1025"),
    (messages.check_open, opening(stage=2), "stage 2 of a route of 2 stages"),
    (messages.check_open, opening(route=route((0, 1), (3, 3))), "from layer 3 to 3 where 2 is next"),
    (messages.check_open, opening(route=route((0, 1), (2, 1))), "from layer 2 to 1 where 2 is next"),
    (
        messages.check_open,
        opening(route=route((0, 1), (2, 3), door=stage.Peer())),
        "the door's peer_id is empty",
    ),
    (
        messages.check_open,
        opening(
            route=route((0, 1), (2, 3), door=stage.Peer(peer_id="d", address="a" * (limits.ADDRESS_CHARS_MAX + 1)))
        ),
        "the door's address",
    ),
    (messages.check_open, opening(route=route((0, 1), (2, 3), standby=stage.Peer())), "a standby's peer_id is empty"),
    (
        messages.check_open,
        opening(route=route((0, 3), door=stage.Peer(peer_id="d", address="a" * 301)), stage=0),
        "address has",
    ),
    (messages.check_raise, raising(epoch=EPOCH), "is not above"),
    (messages.check_raise, raising(epoch=stage.Epoch(counter=0, door="z")), "is not above"),
    (messages.check_raise, raising(resume_key=b""), "resume_key has"),
    (messages.check_step, step(session_id="s" * 129), "session_id has"),
    (messages.check_step, step(token_ids=[]), "token_ids is empty"),
    (messages.check_step, step(token_ids=[1] * (limits.STEP_ROWS_MAX + 1), until=2**40), "token_ids has"),
    (messages.check_step, step(until=4), "2 rows from position 3 on reach beyond 4"),
    (messages.check_step, step(reply=0), "reply is 0"),
    (messages.check_step, step(reply=4), "reply is 4"),
    (messages.check_step, step(allowed=bytes(limits.VOCAB_MAX // 8 + 1)), "allowed has"),
    (messages.check_compute, compute(unit_hashes=[]), "unit_hashes is empty"),
    (
        messages.check_compute,
        compute(unit_hashes=[f"{n:064}" for n in range(limits.EXPERTS_MAX + 1)]),
        "unit_hashes has",
    ),
    (messages.check_compute, compute(unit_hashes=["a", "a"]), "names a unit twice"),
    (messages.check_compute, compute(unit_hashes=["a" * 129]), "a unit hash has"),
    (messages.check_compute, compute(pair_rows=[], pair_experts=[]), "pair_rows is empty"),
    (messages.check_compute, compute(pair_rows=[1] * (limits.PAIRS_MAX + 1)), "pair_rows has"),
    (messages.check_compute, compute(pair_experts=[0]), "pair_experts has a length of 1; it must be 2"),
    (messages.check_compute, compute(pair_experts=[0, 2]), "points beyond the 2 unit_hashes"),
]


@pytest.mark.parametrize(("check", "message", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_each_fault_of_a_message_is_named(check: Callable[[Any], None], message: Any, reason: str):
    with pytest.raises(InvalidRequest, match=reason):
        check(message)


def test_sampling_parameters_cross_the_wire_field_by_field():
    assert {field.name for field in fields(SamplingParams)} == set(Sampling.DESCRIPTOR.fields_by_name)
    params = SamplingParams(
        max_tokens=7, temperature=0.1, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.3, presence_penalty=-0.5,
        frequency_penalty=0.25, seed=2**64 - 1, choice=3, stop_tokens=(2, 9), logprobs=0, prompt_logprobs=True,
    )  # fmt: skip
    assert messages.sampling_params(messages.sampling_message(params)) == params
    assert messages.sampling_params(messages.sampling_message(SamplingParams())) == SamplingParams()


def test_an_absent_field_has_its_default_and_a_zero_is_a_zero():
    assert messages.sampling_params(Sampling()) == SamplingParams()
    assert messages.sampling_params(Sampling(top_p=0.0)).top_p == 0.0
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        messages.sampling_params(Sampling(max_tokens=0))


@pytest.mark.parametrize("code", sorted(by_code))
def test_an_error_crosses_the_wire_as_itself_unless_it_is_a_bug(code: str):
    kind = by_code[code]
    sent = kind("why", held=7) if issubclass(kind, Gap) else kind("why", retry_after_s=2.5)
    received = messages.error(messages.failed(sent))
    assert type(received) is (RemoteError if issubclass(kind, LocalError) else kind)
    assert str(received) == "why"
    assert received.retry_after_s == sent.retry_after_s
    assert getattr(received, "held", None) == getattr(sent, "held", None)


def test_a_code_of_the_future_is_their_fault():
    assert type(messages.error(Failed(code="tachyon", message="?"))) is RemoteError


def test_an_errors_message_is_cut_at_its_limit():
    long = "x" * (limits.ERROR_MESSAGE_CHARS_MAX + 1)
    assert len(messages.failed(Overloaded(long)).message) == limits.ERROR_MESSAGE_CHARS_MAX
    assert len(str(messages.error(Failed(code="overloaded", message=long)))) == limits.ERROR_MESSAGE_CHARS_MAX
    assert messages.error(messages.failed(DeadlineExceeded("late"))).retry_after_s is None
    for number in (math.nan, math.inf, -1.0):
        assert messages.error(Failed(code="overloaded", retry_after_s=number)).retry_after_s is None
