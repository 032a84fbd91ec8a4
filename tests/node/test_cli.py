"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
from toy_node import answer, manifest, text_files
from toy_server import Node
from typer.testing import CliRunner

from node import answer as answers
from node import cli, nearby, presence
from node.demo import build
from node.identity import Identity, taken
from protos import inference_pb2 as pb
from protos.errors import PeerLost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result


@pytest.fixture(autouse=True)
def quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node, no configuration file and no store of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(presence, "folder", lambda: tmp_path / "runtime")


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as running:
        yield running


def shoal(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def ask(node: Node, *arguments: str, stdin: str = "") -> Result:
    return shoal("generate", "--node", node.address, *arguments, stdin=stdin)


def test_an_answer_is_on_stdout_and_nothing_else(node: Node) -> None:
    result = ask(node, "--token-ids", "5,6", "--max-tokens", "3")
    assert result.exit_code == 0
    assert result.stdout == "w13 w27 w55 \n"


def test_stats_are_on_stderr(node: Node) -> None:
    result = ask(node, "--token-ids", "5,6", "--max-tokens", "3", "--stats")
    assert result.stdout == "w13 w27 w55 \n"
    assert "3 tokens after 2 of prompt" in result.stderr
    assert "ended by length" in result.stderr


def test_an_answer_that_was_cut_off_says_so_where_nobody_asked_for_that_length(node: Node) -> None:
    unasked = ask(node, "--token-ids", "5,6", "--ignore-eos")
    assert "tokens; --max-tokens allows more)\n" in unasked.stderr
    assert "cut off" not in ask(node, "--token-ids", "5,6").stderr  # it came to its end
    assert "cut off" not in ask(node, "--token-ids", "5,6", "--max-tokens", "3").stderr


def test_json_is_one_object_with_ids_text_and_timings(node: Node) -> None:
    result = ask(node, "--token-ids", "5,6", "--max-tokens", "3", "--json", "--logprobs", "1")
    reply = json.loads(result.stdout)
    assert reply["token_ids"] == answer([5, 6], 3)
    assert reply["text"] == "w13 w27 w55 "
    assert (reply["prompt_tokens"], reply["finish_reason"]) == (2, "length")
    assert reply["model"] == node.door.manifest.model_id
    assert reply["logprobs"][0] == {"id": 13, "logprob": -0.5, "top": [{"id": 1, "text": "w1 ", "logprob": -0.5}]}
    assert set(reply["timings"]) == {"queue_s", "prefill_s", "decode_s", "first_token_s", "tokens_per_s"}


def test_logprobs_are_absent_unless_asked_for(node: Node) -> None:
    node.worker.logprobs = False
    assert "logprobs" not in json.loads(ask(node, "--token-ids", "5", "--max-tokens", "1", "--json").stdout)


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_an_empty_prompt_is_refused_wherever_it_comes_from(node: Node, raw: tuple[str, ...]) -> None:
    for prompt in ("", "-"):
        result = ask(node, prompt, *raw, stdin="")
        assert result.exit_code == 2
        assert "empty" in result.stderr
    assert node.worker.opened == []


def test_prompt_logprobs_are_in_the_json_if_asked_for_and_null_where_the_model_excludes_a_token() -> None:
    started = pb.Started(prompt_tokens=3, prompt_logprobs=[-0.5, -math.inf])
    top = [pb.TopLogprob(id=4, text="b", logprob=-math.inf)]
    token = pb.Token(id=3, text="a", logprob=-math.inf, top=top)
    events = [
        pb.GenerateEvent(started=started),
        pb.GenerateEvent(token=token),
        pb.GenerateEvent(finished=pb.Finished(reason=pb.Finished.LENGTH)),
    ]
    reply = answers.collect(events, print)
    assert reply["prompt_logprobs"] == [-0.5, None]
    assert reply["logprobs"] == [{"id": 3, "logprob": None, "top": [{"id": 4, "text": "b", "logprob": None}]}]
    assert json.loads(json.dumps(reply, allow_nan=False)) == reply


def test_prompt_logprobs_reach_the_sampler_only_if_asked_for(node: Node) -> None:
    for flags in ((), ("--prompt-logprobs",)):
        assert ask(node, "--token-ids", "5,6", "--max-tokens", "1", "--json", *flags).exit_code == 0
    assert [request.params.prompt_logprobs for request in node.worker.opened] == [False, True]


def test_a_prompt_is_a_chat_unless_raw_and_may_come_from_stdin(node: Node) -> None:
    ask(node, "w7 ", "--max-tokens", "1")
    ask(node, "w7 ", "--max-tokens", "1", "--raw")
    ask(node, "-", "--max-tokens", "1", "--raw", stdin="w8 ")
    ask(node, "w7 ", "--max-tokens", "1", "--system", "w9 ")
    assert [request.log for request in node.worker.opened] == [(60, 7, 61), (7,), (8,), (60, 9, 60, 7, 61)]


def test_every_sampling_option_reaches_the_sampler(node: Node) -> None:
    options: dict[str, Any] = {
        "max_tokens": 2, "temperature": 0.5, "seed": 7, "top_k": 4, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.4, "logprobs": 5,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert ask(node, "--token-ids", "5", "--ignore-eos", "--json", *flags).exit_code == 0
    params = node.worker.opened[0].params
    assert {name: getattr(params, name) for name in options} == options
    assert params.stop_tokens == ()


def test_a_stop_string_ends_the_text(node: Node) -> None:
    assert ask(node, "--token-ids", "5,6", "--stop", "w55", "--stop", "w99").stdout == "w13 w27 \n"


def test_a_model_without_a_template_continues_the_prompt_and_says_so() -> None:
    with Node(text_files(template=False)) as node:
        result = ask(node, "w7 ", "--max-tokens", "1")
        assert result.exit_code == 0
        assert "no chat template" in result.stderr
        assert node.worker.opened[0].log == (7,)
        assert ask(node, "w7 ", "--system", "w9 ").exit_code == 2


def test_a_model_without_a_tokenizer_prints_ids_and_takes_nothing_else() -> None:
    with Node({}) as node:
        assert ask(node, "--token-ids", "5,6", "--max-tokens", "3").stdout == "13 27 55\n"
        assert "no tokenizer; use --token-ids" in ask(node, "hello").stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        ((), 2, "either a PROMPT or --token-ids"),
        (("x", "--token-ids", "1"), 2, "either a PROMPT or --token-ids"),
        (("--token-ids", "1;2"), 2, "numbers with commas"),
        (("--token-ids", "9999"), 2, "token id 9999 is not in the model's vocabulary"),
        (("--token-ids", "1", "--max-tokens", "-1"), 2, "max_tokens is -1"),
        (("--token-ids", "1", "--max-tokens", "1000"), 2, "ask for at most 47"),
        (("--token-ids", "1", "--top-p", "2"), 2, "top_p"),
        (("--token-ids", "1", "--stop", ""), 2, "a stop string is empty"),
        (("--token-ids", "1", "--logprobs", "2"), 2, "only printed with --json"),
        (("--token-ids", "1", "--prompt-logprobs"), 2, "only printed with --json"),
        (("",), 2, "PROMPT is empty"),
        (("--token-ids", "1", "--raw"), 2, "--raw and --system are for a PROMPT"),
        (("x", "--raw", "--system", "y"), 2, "--raw leaves out"),
        (("--token-ids", "1", "--top-k", "many"), 2, "for '--top-k'"),
        (("--no-such-option",), 2, "no such option: --no-such-option"),
        (("--node", "nonsense", "x"), 2, "host:port, such as 127.0.0.1:7645"),
        (("--token-ids", "1", "--model", "beef"), 2, "serves model"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    node: Node, arguments: tuple[str, ...], exit_code: int, says: str
) -> None:
    result = ask(node, *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_with_json_an_error_is_one_object_too(node: Node) -> None:
    result = ask(node, "--token-ids", "9999", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == "invalid_request"


def test_an_answer_that_fails_in_the_middle_says_why(node: Node) -> None:
    from protos.errors import DeadlineExceeded

    node.worker.faults.append(DeadlineExceeded("the step took too long"))
    result = ask(node, "--token-ids", "5")
    assert result.exit_code == 3
    assert "error: the step took too long" in result.stderr


@pytest.mark.parametrize(("text", "printed"), [("half", "half\n"), ("line\n", "line\n"), ("", "")])
@pytest.mark.parametrize("error", [PeerLost("gone"), KeyboardInterrupt()])
def test_text_that_was_cut_off_ends_with_a_newline(
    text: str, printed: str, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def events() -> Iterator[pb.GenerateEvent]:
        yield pb.GenerateEvent(token=pb.Token(text=text))
        raise error

    with pytest.raises(type(error)):
        answers.stream(events(), print, as_ids=False)
    assert capsys.readouterr().out == printed


def test_nobody_at_the_address_is_exit_code_3() -> None:
    with Node() as gone:
        address = gone.address
    result = shoal("generate", "hi", "--node", address)
    assert result.exit_code == 3
    assert f"no node answers at {address} (Connection refused)" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_ends_with_exit_code_130(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("node.answer.stream", interrupted)
    result = ask(node, "--token-ids", "5")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_a_node_on_this_machine_is_used_if_it_serves_the_model(node: Node) -> None:
    with presence.announced(node.address):
        result = shoal("generate", "--token-ids", "5,6", "--max-tokens", "1")
        assert result.stdout == "w13 \n"
        with nearby.connected(nearby.Wanted(model=node.door.manifest.model_id[:8]), print) as doors:
            assert doors.client.address == node.address


def test_a_node_that_cannot_start_says_why(tmp_path: Path) -> None:
    result = shoal("generate", "hi", "--store", str(tmp_path / "empty"))
    assert result.exit_code == 2
    assert "holds no model" in result.stderr
    as_json = shoal("generate", "hi", "--store", str(tmp_path / "empty"), "--json")
    assert json.loads(as_json.stdout)["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (("frob",), 2, "no such command 'frob'; see shoal --help"),
        (("pack",), 2, "missing argument 'CHECKPOINT'; see shoal pack --help"),
        (("run", "--port", "many"), 2, "for '--port'"),
        (("run", "--port", "70000"), 2, "port is 70000"),
        (("run", "--host", "0.0.0.0"), 2, "which nobody can call: say advertise"),
        (("run", "--memory-limit", "lots"), 2, "memory_limit is 'lots'"),
        (("run",), 2, "holds no model"),
        (("run", "--join", "nowhere"), 2, "join is"),
        (("run", "--join", "a.example.org:port"), 2, "is no address of a node: give host:port"),
        (("show",), 2, "holds no model"),
        (("show", "--store", "no/such/store"), 2, "no/such/store does not exist"),
        (("show", "--store", cli.__file__), 2, "is no folder"),
        (("show", "not-hex"), 2, "no model id"),
        (("pack", "/nowhere"), 2, "/nowhere"),
        (("demo-model", "--random"), 2, "needs --out"),
    ],
)
def test_commands_that_cannot_work_say_so(arguments: tuple[str, ...], exit_code: int, says: str) -> None:
    result = shoal(*arguments)
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.exit_code == exit_code


@pytest.fixture
def cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store; whoever gets so far as to load what needs torch fails otherwise than by a typed error."""
    models = tmp_path / "store" / "models"
    models.mkdir(parents=True)
    (models / f"{manifest().model_id}.json").write_bytes(manifest().to_bytes())
    monkeypatch.setitem(sys.modules, "node.runtime", None)
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--hold", "experts:*"), "hold 'experts:*': give all,"),
        (("--hold", "span:0-7"), "not within the 2 layers"),
        (("--identity", "corrupt.key"), "holds no unencrypted Ed25519 key"),
        (("--grant", "nowhere.grant"), "network shoal is open and wants none"),
        (("--network", "ab" * 32), "wants a grant for this node"),
        (("--network", "ab" * 32, "--grant", "nowhere.grant"), "there is no file nowhere.grant"),
        (("--network", "ab" * 32, "--grant", "corrupt.key"), "is refused"),
        (("--revocations", "nowhere.list"), "network shoal is open and takes no grant back"),
        (("--host", "192.0.2.1"), "host is 192.0.2.1, which is no address of this machine"),
    ],
)
def test_what_a_node_cannot_run_with_is_refused_before_anything_is_loaded(
    cannot_load: Path, arguments: tuple[str, ...], says: str
) -> None:
    Path("corrupt.key").write_text("?")
    Path("corrupt.key").chmod(0o600)
    result = shoal("run", "--store", str(cannot_load), "--port", "0", *arguments)
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.exit_code == 2


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(cannot_load: Path, kind: int) -> None:
    with socket.socket(type=kind) as taker:
        taker.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taker.listen()
        port = taker.getsockname()[1]
        result = shoal("run", "--store", str(cannot_load), "--port", str(port))
    assert result.stderr.startswith("error: cannot ")
    assert f"port {port}" in result.stderr
    assert "choose another with --port" in result.stderr
    assert result.exit_code == 3


def test_a_second_node_with_the_key_of_one_that_runs_is_refused(cannot_load: Path, tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    Identity.create().save(key)
    with taken(key):
        result = shoal("run", "--store", str(cannot_load), "--port", "0", "--identity", str(key))
    assert result.stderr.startswith(f"error: another node runs with the key {key}")
    assert result.exit_code == 2


@pytest.mark.parametrize("store", ["taken/store", "taken", "/proc/store", "x" * 300])
def test_a_store_that_cannot_be_written_is_one_line_and_exit_code_2(store: str, tmp_path: Path) -> None:
    checkpoint = tiny.save("mixtral", tmp_path / "checkpoint")
    (tmp_path / "taken").write_text("a file")
    result = CliRunner().invoke(cli.app, ["pack", str(checkpoint), store])
    assert result.exit_code == 2, result.exception
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert store in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_demo_models_folder_is_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda cache, report: cache / "demo")
    assert shoal("demo-model", "--out", str(tmp_path)).stdout.strip() == str(tmp_path / "demo")


@pytest.mark.parametrize("command", ["pack", "run", "generate", "show", "demo-model"])
def test_help_has_examples_and_exit_codes(command: str) -> None:
    result = shoal(command, "--help")
    assert result.exit_code == 0
    assert f"shoal {command}" in result.stdout
    assert "130 interrupted" in " ".join(result.stdout.split())


def test_help_and_a_client_load_neither_torch_nor_transformers(node: Node) -> None:
    program = (
        "import sys; from node import cli\n"
        "try: cli.app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'trio'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["generate", "--node", node.address, "--token-ids", "5", "--max-tokens", "1"]):
        output = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True, text=True, check=True, cwd=cli.__file__.rpartition("/node/")[0],
        )  # fmt: skip
        assert output.stdout.splitlines()[-1] == "[]"
