"""A client and its doors, over real gRPC on loopback."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest
from toy_door import MODEL, Script, ToyDoor, notice

from node.client import Client
from node.doors import Doors
from node.identity import Identity
from protos import inference_pb2 as pb
from protos.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PeerLost,
    RemoteError,
    ShoalError,
    ShuttingDown,
    WrongModel,
    WrongPeer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST = pb.GenerateRequest(text="?")
WHOLE = "The capital of France is Paris . "


@pytest.fixture
def door() -> Iterator[ToyDoor]:
    with ToyDoor() as running:
        yield running


def nowhere() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


def text(events: Iterator[pb.GenerateEvent]) -> str:
    return "".join(event.token.text for event in events)


def test_a_client_proves_its_key_and_is_answered(door: ToyDoor) -> None:
    identity = Identity.create()
    with Client(door.address, identity) as client:
        assert client.info().model_id == MODEL
        assert text(client.generate(REQUEST)) == WHOLE
    assert door.callers == {identity.peer}


def test_plaintext_needs_the_word() -> None:
    with ToyDoor(plaintext=True) as door:
        with Client(door.address, plaintext=True) as client:
            assert client.info().model_id == MODEL
        with Client(door.address) as client, pytest.raises(PeerLost, match="speaks no TLS"):
            client.info()


def test_an_address_may_say_who_must_answer(door: ToyDoor) -> None:
    with Client(f"{door.address}#{door.identity.peer}") as client:
        assert client.info().model_id == MODEL
    with Client(f"{door.address}#{'a' * 52}") as client, pytest.raises(WrongPeer):
        client.info()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:0", "127.0.0.1:7645#abc"])
def test_what_is_no_address_is_refused_before_anybody_is_called(address: str) -> None:
    with pytest.raises(InvalidRequest):
        Client(address)


def test_a_token_that_the_node_has_forgotten_is_renewed(door: ToyDoor) -> None:
    with Client(door.address) as client:
        client.info()
        door.forget_tokens()
        assert text(client.generate(REQUEST)) == WHOLE
        door.forget_tokens()
        assert client.info().model_id == MODEL


def test_a_node_that_is_gone_in_the_middle_says_so(door: ToyDoor) -> None:
    door.script.vanishes_after = 2
    with Client(door.address) as client, pytest.raises(PeerLost, match="gone in the middle"):
        list(client.generate(REQUEST))


def test_a_failure_of_another_peer_leaves_the_connection(door: ToyDoor) -> None:
    door.script.fails = (2, PeerLost("node abc is gone"))
    with Client(door.address) as client:
        client.info()
        link = client._link
        with pytest.raises(PeerLost, match="abc"):
            list(client.generate(REQUEST))
        assert client._link is link


def doors(*addresses: str, model: str = "", tell=lambda line: None) -> Doors:
    return Doors([Client(address) for address in addresses], tell, model)


def test_the_next_door_is_asked_when_one_cannot_be_reached(door: ToyDoor) -> None:
    told: list[str] = []
    missing = nowhere()
    several = doors(missing, door.address, tell=told.append)
    assert several.reach().model_id == MODEL
    assert told == [f"no node answers at {missing} (Connection refused); now asking {door.address}"]
    assert text(several.generate(REQUEST)) == WHOLE
    assert several.client.address == door.address


def test_what_the_last_door_says_is_told(door: ToyDoor) -> None:
    missing = nowhere()
    with pytest.raises(PeerLost, match=missing):
        doors(nowhere(), missing).reach()
    door.script.refuses = Overloaded("full", retry_after_s=1.0)
    with pytest.raises(Overloaded, match="full"):
        text(doors(missing, door.address).generate(REQUEST))


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_another_door_goes_on_where_one_died_and_repeats_nothing(door: ToyDoor, after: int) -> None:
    with ToyDoor(Script(vanishes_after=after, words=[*Script().words, "!"])) as dying:
        events = list(doors(dying.address, door.address).generate(REQUEST))
    assert text(iter(events)) == WHOLE
    kinds = [event.WhichOneof("event") for event in events]
    assert [kinds.count(kind) for kind in ("started", "notice", "finished", "token")] == [1, 1, 1, 7]
    notice = next(event.notice for event in events if event.HasField("notice"))
    assert notice.code == "peer_lost"
    assert f"now asking {door.address}" in notice.message
    assert (f"must repeat the {after} tokens" in notice.message) == (after > 0)
    assert kinds.index("notice") == after + 1
    assert [request.text for request in door.asked] == ["?"]


@pytest.mark.parametrize("error", [ShuttingDown("leaving"), DeadlineExceeded("late"), Overloaded("full")])
def test_weather_at_one_door_is_a_reason_for_the_next(door: ToyDoor, error: ShoalError) -> None:
    with ToyDoor(Script(fails=(4, error))) as dying, ToyDoor(Script(refuses=error)) as refusing:
        assert text(doors(refusing.address, dying.address, door.address).generate(REQUEST)) == WHOLE


@pytest.mark.parametrize("words", [["The", "capital", "of", "Spain", "is", "Madrid", "."], ["The"]])
def test_a_door_that_answers_otherwise_is_an_error(words: list[str]) -> None:
    with ToyDoor(Script(vanishes_after=5)) as dying, ToyDoor(Script(words=words)) as other:
        several = doors(dying.address, other.address)
        seen: list[str] = []
        with pytest.raises(RemoteError, match="answers otherwise"):
            seen.extend(event.token.text for event in several.generate(REQUEST) if event.HasField("token"))
        assert "".join(seen) == "The capital of France is "


def test_a_refusal_of_the_request_itself_is_not_tried_elsewhere(door: ToyDoor) -> None:
    with ToyDoor(Script(refuses=InvalidRequest("no such token"))) as refusing:
        with pytest.raises(InvalidRequest, match="no such token"):
            text(doors(refusing.address, door.address).generate(REQUEST))
        assert door.asked == []


def test_a_door_of_another_model_is_passed_over(door: ToyDoor) -> None:
    with ToyDoor(Script(model="cd" * 32)) as other:
        assert doors(other.address, door.address, model="abab").reach().model_id == MODEL
        with pytest.raises(WrongModel, match="serves model cdcd"):
            doors(other.address, model="abab").reach()


def test_each_door_is_asked_once_an_answer() -> None:
    with ToyDoor(Script(vanishes_after=1)) as first, ToyDoor(Script(vanishes_after=2)) as second:
        several = doors(first.address, second.address)
        with pytest.raises(PeerLost):
            list(several.generate(REQUEST))
        assert [len(first.asked), len(second.asked)] == [1, 1]
        with pytest.raises(PeerLost):
            list(several.generate(REQUEST))
        assert [len(first.asked), len(second.asked)] == [2, 2]


def test_notices_of_a_door_come_through(door: ToyDoor) -> None:
    door.script.between[3] = notice("node abc is gone")
    events = list(doors(door.address).generate(REQUEST))
    assert [event.notice.message for event in events if event.HasField("notice")] == ["node abc is gone"]


@pytest.mark.parametrize("at", [0, 3])
def test_a_node_that_says_nothing_is_given_up_and_the_next_one_asked(door: ToyDoor, at: int) -> None:
    with ToyDoor(Script(silent_at=at)) as silent:
        with Client(silent.address, silence_s=0.3) as client, pytest.raises(DeadlineExceeded, match="said nothing"):
            list(client.generate(REQUEST))
        several = Doors([Client(silent.address, silence_s=0.3), Client(door.address)], lambda _: None)
        assert text(several.generate(REQUEST)) == WHOLE


def test_heartbeats_keep_a_slow_answer_and_nobody_sees_them() -> None:
    with ToyDoor(Script(heartbeats_at={0: 8, 4: 8})) as slow, Client(slow.address, silence_s=0.6) as client:
        events = list(client.generate(REQUEST))
    assert text(iter(events)) == WHOLE
    assert {event.WhichOneof("event") for event in events} == {"started", "token", "finished"}


def test_a_reader_may_take_its_time(door: ToyDoor) -> None:
    with Client(door.address, silence_s=0.2) as client:
        events = client.generate(REQUEST)
        next(events)
        threading.Event().wait(0.5)
        assert text(events) == WHOLE


def test_a_client_leaves_no_thread_when_its_reader_stops_early() -> None:
    with ToyDoor() as door, Client(door.address) as client:
        events = client.generate(REQUEST)
        next(events)
        assert any(thread.name == "shoal-silence" for thread in threading.enumerate())
        events.close()
        assert not any(thread.name == "shoal-silence" for thread in threading.enumerate())
