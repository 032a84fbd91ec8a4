"""A door with a deterministic toy in place of weights: token n of an answer is (sum of the log + n) mod vocabulary."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from coordinator.admission import Admission
from coordinator.view import Record, View
from node.config import Config
from node.gate import Gate
from node.generate import Door
from node.identity import Identity
from node.link import Links
from node.stage_host import StageHost
from node.text import Text
from protos import inference_pb2 as pb
from protos import units
from protos.errors import ShoalError, UnknownSession
from protos.ids import PeerId, UnitHash
from protos.manifest import Manifest, UnitEntry
from protos.stage_pb2 import Peer
from shard.stage import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.epoch import Epoch
    from protos.ids import SessionId
    from shard.batch import Step
    from shard.stage import OpenSession

VOCAB = 64
CONTEXT = 48
EOS = 63
WORDS = [f"w{n} " for n in range(VOCAB - 4)] + ["<user>", "<answer>", "<pad>", "<eos>"]


def manifest(*, recompute_at: int | None = None, context: int = CONTEXT) -> Manifest:
    experts = (2, 2)
    names = [units.TEXT, units.EMBED]
    for layer, count in enumerate(experts):
        names += [units.trunk(layer), *(units.expert(layer, e) for e in range(count))]
    entries = tuple(UnitEntry(name, UnitHash("ab" * 32), 1000, ()) for name in [*names, units.HEAD])
    return Manifest(
        family="toy",
        architecture="ToyForCausalLM",
        dtype="float32",
        layers=2,
        experts=experts,
        top_k=1,
        hidden=4,
        vocab=VOCAB,
        grain=1,
        context=context,
        recompute_at=recompute_at,
        has_tokenizer=True,
        units=entries,
    )


def text_files(generation: dict[str, object] | None = None, *, template: bool = True) -> dict[str, bytes]:
    """A tokenizer of whole words; the words keep their space, so that texts join."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<user>", "<answer>", "<pad>", "<eos>"])
    config = {"chat_template": "{% for m in messages %}<user>{{ m.content }}{% endfor %}<answer>"} if template else {}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": EOS, **(generation or {})}).encode(),
    }


def next_token(log: list[int], vocab: int = VOCAB) -> int:
    return (sum(log) + len(log)) % vocab


def answer(prompt: list[int], count: int) -> list[int]:
    """What the toy answers if nothing ends it before."""
    log = list(prompt)
    for _ in range(count):
        log.append(next_token(log))
    return log[len(prompt) :]


class ToyWorker:
    """Resolves at once, unless `stuck`: then futures stay open.  `faults` are raised instead of the next steps."""

    def __init__(self) -> None:
        self.open_sessions: dict[SessionId, list[int]] = {}
        self.opened: list[OpenSession] = []
        self.steps: list[Step] = []
        self.faults: list[ShoalError] = []
        self.open_fault: ShoalError | None = None
        self.stuck = False
        self.logprobs = True
        self.counting = threading.Event()  # cleared: kv_bytes waits for it
        self.counting.set()

    @property
    def kv_bytes(self) -> tuple[int, int]:
        assert self.counting.wait(20)
        return len(self.open_sessions), 100

    def open(self, request: OpenSession) -> Future[None]:
        future: Future[None] = Future()
        if self.open_fault is not None:
            future.set_exception(self.open_fault)
            return future
        self.opened.append(request)
        self.open_sessions[request.session] = list(request.log)
        future.set_result(None)
        return future

    def step(self, step: Step) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self.steps.append(step)
        if self.stuck:
            return future
        if self.faults:
            future.set_exception(self.faults.pop(0))
        elif step.session not in self.open_sessions:
            future.set_exception(UnknownSession("not open"))
        else:
            future.set_result(self._result(step))
        return future

    def _result(self, step: Step) -> StepResult:
        assert step.tokens is not None
        log = self.open_sessions[step.session]
        log[step.start :] = step.tokens
        assert len(log) == step.until
        token = next_token(log)
        if not self.logprobs:
            return StepResult(step.session, step.epoch, step.until, token=token)
        return StepResult(step.session, step.epoch, step.until, token=token, logprob=-0.5, top=((1, -0.5),))

    def close(self, session: SessionId, epoch: Epoch) -> Future[None]:
        self.open_sessions.pop(session, None)
        return _done(None)

    def raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> Future[None]:
        return _done(None)

    def truncate(self, session: SessionId, position: int) -> Future[None]:
        return _done(None)

    def call(self, run: Callable[[Any], Any]) -> Future[Any]:
        return _done(0)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Alone:
    """What a node that holds everything knows of its peers: itself."""

    me = PeerId("toy")
    called_at = "127.0.0.1:7645"

    def __init__(self, layers: int) -> None:
        experts = dict.fromkeys(range(layers), 3)
        self._record = Record(self.called_at, "", range(layers), embed=True, head=True, text=True, experts=experts)

    def view(self, _: object) -> View:
        return View({self.me: self._record})

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        raise AssertionError(f"peer {peer} failed: {error}")

    def heard(self, peer: PeerId) -> None:
        raise AssertionError(f"peer {peer} was heard of")


def door(
    worker: ToyWorker,
    files: dict[str, bytes] | None = None,
    *,
    recompute_at: int | None = None,
    context: int = CONTEXT,
    **settings: object,
) -> Door:
    config = Config(**settings)  # type: ignore[arg-type]
    gate = Gate(Admission(config.sessions_max, config.queue_max, config.queue_wait_s))
    text = Text(text_files() if files is None else files)
    model = manifest(recompute_at=recompute_at, context=context)
    links = Links(Identity.create(), plaintext=True)
    host = StageHost(Peer(peer_id=Alone.me, address=Alone.called_at), model, worker, range(model.layers), links)
    return Door(Alone(model.layers), model, text, host, links, gate, config)


def by_ids(*ids: int, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]
