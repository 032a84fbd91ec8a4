"""Testnets: nodes that are started, ready and ended together, with toys in place of nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from toy_door import ToyDoor
from toy_node import manifest
from toy_testnet import TOY, toy_command, toy_planned
from typer.testing import CliRunner

from node import cli, ports, presence, process, testnet, testnet_state
from node.topology import Place
from protos.errors import BrokenInvariant, DeadlineExceeded, InvalidRequest, PortInUse, ShoalError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from node.testnet_state import Member, Record


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folders with a store, and toys for nodes; whatever a test leaves running is ended."""
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{TOY.parents[2]}")
    monkeypatch.setattr(presence, "folder", lambda: tmp_path / "runtime")
    monkeypatch.setattr(testnet, "command", toy_command)
    models = tmp_path / "data" / "shoal" / "models"
    models.mkdir(parents=True)
    (models / f"{manifest().model_id}.json").write_bytes(manifest().to_bytes())
    yield tmp_path
    for name in testnet_state.names():
        record = testnet_state.load(name)
        process.end([(member.pid, member.key) for member in record.members] if record else [], 0.0)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def shoal(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def up(*arguments: str) -> Record:
    result = shoal("testnet", "up", "-n", "2", *arguments)
    assert result.exit_code == 0, result.output
    return known(testnet_state.choose(None) if "--name" not in arguments else arguments[-1])


def known(name: str = "default") -> Record:
    record = testnet_state.load(name)
    assert record is not None
    return record


def states(record: Record) -> list[str]:
    return [member.state for member in record.members]


def logs_alone(folder: str) -> bool:
    return {path.suffix for path in Path(folder).iterdir()} == {".log"}


def test_up_shows_the_nodes_and_down_leaves_their_logs_alone() -> None:
    result = shoal("testnet", "up", "-n", "2")
    assert result.exit_code == 0, result.output
    record = known()
    assert record.ready
    assert states(record) == ["running", "running"]
    for member in record.members:
        assert member.address in result.stdout
        assert member.peer[:8] in result.stdout
    assert f"logs: {record.folder}" in result.stderr
    ended = shoal("testnet", "down")
    assert (ended.exit_code, ended.stdout) == (0, f"{record.folder}\n")
    assert "ended 2 nodes\n" in ended.stderr
    assert states(record) == ["dead", "dead"]
    assert logs_alone(record.folder)
    assert [path.name for path in testnet_state.base().iterdir()] == ["default.1"]


def test_down_again_has_nothing_to_do() -> None:
    up()
    shoal("testnet", "down")
    again = shoal("testnet", "down")
    assert (again.exit_code, again.stdout, again.stderr) == (0, "", "no testnet is up\n")


def test_status_shows_who_is_alive_and_whom_they_see() -> None:
    record = up()
    assert shoal("testnet", "status").stdout.count("1 of 1") == 2
    assert shoal("testnet", "kill", "2").exit_code == 0
    said = json.loads(shoal("testnet", "status", "--json").stdout)
    assert [node["state"] for node in said["nodes"]] == ["running", "dead"]
    assert said["folder"] == record.folder
    assert "dead" in shoal("testnet", "status").stdout


def test_without_a_testnet_status_and_kill_say_how_to_start_one() -> None:
    for arguments in (("status",), ("kill", "1")):
        result = shoal("testnet", *arguments)
        assert result.exit_code == 3
        assert result.stderr == "error: no testnet is up; 'shoal testnet up' starts one\n"


def test_a_frozen_node_goes_on_and_is_ended_like_the_others() -> None:
    record = up()
    shoal("testnet", "kill", "1", "--signal", "STOP")
    until(lambda: states(record) == ["frozen", "running"])
    shoal("testnet", "kill", "1", "--signal", "SIGCONT")
    until(lambda: states(record) == ["running", "running"])
    shoal("testnet", "kill", "1", "--signal", "stop")
    assert "ended 2 nodes" in shoal("testnet", "down").stderr
    assert states(record) == ["dead", "dead"]


def until(holds, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("kill", "2"), "node 2 is dead already"),
        (("kill", "3"), "there is no node 3; testnet default has 1 to 2"),
        (("kill", "0"), "there is no node 0"),
        (("kill", "1", "--signal", "HUP"), "--signal is 'HUP'; it must be one of KILL, TERM, STOP, CONT"),
        (("up", "-n", "2"), "testnet default is up already, with 1 of 2 nodes alive"),
    ],
)
def test_what_cannot_be_done_to_a_testnet_is_refused(arguments: tuple[str, ...], says: str) -> None:
    up()
    shoal("testnet", "kill", "2")
    until(lambda: known().members[1].state == "dead")
    result = shoal("testnet", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-n", "0"), "-n is 0"),
        (("--spans", "9"), "--spans is 9"),
        (("--experts", "some"), "'--experts'"),
        (("--name", "../x"), "--name is '../x'"),
        (("--model", "beef"), "begins with beef"),
        (("--store", "nowhere"), "does not exist"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is(arguments: tuple[str, ...], says: str) -> None:
    result = shoal("testnet", "up", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not testnet_state.base().exists() or list(testnet_state.base().iterdir()) == []


def test_two_testnets_have_names_and_addresses_of_their_own() -> None:
    first, second = up(), up("--name", "other")
    addresses = {member.address for record in (first, second) for member in record.members}
    assert len(addresses) == 4
    assert "no testnet" not in shoal("testnet", "status", "--name", "other").stderr
    shoal("testnet", "down", "--name", "other")
    assert states(first) == ["running", "running"]
    assert shoal("testnet", "down").stdout == f"{first.folder}\n"


def test_of_several_testnets_one_must_be_named() -> None:
    for name in ("one", "two"):
        up("--name", name)
    result = shoal("testnet", "down")
    assert result.exit_code == 2
    assert "several testnets are up: one, two; say which with --name" in result.stderr


@pytest.mark.parametrize(("code", "exit_code"), [(2, 2), (3, 3), (1, 1)])
def test_a_node_that_ends_while_it_starts_takes_all_down_and_shows_its_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int
) -> None:
    ordered(monkeypatch, f"2 exit {code}")
    result = shoal("testnet", "up", "-n", "3")
    assert result.exit_code == exit_code
    assert "error: nothing works here" in result.stderr
    folder = testnet_state.base() / "default.1"
    assert f"node 2 ended with exit code {code} before it was ready; its log is {folder}/node-2.log" in result.stderr
    assert left_running(home) == []
    assert sorted(path.name for path in testnet_state.base().iterdir()) == ["default.1"]
    assert {path.name for path in folder.iterdir()} == {"deed", "node-1.log", "node-2.log", "node-3.log"}


def ordered(monkeypatch: pytest.MonkeyPatch, deed: str) -> None:
    monkeypatch.setattr(testnet, "planned", toy_planned(deed))


def left_running(home: Path) -> list[int]:
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if str(TOY) in each.cmdline() and any(str(home) in word for word in each.cmdline()):
                found.append(each.pid)
    return found


def test_nodes_that_never_see_each_other_are_given_up_and_ended(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ordered(monkeypatch, "2 deaf")
    net = testnet.Testnet(planned(tmp_path, 2), toy_command(OPTIONS, 2))
    try:
        net.start()
        with pytest.raises(DeadlineExceeded, match=r"get to know each other: 1 of 2 after 0\.5 s"):
            net.wait_ready(lambda *_: None, meet_s=0.5)
    finally:
        net.end()
    assert left_running(home) == []


def planned(folder: Path, count: int) -> list[Member]:
    with ports.reserved(count) as free:
        return testnet.planned(folder, [Place(("all",), "a")] * count, free)


OPTIONS = testnet.Options(Path("store"), "model")


def test_progress_counts_nodes_and_then_their_acquaintances(tmp_path: Path) -> None:
    net = testnet.Testnet(planned(tmp_path, 2), toy_command(OPTIONS, 2))
    seen: list[tuple[str, int, int]] = []
    try:
        net.start()
        net.wait_ready(lambda what, done, total: seen.append((what, done, total)))
    finally:
        net.end()
    assert seen[0] == ("starting nodes", 0, 2)
    assert ("starting nodes", 2, 2) in seen
    assert seen[-1] == ("nodes get to know each other", 2, 2)


def test_a_node_whose_pid_was_not_noted_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ctrl-C came in the moment of its start."""
    net = testnet.Testnet(planned(tmp_path, 1), toy_command(OPTIONS, 1))
    started = []

    def interrupted(*given: object, **named: object) -> None:
        started.append(subprocess.Popen(*given, **named, start_new_session=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(testnet.child, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        net.start()
    until(lambda: len(process.children([net.members[0].key])) == 1, 10)
    net.end()
    assert started[0].wait(10) is not None


def starting(deed: str) -> list[str]:
    """`shoal testnet up` as a process, whose node 2 does that."""
    return [sys.executable, str(TOY.with_name("toy_testnet.py")), deed, "testnet", "up", "-n", "2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_leaves_nothing(home: Path, number: signal.Signals) -> None:
    running = subprocess.Popen(starting("2 deaf"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(left_running(home)) == 2, 30)
    running.send_signal(number)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted; nothing is left running" in said
    assert "Traceback" not in said
    assert left_running(home) == []
    assert testnet_state.names() == []


def test_an_up_that_was_killed_is_ended_by_down(home: Path) -> None:
    with subprocess.Popen(starting("2 deaf"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        until(lambda: (record := testnet_state.load("default")) is not None and len(record.members) == 2, 30)
        running.kill()
    assert len(left_running(home)) == 2
    assert shoal("testnet", "down").exit_code == 0
    assert left_running(home) == []


def test_what_a_restart_of_the_machine_left_is_swept(home: Path) -> None:
    record = up()
    process.end([(member.pid, member.key) for member in record.members], 5.0)
    assert shoal("testnet", "status").stdout.count("dead") == 2
    again = up()
    assert again.folder != record.folder
    assert logs_alone(record.folder)


def test_a_pid_that_another_process_has_now_is_left_alone() -> None:
    assert process.state(os.getpid(), "/no/such/key") == "dead"
    assert not process.send(os.getpid(), "/no/such/key", signal.SIGKILL)
    assert process.end([(os.getpid(), "/no/such/key")], 1.0) == 0


def test_a_process_that_does_not_end_is_killed() -> None:
    stubborn = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", stubborn, "a-mark"], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert process.end([(running.pid, "a-mark")], 0.1) == 1
        assert running.wait(10) == -signal.SIGKILL


def test_state_that_is_none_of_ours_is_refused() -> None:
    testnet_state.base().mkdir(parents=True)
    for text in ("{}", "[]", "none", '{"members": [{}]}'):
        (testnet_state.base() / "default.json").write_text(text)
        with pytest.raises(InvalidRequest, match="is no testnet's state"):
            testnet_state.load("default")
    (testnet_state.base() / "default.json").unlink()


def test_a_testnet_that_another_command_starts_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as other:
        record = testnet_state.claim("default", "m")
        record.starter = other.pid
        testnet_state.save(record)
        with pytest.raises(Unavailable, match=f"is being started by process {other.pid}"):
            testnet_state.claim("default", "m")
        other.kill()
    assert testnet_state.claim("default", "m").folder.endswith("default.2")


def test_folders_of_earlier_testnets_are_bounded() -> None:
    for _ in range(testnet_state.FOLDERS_KEPT_MAX + 3):
        record = testnet_state.claim("default", "m")
        (Path(record.folder) / "node-1.log").write_text("")
        testnet_state.forget(record)
    kept = sorted(int(path.name.removeprefix("default.")) for path in testnet_state.base().iterdir())
    assert kept == list(range(4, 4 + testnet_state.FOLDERS_KEPT_MAX))


def test_a_claim_is_never_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testnet_state, "_sweep", lambda name: None)
    testnet_state.claim("default", "m")
    with pytest.raises(InvalidRequest, match="is being started elsewhere"):
        testnet_state.claim("default", "m")


def test_of_commands_at_one_moment_one_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits, where it has found a testnet that is gone, for all others to have come as far as they can."""
    gone = testnet_state.claim("default", "m")
    gone.starter = -1
    testnet_state.save(gone)
    # Each thread is a command.
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid != gone.starter)
    monkeypatch.setattr(os, "getpid", threading.get_native_id)
    barrier = threading.Barrier(4)
    forget = testnet_state._forget

    def slowly(record: Record) -> None:
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.5)
        forget(record)

    monkeypatch.setattr(testnet_state, "_forget", slowly)
    won: list[Record] = []

    def claim() -> None:
        with suppress(Unavailable):
            won.append(testnet_state.claim("default", "m"))

    commands = [threading.Thread(target=claim) for _ in range(4)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    (record,) = won
    assert testnet_state.load("default") == record


def test_who_forgets_a_testnet_leaves_the_one_that_took_its_name() -> None:
    old = testnet_state.claim("default", "m")
    testnet_state.forget(old)
    new = testnet_state.claim("default", "m")
    testnet_state.forget(old)
    assert testnet_state.load("default") == new


def test_a_command_that_holds_the_lock_for_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testnet_state, "LOCK_S", 0.05)
    testnet_state.claim("other", "m")
    with testnet_state._alone(), pytest.raises(Unavailable, match="another command"):
        testnet_state.claim("default", "m")
    assert testnet_state.claim("default", "m").folder


def test_ports_that_are_taken_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with ports.reserved(1) as [first], ports.reserved(3) as others:
        assert first not in others
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", first))
            listening.listen()
            with ports.reserved(1) as [later]:
                assert later != first
    monkeypatch.setattr(ports, "TRIED_MAX", 2)
    with pytest.raises(PortInUse, match="3 ports are needed"), ports.reserved(3):
        pass


def test_a_node_listens_on_a_port_that_is_held_for_it() -> None:
    with ports.reserved(1) as [port], ToyDoor(port=port) as door:
        assert door.address == f"127.0.0.1:{port}"


def test_a_node_is_told_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    members = testnet.planned(tmp_path, [Place(("trunk:*", "experts:*/1%2"), "zone-1")] * 2, [7646, 7647])
    command = testnet.command(testnet.Options(Path("/store"), "abc", attached=True), 2)
    words = command(members[0], [members[1].where])
    flags = {words[at]: words[at + 1] for at in range(4, len(words) - 1, 2) if words[at] != "--hold"}
    assert words[:4] == [sys.executable, "-m", "node.cli", "run"]
    assert words[-1] == "--attached"
    assert [words[at + 1] for at, word in enumerate(words) if word == "--hold"] == ["trunk:*", "experts:*/1%2"]
    assert flags["--join"] == f"{members[1].address}#{members[1].peer}"
    assert (flags["--identity"], flags["--store"], flags["--model"]) == (members[0].key, "/store", "abc")
    assert f"{flags['--host']}:{flags['--port']}" == flags["--advertise"] == members[0].address
    assert int(flags["--threads"]) >= 1
    assert int(flags["--kv-limit"]) >= 64 << 20


def test_the_end_of_a_log_is_short(tmp_path: Path) -> None:
    member = planned(tmp_path, 1)[0]
    assert testnet.log_end(member) == []
    Path(member.log).write_text("\n".join(f"line {n}" for n in range(100)))
    assert testnet.log_end(member) == [f"line {n}" for n in range(92, 100)]


@pytest.mark.parametrize(
    ("code", "kind"), [(0, Unavailable), (1, BrokenInvariant), (2, InvalidRequest), (-9, Unavailable)]
)
def test_an_exit_code_means_a_family_of_errors(tmp_path: Path, code: int, kind: type[ShoalError]) -> None:
    member = planned(tmp_path, 1)[0]
    assert isinstance(testnet._ended(member, code), kind)
