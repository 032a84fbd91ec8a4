"""Options and arguments that several commands share, as --help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, ANSWER, SAMPLING, NODE, LIMITS, LOGS = "The model", "The answer", "Sampling", "The node", "Limits", "Logs"
NETWORK = "The network"


def option(metavar: str, text: str, panel: str | None = None, *, flag: str | None = None, **more: Any) -> Any:
    """An option as --help shows it; `flag` where the name of the parameter is another."""
    return typer.Option(*([flag] if flag else []), metavar=metavar, help=text, rich_help_panel=panel, **more)


Store = Annotated[Path | None, option("FOLDER", "Packed models (default: SHOAL_STORE, or the user's data folder).")]
ConfigFile = Annotated[
    Path | None, option("FILE", "Settings (default: ./shoal.toml, or the user's).", NODE, flag="--config")
]
Model = Annotated[str | None, option("ID", "Model id, or its first digits (default: the only one).", MODEL)]
AsJson = Annotated[bool, option("", "One JSON value on stdout; errors too.", flag="--json")]

# Of commands that ask a node.
Nodes = Annotated[
    list[str] | None,
    option(
        "HOST:PORT[#PEER]",
        "Ask this node; repeated: the next one where one fails (default: those on this machine).",
        NODE,
        flag="--node",
    ),
]
Key = Annotated[
    Path | None,
    option("FILE", "Ask with this key (default: your own, made on first use).", NODE, flag="--identity"),
]
Plaintext = Annotated[bool, option("", "The node was started with --plaintext.", NODE, flag="--plaintext")]

# Of answers.
MaxTokens = Annotated[int | None, option("N", "At most so many (default: 256, or what fits).", ANSWER)]
Stop = Annotated[list[str] | None, option("TEXT", "End before this text; may be repeated.", ANSWER)]
System = Annotated[str | None, option("TEXT", "System message before the prompt.", MODEL)]
Stats = Annotated[bool, option("", "Say how fast it went, also if stderr is no terminal.", ANSWER, flag="--stats")]

# protos.sampling.SamplingParams; what is left out is the checkpoint's own.
Temperature = Annotated[float | None, option("T", "0: always the likeliest token; to 100.", SAMPLING)]
Seed = Annotated[int | None, option("N", "Equal seeds give equal answers.", SAMPLING)]
TopK = Annotated[int | None, option("N", "Only the N likeliest tokens; 0: all.", SAMPLING)]
TopP = Annotated[float | None, option("P", "Only the likeliest that make up P, 0 to 1.", SAMPLING)]
MinP = Annotated[float | None, option("P", "Only with P of the likeliest's probability.", SAMPLING)]
Repetition = Annotated[float | None, option("X", "0.01 to 100; above 1: fewer tokens again.", SAMPLING)]
Presence = Annotated[float | None, option("X", "-2 to 2, once for each token answered.", SAMPLING)]
Frequency = Annotated[float | None, option("X", "-2 to 2, each time that it was answered.", SAMPLING)]
