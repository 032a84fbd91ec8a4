"""Sessions that run through a span of layers: ragged batches, steps atomic per session, sampling after the last layer.

One thread owns a stage. A step says where it starts: a stage that holds more truncates, one that holds less answers
Gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos.errors import (
    BrokenInvariant,
    ContextTooLong,
    Fenced,
    Gap,
    InvalidRequest,
    NonFinite,
    ShoalError,
    UnknownSession,
)
from protos.limits import FRAME_BYTES_MAX, FRAME_HEADER_BYTES_MAX
from shard import sampler
from shard.experts import RowsLost
from shard.kv import KvPool, RaggedCache, SessionKv, Slice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from protos.epoch import Epoch
    from protos.ids import SessionId
    from protos.sampling import SamplingParams
    from shard.batch import Chunk, Step
    from shard.body import Body


@dataclass(frozen=True, slots=True)
class OpenSession:
    """What a stage must know of a session before its first step: the log so far and the positions to reserve KV for."""

    session: SessionId
    epoch: Epoch
    log: tuple[int, ...]
    prompt_len: int
    params: SamplingParams
    positions: int


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step gave: rows [n, H] for the next stage, or after the last one the token at `position`.

    `prompt_logprobs[i]` is log p(log[i + 1] | log[: i + 1]), given once, with the step that ends the prompt.
    """

    session: SessionId
    epoch: Epoch
    position: int
    rows: torch.Tensor | None = None
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[float, ...] | None = None


class _Session:
    __slots__ = ("epoch", "kv", "log", "params", "prompt_len", "prompt_logprobs")

    def __init__(self, request: OpenSession, kv: SessionKv) -> None:
        self.epoch = request.epoch
        self.kv = kv
        self.log = list(request.log)
        self.params = request.params
        self.prompt_len = request.prompt_len
        self.prompt_logprobs: list[float] = []


class Stage:
    """The sessions of one span."""

    def __init__(self, body: Body, kv_bytes_max: int) -> None:
        self.body = body
        self.kv = KvPool(body.kv_layers, kv_bytes_max, body.device)
        text = body.model.config.get_text_config()
        self.vocab = int(text.vocab_size)
        self.context = int(text.max_position_embeddings)
        # Of one forward: all of them may go to one expert, and then to its holder, and back, in one frame.
        self.rows_max = (FRAME_BYTES_MAX - FRAME_HEADER_BYTES_MAX) // (body.hidden * body.dtype.itemsize)
        self._sessions: dict[SessionId, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, request: OpenSession) -> None:
        """Reserves a session's KV.  Raises Overloaded, InvalidRequest or ContextTooLong, and then nothing is held."""
        if request.session in self._sessions:
            raise InvalidRequest(f"session {request.session} is open already")
        if request.positions > self.context:
            raise ContextTooLong(
                f"{request.positions} positions were asked for, the model's context has {self.context}"
            )
        if not 0 < request.prompt_len <= len(request.log) <= request.positions:
            raise InvalidRequest(
                f"a session needs 0 < prompt ({request.prompt_len}) <= log ({len(request.log)}) "
                f"<= positions ({request.positions})"
            )
        self._check_tokens(request.log)
        self._sessions[request.session] = _Session(request, self.kv.reserve(request.session, request.positions))

    def close(self, session: SessionId, epoch: Epoch) -> None:
        """Frees a session; closing twice is harmless.  Raises Fenced for a lower epoch than the session's."""
        found = self._sessions.get(session)
        if found is None:
            return
        if epoch < found.epoch:
            raise Fenced(f"session {session} is at epoch {found.epoch}; a door of epoch {epoch} cannot close it")
        del self._sessions[session]
        self.kv.release(session)

    def held(self, session: SessionId) -> int:
        """Positions of a session's KV that are held."""
        return self._find(session).kv.held

    def session_kv(self, session: SessionId) -> SessionKv:
        return self._find(session).kv

    def truncate(self, session: SessionId, position: int) -> None:
        """Forgets KV from `position` on.  Raises Gap when less is held."""
        kv = self._find(session).kv
        if position > kv.held:
            raise Gap(
                f"session {session} holds {kv.held} positions, truncation to {position} was asked for", held=kv.held
            )
        kv.truncate(position)

    def raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> None:
        """Compare-and-set of a session's epoch: what carries another one is refused from now on.  Raises Fenced."""
        found = self._find(session)
        if found.epoch != expected or epoch <= expected:
            raise Fenced(f"session {session} is at epoch {found.epoch}; it cannot be raised from {expected} to {epoch}")
        found.epoch = epoch

    def begin(self, step: Step) -> None:
        """Checks a step against its session and rewinds to its start; must precede the step's chunks.

        Raises UnknownSession, Fenced, Gap or InvalidRequest, and then the session is as before.
        """
        session = self._find(step.session)
        if step.epoch < session.epoch:
            raise Fenced(f"session {step.session} is at epoch {session.epoch}, the step carries {step.epoch}")
        if step.epoch > session.epoch:
            raise InvalidRequest(
                f"session {step.session} is at epoch {session.epoch}, the step carries {step.epoch}: raise it first"
            )
        self._check_input(step)
        if not 0 <= step.start < step.end <= step.until <= session.kv.positions:
            raise InvalidRequest(
                f"rows {step.start} to {step.end} of a feed to {step.until} do not fit "
                f"{session.kv.positions} reserved positions"
            )
        if step.start > session.kv.held:
            raise Gap(
                f"session {step.session} holds {session.kv.held} positions, the step starts at {step.start}",
                held=session.kv.held,
            )
        scored = len(session.prompt_logprobs)
        if self.body.is_last and session.params.prompt_logprobs and scored < step.start < session.prompt_len:
            raise Gap(
                f"of the prompt of session {step.session} {scored} rows are scored, the step starts at {step.start}",
                held=scored,
            )
        known = step.start if step.tokens is not None else step.end if self.body.is_last else 0
        if len(session.log) < known:
            raise InvalidRequest(
                f"the log of session {step.session} has {len(session.log)} tokens, the step needs {known}"
            )
        session.kv.truncate(step.start)
        if step.tokens is not None:
            session.log[step.start : step.end] = step.tokens
        del session.log[step.until :]
        del session.prompt_logprobs[step.start :]

    def undo(self, step: Step) -> None:
        """Forgets what a step that failed has computed: all from its start, which is where it began."""
        kv = self._find(step.session).kv
        kv.truncate(min(kv.held, step.start))

    def run(self, chunks: Sequence[Chunk]) -> list[StepResult | ShoalError]:
        """One forward over the next rows of several sessions; a result (or a session's own error) for each chunk.

        A chunk's KV counts once it has its result.  An exception leaves every session as it was before the call.
        Sessions with rows that no holder of their experts answered leave the batch, and the others run without them.
        """
        try:
            return self._run(chunks)
        except RowsLost as lost:
            found: dict[int, StepResult | ShoalError] = dict(_losses(chunks, lost))
            if not found:
                raise BrokenInvariant(f"lost rows {sorted(lost.rows)} belong to none of {len(chunks)} chunks") from lost
        left = [number for number in range(len(chunks)) if number not in found]
        if left:
            found.update(zip(left, self.run([chunks[number] for number in left]), strict=True))
        return [found[number] for number in range(len(chunks))]

    def _run(self, chunks: Sequence[Chunk]) -> list[StepResult | ShoalError]:
        sessions = [self._find(chunk.step.session) for chunk in chunks]
        slices, first = [], 0
        for chunk, session in zip(chunks, sessions, strict=True):
            slices.append(Slice(session.kv, chunk.start, first, first + chunk.rows))
            first += chunk.rows
        with torch.inference_mode():
            hidden = self._forward(chunks, slices)
            results: list[StepResult | ShoalError] = (
                self._sample(chunks, sessions, slices, hidden)
                if self.body.is_last
                else self._hand_on(chunks, slices, hidden)
            )
        for chunk, session, result in zip(chunks, sessions, results, strict=True):
            if isinstance(result, StepResult):
                session.kv.held = chunk.end
        return results

    def _forward(self, chunks: Sequence[Chunk], slices: Sequence[Slice]) -> torch.Tensor:
        device = self.body.device
        positions = torch.tensor([[at for chunk in chunks for at in range(chunk.start, chunk.end)]], device=device)
        cache = RaggedCache(slices, self.body.direct)
        ends = [chunk.step.until for chunk in chunks]
        if not self.body.is_first:
            rows = torch.cat([self._rows(chunk) for chunk in chunks]) if len(chunks) > 1 else self._rows(chunks[0])
            return self.body.forward(None, rows.to(device), positions, cache, ends)
        ids = [token for chunk in chunks for token in self._tokens(chunk)]
        return self.body.forward(torch.tensor([ids], device=device), None, positions, cache, ends)

    @staticmethod
    def _tokens(chunk: Chunk) -> tuple[int, ...]:
        assert chunk.step.tokens is not None
        return chunk.step.tokens[chunk.start - chunk.step.start : chunk.end - chunk.step.start]

    @staticmethod
    def _rows(chunk: Chunk) -> torch.Tensor:
        assert chunk.step.rows is not None
        return chunk.step.rows[chunk.start - chunk.step.start : chunk.end - chunk.step.start]

    @staticmethod
    def _hand_on(
        chunks: Sequence[Chunk], slices: Sequence[Slice], hidden: torch.Tensor
    ) -> list[StepResult | ShoalError]:
        return [
            _finite(StepResult(chunk.step.session, chunk.step.epoch, chunk.end, rows=hidden[part.first : part.last]))
            for chunk, part in zip(chunks, slices, strict=True)
        ]

    def _sample(
        self, chunks: Sequence[Chunk], sessions: Sequence[_Session], slices: Sequence[Slice], hidden: torch.Tensor
    ) -> list[StepResult | ShoalError]:
        final = [part.last - 1 for chunk, part in zip(chunks, slices, strict=True) if chunk.ends_feed]
        logits = self.body.head(hidden if len(final) == hidden.shape[0] else hidden[final]) if final else hidden[:0]
        rows = iter(logits)
        outcomes: list[tuple[StepResult, list[float]] | ShoalError] = []
        for chunk, session, part in zip(chunks, sessions, slices, strict=True):
            row = next(rows) if chunk.ends_feed else None
            try:
                scores = self._score_prompt(chunk, session, hidden[part.first : part.last])
                outcomes.append((self._outcome(chunk, session, scores, row), scores))
            except ShoalError as error:  # this session's alone: the batch goes on
                outcomes.append(error)
        return [self._keep(*item) for item in zip(chunks, sessions, outcomes, strict=True)]

    @staticmethod
    def _outcome(chunk: Chunk, session: _Session, scores: list[float], logits: torch.Tensor | None) -> StepResult:
        step = chunk.step
        if logits is None:
            return StepResult(step.session, step.epoch, chunk.end)
        found = sampler.sample(logits, session.params, session.log, session.prompt_len, step.allowed)
        complete = session.params.prompt_logprobs and step.until == session.prompt_len
        return StepResult(
            step.session,
            step.epoch,
            step.until,
            token=found.token,
            logprob=found.logprob,
            top=found.top,
            prompt_logprobs=(*session.prompt_logprobs[: chunk.start], *scores) if complete else None,
        )

    @staticmethod
    def _keep(
        chunk: Chunk, session: _Session, outcome: tuple[StepResult, list[float]] | ShoalError
    ) -> StepResult | ShoalError:
        """Changes the session, once nothing of the batch can fail any more."""
        if isinstance(outcome, ShoalError):
            return outcome
        result, scores = outcome
        session.prompt_logprobs[chunk.start :] = scores
        if result.token is not None:
            session.log.append(result.token)
        return result

    def _score_prompt(self, chunk: Chunk, session: _Session, hidden: torch.Tensor) -> list[float]:
        """Log-probabilities of the prompt's tokens that follow the chunk's rows, the head in blocks."""
        if not session.params.prompt_logprobs:
            return []
        end = min(chunk.end, session.prompt_len - 1)
        block = max(1, sampler.PROMPT_BLOCK_BYTES_MAX // (4 * self.vocab))
        scores: list[float] = []
        for at in range(chunk.start, end, block):
            stop = min(end, at + block)
            logits = self.body.head(hidden[at - chunk.start : stop - chunk.start])
            targets = torch.tensor(session.log[at + 1 : stop + 1], device=logits.device)
            scores += sampler.prompt_logprobs(logits, targets)
        return scores

    def _find(self, session: SessionId) -> _Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise UnknownSession(f"session {session} is not open here") from None

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab:
                raise InvalidRequest(f"token id {token} is not in the vocabulary of {self.vocab}")

    def _check_input(self, step: Step) -> None:
        if step.tokens is not None:
            self._check_tokens(step.tokens)
        if self.body.is_first:
            if step.tokens is None or step.rows is not None:
                raise InvalidRequest("the first stage takes token ids, not rows")
            return
        if step.rows is None:
            raise InvalidRequest("a later stage takes rows, token ids alone do not do")
        if step.rows.dim() != 2:
            raise InvalidRequest(f"rows have the shape {tuple(step.rows.shape)}, expected [rows, {self.body.hidden}]")
        expected = (step.end - step.start if step.tokens is None else len(step.tokens), self.body.hidden)
        if tuple(step.rows.shape) != expected or step.rows.dtype != self.body.dtype:
            raise InvalidRequest(
                f"rows are {step.rows.dtype} {tuple(step.rows.shape)}, expected {self.body.dtype} {expected}"
            )


def _losses(chunks: Sequence[Chunk], lost: RowsLost) -> Iterator[tuple[int, ShoalError]]:
    """The numbers of the chunks that own lost rows, each with the reason of its first one."""
    first = 0
    for number, chunk in enumerate(chunks):
        reasons = [lost.rows[row] for row in range(first, first + chunk.rows) if row in lost.rows]
        if reasons:
            yield number, reasons[0]
        first += chunk.rows


def _finite(result: StepResult) -> StepResult | ShoalError:
    """Garbage ends where it is made, not after it has crossed all stages."""
    assert result.rows is not None
    if bool(torch.isfinite(result.rows).all()):
        return result
    return NonFinite(f"rows of session {result.session} before position {result.position} are not finite")
