"""A client's request made sure: a Generate message to prompt ids, sampling parameters and stop strings.

Pure: reads the message and the model's manifest and text, and changes nothing.  Runs in the caller's thread.

What a request leaves open comes from the checkpoint, as transformers' generate would take it: `do_sample` false means
temperature 0; the checkpoint's end tokens end the answer unless `ignore_eos`.  `max_tokens` is always finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from protos import messages
from protos.errors import ContextTooLong, InvalidRequest, WrongModel
from protos.inference_pb2 import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.text import Text
    from protos.inference_pb2 import GenerateRequest
    from protos.manifest import Manifest
    from protos.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """What a door needs to answer."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()


def read(request: GenerateRequest, manifest: Manifest, text: Text) -> Ask:
    """Raises InvalidRequest, WrongModel or ContextTooLong, saying what to change."""
    messages.check_generate(request)
    if request.model and request.model != manifest.model_id:
        raise WrongModel(
            f"the request is for model {request.model}, this node serves {manifest.model_id}; "
            "leave the model out, or ask a node that serves it"
        )
    prompt = _prompt(request, text)
    _check_ids(prompt, manifest)
    params = _params(request.sampling, request.ignore_eos, text)
    return Ask(prompt, _fitted(params, request.sampling, len(prompt), manifest.context), tuple(request.stop))


def _prompt(request: GenerateRequest, text: Text) -> tuple[int, ...]:
    match request.WhichOneof("prompt"):
        case "text":
            return tuple(text.encode(request.text))
        case "chat":
            return tuple(text.chat([(message.role, message.content) for message in request.chat.messages]))
        case _:
            return tuple(request.token_ids.ids)


def _check_ids(prompt: Sequence[int], manifest: Manifest) -> None:
    if not prompt:
        raise InvalidRequest("the prompt has no tokens; give at least one")
    for token in prompt:
        if not 0 <= token < manifest.vocab:
            raise InvalidRequest(f"token id {token} is not in the model's vocabulary, 0 to {manifest.vocab - 1}")


def _params(sampling: Sampling, ignore_eos: bool, text: Text) -> SamplingParams:
    """The request's fields over the checkpoint's defaults."""
    given = {field.name for field, _ in sampling.ListFields()}
    filled = Sampling()
    filled.CopyFrom(sampling)
    for name, value in text.defaults.items():
        if name not in given:
            setattr(filled, name, int(value) if name == "top_k" else value)
    params = messages.sampling_params(filled)
    ends = () if ignore_eos else text.eos_ids
    return replace(params, stop_tokens=tuple(dict.fromkeys((*params.stop_tokens, *ends))))


def _fitted(params: SamplingParams, sampling: Sampling, prompt_length: int, context: int) -> SamplingParams:
    """max_tokens cut to the context if nobody asked for so many; refused if somebody did."""
    room = context - prompt_length
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {prompt_length} tokens, the model's context {context}: shorten the prompt to {context - 1}"
        )
    if params.max_tokens <= room:
        return params
    if sampling.HasField("max_tokens"):
        raise ContextTooLong(
            f"max_tokens {params.max_tokens} after a prompt of {prompt_length} exceeds the context of {context}: "
            f"ask for at most {room}"
        )
    return replace(params, max_tokens=room)
