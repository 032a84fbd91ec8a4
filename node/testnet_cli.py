"""The commands `shoal testnet` and `shoal demo`: networks on this machine.

Law: what they need is imported when they run; what was started and is not wanted any more is ended before they return.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from node.options import MODEL, AsJson, Model, Store, option
from node.outcome import tell, told
from node.usage import Commands
from protos.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.testnet import Testnet
    from node.testnet_state import Record
    from node.topology import Topology
    from protos.manifest import Manifest

SHAPE = "The shape"
SIGNALS = ("KILL", "TERM", "STOP", "CONT")

Name = Annotated[str | None, option("NAME", "Which testnet (default: the one that is up).")]
Number = Annotated[int, typer.Argument(metavar="N", help="Which node, as 'shoal testnet status' counts them.")]


def up(
    nodes: Annotated[int, typer.Option("-n", "--nodes", metavar="N", help="So many.", rich_help_panel=SHAPE)] = 4,
    spans: Annotated[
        int, option("N", "Cut the layers in so many spans (default: every node holds all trunks).", SHAPE)
    ] = 0,
    experts: Annotated[
        Literal["spread", "own"] | None,
        option("HOW", "spread: over all nodes; own: of its span (default: own with --spans, else spread).", SHAPE),
    ] = None,
    replicas: Annotated[
        int | None, option("N", "Everything is held by so many nodes (default: 2, where there is room).", SHAPE)
    ] = None,
    zones: Annotated[int, option("N", "Nodes in so many zones.", SHAPE)] = 1,
    model: Model = None,
    store: Annotated[Path | None, option("FOLDER", "Packed models (default: the user's data folder).", MODEL)] = None,
    name: Annotated[str, option("NAME", "To have several testnets.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Start a network of nodes on this machine.

    It is up when every node serves and sees every other one, and stays
    up until 'shoal testnet down'.

    Examples:

        shoal testnet up
        shoal testnet up -n 6 --spans 3
        shoal testnet up -n 4 --spans 2 --experts spread --replicas 2 --name wide
    """
    with told(as_json=as_json, interrupted="interrupted; nothing is left running"):
        from node import config, ports, testnet, testnet_state, topology
        from shard.catalogue import Catalogue

        folder = config.load({"store": store}).store
        manifest = Catalogue(folder).manifest(model or None)
        shape = topology.choose(nodes, experts, spans, replicas, zones)
        places = topology.places(shape, manifest.layers, manifest.grain)
        record = testnet_state.claim(name, manifest.model_id)
        with _forgotten_if_it_fails(record), ports.reserved(nodes) as free:
            members = testnet.planned(Path(record.folder), places, free)
            launch = testnet.command(testnet.Options(folder.absolute(), manifest.model_id), nodes)
            _start(testnet.Testnet(members, launch), record)
        _show_up(record, shape, manifest, as_json=as_json)


def _start(net: Testnet, record: Record) -> None:
    """Also what is started last is known to 'down' if this process dies."""
    from node import progress, testnet, testnet_state

    def note(_: object) -> None:
        record.members = [member for member in net.members if member.pid]
        testnet_state.save(record)

    try:
        with progress.shown(tell) as report:
            net.start(note)
            net.wait_ready(report)
    except BaseException:
        for member in net.ended():
            for line in testnet.log_end(member):
                tell(f"  {line}")
        net.end(grace_s=0.5)
        raise
    net.leave()
    record.ready = True
    testnet_state.save(record)


@contextlib.contextmanager
def _forgotten_if_it_fails(record: Record) -> Iterator[None]:
    """SIGTERM is a failure too."""
    from node import testnet_state

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except BaseException:
        testnet_state.forget(record)
        tell(f"logs: {record.folder}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show_up(record: Record, shape: Topology, manifest: Manifest, *, as_json: bool) -> None:
    from node import answer, peer_table, testnet_table

    if as_json:
        answer.write_json(testnet_table.facts(record))
        return
    peer_table.show(testnet_table.members(record))
    copies = "once" if shape.replicas == 1 else f"{shape.replicas} times"
    tell(f"{len(record.members)} nodes hold model {manifest.model_id[:12]}, everything {copies}; logs: {record.folder}")
    tell(f"ask them: shoal chat --node {record.members[0].address}")


def status(name: Name = None, as_json: AsJson = False) -> None:
    """Show the nodes of a testnet: are they alive, and whom do they see.

    Examples:

        shoal testnet status
        shoal testnet status --json
    """
    with told(as_json=as_json):
        from node import answer, peer_table, testnet_table

        record = _known(name)
        if as_json:
            answer.write_json(testnet_table.facts(record))
            return
        peer_table.show(testnet_table.members(record, sees=testnet_table.seen(record)))
        tell(f"testnet {record.name}, model {record.model[:12]}; logs: {record.folder}")


def kill(
    number: Number,
    how: Annotated[str, option("NAME", "KILL, TERM, STOP (frozen) or CONT (goes on).", flag="--signal")] = "KILL",
    name: Name = None,
) -> None:
    """Kill a node of a testnet, or freeze it, to see what the others do.

    Examples:

        shoal testnet kill 3
        shoal testnet kill 2 --signal STOP
    """
    with told():
        from node import process

        chosen = how.upper().removeprefix("SIG")
        if chosen not in SIGNALS:
            raise InvalidRequest(f"--signal is {how!r:.80}; it must be one of {', '.join(SIGNALS)}")
        record = _known(name)
        member = next((member for member in record.members if member.number == number), None)
        if member is None:
            raise InvalidRequest(f"there is no node {number}; testnet {record.name} has 1 to {len(record.members)}")
        if not process.send(member.pid, member.key, signal.Signals[f"SIG{chosen}"]):
            raise InvalidRequest(f"node {number} is dead already; 'shoal testnet status' shows who is alive")
        tell(f"sent SIG{chosen} to node {number} ({member.peer[:8]} at {member.address}, pid {member.pid})")


def down(name: Name = None) -> None:
    """End a testnet; print the folder of its logs, which is all that is left.

    Examples:

        shoal testnet down
        rm -r "$(shoal testnet down)"
    """
    with told(interrupted="interrupted; run it again to end the rest"):
        from node import presence, process, testnet, testnet_state

        record = testnet_state.load(testnet_state.choose(name))
        if record is None:
            tell(_nothing(name))
            return
        ended = process.end([(member.pid, member.key) for member in record.members], testnet.END_S)
        testnet_state.forget(record)
        presence.addresses()  # sweeps what killed nodes left
        dead = len(record.members) - ended
        tell(f"ended {ended} nodes{f' ({dead} dead before)' if dead else ''}")
        if record.folder:
            typer.echo(record.folder)


def _known(name: str | None) -> Record:
    from node import testnet_state

    record = testnet_state.load(testnet_state.choose(name))
    if record is None:
        raise Unavailable(f"{_nothing(name)}; 'shoal testnet up' starts one")
    return record


def _nothing(name: str | None) -> str:
    return f"no testnet {name} is up" if name else "no testnet is up"


def demo(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")] = "What is the capital of France?",
    model: Model = None,
    store: Store = None,
    nodes: Annotated[int, typer.Option("-n", "--nodes", metavar="N", help="So many, from 3 on.")] = 4,
    max_tokens: Annotated[int, option("N", "Length of the answer, from 8 on.", min=8)] = 48,
) -> None:
    """Four nodes answer together, and go on when one of them is killed.

    The same question is asked twice: once in peace, and once with a
    kill -9 in the middle for the node (not the door) that computes most
    of the experts. Then both answers are compared, token by token. Exit
    code 1 if they differ. Nothing is left running.

    Examples:

        shoal demo
        shoal demo "Why is the sky blue?" --max-tokens 100
    """
    with told(interrupted="interrupted; nothing is left running"):
        from node import config
        from node.demo import outage
        from shard.catalogue import Catalogue

        if nodes < outage.NODES_MIN:
            raise InvalidRequest(f"-n is {nodes}; with fewer than {outage.NODES_MIN} nodes nobody can be spared")
        folder = config.load({"store": store}).store
        manifest = Catalogue(folder).manifest(model or None)
        signal.signal(signal.SIGTERM, _interrupt)
        same = outage.run(manifest, folder.absolute(), prompt, nodes=nodes, max_tokens=max_tokens, tell=tell)
        sys.stdout.flush()
        raise typer.Exit(0 if same else 1)


def register(app: typer.Typer, epilog: str) -> None:
    """Adds the commands."""
    group = typer.Typer(cls=Commands, epilog=epilog, rich_markup_mode="rich", no_args_is_help=True)
    for command in (up, status, kill, down):
        group.command(epilog=epilog)(command)
    app.add_typer(group, name="testnet", help="A network of nodes on this machine: up, status, kill, down.")
    app.command(epilog=epilog)(demo)
