"""The commands `shoal network`: what the operator of a permissioned network signs.

Law: stdout carries what others need (an id, the file to hand on), stderr says what to do with it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Final

import typer

from node.options import option
from node.outcome import tell, told
from node.usage import Commands
from protos.errors import InvalidRequest
from protos.ids import PeerId
from protos.limits import GRANT_S_MAX

DAY_MS: Final = 86_400_000

Name = Annotated[str | None, option("NAME", "Which network (default: the only one).")]
KeyFile = Annotated[Path | None, option("FILE", "The operator's key (default: where 'create' put it).", flag="--key")]
Peer = Annotated[str, typer.Argument(metavar="PEERID", help="52 characters, as 'shoal keygen' prints them.")]


def create(
    name: Annotated[str, option("NAME", "To have several networks.")] = "default",
    out: Annotated[Path | None, option("FILE", "Make the key here (default: the user's data folder).")] = None,
) -> None:
    """Make a network that nodes enter with a grant; print its id.

    The network is the operator's key: who has the file lets nodes in.
    Keep a copy, and keep it secret. It is never overwritten.

    Examples:

        shoal network create
        shoal run --network "$(shoal network create --name lab)" --grant my.grant
    """
    with told():
        from node import network, operator_files
        from node.identity import Identity

        path = out or operator_files.key_path(name)
        identity = Identity.create()
        try:
            identity.save(path)
        except FileExistsError:
            known = network.permissioned(Identity.load(path).public_key)
            raise InvalidRequest(f"{path} is the key of network {known} already; give this one another name") from None
        tell(f"made {path}, which only you can read; keep a copy")
        tell("let nodes in: shoal network grant PEERID; they start with --network ID --grant FILE")
        typer.echo(str(network.permissioned(identity.public_key)))


def grant(
    peer: Peer,
    days: Annotated[int, option("N", "It ends after so many days.", min=1, max=GRANT_S_MAX // 86_400)] = 90,
    zone: Annotated[str, option("NAME", "The node must say this zone.")] = "",
    owner: Annotated[str, option("NAME", "The node must say this owner.")] = "",
    out: Annotated[Path | None, option("FILE", "Write it here (default: PEER.grant).")] = None,
    name: Name = None,
    key: KeyFile = None,
) -> None:
    """Let a node into the network; write its grant, and print the file.

    Give the file to whoever runs the node. It is no secret: it is worth
    something to that one node only, and it ends.

    Examples:

        shoal network grant "$(shoal keygen)"
        shoal network grant PEERID --days 30 --zone rack-7 --owner anna
    """
    with told():
        from node import grant as grants
        from node import operator_files
        from node.identity import Identity

        who = _peer(peer)
        operator = Identity.load(operator_files.choose(name, key))
        now_ms = int(time.time() * 1000)
        made = grants.Grant(who, now_ms, now_ms + days * DAY_MS, zone, owner)
        path = out or Path(f"{who[:8]}.grant")
        operator_files.write(path, grants.sign(made, operator))
        tell(f"{who[:8]} may take part for {days} days: its node starts with --grant {path}")
        typer.echo(str(path))


def revoke(
    peer: Peer,
    out: Annotated[Path | None, option("FILE", "Write the list here too.")] = None,
    name: Name = None,
    key: KeyFile = None,
) -> None:
    """Take a node's grants back; write the network's next list of those.

    The list lies beside the operator's key. A node that is started with
    --network KEYFILE reads it there, and passes it on to all others. What
    is granted later holds again.

    Example:

        shoal network revoke PEERID
    """
    with told():
        from node import network, operator_files, revocations
        from node.identity import Identity

        who = _peer(peer)
        key_file = operator_files.choose(name, key)
        operator = Identity.load(key_file)
        known = operator_files.known_revocations(key_file, network.permissioned(operator.public_key))
        following = known.next(who, int(time.time() * 1000))
        data = revocations.sign(following, operator)
        path = operator_files.revocations_path(key_file)
        for target in (path, *([out] if out else [])):
            operator_files.write(target, data)
        count = len(following.at_ms)
        names = "1 peer" if count == 1 else f"{count} peers"
        tell(f"list {following.version} takes back what was granted to {who[:8]}; it names {names}")
        tell("give it to one node ('shoal run --revocations FILE'), which rereads it and tells all others")
        typer.echo(str(out or path))


def name_model(
    text: Annotated[str, typer.Argument(metavar="NAME", help="What people call it.")],
    model_id: Annotated[str, typer.Argument(metavar="MODEL_ID", help="64 hex digits, as 'shoal pack' prints them.")],
    out: Annotated[Path | None, option("FILE", "Write it here (default: MODEL.name).")] = None,
    name: Name = None,
    key: KeyFile = None,
) -> None:
    """Sign a name for a model; write it, and print the file.

    Of two names that are equal the one that was signed later holds.

    Example:

        shoal network name mixtral "$(shoal pack ./mixtral)"
    """
    with told():
        from node import model_name, operator_files
        from node.identity import Identity
        from protos.ids import ModelId

        operator = Identity.load(operator_files.choose(name, key))
        signed = model_name.sign(model_name.ModelName(text, ModelId(model_id), int(time.time() * 1000)), operator)
        path = out or Path(f"{model_id[:8]}.name")
        operator_files.write(path, signed)
        tell(f"{text} is model {model_id[:12]} in this network")
        typer.echo(str(path))


def _peer(text: str) -> PeerId:
    from node import address

    if not address.is_peer_id(text):
        raise InvalidRequest(f"{text!r:.80} is no peer id: it has 52 characters, of a to z and 2 to 7")
    return PeerId(text)


def register(app: typer.Typer, epilog: str) -> None:
    """Adds the commands."""
    group = typer.Typer(cls=Commands, epilog=epilog, rich_markup_mode="rich", no_args_is_help=True)
    for command in (create, grant, revoke):
        group.command(epilog=epilog)(command)
    group.command("name", epilog=epilog)(name_model)
    app.add_typer(group, name="network", help="A network that nodes enter with a grant: create, grant, revoke, name.")
