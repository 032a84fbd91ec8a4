"""Real processes: a packed checkpoint, nodes, and the command line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from node.client import Client
from protos import inference_pb2 as pb
from protos.errors import Overloaded, ShuttingDown

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

CODE = Path(__file__).parents[2]
START_S = 120.0
SESSIONS_MAX, QUEUE_MAX, REFUSED = 4, 4, 8
HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = b"\x1b[?25l", b"\x1b[?25h", b"\x1b[2K"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def store(home: Path) -> Path:
    """A tiny random checkpoint, packed."""
    assert shoal(home, "demo-model", "--random", "--out", str(home / "checkpoint")).returncode == 0
    packed = shoal(home, "pack", str(home / "checkpoint"), str(home / "store"))
    assert packed.returncode == 0, packed.stderr
    assert re.fullmatch(r"[0-9a-f]{64}\n", packed.stdout)
    return home / "store"


def environment(home: Path) -> dict[str, str]:
    runtime = home / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(CODE),
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "node.cli", *arguments]


def shoal(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(home),
        cwd=home,
        timeout=START_S,
        check=False,
    )


class Node:
    """`shoal run` as a process."""

    def __init__(self, home: Path, store: Path, *options: str) -> None:
        self.log = home / f"node-{time.monotonic_ns()}.log"
        key = str(self.log.with_suffix(".key"))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command("run", "--store", str(store), "--port", "0", "--identity", key, *options),
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(home),
                cwd=home,
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline().decode() if ready else ""
        assert line.startswith("serving model"), self.log.read_text()
        self.address = line.split()[-1]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="module")
def node(home: Path, store: Path) -> Iterator[Node]:
    running = Node(
        home, store, "--log-format", "json", "--sessions-max", str(SESSIONS_MAX), "--queue-max", str(QUEUE_MAX)
    )
    yield running
    assert running.end() == 0


def request(*ids: int, max_tokens: int = 8) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.Sampling(max_tokens=max_tokens), ignore_eos=True
    )


def test_a_running_node_is_found_and_answers_the_same_every_time(home: Path, node: Node) -> None:
    first, second = (
        shoal(home, "generate", "--token-ids", "5,17,9", "--max-tokens", "12", "--ignore-eos", "--json")
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert json.loads(first.stdout)["token_ids"] == json.loads(second.stdout)["token_ids"]
    assert len(json.loads(first.stdout)["token_ids"]) == 12


def test_several_at_once_get_the_answers_that_each_gets_alone(node: Node) -> None:
    prompts = [(5,), (7, 8, 9), (1, 2), tuple(range(40))]
    with Client(node.address) as client:
        alone = [[e.token.id for e in client.generate(request(*p)) if e.HasField("token")] for p in prompts]
        streams = [client.generate(request(*prompt)) for prompt in prompts]
        together: list[list[int]] = [[] for _ in prompts]
        for _ in range(9):
            for stream, tokens in zip(streams, together, strict=True):
                event = next(stream)
                tokens += [event.token.id] if event.HasField("token") else []
        for stream in streams:
            assert next(stream).finished.generated == 8
            stream.close()
    assert together == alone


def fill_pools(client: Client) -> None:
    """As many calls at once as the node has threads for; those beyond its sessions and its queue are refused."""
    streams = [client.generate(request(n, max_tokens=400)) for n in range(SESSIONS_MAX + QUEUE_MAX + REFUSED)]
    with ThreadPoolExecutor(len(streams)) as pool:
        firsts = [pool.submit(next, stream) for stream in streams]
        assert sum(isinstance(first.exception(START_S), Overloaded) for first in firsts) == REFUSED
    for stream in streams:
        stream.close()


def test_a_hundred_answers_leak_no_thread_file_or_kv(node: Node) -> None:
    process = psutil.Process(node.process.pid)
    with Client(node.address) as client:
        fill_pools(client)
        list(client.generate(request(5, max_tokens=2)))
        before = process.num_threads(), process.num_fds()
        for n in range(100):
            stream = client.generate(request(n, max_tokens=3))
            next(stream)
            if n % 3 == 0:
                stream.close()  # a client that leaves
            else:
                list(stream)
        list(client.generate(request(5, max_tokens=2)))
        settle = time.monotonic() + 10
        while client.info().sessions_running and time.monotonic() < settle:
            pass
        info = client.info()
    assert (info.sessions_running, info.kv_bytes_used) == (0, 0)
    after = process.num_threads(), process.num_fds()
    assert after[0] <= before[0] + 4  # gRPC's own threads come and go by a few
    assert after[1] <= before[1] + 2


def test_logs_are_json_and_hold_no_prompt(home: Path, node: Node) -> None:
    shoal(home, "generate", "--token-ids", "211,222,233", "--max-tokens", "2", "--json")
    entries = [json.loads(line) for line in node.log.read_text().splitlines()]
    answers = [entry for entry in entries if entry["event"] == "answer"]
    assert {"session", "tokens", "tokens_per_s", "first_token_s", "prompt_tokens"} <= answers[-1].keys()
    assert "222" not in json.dumps([{k: v for k, v in entry.items() if k != "session"} for entry in answers[-1:]])


@pytest.mark.slow
def test_a_port_in_use_is_exit_code_3(home: Path, store: Path, node: Node) -> None:
    result = shoal(home, "run", "--store", str(store), "--port", node.address.rpartition(":")[2])
    assert result.returncode == 3
    assert "--port" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_memory_limit_below_the_models_size_says_what_is_needed(home: Path, store: Path) -> None:
    result = shoal(home, "run", "--store", str(store), "--port", "0", "--memory-limit", "100KiB")
    assert result.returncode == 2
    assert "needs 1." in result.stderr
    assert "memory_limit is 100.0 KiB" in result.stderr


def test_ctrl_c_while_a_node_starts_leaves_the_terminal_as_it_was(home: Path, store: Path) -> None:
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        command("generate", "hello", "--store", str(store)),
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment(home) | {"TERM": "xterm"}, cwd=home,
    ) as asking:  # fmt: skip
        os.close(terminal)
        shown = b""
        while b"loading torch" not in shown:
            shown += os.read(screen, 4096)
        asking.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux's end of a terminal that nobody has open any more
            while more := os.read(screen, 4096):
                shown += more
        os.close(screen)
        assert asking.wait(START_S) == 130
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert shown.endswith(ERASE_LINE + b"interrupted\r\n")


@pytest.mark.slow
def test_an_altered_unit_is_refused_by_its_name(home: Path, store: Path) -> None:
    unit = max((store / "units").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = unit.read_bytes()
    unit.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        result = shoal(home, "run", "--store", str(store), "--port", "0")
    finally:
        unit.write_bytes(content)
    assert result.returncode == 2
    assert "damaged" in result.stderr


def test_what_is_packed_already_is_said_and_not_packed_again(home: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    again = shoal(home, "pack", str(home / "checkpoint"), str(store))
    assert again.returncode == 0
    assert again.stderr == f"{home / 'checkpoint'} is packed already, in {store}\n"
    assert re.fullmatch(r"[0-9a-f]{64}\n", again.stdout)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


@pytest.mark.slow
def test_packing_that_is_interrupted_says_how_it_goes_on(home: Path, tmp_path: Path) -> None:
    packing = subprocess.Popen(
        command("pack", str(home / "checkpoint"), str(tmp_path / "store")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(home),
        cwd=home,
    )
    assert packing.stderr is not None
    assert packing.stderr.readline() == b"loading torch and transformers\n"
    packing.send_signal(signal.SIGINT)
    output, errors = packing.communicate(timeout=60)
    assert (packing.returncode, output) == (130, b"")
    assert errors.splitlines()[-1] == b"interrupted; run it again to go on where it was"
    assert shoal(home, "pack", str(home / "checkpoint"), str(tmp_path / "store")).returncode == 0


def test_show_prints_the_model(home: Path, store: Path) -> None:
    assert "qwen2_moe" in shoal(home, "show", "--store", str(store)).stdout
    (model,) = json.loads(shoal(home, "show", "--store", str(store), "--json").stdout)
    assert "trunk.0" in model["units"]
    assert "0 to 3" in shoal(home, "show", model["model"][:8], "--store", str(store)).stdout


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_running_answers_with_a_typed_error(
    home: Path, store: Path, number: signal.Signals, exit_code: int
) -> None:
    running = Node(home, store)
    try:
        with Client(running.address) as client:
            stream = client.generate(request(5, max_tokens=900))
            next(stream)
            running.process.send_signal(number)
            with pytest.raises(ShuttingDown):
                list(stream)
        assert running.process.wait(30) == exit_code
    finally:
        running.end()


@pytest.mark.slow
def test_a_node_that_is_killed_in_the_middle_of_an_answer_is_exit_code_3(home: Path, store: Path) -> None:
    running = Node(home, store)
    try:
        asking = subprocess.Popen(
            command("generate", "--node", running.address, "--token-ids", "5", "--max-tokens", "1000", "--ignore-eos"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(home),
            cwd=home,
        )
        assert asking.stdout is not None
        assert asking.stdout.read(1)
        running.process.kill()
        _, errors = asking.communicate(timeout=20)
    finally:
        running.end()
    assert asking.returncode == 3
    (line,) = errors.decode().splitlines()
    assert line.startswith(f"error: the node at {running.address} is gone in the middle of its answer")


def test_without_a_node_one_is_started_for_the_answer_and_ended(home: Path, store: Path) -> None:
    result = shoal(home, "generate", "--store", str(store), "--token-ids", "5,17", "--max-tokens", "3", "--json")
    assert result.returncode == 0, result.stderr
    assert "starting one for this answer" in result.stderr
    assert len(json.loads(result.stdout)["token_ids"]) == 3
    assert attached_nodes(store) == []


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_the_node_that_was_started_for_it(home: Path, store: Path) -> None:
    asking = subprocess.Popen(
        command("generate", "--store", str(store), "--token-ids", "5", "--max-tokens", "900", "--ignore-eos"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(home),
        cwd=home,
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1)
    asking.send_signal(signal.SIGINT)
    _, errors = asking.communicate(timeout=60)
    assert asking.returncode == 130
    assert b"Traceback" not in errors
    assert attached_nodes(store) == []


@pytest.mark.slow
def test_a_started_node_does_not_outlive_a_command_that_was_killed(home: Path, store: Path) -> None:
    asking = subprocess.Popen(
        command("generate", "--store", str(store), "--token-ids", "5", "--max-tokens", "900", "--ignore-eos"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(home),
        cwd=home,
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1)
    (child,) = attached_nodes(store)
    asking.kill()
    asking.wait()
    asking.stdout.close()
    psutil.wait_procs([child], timeout=60)
    assert attached_nodes(store) == []


def attached_nodes(store: Path) -> list[psutil.Process]:
    """Nodes that a command started for itself, by their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if "--attached" in line and str(store) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
