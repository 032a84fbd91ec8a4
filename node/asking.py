"""The commands that ask a node: generate, chat, peers.

Law: what they need is imported when they run, and never torch.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import (
    ANSWER,
    MODEL,
    AsJson,
    ConfigFile,
    Frequency,
    Key,
    MaxTokens,
    MinP,
    Model,
    Nodes,
    Plaintext,
    Presence,
    Repetition,
    Seed,
    Stats,
    Stop,
    Store,
    System,
    Temperature,
    TopK,
    TopP,
    option,
)
from node.outcome import tell, told
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from node.doors import Doors
    from node.nearby import Wanted


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask; '-': read it from stdin.")
    ] = None,
    node: Nodes = None,
    identity: Key = None,
    plaintext: Plaintext = False,
    store: Store = None,
    config_file: ConfigFile = None,
    model: Model = None,
    token_ids: Annotated[
        str | None, option("IDS", "Prompt as ids, such as 5,17,230; for models without a tokenizer.", MODEL)
    ] = None,
    raw: Annotated[bool, option("", "Continue PROMPT as it is: no chat template.", MODEL, flag="--raw")] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, option("", "Go on after the model's end tokens.", ANSWER, flag="--ignore-eos")] = False,
    as_json: Annotated[bool, option("", "One JSON object on stdout; errors too.", ANSWER, flag="--json")] = False,
    logprobs: Annotated[
        int | None, option("N", "With --json: of each token and of the N likeliest, 0 to 20.", ANSWER)
    ] = None,
    prompt_logprobs: Annotated[
        bool | None,
        option("", "With --json: of each token of the prompt but the first.", ANSWER, flag="--prompt-logprobs"),
    ] = None,
    stats: Stats = False,
    temperature: Temperature = None,
    seed: Seed = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
) -> None:
    """Ask a model, and print its answer as it comes.

    A model with a chat template is asked through it, unless --raw.
    Sampling options that are left out are the checkpoint's own
    (generation_config.json), as transformers would take them.
    With several --node the answer goes on at the next one where one dies.

    Examples:

        shoal generate "What is the capital of France?"
        shoal generate "Once upon a time" --raw --temperature 0.8 --seed 7
        shoal generate --token-ids 5,17,230 --ignore-eos --json --logprobs 3
        cat question.txt | shoal generate - --node 127.0.0.1:9000 --node 127.0.0.1:9001
    """
    options = dict(locals())
    with told(as_json=as_json):
        from node import answer, ask

        if not as_json and (logprobs is not None or prompt_logprobs):
            raise InvalidRequest("--logprobs and --prompt-logprobs are only printed with --json; add it")
        message = ask.request(
            prompt, token_ids, options, raw=raw, system=system, stop=stop or [], ignore_eos=ignore_eos
        )
        wanted = _wanted(node, identity, plaintext, model, store, config_file)
        shown = ask.show(message, wanted, tell, as_json=as_json)
        if shown is None:
            return
        if stats or sys.stderr.isatty():
            tell(answer.summary(shown))
        elif max_tokens is None and (line := answer.cut_off(shown)):
            tell(line)


def chat(
    node: Nodes = None,
    identity: Key = None,
    plaintext: Plaintext = False,
    store: Store = None,
    config_file: ConfigFile = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    stats: Stats = False,
    temperature: Temperature = None,
    seed: Seed = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
) -> None:
    """Talk with a model; it knows what was said before.

    /reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer.
    Where stdin is no terminal, each of its lines is a turn.

    Examples:

        shoal chat
        shoal chat --node 127.0.0.1:7646 --node 127.0.0.1:7647
        printf 'Name a river.\\nAnother one.\\n' | shoal chat --max-tokens 40
    """
    options = dict(locals())
    with told():
        from node import ask, nearby
        from node.chat import HELP, Chat

        message = ask.chat_request(options, system=system, stop=stop or [])
        wanted = _wanted(node, identity, plaintext, model, store, config_file)
        interactive = sys.stdin.isatty()
        with nearby.connected(wanted, tell) as doors:
            talk = Chat(doors, message, tell, stats=stats)
            info = talk.begin()
            if interactive:
                _edit_lines()
                tell(f"model {info.model_id[:12]} ({info.family}) at {doors.client.address}; {HELP}")
            talk.talk(interactive=interactive)


def peers(
    node: Nodes = None,
    identity: Key = None,
    plaintext: Plaintext = False,
    work: Annotated[
        bool, option("", "Also where the layers of the node's answers were computed.", flag="--work")
    ] = False,
    watch: Annotated[bool, option("", "Again every second, until Ctrl-C.", flag="--watch")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the peers that a node knows: where they are, what they hold, how they are.

    A node that knows no other shows where it looks for them.

    Examples:

        shoal peers
        shoal peers --node 127.0.0.1:7646 --work
        shoal peers --watch
        shoal peers --json | jq -r '.peers[] | select(.state == "dead") | .address'
    """
    with told(as_json=as_json):
        from node import answer, nearby, peer_table

        wanted = _wanted(node, identity, plaintext, None, None, None)
        with nearby.known(wanted, tell) as doors:
            if watch:
                _watch(doors, work=work, as_json=as_json)
                return
            reply = doors.peers()
        if as_json:
            answer.write_json(peer_table.facts(reply))
        else:
            peer_table.show(peer_table.whole(reply, work=work))


def _watch(doors: Doors, *, work: bool, as_json: bool) -> None:
    """Until Ctrl-C, which is how one ends it and no failure."""
    from node import peer_table, peer_watch

    with contextlib.suppress(KeyboardInterrupt):
        if as_json:
            peer_watch.json(doors)
        elif sys.stdout.isatty():
            peer_watch.table(doors, lambda reply: peer_table.whole(reply, work=work))
        else:
            peer_watch.lines(doors, lambda reply: peer_table.whole(reply, work=work))


def _wanted(
    nodes: list[str] | None,
    identity: Path | None,
    plaintext: bool,
    model: str | None,
    store: Path | None,
    config: Path | None,
) -> Wanted:
    from node.nearby import Wanted

    if nodes and store is not None:
        raise InvalidRequest(
            "--store is for a node that is started for this answer, --node for one that runs; give one"
        )
    return Wanted(tuple(nodes or ()), store, model or "", config, identity, plaintext)


def _edit_lines() -> None:
    """Arrow keys and a history, where Python has them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)


def register(app: typer.Typer, epilog: str) -> None:
    """Adds the commands."""
    for command in (generate, chat, peers):
        app.command(epilog=epilog)(command)
