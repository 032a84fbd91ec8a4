"""Sessions at stages between shard's values and the messages of stage.proto (PROTOCOL.md, sections 8 and 9).

Pure.  Law: what another node sent is checked whole before anybody acts on it; a result says whose session, which
epoch and which stage it speaks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from node import rows
from protos import messages
from protos import stage_pb2 as pb
from protos.epoch import Epoch
from protos.errors import Gap, InvalidRequest, ShoalError
from protos.ids import PeerId, SessionId
from protos.inference_pb2 import Notice
from protos.limits import ERROR_MESSAGE_CHARS_MAX, ID_CHARS_MAX, LOG_TOKENS_MAX, TOP_LOGPROBS_MAX
from shard.batch import Step
from shard.stage import OpenSession, StepResult

if TYPE_CHECKING:
    import torch

    from protos.manifest import Manifest

PEER_CHARS_SHOWN = 8


@dataclass(frozen=True, slots=True, eq=False)
class StageFailed:
    """A stage of the route cannot go on.  `position`: where the rows begin that it could not compute."""

    session: SessionId
    epoch: Epoch
    position: int
    error: ShoalError
    stage: int
    fetching: bool = False
    """Its results could not be had: what it computes may be well."""


@dataclass(frozen=True, slots=True, eq=False)
class StageNotice:
    """Something failed and the stage goes on.  With an empty code: is the session still wanted?"""

    session: SessionId
    epoch: Epoch
    position: int
    code: str
    message: str
    peer: PeerId
    late: bool = False  # and no failure


Result: TypeAlias = StepResult | StageFailed | StageNotice


def named(error: ShoalError, peer: PeerId, address: str) -> ShoalError:
    """The same error, saying whose it is."""
    who = f"peer {peer[:PEER_CHARS_SHOWN]} at {address}"
    if error.message.startswith(who):
        return error
    text = f"{who}: {error.message}"
    if isinstance(error, Gap):
        return Gap(text, held=error.held, retry_after_s=error.retry_after_s)
    return type(error)(text, retry_after_s=error.retry_after_s)


def epoch_message(epoch: Epoch) -> pb.Epoch:
    return pb.Epoch(counter=epoch.counter, door=epoch.door)


def refusal_message(result: pb.StepResult, error: ShoalError) -> pb.DeliverRefusal:
    """A door's answer to a result that it does not take."""
    return pb.DeliverRefusal(
        session_id=result.session_id[:ID_CHARS_MAX],
        epoch=short_epoch(result.epoch),
        position=result.position,
        error=messages.failed(error),
    )


def short_epoch(epoch: pb.Epoch) -> pb.Epoch:
    """What a refusal names of an epoch that nobody has checked, so that it is short whatever was refused."""
    return pb.Epoch(counter=epoch.counter, door=epoch.door[:ID_CHARS_MAX])


def read_epoch(message: pb.Epoch) -> Epoch:
    return Epoch(message.counter, PeerId(message.door))


def read_open(request: pb.OpenRequest) -> OpenSession:
    """What shard must know of a session.  Raises InvalidRequest."""
    return OpenSession(
        session=SessionId(request.session_id),
        epoch=read_epoch(request.epoch),
        log=(*request.prompt_ids, *request.generated_ids),
        prompt_len=len(request.prompt_ids),
        params=messages.sampling_params(request.sampling),
        positions=request.positions,
    )


def reply_of(wants_top: bool, wants_rows: bool) -> pb.Reply.ValueType:
    if wants_rows:
        return pb.REPLY_ROWS
    return pb.REPLY_TOP if wants_top else pb.REPLY_TOKEN


def step_message(step: Step, reply: pb.Reply.ValueType, computed: torch.Tensor | None) -> pb.Step:
    """A step for the next stage with what this one computed, or for the first stage without rows."""
    assert step.tokens is not None, "ids travel with every step"
    return pb.Step(
        session_id=step.session,
        epoch=epoch_message(step.epoch),
        start=step.start,
        until=step.until,
        token_ids=step.tokens,
        rows=b"" if computed is None else rows.encode(computed),
        reply=reply,
        allowed=step.allowed or b"",
    )


def read_step(message: pb.Step, manifest: Manifest, *, first: bool) -> Step:
    """Raises InvalidRequest, InvalidFrame or NonFinite."""
    messages.check_step(message)
    if first and message.rows:
        raise InvalidRequest("the first stage takes token ids, not rows")
    return Step(
        session=SessionId(message.session_id),
        epoch=read_epoch(message.epoch),
        start=message.start,
        until=message.until,
        tokens=tuple(message.token_ids),
        rows=None if first else rows.decode(message.rows, manifest, len(message.token_ids)),
        allowed=message.allowed or None,
    )


def result_message(result: Result, reply: pb.Reply.ValueType) -> pb.StepResult:
    """What a door is told; of an answer no more than `reply` asks for."""
    message = pb.StepResult(session_id=result.session, epoch=epoch_message(result.epoch), position=result.position)
    match result:
        case StageFailed():
            message.failure.CopyFrom(pb.StageFailure(error=messages.failed(result.error), stage=result.stage))
        case StageNotice():
            message.notice.CopyFrom(
                Notice(
                    code=result.code,
                    message=result.message[:ERROR_MESSAGE_CHARS_MAX],
                    peer_id=result.peer,
                    position=result.position,
                    late=result.late,
                )
            )
        case StepResult():
            message.answer.CopyFrom(_answer(result, reply))
    return message


def _answer(result: StepResult, reply: pb.Reply.ValueType) -> pb.Answer:
    answer = pb.Answer(token=result.token)
    if reply in (pb.REPLY_TOP, pb.REPLY_ROWS) and result.logprob is not None:
        answer.logprob = result.logprob
        answer.top_ids.extend(token for token, _ in result.top)
        answer.top_logprobs.extend(value for _, value in result.top)
    if reply == pb.REPLY_ROWS:
        answer.row_logprobs.extend(result.prompt_logprobs or ())
    return answer


def read_result(message: pb.StepResult, manifest: Manifest) -> Result:
    """Raises InvalidRequest."""
    if not 0 < len(message.session_id) <= ID_CHARS_MAX:
        raise InvalidRequest(f"session_id has a length of {len(message.session_id)}")
    session, epoch = SessionId(message.session_id), read_epoch(message.epoch)
    match message.WhichOneof("outcome"):
        case "failure":
            error = messages.error(message.failure.error)
            return StageFailed(session, epoch, message.position, error, message.failure.stage)
        case "notice":
            notice = message.notice
            text = notice.message[:ERROR_MESSAGE_CHARS_MAX]
            peer = PeerId(notice.peer_id[:ID_CHARS_MAX])
            code = notice.code[:ID_CHARS_MAX]
            return StageNotice(session, epoch, message.position, code, text, peer, late=notice.late)
        case "answer":
            return _read_answer(session, epoch, message.position, message.answer, manifest)
        case _:
            raise InvalidRequest("a result has no outcome; it must have an answer, a failure or a notice")


def _read_answer(session: SessionId, epoch: Epoch, position: int, answer: pb.Answer, manifest: Manifest) -> StepResult:
    if answer.HasField("token"):
        _check_token(answer.token, manifest)
    if len(answer.top_ids) != len(answer.top_logprobs) or len(answer.top_ids) > TOP_LOGPROBS_MAX:
        raise InvalidRequest(f"{len(answer.top_ids)} likeliest tokens with {len(answer.top_logprobs)} logprobs")
    for token in answer.top_ids:
        _check_token(token, manifest)
    if len(answer.row_logprobs) > LOG_TOKENS_MAX or answer.rows_start != 0:
        raise InvalidRequest(f"{len(answer.row_logprobs)} row logprobs from {answer.rows_start} on; all come at once")
    if any(math.isnan(value) for value in (answer.logprob, *answer.top_logprobs, *answer.row_logprobs)):
        raise InvalidRequest("a logprob is NaN")
    return StepResult(
        session,
        epoch,
        position,
        token=answer.token if answer.HasField("token") else None,
        logprob=answer.logprob if answer.HasField("logprob") else None,
        top=tuple(zip(answer.top_ids, answer.top_logprobs, strict=True)),
        prompt_logprobs=tuple(answer.row_logprobs) or None,
    )


def _check_token(token: int, manifest: Manifest) -> None:
    if not 0 <= token < manifest.vocab:
        raise InvalidRequest(f"token id {token} is not in the model's vocabulary, 0 to {manifest.vocab - 1}")
