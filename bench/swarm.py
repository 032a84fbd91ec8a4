"""Tokens a second of two and four nodes on loopback, against one node and against transformers' `generate`.

python -m bench.swarm [--rounds 3] [--answers 2] [--no-plaintext] [--only TEXT]

How to read it.  The bench model in float32, one torch thread a process; one greedy answer of 64 tokens at a time to a
prompt of 32; `tokens/s` counts the tokens after the first one.  "spread": every node has the trunk, each expert is on
one node (R = 1), and the door calls the others in every layer; "spans": each node has some layers with their experts,
and steps go from one to the next.  Each side in its turn is started, warmed up, asked and taken down, so that nothing
else runs beside it.  "remote" is the share of (row, expert) pairs that other nodes computed; "ms a remote layer" is
what a token takes longer than with one node, over the layers.  transformers is the faster of its eager and grouped_mm.
Ratios are of the medians; in brackets the least and the greatest of a round.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench import models, nodes
from bench.rounds import conditions, interleaved, median, ratio, table

if TYPE_CHECKING:
    from bench.models import Subject

NEW, PROMPT, WARM = 64, 32, 12
EXPERTS = ("grouped_mm", "eager")
HEAD = ("", "tokens/s", "of transformers", "of one node", "remote", "ms a remote layer", "same tokens")


@dataclass(frozen=True, slots=True)
class Side:
    """A way to share a model out; no `holds`: transformers in this process."""

    name: str
    holds: list[list[str]]
    plaintext: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """What a side gave in one round."""

    speed: float
    remote: float
    tokens: list[int]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    with models.bench_model() as subject, nodes.place() as place:
        prompt = subject.prompts(1, PROMPT)[0]
        theirs = _Transformers(subject, prompt)
        sides = [side for side in _sides(subject) if arguments.only in side.name]
        if arguments.no_plaintext:
            sides = [side for side in sides if not side.plaintext]
        ways = {"transformers": theirs.turn}
        ways |= {side.name: partial(_turn, place, subject, side, prompt, arguments.answers) for side in sides}
        found = interleaved(ways, arguments.rounds)
        print(table(HEAD, _rows(found, theirs.tokens, subject.manifest.layers)))
    print(f"\nMedians of {arguments.rounds} rounds, {arguments.answers} answers in each. {conditions(1)}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=2, help="of each side in a round")
    parser.add_argument("--no-plaintext", action="store_true", help="leave the sides without TLS out")
    parser.add_argument("--only", default="", help="sides whose name has this text")
    return parser.parse_args()


def _sides(subject: Subject) -> list[Side]:
    layers = subject.manifest.layers
    sides = [Side("one node", [["all"]])]
    for count in (2, 4):
        sides.append(Side(f"{count} nodes, spread", nodes.spread(count)))
        sides.append(Side(f"{count} nodes, spread, no TLS", nodes.spread(count), plaintext=True))
    return sides + [Side(f"{count} spans", nodes.spans(layers, count)) for count in (2, 4)]


def _turn(place: nodes.Place, subject: Subject, side: Side, prompt: list[int], answers: int) -> Turn:
    with nodes.Swarm(
        place.hatchery, place.fresh(), subject.store, side.holds, naughty=(), plaintext=side.plaintext
    ) as running:
        client = running.client(0)
        nodes.ask(client, prompt, WARM)
        given = [nodes.ask(client, prompt, NEW) for _ in range(answers)]
        return Turn(
            median([nodes.decode_speed(answer) for answer in given]), nodes.remote_share(running), given[0].tokens
        )


class _Transformers:
    """In this process, with the faster of its experts functions; idle while nodes are measured."""

    def __init__(self, subject: Subject, prompt: list[int]) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(subject.checkpoint, dtype="auto").eval()
        self._model.generation_config = GenerationConfig(pad_token_id=0)
        self._ids = torch.tensor([prompt])
        speeds = {}
        for name in EXPERTS:
            self._model.set_experts_implementation(name)
            self._generate(WARM)
            speeds[name] = self._speed()
        self._model.set_experts_implementation("grouped_mm")
        self.tokens = self._generate(NEW)
        self._model.set_experts_implementation(max(speeds, key=lambda name: speeds[name]))

    def turn(self) -> Turn:
        return Turn(self._speed(), 0.0, self.tokens)

    def _speed(self) -> float:
        """Of the tokens after the first: an answer of one token less the prompt's share."""
        first = -time.perf_counter()
        self._generate(1)
        first += time.perf_counter()
        whole = -time.perf_counter()
        self._generate(NEW)
        whole += time.perf_counter()
        return (NEW - 1) / (whole - first)

    def _generate(self, new: int) -> list[int]:
        output = self._model.generate(
            self._ids, attention_mask=torch.ones_like(self._ids), max_new_tokens=new, do_sample=False
        )
        tokens: list[int] = output[0, self._ids.shape[1] :].tolist()
        return tokens


def _rows(found: dict[str, list[Turn]], expected: list[int], layers: int) -> list[list[str]]:
    speeds = {name: [turn.speed for turn in turns] for name, turns in found.items()}
    rows = []
    for name, turns in found.items():
        row = [name, f"{median(speeds[name]):.1f}", ratio(speeds[name], speeds["transformers"])]
        row.append(ratio(speeds[name], speeds["one node"]) if "one node" in speeds else "")
        row.append(f"{median([turn.remote for turn in turns]):.0%}" if "spread" in name else "")
        row.append(_remote_layer(speeds[name], speeds["one node"], layers) if "spread" in name else "")
        row.append(f"{sum(turn.tokens == expected for turn in turns)} of {len(turns)}")
        rows.append(row)
    return rows


def _remote_layer(speeds: list[float], alone: list[float], layers: int) -> str:
    return f"{(1 / median(speeds) - 1 / median(alone)) / layers * 1000:.2f}"


if __name__ == "__main__":
    main()
