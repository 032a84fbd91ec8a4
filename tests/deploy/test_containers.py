"""Four nodes in containers: asked through the published door, and one of them is killed in the middle of an answer.

Where no engine can be had this is skipped, and says so.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest
from containers import Project
from engine import SHORT_S, Engine, NoEngine, run
from swarm import free_ports, until

from node.client import Client
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.containers, pytest.mark.timeout(540)]

QUESTION = "What is the capital of France?"
NEW, WATCHED_FROM, KILLED_AT = 64, 4, 12
NODES = ("node-1", "node-2", "node-3", "node-4")
DOOR = NODES[0]
READY_S = 90.0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    try:
        found = Engine.find()
    except NoEngine as error:
        pytest.skip(f"NOT TESTED, containers need a Docker engine: {error}")
    yield found
    found.close()


@pytest.fixture(scope="module")
def project(engine: Engine) -> Iterator[Project]:
    try:
        made = Project(engine, "shoal-check", free_ports(1)[0])
    except NoEngine as error:
        pytest.skip(f"NOT TESTED, containers need compose: {error}")
    with made as running:
        until(lambda: all(running.health(node) == "healthy" for node in NODES), READY_S, running.logs)
        yield running


@pytest.fixture(scope="module")
def client(project: Project) -> Iterator[Client]:
    """Outside of all containers."""
    with Client(project.door) as reached:
        until(lambda: _alive(reached) == 3, READY_S, project.logs)
        yield reached


@pytest.fixture(scope="module")
def expected(client: Client) -> list[int]:
    """The answer while nobody dies."""
    tokens, _ = _ask(client)
    assert len(tokens) == NEW
    return tokens


def _ask(client: Client, on_token: Callable[[int], None] = lambda _: None) -> tuple[list[int], list[pb.Notice]]:
    message = pb.GenerateRequest(sampling=pb.Sampling(max_tokens=NEW, temperature=0.0), ignore_eos=True)
    message.chat.messages.add(role="user", content=QUESTION)
    tokens: list[int] = []
    notices: list[pb.Notice] = []
    for event in client.generate(message):
        if event.HasField("token"):
            tokens.append(event.token.id)
            on_token(len(tokens))
        elif event.HasField("notice"):
            notices.append(event.notice)
    return tokens, notices


def _alive(client: Client) -> int:
    return sum(status.state == "alive" for status in client.peers().peers)


def _addresses(client: Client) -> dict[str, str]:
    """Peer id by service."""
    return {status.address.partition(":")[0]: status.peer_id for status in client.peers().peers}


def _calls(client: Client) -> dict[str, int]:
    """By peer id: calls for experts, of all layers."""
    calls: dict[str, int] = {}
    for entry in client.peers().work:
        calls[entry.peer_id] = calls.get(entry.peer_id, 0) + entry.calls
    return calls


def test_a_command_in_a_container_gets_the_answer_that_the_published_door_gives(
    project: Project, expected: list[int]
) -> None:
    question = ("--json", "--max-tokens", str(NEW), "--temperature", "0", "--ignore-eos", QUESTION)
    said = project.compose("exec", "-T", DOOR, "shoal", "generate", "--node", "localhost:7645", *question)
    assert json.loads(said)["token_ids"] == expected


def test_a_chat_on_this_machine_reaches_the_published_door(project: Project, tmp_path: Path) -> None:
    """With a key of its own, which nobody told the door."""
    command = [sys.executable, "-m", "node.cli", "chat", "--node", project.door, "--temperature", "0"]
    homes = {f"XDG_{name}_HOME": str(tmp_path) for name in ("CONFIG", "DATA")}
    said = run(command, {**os.environ, **homes}, SHORT_S, f"{QUESTION}\n")
    assert "Paris" in said


def test_an_answer_goes_on_when_a_container_is_killed_and_the_node_comes_back_as_who_it_was(
    project: Project, client: Client, expected: list[int]
) -> None:
    peers = _addresses(client)
    before: dict[str, int] = {}
    victim = ""

    def kill(count: int) -> None:
        nonlocal victim
        if count == WATCHED_FROM:
            before.update(_calls(client))
        elif count == KILLED_AT:
            made = {node: _calls(client).get(peers[node], 0) - before.get(peers[node], 0) for node in NODES[1:]}
            victim = max(made, key=lambda node: made[node])
            assert made[victim] > 0, "no node but the door was in use"
            project.docker("kill", project.container(victim))

    tokens, notices = _ask(client, kill)
    assert project.inspect(victim)["State"]["ExitCode"] == 137
    assert peers[victim] in [notice.peer_id for notice in notices]
    assert tokens == expected
    project.docker("start", project.container(victim))
    until(lambda: project.health(victim) == "healthy" and _alive(client) == 3, READY_S, project.logs)
    assert _addresses(client) == peers
    assert _ask(client)[0] == expected


def test_a_node_is_nobody_in_particular_and_writes_only_its_own_data(project: Project) -> None:
    for node in NODES:
        told = project.inspect(node)
        assert told["Config"]["User"] == "shoal"
        assert told["HostConfig"]["ReadonlyRootfs"]
        assert told["HostConfig"]["CapAdd"] is None
        written = [mount["Destination"] for mount in told["Mounts"] if mount["RW"]]
        assert written == ["/data"]
        published = [port for ports in told["NetworkSettings"]["Ports"].values() for port in ports or []]
        assert {port["HostIp"] for port in published} == ({"127.0.0.1"} if node == DOOR else set())


def test_the_image_has_neither_a_key_nor_the_wheels_nor_the_repository_in_it(project: Project) -> None:
    image = ("--rm", "--network", "none", "--user", "root", "--entrypoint", "find", "shoal:local")
    names = [word for name in ("*.whl", "*.key", ".git", "wheels", "tests") for word in ("-o", "-name", name)][1:]
    found = project.docker("run", *image, "/", "-maxdepth", "3", "(", *names, ")", "-not", "-path", "/[psu]*/*")
    assert found == ""
    history = project.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", "shoal:local")
    assert "INDEX" not in history
