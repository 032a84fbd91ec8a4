"""Many sessions through two doors at once, again and again: no deadlock, no hang, and nothing is left behind."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from oracle import LAYERS
from swarm import Swarm, ask, request, spans, spread, until

from protos.errors import ShoalError, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracles
    from swarm import Hatchery, Node

    from protos import inference_pb2 as pb

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SESSIONS = 16
NEW = 12
ROUNDS = 100
SETTLE_S = 20.0
# Streams of steps: one for each peer and direction; streams of experts: one for each peer.  Four of each.
POOLS_OF_FOUR = {"step_streams_max": 4, "expert_streams_max": 4, "sessions_max": SESSIONS, "queue_max": SESSIONS}
# Each node's stage needs the other node in every layer, or every token crosses both ways.
BOTH_WAYS = {"experts of each other": spread(2), "spans": spans(LAYERS, 2)}


@dataclass(frozen=True, slots=True)
class Level:
    """What a process holds."""

    threads: int
    files: int


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_sixteen_sessions_through_two_doors_never_deadlock(
    hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path, name: str
) -> None:
    oracle = oracle_of("mixtral")
    prompts = [oracle.prompt(5 + 9 * n) for n in range(SESSIONS)]
    with Swarm(hatchery, tmp_path, oracle.store, BOTH_WAYS[name], settings=POOLS_OF_FOUR) as swarm:
        with ThreadPoolExecutor(SESSIONS) as pool:
            for _ in range(2):
                jobs = [pool.submit(ask, swarm.client(n % 2), prompt, 2 * NEW) for n, prompt in enumerate(prompts)]
                answers = [job.result(SETTLE_S * 2) for job in jobs]
                found = [oracle.excuses(p, answer.tokens) for p, answer in zip(prompts, answers, strict=True)]
                assert found == [True] * SESSIONS
        _assert_idle(swarm)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_hundred_rounds_of_sixteen_sessions_leave_nothing_behind(
    hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path, name: str
) -> None:
    """Of sixteen sessions two are left by their clients, and one asks for what cannot be."""
    oracle = oracle_of("mixtral")
    prompts = [oracle.prompt(3 + n % 7) for n in range(SESSIONS)]
    expected = [oracle.tokens(prompt, 4) for prompt in prompts]
    with Swarm(hatchery, tmp_path, oracle.store, BOTH_WAYS[name], settings=POOLS_OF_FOUR) as swarm:

        def one(n: int) -> bool:
            client = swarm.client(n % 2)
            match n:
                case 3 | 4:
                    stream = client.generate(request(prompts[n], 300))
                    next(stream)
                    stream.close()
                    return True
                case 5:
                    with contextlib.suppress(ShoalError):
                        ask(client, [1 << 40], 3)
                        return False
                    return True
                case _:
                    return ask(client, prompts[n], 4).tokens == expected[n]

        with ThreadPoolExecutor(SESSIONS) as pool:

            def round_of_all() -> None:
                jobs = [pool.submit(one, n) for n in range(SESSIONS)]
                assert [job.result(SETTLE_S * 2) for job in jobs] == [True] * SESSIONS

            for _ in range(5):
                round_of_all()
            before = _levels(swarm)
            for _ in range(ROUNDS):
                round_of_all()
            after = _levels(swarm)
    print(f"before {before}, after {after}")
    for now, then in zip(after, before, strict=True):
        # gRPC's own threads and wake-up pipes come and go by a few; a leak would be one for each round.
        assert now.threads <= then.threads + 8, (before, after)
        assert now.files <= then.files + 8, (before, after)


@pytest.mark.slow
def test_a_hundred_answers_in_a_row_while_peers_come_and_go_leave_nothing_behind(
    hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path
) -> None:
    """Every tenth answer finds an expert peer gone; it is back before the next such."""
    oracle = oracle_of("mixtral")
    prompt = oracle.prompt(30)
    with Swarm(hatchery, tmp_path, oracle.store, spread(3, 2)) as swarm:
        levels = []
        for n in range(ROUNDS):
            if n % 10 == 5:
                swarm[1 + n // 10 % 2].kill()
            assert oracle.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)
            if n % 10 == 9:
                swarm.restart(swarm[1 + n // 10 % 2])
                levels.append(_levels(swarm)[0])
    print(levels)
    assert levels[-1].threads <= levels[2].threads + 8, levels
    assert levels[-1].files <= levels[2].files + 8, levels


@pytest.mark.slow
def test_when_an_expert_has_no_holder_left_the_answer_waits_and_then_names_what_is_missing(
    hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path
) -> None:
    oracle = oracle_of("mixtral")
    prompt = oracle.prompt(30)
    settings = {"expert_wait_s": 0.5, "repair_wait_s": 20.0}
    with Swarm(hatchery, tmp_path, oracle.store, spread(2), settings=settings) as swarm, ThreadPoolExecutor(1) as pool:
        waiting = []

        def repair(notice: pb.Notice) -> None:
            if notice.code == "experts_unreachable":
                waiting.append(pool.submit(swarm.restart, swarm[1]))

        answer = ask(swarm.client(0), prompt, NEW * 3, lambda tokens: swarm[1].kill() if tokens == 5 else None, repair)
        waiting[0].result(SETTLE_S)
        assert oracle.excuses(prompt, answer.tokens)
    with Swarm(
        hatchery, tmp_path / "again", oracle.store, spread(2), settings=settings | {"repair_wait_s": 1.0}
    ) as swarm:
        with pytest.raises(Unavailable) as told:
            ask(swarm.client(0), prompt, 400, lambda tokens: swarm[1].kill() if tokens == 5 else None)
        assert "expert" in told.value.message
        _assert_idle(swarm)


def _assert_idle(swarm: Swarm) -> None:
    """No session and no KV is left at any node."""

    def left() -> list[tuple[int, int]]:
        infos = [swarm.client(node.number).info() for node in swarm.nodes if not node.has_ended]
        return [(info.sessions_running, info.kv_bytes_used) for info in infos]

    until(lambda: not any(map(any, left())), SETTLE_S, lambda: f"sessions and KV bytes left: {left()}")


def _levels(swarm: Swarm) -> list[Level]:
    _assert_idle(swarm)
    return [_level(node) for node in swarm.nodes]


def _level(node: Node) -> Level:
    process = node.process()
    return Level(process.num_threads(), process.num_fds())
