"""Tokens a second of two and four spans, and of spread experts, at 1, 5, 20 and 50 ms between any two nodes.

python -m bench.rtt [--rounds 3] [--model light|bench] [--rtt-ms 1 5 20 50]

How to read it.  Every node is called through a proxy (bench.delay_proxy) that delays each direction by RTT / 2 and
limits nothing else; the client asks its door directly.  The bound of design.md, section 6, takes compute for free: a
token crosses half an RTT from each span to the next and from the last one to the door, so S spans give at best
2 / (S * RTT); spread experts take one RTT a layer.  "with compute" adds what a token took through the same proxies at
an RTT of 0.  The RTTs take turns within each round of one swarm.  The light model's compute is next to nothing, so that
its figure is the protocol's; the bench model's compute counts as it would at home.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bench import models, nodes
from bench.rounds import conditions, interleaved, median, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.models import Subject

NEW, PROMPT, WARM = 48, 32, 8
TOKENS_MAX_S = 12.0  # an answer is cut to what takes about so long
HEAD = ("", "RTT", "tokens/s", "bound", "of it", "with compute", "of it")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is shared out, and the round trips that a token waits for."""

    name: str
    holds: list[list[str]]
    round_trips: float

    def bound(self, rtt_s: float) -> float:
        return 1 / (self.round_trips * rtt_s)


class Proxies:
    """One in front of each node, in a process of their own; all have the same RTT."""

    def __init__(self, process: subprocess.Popen[str], addresses: list[str]) -> None:
        self._process = process
        self.addresses = addresses

    def set(self, rtt_s: float) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rtt_s * 1000}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    rows = []
    with (
        models.bench_model() if arguments.model == "bench" else models.light_model() as subject,
        nodes.place() as place,
    ):
        for layout in _layouts(subject):
            rows += _measure(place, subject, layout, [ms / 1000 for ms in arguments.rtt_ms], arguments.rounds)
    print(table(HEAD, rows))
    print(f"\nThe {arguments.model} model, medians of {arguments.rounds} rounds, TLS on. {conditions(1)}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=("light", "bench"), default="light")
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[1.0, 5.0, 20.0, 50.0])
    return parser.parse_args()


def _layouts(subject: Subject) -> list[Layout]:
    layers = subject.manifest.layers
    spans = [Layout(f"{count} spans", nodes.spans(layers, count), count / 2) for count in (2, 4)]
    return [*spans, Layout("4 nodes, spread", nodes.spread(4), layers)]


def _measure(place: nodes.Place, subject: Subject, layout: Layout, rtts_s: list[float], rounds: int) -> list[list[str]]:
    ports = nodes.free_ports(len(layout.holds))
    with (
        _proxies(ports) as proxies,
        nodes.Swarm(
            place.hatchery,
            place.fresh(),
            subject.store,
            layout.holds,
            naughty=(),
            ports=ports,
            advertise=proxies.addresses,
        ) as running,
    ):
        client = running.client(0)
        prompt = subject.prompts(1, PROMPT)[0]

        def speed(rtt_s: float) -> float:
            proxies.set(rtt_s)
            nodes.ask(client, prompt, 3 if rtt_s else WARM)
            new = NEW if not rtt_s else max(8, min(NEW, int(TOKENS_MAX_S * layout.bound(rtt_s))))
            return nodes.decode_speed(nodes.ask(client, prompt, new))

        speed(0.0)
        found = interleaved({rtt_s: lambda rtt_s=rtt_s: speed(rtt_s) for rtt_s in [0.0, *rtts_s]}, rounds)
    return _rows(layout, {rtt_s: median(speeds) for rtt_s, speeds in found.items()})


def _rows(layout: Layout, found: dict[float, float]) -> list[list[str]]:
    rows = [[layout.name, "0", f"{found[0.0]:.1f}", "", "", "", ""]]
    for rtt_s, speed in found.items():
        if rtt_s:
            bound = layout.bound(rtt_s)
            honest = 1 / (1 / bound + 1 / found[0.0])
            row = [layout.name, f"{rtt_s * 1000:g} ms", f"{speed:.2f}", f"{bound:.2f}", f"{speed / bound:.0%}"]
            rows.append([*row, f"{honest:.2f}", f"{speed / honest:.0%}"])
    for row in rows:
        print(*row, flush=True)
    return rows


@contextlib.contextmanager
def _proxies(ports: list[int]) -> Iterator[Proxies]:
    routes = [f"0=127.0.0.1:{port}" for port in ports]
    with subprocess.Popen(
        [sys.executable, "-m", "bench.delay_proxy", "--rtt-ms", "0", *routes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Proxies(process, [f"127.0.0.1:{port}" for port in process.stdout.readline().split()])
        finally:
            process.stdin.close()


if __name__ == "__main__":
    main()
