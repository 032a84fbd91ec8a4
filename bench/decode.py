"""Tokens a second of one node against transformers' `generate`, on the same checkpoint, in the same run.

python -m bench.decode [--no-demo] [--no-bench] [--rounds 5] [--threads 1] [--all]

How to read it.  Greedy answers of 64 tokens to prompts of 32, one at a time (batch 1) and eight at once (batch 8: eight
sessions here, one batch without padding there).  `decode` counts the tokens after each answer's first, over the time
from the earliest first token to the last token of all; `answer` counts all tokens, over the time from asking to the
last one; `prefill` counts the prompt's tokens, over the time from asking to the first token.

transformers is the fastest of its experts functions (`--all` tries batched_mm too, which copies weights); one that is
far behind in the warm-up is not run again.  "node" is a child process, `shoal run`, asked through gRPC from this one;
"worker" is the same engine without process, gRPC and door around it.  Each side is idle while another computes.
Ratios are of the medians; in brackets the least and the greatest of a round.  Above 1, shoal is faster.  "same tokens"
are the answers, node's and worker's, that equal those of transformers' grouped_mm in the warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bench import models
from bench.rounds import conditions, interleaved, median, ratio, table
from node import config as node_config
from node import log, model, nearby
from protos import inference_pb2 as pb
from protos.epoch import Epoch
from protos.ids import PeerId, SessionId
from protos.sampling import SamplingParams
from shard.batch import Step
from shard.stage import OpenSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bench.models import Subject
    from node.client import Client
    from shard.worker import Worker

    Prompts = list[list[int]]
    Ask = Callable[[Prompts, int], "Run"]

EPOCH = Epoch(0, PeerId("bench"))
NEW = 64
PROMPT = 32
PREFILLS = (32, 512)
BATCHES = (1, 8)
SLOWER = 1.3  # an experts function that takes so many times the best one's time in the warm-up does not run again
HEAD = ("", "transformers", "its experts", "node", "ratio", "worker", "ratio", "same tokens")


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from asking to the first token of any answer and to the last of all, and the answers."""

    first_s: float
    last_s: float
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: what is asked, and how a run becomes tokens a second."""

    name: str
    prompts: Prompts
    new: int
    speeds: Mapping[str, Callable[[Run], float]]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    os.environ |= {"SHOAL_THREADS": str(arguments.threads), "SHOAL_SESSIONS_MAX": str(max(BATCHES))}
    log.configure("warning")
    functions = ("grouped_mm", "eager", "batched_mm") if arguments.all else ("grouped_mm", "eager")
    rows = []
    if not arguments.no_bench:
        with models.bench_model() as subject:
            rows += _measure(subject, functions, arguments.rounds)
    if not arguments.no_demo:
        with models.demo() as found:
            if found is None:
                print("the demo model is not in the cache (`shoal demo-model` builds it): left out")
            else:
                rows += _measure(found, functions, arguments.rounds)
    print(table(HEAD, rows))
    print(f"\nTokens a second, medians of {arguments.rounds} interleaved rounds. {conditions(arguments.threads)}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-bench", action="store_true", help="leave the bench model out")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo model out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each side")
    parser.add_argument("--all", action="store_true", help="also transformers' batched_mm")
    return parser.parse_args()


def _measure(subject: Subject, functions: tuple[str, ...], rounds: int) -> list[list[str]]:
    with contextlib.ExitStack() as stack:
        theirs = _transformers(subject)
        client = stack.enter_context(nearby.connected(nearby.Wanted(store=subject.store), _quiet))
        worker = stack.enter_context(_worker(subject))
        threads = stack.enter_context(ThreadPoolExecutor(max(BATCHES)))
        ours: dict[str, Ask] = {"node": partial(_ask_node, client, threads), "worker": partial(_ask_worker, worker)}
        rows = []
        for case in _cases(subject):
            ways = {name: partial(theirs, name) for name in functions} | ours
            rows += _compare(case, ways, functions, rounds, f"{subject.name}, {subject.manifest.dtype}")
        return rows


def _cases(subject: Subject) -> list[Case]:
    cases = []
    for batch in BATCHES:
        speeds = {f"decode, batch {batch}": _decode_speed, f"answer, batch {batch}": _answer_speed}
        cases.append(Case(f"batch {batch}", subject.prompts(batch, PROMPT), NEW, speeds))
    for length in PREFILLS:
        speeds = {f"prefill, {length} tokens": partial(_prefill_speed, length)}
        cases.append(Case(f"prefill {length}", subject.prompts(1, length), 1, speeds))
    return cases


def _decode_speed(run: Run) -> float:
    return (run.tokens - len(run.answers)) / (run.last_s - run.first_s)


def _prefill_speed(length: int, run: Run) -> float:
    return length / run.first_s


def _answer_speed(run: Run) -> float:
    return run.tokens / run.last_s


def _compare(case: Case, ways: dict[str, Ask], functions: tuple[str, ...], rounds: int, name: str) -> list[list[str]]:
    runs = {way: partial(ask, case.prompts, case.new) for way, ask in ways.items()}
    warm = {way: run() for way, run in runs.items()}
    best = min(warm[function].last_s for function in functions)
    kept = [function for function in functions if warm[function].last_s <= SLOWER * best]
    found = interleaved({way: run for way, run in runs.items() if way in kept or way not in functions}, rounds)
    rows = []
    for title, speed in case.speeds.items():
        speeds = {way: [speed(run) for run in results] for way, results in found.items()}
        reference = max(kept, key=lambda function: median(speeds[function]))
        row = [f"{name}: {title}", f"{median(speeds[reference]):.1f}", reference]
        for way in ("node", "worker"):
            row += [f"{median(speeds[way]):.1f}", ratio(speeds[way], speeds[reference])]
        same = [_same(results, warm["grouped_mm"]) for way, results in found.items() if way not in functions]
        rows.append([*row, f"{min(same)} of {len(case.prompts)}"])
        print(" ".join(rows[-1]), flush=True)
    return rows


def _same(runs: list[Run], reference: Run) -> int:
    """Answers that are the reference's, in the worst of the runs."""
    return min(sum(ours == theirs for ours, theirs in zip(run.answers, reference.answers, strict=True)) for run in runs)


# ---- transformers


def _transformers(subject: Subject) -> Callable[[str, Prompts, int], Run]:
    loaded = AutoModelForCausalLM.from_pretrained(subject.checkpoint, dtype="auto").eval()
    loaded.generation_config = GenerationConfig(pad_token_id=0)  # greedy, and no end token
    return partial(_ask_transformers, loaded)


class _FirstToken(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when the first token was there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def _ask_transformers(loaded: Any, experts: str, prompts: Prompts, new: int) -> Run:
    loaded.set_experts_implementation(experts)
    ids = torch.tensor(prompts)
    first = _FirstToken()
    asked = time.perf_counter()
    output = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([first]),
    )
    last = time.perf_counter()
    assert first.at is not None
    return Run(first.at - asked, last - asked, output[:, ids.shape[1] :].tolist())


# ---- the node


def _quiet(_: str) -> None:
    """Nobody needs to hear that a node is being started."""


def _ask_node(client: Client, threads: ThreadPoolExecutor, prompts: Prompts, new: int) -> Run:
    asked = time.perf_counter()
    answers = list(threads.map(partial(_ask_once, client, new), prompts))
    first = min(times[0] for times, _ in answers)
    last = max(times[-1] for times, _ in answers)
    return Run(first - asked, last - asked, [tokens for _, tokens in answers])


def _ask_once(client: Client, new: int, prompt: list[int]) -> tuple[list[float], list[int]]:
    """When each token of an answer came, and the tokens."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(max_tokens=new, temperature=0, repetition_penalty=1),
        ignore_eos=True,
    )
    times, tokens = [], []
    for event in client.generate(request):
        if event.HasField("token"):
            times.append(time.perf_counter())
            tokens.append(event.token.id)
    return times, tokens


# ---- the worker in this process


@contextlib.contextmanager
def _worker(subject: Subject) -> Iterator[Worker]:
    loaded = model.load(node_config.load({"store": subject.store}), lambda *_: None)
    try:
        yield loaded.worker
    finally:
        loaded.worker.shutdown()


def _ask_worker(worker: Worker, prompts: Prompts, new: int) -> Run:
    asked = time.perf_counter()
    params = SamplingParams(max_tokens=new)
    logs = {SessionId(str(number)): list(prompt) for number, prompt in enumerate(prompts)}
    for session, tokens in logs.items():
        worker.open(OpenSession(session, EPOCH, tuple(tokens), len(tokens), params, len(tokens) + new)).result()
    starts = dict.fromkeys(logs, 0)
    first = 0.0
    for _ in range(new):
        steps = [Step(s, EPOCH, starts[s], len(logs[s]), tuple(logs[s][starts[s] :])) for s in logs]
        for step, done in [(step, worker.step(step)) for step in steps]:
            token = done.result().token
            assert token is not None
            first = first or time.perf_counter()
            starts[step.session] = step.until
            logs[step.session].append(token)
    last = time.perf_counter()
    for session in logs:
        worker.close(session, EPOCH).result()
    return Run(first - asked, last - asked, [list(log[-new:]) for log in logs.values()])


if __name__ == "__main__":
    main()
