"""The commands `shoal record`: what a node signed about itself.

Law: a file is the bytes of a SignedRecord, as nodes pass them on; nothing is shown as believed that was not verified.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import AsJson, Key, Plaintext, option
from node.outcome import tell, told
from node.usage import Commands
from protos.limits import RECORD_BYTES_MAX

if TYPE_CHECKING:
    from node.record_facts import Examined

FETCH_S = 10.0

NetworkName = Annotated[
    str | None, option("NAME|ID|KEYFILE", "Of this network (default: of the one that it names).", flag="--network")
]


def show(
    where: Annotated[str, typer.Argument(metavar="FILE|HOST:PORT", help="A file, or the node to ask for its record.")],
    peer: Annotated[str, option("PEERID", "Ask the node for this peer's record.")] = "",
    out: Annotated[Path | None, option("FILE", "Keep the signed bytes here.")] = None,
    network: NetworkName = None,
    identity: Key = None,
    plaintext: Plaintext = False,
    as_json: AsJson = False,
) -> None:
    """Show a node's record: who, what it holds, and until when it holds.

    Examples:

        shoal record show 10.0.0.2:7645
        shoal record show 10.0.0.2:7645 --out their.record
        shoal record show their.record --json
    """
    with told(as_json=as_json):
        data = _read(Path(where)) if Path(where).is_file() else _fetch(where, peer, identity, plaintext=plaintext)
        if out is not None:
            from node import operator_files

            operator_files.write(out, data)
        found = _examined(data, network)
        _show(found, as_json=as_json)
        if found.problem is not None and not as_json:
            tell(f"nobody would take it now: {found.problem.message}")


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The bytes of a signed record.")],
    network: NetworkName = None,
    as_json: AsJson = False,
) -> None:
    """Check a signed record, and say exactly what is wrong with it.

    Exit code 0: any node of its network would take it now. 2: none would.
    Whether the operator has taken its grant back is not in the record:
    'shoal peers' at any node of the network shows who takes part.

    Examples:

        shoal record verify their.record
        shoal record verify their.record --network lab && echo good
    """
    with told(as_json=as_json):
        found = _examined(_read(file), network)
        _show(found, as_json=as_json)
        if found.problem is None:
            if not as_json:
                tell("good: any node of its network takes it now, unless the operator has taken the grant back")
            return
        if as_json:  # which has said it
            from node import status

            raise typer.Exit(status.exit_code(found.problem))
        raise found.problem


def _examined(data: bytes, network: str | None) -> Examined:
    from node import operator_files, record_facts

    chosen = operator_files.network_of(network) if network else None
    return record_facts.examine(data, int(time.time() * 1000), chosen)


def _show(found: Examined, *, as_json: bool) -> None:
    from node import answer, record_facts

    if as_json:
        answer.write_json(record_facts.facts(found))
        return
    for name, text in record_facts.lines(found):
        typer.echo(f"{name:<14}{text}")
    if found.unsigned_bytes:
        unsigned = f"{found.unsigned_bytes} bytes in it are no part of what is signed"
        tell(f"note: {unsigned}; whoever passes it on leaves them out")


def _read(path: Path) -> bytes:
    from node import operator_files

    return operator_files.read(path, RECORD_BYTES_MAX)


def _fetch(address: str, peer: str, identity: Path | None, *, plaintext: bool) -> bytes:
    from node import nearby
    from node.link import connect
    from protos import peers_pb2 as pb
    from protos.peers_pb2_grpc import PeersStub

    link = connect(nearby.key(identity), address, plaintext=plaintext, timeout_s=FETCH_S)
    try:
        request = pb.RecordRequest(peer_id=peer)
        signed = link.call(lambda channel: PeersStub(channel).Record, request, timeout_s=FETCH_S)
    finally:
        link.close()
    return signed.SerializeToString(deterministic=True)


def register(app: typer.Typer, epilog: str) -> None:
    """Adds the commands."""
    group = typer.Typer(cls=Commands, epilog=epilog, rich_markup_mode="rich", no_args_is_help=True)
    for command in (show, verify):
        group.command(epilog=epilog)(command)
    app.add_typer(group, name="record", help="What a node signed about itself: show, verify.")
