"""What `shoal generate` asks: the command line to a request, and the answer to the terminal.

Law: what can be refused without a node is refused before one is looked for or started; neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, Final

from node import answer, nearby
from protos import inference_pb2 as pb
from protos import messages
from protos.errors import InvalidRequest
from protos.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from node.nearby import Wanted

SAMPLING: Final = (
    "max_tokens",
    "temperature",
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
)
"""Options that are fields of protos.sampling.SamplingParams."""


def request(
    prompt: str | None,
    token_ids: str | None,
    options: Mapping[str, Any],
    *,
    raw: bool = False,
    system: str | None = None,
    stop: Iterable[str] = (),
    ignore_eos: bool = False,
) -> pb.GenerateRequest:
    """The message for a prompt ("-": stdin) or for token ids.  Raises InvalidRequest, naming the option."""
    if (token_ids is None) == (prompt is None):
        raise InvalidRequest("give either a PROMPT or --token-ids, such as --token-ids 5,17")
    if prompt == "":
        raise InvalidRequest("PROMPT is empty; give some text, or - to read it from stdin")
    if token_ids is not None and (raw or system is not None):
        raise InvalidRequest("--raw and --system are for a PROMPT; --token-ids are taken as they are")
    if raw and system is not None:
        raise InvalidRequest("--system needs the chat template, which --raw leaves out; give one of the two")
    message = _sampled(options, stop)
    message.ignore_eos = ignore_eos
    if token_ids is not None:
        message.token_ids.ids.extend(_ids(token_ids))
    elif prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text:
            raise InvalidRequest("PROMPT - reads stdin, which is empty; give some text")
        _say(message, text, raw, system)
    messages.check_generate(message)
    return message


def chat_request(options: Mapping[str, Any], *, system: str | None, stop: Iterable[str] = ()) -> pb.GenerateRequest:
    """The message that a chat begins with, without a turn yet.  Raises InvalidRequest, naming the option."""
    message = _sampled(options, stop)
    message.chat.SetInParent()
    if system is not None:
        message.chat.messages.add(role="system", content=_valid(system))
    messages.check_generate(message)
    return message


def _sampled(options: Mapping[str, Any], stop: Iterable[str]) -> pb.GenerateRequest:
    given = {name: value for name, value in options.items() if name in SAMPLING and value is not None}
    SamplingParams(**given)
    return pb.GenerateRequest(sampling=pb.Sampling(**given), stop=stop)


def _say(message: pb.GenerateRequest, text: str, raw: bool, system: str | None) -> None:
    _valid(text)
    if raw:
        message.text = text
        return
    if system is not None:
        message.chat.messages.add(role="system", content=_valid(system))
    message.chat.messages.add(role="user", content=text)


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of an argument that are no text in this locale
        raise InvalidRequest("the prompt is not valid UTF-8; give it as UTF-8 text") from None
    return text


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(
            f"--token-ids is {text!r:.80}; it must be numbers with commas between, such as 5,17"
        ) from None


def show(
    message: pb.GenerateRequest, wanted: Wanted, tell: Callable[[str], None], *, as_json: bool
) -> answer.Shown | None:
    """Prints the answer of such a node, and gives what was shown; with `as_json` nothing."""
    with nearby.connected(wanted, tell) as doors:
        info = doors.reach()
        message.model = info.model_id  # or another door could go on with another model
        _fit(message, info, tell)
        with contextlib.closing(doors.generate(message)) as events:
            if as_json:
                answer.write_json(answer.collect(events, tell))
                return None
            return answer.stream(events, tell, as_ids=not info.has_tokenizer)


def _fit(message: pb.GenerateRequest, info: pb.InfoReply, tell: Callable[[str], None]) -> None:
    """A chat that loses nothing as plain text becomes that for a model that knows no chats."""
    if info.has_tokenizer and not info.has_chat_template and len(message.chat.messages) == 1:
        tell("this model has no chat template: continuing the prompt as it is, as --raw does")
        message.text = message.chat.messages[0].content
