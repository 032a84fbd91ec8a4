"""A conversation: its history, its commands, and how answers that fail or are stopped leave it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from toy_door import Script, ToyDoor, notice

from node import chat as chats
from node.chat import Chat
from node.client import Client
from node.doors import Doors
from protos import inference_pb2 as pb
from protos.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER = "The capital of France is Paris . "


@pytest.fixture
def door() -> Iterator[ToyDoor]:
    with ToyDoor() as running:
        yield running


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def chat(door: ToyDoor, told: list[str]) -> Chat:
    made = Chat(Doors([Client(door.address)], told.append), pb.GenerateRequest(), told.append)
    made.begin()
    return made


def history(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What is typed on a terminal; then Ctrl-D."""
    left = iter([*lines, EOFError])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_every_turn_has_the_turns_before_it(
    chat: Chat, door: ToyDoor, capsys: pytest.CaptureFixture[str], told: list[str]
) -> None:
    chat.ask("one")
    chat.ask("two")
    assert [history(request) for request in door.asked] == [
        [("user", "one")],
        [("user", "one"), ("assistant", ANSWER), ("user", "two")],
    ]
    assert capsys.readouterr().out == f"{ANSWER}\n" * 2
    assert told == []


def test_a_pipe_has_a_turn_a_line_and_no_prompt(
    chat: Chat, door: ToyDoor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n  \n/usr/bin is what?\n/reset\nthree"))
    chat.talk(interactive=False)
    assert [history(request)[-1][1] for request in door.asked] == ["one", "/usr/bin is what?", "three"]
    assert [len(request.chat.messages) for request in door.asked] == [1, 3, 1]
    assert capsys.readouterr().out == f"{ANSWER}\n" * 3


def test_an_error_ends_a_pipe_and_not_a_terminal(
    chat: Chat, door: ToyDoor, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door.script.fails = (2, DeadlineExceeded("too late"))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    with pytest.raises(DeadlineExceeded):
        chat.talk(interactive=False)
    typed(monkeypatch, "two")
    chat.talk(interactive=True)
    assert told == ["error: too late (ask again)", ""]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ContextTooLong("too long"), "error: too long (/reset begins anew)"),
        (InvalidRequest("refused"), "error: refused"),
    ],
)
def test_a_question_that_failed_is_forgotten(
    chat: Chat, door: ToyDoor, told: list[str], monkeypatch: pytest.MonkeyPatch, error: ShoalError, says: str
) -> None:
    chat.ask("one")
    door.script.refuses = error
    typed(monkeypatch, "two")
    chat.talk(interactive=True)
    assert told[0] == says
    door.script.refuses = None
    chat.ask("three")
    assert history(door.asked[-1]) == [("user", "one"), ("assistant", ANSWER), ("user", "three")]


@pytest.mark.parametrize(("after", "kept"), [(2, [("assistant", "The capital ")]), (0, None)])
def test_an_answer_that_is_stopped_stays_as_far_as_it_came(
    chat: Chat,
    door: ToyDoor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: int,
    kept: list[tuple[str, str]] | None,
) -> None:
    def stopped(request: pb.GenerateRequest) -> Iterator[pb.GenerateEvent]:
        events = Doors.generate(chat._doors, request)
        for _ in range(after + 1):
            yield next(events)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat._doors, "generate", stopped)
        typed(patched, "one")
        chat.talk(interactive=True)
    assert capsys.readouterr().out == ("The capital \n" if kept else "")
    chat.ask("two")
    assert history(door.asked[-1]) == ([("user", "one"), *kept] if kept else []) + [("user", "two")]


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_commands_do_what_they_say(
    chat: Chat, door: ToyDoor, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, KeyboardInterrupt, "/help", "/frob", "one", "/reset", "two", "/quit", "never")
    chat.talk(interactive=True)
    assert told == ["", f"({chats.HELP})", chats.HELP, f"no command /frob: {chats.HELP}", "(forgotten)"]
    assert [history(request) for request in door.asked] == [[("user", "one")], [("user", "two")]]


def test_a_reset_keeps_the_system_message(door: ToyDoor) -> None:
    beginning = pb.GenerateRequest(chat=pb.Messages(messages=[pb.Message(role="system", content="be brief")]))
    chat = Chat(Doors([Client(door.address)], print), beginning, print)
    chat.ask("one")
    chat.reset()
    chat.ask("two")
    assert history(door.asked[-1]) == [("system", "be brief"), ("user", "two")]


def test_notices_are_lines_of_their_own_on_stderr(
    chat: Chat, door: ToyDoor, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    door.script.between[3] = notice("node abc is gone;\n the answer goes on")
    chat.ask("one")
    assert told == ["note: node abc is gone; the answer goes on"]
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_on_a_terminal_a_notice_does_not_stand_in_the_middle_of_a_line(
    chat: Chat, door: ToyDoor, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    door.script.between[3] = notice("node abc is gone")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    chat.ask("one")
    assert told == ["", "note: node abc is gone"]


def test_late_replies_are_counted_and_said_after_the_answer(
    chat: Chat, door: ToyDoor, told: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    door.script.between = {number: notice("it has not answered within 0.15 s", late=True) for number in (2, 3, 5)}
    chat.ask("one")
    assert told == ["note: peer pppppppp was late 3 times, and other holders of its experts were asked too"]
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_late_replies_are_said_of_an_answer_that_fails_too(chat: Chat, door: ToyDoor, told: list[str]) -> None:
    door.script.between[1] = notice("it has not answered within 0.15 s", late=True)
    door.script.fails = (2, DeadlineExceeded("too slow"))
    with pytest.raises(DeadlineExceeded):
        chat.ask("one")
    assert told == ["note: peer pppppppp was late once, and other holders of its experts were asked too"]


def test_an_answer_that_was_cut_off_says_so(chat: Chat, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        pb.GenerateEvent(token=pb.Token(id=1, text="a")),
        pb.GenerateEvent(finished=pb.Finished(reason=pb.Finished.LENGTH, generated=1)),
    ]
    monkeypatch.setattr(chat._doors, "generate", lambda _: (event for event in events))
    chat.ask("one")
    assert told == ["(cut off after 1 tokens; --max-tokens allows more)"]


def test_a_model_that_knows_no_chats_is_refused_at_once(told: list[str]) -> None:
    with (
        ToyDoor(Script(template=False)) as door,
        pytest.raises(InvalidRequest, match="has no chat template"),
    ):
        Chat(Doors([Client(door.address)], told.append), pb.GenerateRequest(), told.append).begin()


def test_a_chat_has_a_greatest_length(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "CHAT_MESSAGES_MAX", 4)
    chat.ask("one")
    chat.ask("two")
    with pytest.raises(ContextTooLong, match="at most 4 messages"):
        chat.ask("three")
