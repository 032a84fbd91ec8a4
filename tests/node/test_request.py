"""A request made sure: defaults, limits, and what is refused."""

import pytest
from toy_node import CONTEXT, EOS, VOCAB, by_ids, manifest, text_files

from node import request
from node.text import Text
from protos import inference_pb2 as pb
from protos.errors import ContextTooLong, InvalidRequest, WrongModel
from protos.limits import STOP_STRINGS_MAX

TOY = manifest()
TEXT = Text(text_files())


def read(message: pb.GenerateRequest, text: Text = TEXT) -> request.Ask:
    return request.read(message, TOY, text)


def test_a_text_is_tokenized_and_a_chat_templated() -> None:
    assert read(pb.GenerateRequest(text="w1 w2 ")).prompt == (1, 2)
    message = pb.GenerateRequest()
    message.chat.messages.add(role="user", content="w3 ")
    assert read(message).prompt == (60, 3, 61)


def test_what_is_left_open_is_greedy_finite_and_ends_at_the_checkpoints_end_token() -> None:
    params = read(by_ids(1)).params
    assert (params.temperature, params.stop_tokens, params.logprobs) == (0.0, (EOS,), None)
    assert params.max_tokens == CONTEXT - 1


def test_own_stop_tokens_stay_when_the_checkpoints_are_ignored() -> None:
    message = by_ids(1, stop_tokens=[7, EOS])
    assert read(message).params.stop_tokens == (7, EOS)
    message.ignore_eos = True
    assert read(by_ids(1, stop_tokens=[7])).params.stop_tokens == (7, EOS)
    assert read(message).params.stop_tokens == (7, EOS)


def test_a_zero_that_was_asked_for_is_not_a_default() -> None:
    sampled = Text(text_files({"do_sample": True, "temperature": 0.9, "top_k": 5}))
    params = read(by_ids(1, temperature=0.0, top_k=0, logprobs=0), sampled).params
    assert (params.temperature, params.top_k, params.logprobs) == (0.0, 0, 0)


def test_more_tokens_than_fit_are_refused_if_asked_for_and_say_how_many_fit() -> None:
    assert read(by_ids(1, 2, max_tokens=CONTEXT - 2)).params.max_tokens == CONTEXT - 2
    with pytest.raises(ContextTooLong, match=f"at most {CONTEXT - 2}"):
        read(by_ids(1, 2, max_tokens=CONTEXT - 1))
    with pytest.raises(ContextTooLong, match=f"shorten the prompt to {CONTEXT - 1}"):
        read(by_ids(*[1] * CONTEXT))


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (pb.GenerateRequest(), InvalidRequest, "no prompt"),
        (by_ids(), InvalidRequest, "no tokens"),
        (pb.GenerateRequest(text=""), InvalidRequest, "no tokens"),
        (by_ids(1, VOCAB), InvalidRequest, f"token id {VOCAB} is not in the model's vocabulary"),
        (by_ids(-1), InvalidRequest, "token id -1"),
        (by_ids(1, top_p=1.5), InvalidRequest, "top_p"),
        (by_ids(1, max_tokens=0), InvalidRequest, "max_tokens"),
        (pb.GenerateRequest(text="w1 ", stop=["x"] * (STOP_STRINGS_MAX + 1)), InvalidRequest, "stop"),
        (pb.GenerateRequest(text="w1 ", model="beef"), WrongModel, "is for model beef"),
    ],
)
def test_what_is_wrong_is_named(message: pb.GenerateRequest, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read(message)


def test_the_models_own_id_is_accepted() -> None:
    assert read(pb.GenerateRequest(text="w1 ", model=TOY.model_id)).prompt == (1,)


def test_a_chat_with_a_model_that_has_no_template_is_refused() -> None:
    message = pb.GenerateRequest()
    message.chat.messages.add(role="user", content="w3 ")
    with pytest.raises(InvalidRequest, match="no chat template"):
        read(message, Text(text_files(template=False)))
