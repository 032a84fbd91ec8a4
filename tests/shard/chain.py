"""A model's spans in one process: stages in a row, as a route has them, driven without threads or a network.
Law: everything that computes is shard's own; this only carries rows from one stage to the next."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from protos import units
from protos.ids import SessionId, UnitName
from protos.sampling import SamplingParams
from shard import batch
from shard.anatomy import Anatomy
from shard.batch import Chunk, Step
from shard.body import Body
from shard.experts import ExpertBank, Pairs
from shard.stage import OpenSession, Stage, StepResult

CPU = torch.device("cpu")


class Holders:
    """The port to experts that several banks hold: expert e is on bank e % len(banks)."""

    def __init__(self, anatomy: Anatomy, weights: Mapping[UnitName, Mapping[str, torch.Tensor]], count: int) -> None:
        self.banks = [ExpertBank() for _ in range(count)]
        self.calls = [0] * count
        for layer, (_, module) in anatomy.experts.items():
            for bank in self.banks:
                bank.add_layer(layer, module)
            for expert in range(anatomy.expert_count(layer)):
                self.banks[expert % count].add(layer, expert, weights[units.expert(layer, expert)])

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if len(self.banks) == 1:
            return self.banks[0](layer, hidden, index)
        pairs, parts = Pairs(index), []
        for number, bank in enumerate(self.banks):
            part = pairs.part([expert for expert in pairs.experts if expert % len(self.banks) == number])
            self.calls[number] += bool(part.experts)
            parts.append((part, bank.rows(layer, hidden, part)))
        return pairs.join(parts, hidden)


@dataclass
class Answer:
    """One session's log, and the logits [V] from which each new token came."""

    log: list[int]
    prompt_len: int
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.log[self.prompt_len :]


class Chain:
    """Stages over the spans of `model`, cut at `cuts`, with the experts of all layers on `holders` banks."""

    def __init__(
        self,
        model: Any,
        cuts: Sequence[int] = (),
        holders: int = 1,
        rows_max: int = 256,
        recompute_at: int | None = None,
    ) -> None:
        anatomy = Anatomy(model)
        weights = anatomy.tensors()
        self.experts = Holders(anatomy, weights, holders)
        bounds = [0, *cuts, anatomy.layers]
        dtype = model.dtype
        self.stages = [
            Stage(Body(model.config, dtype, range(a, b), weights.__getitem__, self.experts, model.device), 1 << 28)
            for a, b in pairwise(bounds)
        ]
        self.rows_max = rows_max
        self.recompute_at = recompute_at
        self.answers: dict[SessionId, Answer] = {}
        self._last_logits: torch.Tensor | None = None
        self._record_logits(self.stages[-1].body)

    def _record_logits(self, body: Body) -> None:
        inner: Callable[[torch.Tensor], torch.Tensor] = body.head

        def head(rows: torch.Tensor) -> torch.Tensor:
            self._last_logits = inner(rows)
            return self._last_logits

        body.head = head  # type: ignore[method-assign]

    def open(self, name: str, prompt: Iterable[int], new: int, params: SamplingParams | None = None) -> SessionId:
        session, log = SessionId(name), list(prompt)
        for stage in self.stages:
            stage.open(OpenSession(session, 0, tuple(log), len(log), params or SamplingParams(), len(log) + new))
        self.answers[session] = Answer(log, len(log))
        return session

    def close(self, session: SessionId) -> None:
        for stage in self.stages:
            stage.close(session, 0)

    def truncate(self, session: SessionId, position: int) -> None:
        for stage in self.stages:
            stage.truncate(session, position)

    def held(self, session: SessionId) -> int:
        return min(stage.held(session) for stage in self.stages)

    def feed(self, *sessions: SessionId) -> list[StepResult]:
        """Feeds each session's log from what its stages hold, packed together, and appends the tokens that come."""
        steps = []
        for session in sessions:
            log, held = self.answers[session].log, self.held(session)
            start = 0 if held == self.recompute_at and len(log) > held else min(held, len(log) - 1)
            steps.append(Step(session, 0, start, len(log), tuple(log[start:])))
        feeds = [(step, step.start) for step in steps]
        for step in steps:
            self.stages[0].begin(step)
        done: list[StepResult] = []
        while feeds:
            chunks = batch.plan(feeds, self.rows_max)
            results = self._through(chunks)
            done += [result for chunk, result in zip(chunks, results, strict=True) if chunk.ends_feed]
            ends = {chunk.step.session: chunk.end for chunk in chunks}
            moved = [(step, ends.get(step.session, at)) for step, at in feeds]
            feeds = [(step, at) for step, at in moved if at < step.until]
        return done

    def _through(self, chunks: list[Chunk]) -> list[StepResult]:
        results = self._run(self.stages[0], chunks)
        for stage in self.stages[1:]:
            onward = [
                Step(c.step.session, 0, c.start, c.step.until, rows=r.rows)
                for c, r in zip(chunks, results, strict=True)
            ]
            for step in onward:
                stage.begin(step)
            results = self._run(stage, [Chunk(step, step.start, step.end) for step in onward])
        self._note(chunks, results)
        return results

    @staticmethod
    def _run(stage: Stage, chunks: list[Chunk]) -> list[StepResult]:
        results = stage.run(chunks)
        failed = [result for result in results if isinstance(result, Exception)]
        if failed:
            raise failed[0]
        return [result for result in results if isinstance(result, StepResult)]

    def _note(self, chunks: list[Chunk], results: list[StepResult]) -> None:
        row = 0
        for chunk, result in zip(chunks, results, strict=True):
            if not chunk.ends_feed:
                continue
            answer = self.answers[chunk.step.session]
            assert result.token is not None
            assert self._last_logits is not None
            answer.logits.append(self._last_logits[row].clone())
            answer.log.append(result.token)
            row += 1
