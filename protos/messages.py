"""What a received message must satisfy by itself, before anybody looks at the session or the model it speaks of.

Pure. Law: each check raises InvalidRequest, naming the field, and touches nothing; tensor frames are checked by
protos.frame, with the dtype and shape that the receiver expects.
"""

import math
from collections.abc import Sized
from dataclasses import fields

from protos.errors import Gap, InvalidRequest, LocalError, RemoteError, ShoalError, by_code
from protos.expert_pb2 import ComputeRequest
from protos.inference_pb2 import Failed, GenerateRequest, Sampling
from protos.limits import (
    ADDRESS_CHARS_MAX,
    CHAT_MESSAGES_MAX,
    ERROR_MESSAGE_CHARS_MAX,
    EXPERTS_MAX,
    ID_CHARS_MAX,
    LOG_TOKENS_MAX,
    PAIRS_MAX,
    RESUME_KEY_BYTES,
    ROLE_CHARS_MAX,
    ROUTE_STAGES_MAX,
    STEP_ROWS_MAX,
    STOP_STRING_CHARS_MAX,
    STOP_STRINGS_MAX,
    VOCAB_MAX,
)
from protos.sampling import SamplingParams
from protos.stage_pb2 import (
    REPLY_ROWS,
    REPLY_TOKEN,
    REPLY_TOP,
    Epoch,
    OpenRequest,
    Peer,
    RaiseEpochRequest,
    Route,
    Step,
)


def sampling_params(message: Sampling) -> SamplingParams:
    """The parameters that a message means: an absent field has its default."""
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    if "stop_tokens" in given:
        given["stop_tokens"] = tuple(message.stop_tokens)
    return SamplingParams(**given)


def sampling_message(params: SamplingParams) -> Sampling:
    """The message that means these parameters, whatever the receiver's defaults are."""
    return Sampling(**{field.name: getattr(params, field.name) for field in fields(params)})


def failed(error: ShoalError) -> Failed:
    """An error as it travels inside a stream."""
    return Failed(
        code=error.code,
        message=str(error)[:ERROR_MESSAGE_CHARS_MAX],
        retry_after_s=error.retry_after_s,
        held=error.held if isinstance(error, Gap) else None,
    )


def error(message: Failed) -> ShoalError:
    """The error that a message means. A code that we do not know, and a bug that is not ours, are a RemoteError."""
    text = message.message[:ERROR_MESSAGE_CHARS_MAX]
    retry_after_s = message.retry_after_s if message.HasField("retry_after_s") else None
    if retry_after_s is not None and not 0 <= retry_after_s < math.inf:  # no time that anybody could wait
        retry_after_s = None
    kind = by_code.get(message.code, RemoteError)
    if issubclass(kind, LocalError):
        kind = RemoteError
    if issubclass(kind, Gap):
        return kind(text, held=message.held, retry_after_s=retry_after_s)
    return kind(text, retry_after_s=retry_after_s)


def check_generate(request: GenerateRequest) -> None:
    """A client's request: a prompt in one of its forms, counts and lengths."""
    if request.WhichOneof("prompt") is None:
        raise InvalidRequest("the request has no prompt; give text, token_ids or chat")
    _at_most("token_ids", request.token_ids.ids, LOG_TOKENS_MAX)
    _at_most("chat", request.chat.messages, CHAT_MESSAGES_MAX)
    for message in request.chat.messages:
        _at_most("a chat message's role", message.role, ROLE_CHARS_MAX)
    _at_most("stop", request.stop, STOP_STRINGS_MAX)
    for text in request.stop:
        _filled("a stop string", text, STOP_STRING_CHARS_MAX)
    _at_most("model", request.model, ID_CHARS_MAX)


def check_open(request: OpenRequest) -> None:
    """A session to be opened: ids, log, route."""
    _filled("session_id", request.session_id, ID_CHARS_MAX)
    _filled("model_id", request.model_id, ID_CHARS_MAX)
    _epoch("epoch", request.epoch)
    _filled("prompt_ids", request.prompt_ids, LOG_TOKENS_MAX)
    log_tokens = len(request.prompt_ids) + len(request.generated_ids)
    if log_tokens > LOG_TOKENS_MAX or log_tokens > request.positions:
        raise InvalidRequest(
            f"a log of {log_tokens} tokens for {request.positions} positions; it must fit them, and may have"
            f" at most {LOG_TOKENS_MAX} tokens"
        )
    _exactly("resume_key_sha256", request.resume_key_sha256, RESUME_KEY_BYTES)
    _route(request.route, request.stage)


def check_raise(request: RaiseEpochRequest) -> None:
    """A session to be taken over: the epoch must rise."""
    _filled("session_id", request.session_id, ID_CHARS_MAX)
    _epoch("expected", request.expected)
    _epoch("epoch", request.epoch)
    if (request.epoch.counter, request.epoch.door) <= (request.expected.counter, request.expected.door):
        raise InvalidRequest(f"epoch {request.epoch.counter} is not above the expected {request.expected.counter}")
    _exactly("resume_key", request.resume_key, RESUME_KEY_BYTES)
    _route(request.route, request.stage)


def check_step(step: Step) -> None:
    """A step: positions, token ids, bitset. What they mean for the session is the stage's to judge."""
    _filled("session_id", step.session_id, ID_CHARS_MAX)
    _epoch("epoch", step.epoch)
    _filled("token_ids", step.token_ids, STEP_ROWS_MAX)
    if step.start + len(step.token_ids) > step.until:
        raise InvalidRequest(f"{len(step.token_ids)} rows from position {step.start} on reach beyond {step.until}")
    if step.reply not in (REPLY_TOKEN, REPLY_TOP, REPLY_ROWS):
        raise InvalidRequest(f"reply is {step.reply}; it must be REPLY_TOKEN, REPLY_TOP or REPLY_ROWS")
    _at_most("allowed", step.allowed, VOCAB_MAX // 8)


def check_compute(request: ComputeRequest) -> None:
    """An expert call: unit hashes and pairs. pair_rows are checked against the frame by whoever decodes it."""
    _filled("model_id", request.model_id, ID_CHARS_MAX)
    _filled("unit_hashes", request.unit_hashes, EXPERTS_MAX)
    for unit_hash in request.unit_hashes:
        _filled("a unit hash", unit_hash, ID_CHARS_MAX)
    if len(set(request.unit_hashes)) != len(request.unit_hashes):
        raise InvalidRequest("unit_hashes names a unit twice; each is given once, and pairs point to it")
    _filled("pair_rows", request.pair_rows, PAIRS_MAX)
    _exactly("pair_experts", request.pair_experts, len(request.pair_rows))
    if max(request.pair_experts) >= len(request.unit_hashes):
        raise InvalidRequest(f"pair_experts points beyond the {len(request.unit_hashes)} unit_hashes")


def _route(route: Route, stage: int) -> None:
    _filled("route", route.stages, ROUTE_STAGES_MAX)
    if stage >= len(route.stages):
        raise InvalidRequest(f"stage {stage} of a route of {len(route.stages)} stages, counted from 0")
    _filled("the door's peer_id", route.door.peer_id, ID_CHARS_MAX)
    _at_most("the door's address", route.door.address, ADDRESS_CHARS_MAX)
    layer = 0
    for entry in route.stages:
        _peer("a stage", entry.peer)
        if entry.HasField("standby"):
            _peer("a standby", entry.standby)
        if entry.first_layer != layer or entry.last_layer < layer:
            raise InvalidRequest(f"a stage from layer {entry.first_layer} to {entry.last_layer} where {layer} is next")
        layer = entry.last_layer + 1


def _peer(what: str, peer: Peer) -> None:
    _filled(f"{what}'s peer_id", peer.peer_id, ID_CHARS_MAX)
    _filled(f"{what}'s address", peer.address, ADDRESS_CHARS_MAX)


def _epoch(what: str, epoch: Epoch) -> None:
    _filled(f"{what}'s door", epoch.door, ID_CHARS_MAX)


def _at_most(what: str, value: Sized, count_max: int) -> None:
    if len(value) > count_max:
        raise InvalidRequest(f"{what} has a length of {len(value)}; at most {count_max} is allowed")


def _filled(what: str, value: Sized, count_max: int) -> None:
    if not len(value):
        raise InvalidRequest(f"{what} is empty; it must be given")
    _at_most(what, value, count_max)


def _exactly(what: str, value: Sized, count: int) -> None:
    if len(value) != count:
        raise InvalidRequest(f"{what} has a length of {len(value)}; it must be {count}")
