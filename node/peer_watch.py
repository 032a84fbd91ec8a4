"""`shoal peers --watch`: the same table again and again, until Ctrl-C.

Law: a node that does not answer for a while ends nothing; the last that it said stays, and below it why there is no
more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from node import answer, peer_table
from protos.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from node.doors import Doors
    from protos import inference_pb2 as pb

    Draw = Callable[[pb.PeersReply], RenderableType]

PERIOD_S = 1.0


def table(doors: Doors, draw: Draw) -> None:
    """On a terminal, in place.  Raises what the first question does."""
    shown = draw(doors.peers())
    with Live(shown, console=Console(), auto_refresh=False) as live:
        live.refresh()
        while True:
            time.sleep(PERIOD_S)
            try:
                shown = draw(doors.peers())
                live.update(shown, refresh=True)
            except Unavailable as error:
                live.update(Group(shown, "", Text(error.message, style="yellow")), refresh=True)


def lines(doors: Doors, draw: Draw) -> None:
    """Where stdout is no terminal: one table after the other."""
    while True:
        peer_table.show(draw(doors.peers()))
        print(flush=True)  # noqa: T201  (a result)
        time.sleep(PERIOD_S)


def json(doors: Doors) -> None:
    """One object a line."""
    while True:
        answer.write_json(peer_table.facts(doors.peers()))
        time.sleep(PERIOD_S)
