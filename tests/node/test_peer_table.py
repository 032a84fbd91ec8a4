"""What `shoal peers` prints."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from node import peer_table, peer_watch
from protos import inference_pb2 as pb
from protos.errors import InvalidRequest, PeerLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

ME, OTHER = "a" * 52, "b" * 52


def printed(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def reply(*more: pb.PeerStatus, **fields: Any) -> pb.PeersReply:
    own = pb.PeerStatus(peer_id=ME, address="h:1", state="self", island="home", layers=4, experts=8, bytes=3 << 20)
    return pb.PeersReply(peer_id=ME, peers=[own, *more], network="shoal", **fields)


def other(**fields: Any) -> pb.PeerStatus:
    return pb.PeerStatus(peer_id=OTHER, address="h:2", state="alive", rtt_s=0.0123, age_s=0.5, **fields)


def test_a_peer_is_a_line_with_where_how_far_what_and_since_when() -> None:
    text = printed(peer_table.whole(reply(other(island="home", first_layer=1, layers=3, experts=5, queue=2))))
    heading, first, second = text.splitlines()
    assert heading.split() == ["peer", "address", "state", "RTT", "trunk", "experts", "size", "queue", "heard"]
    assert first.split() == [ME[:8], "h:1", "self", "0-3", "8", "3.0", "MiB", "0"]
    assert second.split() == [OTHER[:8], "h:2", "alive", "12.3", "ms", "1-3", "5", "2", "0.5", "s"]


def test_zones_and_islands_are_shown_where_they_differ() -> None:
    heading, first, second = printed(peer_table.whole(reply(other(zone="rack-7")))).splitlines()
    assert "zone" in heading
    assert "island" in heading
    assert "home" in first
    assert "rack-7" in second


def test_failed_calls_are_counted_in_the_line_and_the_last_is_told_below() -> None:
    why = "peer_lost: the connection broke"
    heading, first, second, _, last = printed(
        peer_table.whole(reply(other(calls_failed=3, last_error=why)))
    ).splitlines()
    assert heading.split()[-1] == "failed"
    assert (first.split()[-1], second.split()[-1]) == ("0", "3")  # the node's own queue
    assert last == f"the last call to {OTHER[:8]} that failed: {why}"


def test_a_node_that_is_alone_shows_where_it_looks() -> None:
    contact = pb.ContactStatus(
        address=f"h:3#{OTHER}", source="seed", state="waiting", peer_id=OTHER, why="peer_lost: gone", retry_s=2.4
    )
    text = printed(peer_table.whole(reply(contacts=[contact])))
    assert "no other node of network shoal is known yet; it is looked for here:" in text
    assert text.splitlines()[-1].split() == ["h:3#bbbbbbbb", "seed", "waiting", "2", "s", "peer_lost:", "gone"]
    assert "--join" in printed(peer_table.whole(reply()))
    assert "looked for" not in printed(peer_table.whole(reply(other(), contacts=[contact])))


def test_a_node_that_nobody_can_call_says_why() -> None:
    text = printed(peer_table.whole(reply(other(), unreached="is UDP port 7 open?")))
    assert "no other node counts on this one: is UDP port 7 open?" in text


def test_work_is_shown_if_asked_for() -> None:
    work = pb.LayerWork(layer=2, peer_id=ME, pairs=7, steps=1)
    assert "7*" in printed(peer_table.whole(reply(other(), work=[work]), work=True))
    assert "7*" not in printed(peer_table.whole(reply(other(), work=[work])))
    assert "computed no answer yet" in printed(peer_table.whole(reply(other()), work=True))


def test_json_has_all_of_it() -> None:
    contact = pb.ContactStatus(address="h:3", source="lan", state="trying")
    facts = json.loads(json.dumps(peer_table.facts(reply(other(), contacts=[contact], counts={"bytes sent": 5}))))
    assert (facts["network"], facts["unreached"], facts["counts"]) == ("shoal", "", {"bytes sent": 5})
    assert facts["contacts"] == [
        {"address": "h:3", "source": "lan", "state": "trying", "peer": None, "why": "", "retry_s": None}
    ]
    assert facts["peers"][0]["island"] == "home"


class ToyDoors:
    """Says one reply after the other, and then Ctrl-C."""

    def __init__(self, *replies: pb.PeersReply | Exception) -> None:
        self._left = list(replies)

    def peers(self) -> pb.PeersReply:
        if not self._left:
            raise KeyboardInterrupt
        found = self._left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_watch, "PERIOD_S", 0.0)


@pytest.mark.parametrize("watch", [peer_watch.table, peer_watch.lines])
def test_a_watch_shows_one_table_after_the_other(
    watch: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        watch(ToyDoors(reply(), reply(other())), peer_table.whole)
    assert OTHER[:8] in capsys.readouterr().out


def test_a_watch_outlives_the_node_and_not_what_cannot_be_mended(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        peer_watch.table(ToyDoors(reply(other()), PeerLost("nobody answers")), peer_table.whole)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert OTHER[:8] in said
    assert "nobody answers" in said
    with pytest.raises(InvalidRequest):
        peer_watch.table(ToyDoors(reply(), InvalidRequest("no")), peer_table.whole)  # type: ignore[arg-type]
    with pytest.raises(PeerLost):
        peer_watch.table(ToyDoors(PeerLost("gone")), peer_table.whole)  # type: ignore[arg-type]


def test_a_watch_in_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        peer_watch.json(ToyDoors(reply(), reply(other())))  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)["peers"]) for line in lines] == [1, 2]
