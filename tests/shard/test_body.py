"""A model cut to a span: which weights it takes, what it refuses, and what the seams see."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from chain import CPU, Chain, Holders
from tiny import config, model

from protos import units
from protos.errors import InvalidManifest, UnsupportedModel
from protos.ids import SessionId, UnitName
from shard import attention
from shard.anatomy import Anatomy
from shard.body import Body, RegimeRotary, parse_config
from shard.kv import RaggedCache, SessionKv, Slice
from shard.selfcheck import rope_boundary

BOUNDARY = 32  # the tiny phimoe's original length
PROMPT = list(range(5, 25))

Weights = dict[UnitName, dict[str, torch.Tensor]]


class Units:
    """A model's units, and which of them were asked for."""

    def __init__(self, tiny: Any) -> None:
        self.anatomy = Anatomy(tiny)
        self.weights: Weights = self.anatomy.tensors()
        self.asked: list[UnitName] = []
        self.config = tiny.config
        self.experts = Holders(self.anatomy, self.weights, 1)

    def __call__(self, name: UnitName) -> Mapping[str, torch.Tensor]:
        self.asked.append(name)
        return self.weights[name]

    def body(self, span: range) -> Body:
        return Body(self.config, torch.float32, span, self, self.experts, CPU)


@pytest.fixture
def mixtral() -> Units:
    return Units(model("mixtral"))


def logits(bodies: list[Body], log: list[int]) -> torch.Tensor:
    """[T, V] of a log in one piece through all spans."""
    rows, positions = None, torch.arange(len(log)).unsqueeze(0)
    with torch.inference_mode():
        for number, body in enumerate(bodies):
            kv = SessionKv(body.kv_layers, len(log), CPU)
            cache = RaggedCache([Slice(kv, 0, 0, len(log))], body.direct)
            rows = body.forward(torch.tensor([log]) if number == 0 else None, rows, positions, cache)
        assert rows is not None
        return bodies[-1].head(rows)


def expected(tiny: Any, log: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return tiny(torch.tensor([log])).logits[0]  # type: ignore[no-any-return]


# Spans


@pytest.mark.parametrize(
    ("span", "names"),
    [
        (range(3), ["embed", "trunk.0", "trunk.1", "trunk.2", "head"]),
        (range(1), ["embed", "trunk.0"]),
        (range(1, 2), ["trunk.1"]),
        (range(1, 3), ["trunk.1", "trunk.2", "head"]),
    ],
    ids=str,
)
def test_a_span_asks_for_its_own_units_and_no_others(mixtral: Units, span: range, names: list[str]) -> None:
    body = mixtral.body(span)
    assert mixtral.asked == body.held_units() == names
    assert sorted(body.kv_layers) == list(span)


def test_what_a_span_does_not_hold_takes_no_memory(mixtral: Units) -> None:
    body = mixtral.body(range(1, 2))
    held = [name for name, tensor in body.model.named_parameters() if not tensor.is_meta]
    assert held
    assert all(name.startswith("model.layers.1.") and ".experts." not in name for name in held)


def test_weights_are_taken_as_they_are_without_a_copy(mixtral: Units) -> None:
    body = mixtral.body(range(3))
    ours = body.model.get_parameter("model.layers.1.self_attn.q_proj.weight")
    theirs = mixtral.weights[units.trunk(1)]["self_attn.q_proj.weight"]
    assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("cuts", [(), (1,), (2,), (1, 2)], ids=str)
def test_spans_give_the_logits_of_the_whole(family: str, cuts: tuple[int, ...]) -> None:
    tiny = model(family)
    whole = Units(tiny)
    bounds = [0, *cuts, 3]
    bodies = [whole.body(range(a, b)) for a, b in pairwise(bounds)]
    torch.testing.assert_close(logits(bodies, PROMPT), expected(tiny, PROMPT), atol=1e-4, rtol=0)


def test_a_tied_head_takes_embed_s_tensor_where_the_span_does_not_hold_embed() -> None:
    tiny = model("granitemoe", tie_word_embeddings=True)
    whole = Units(tiny)
    assert units.HEAD not in whole.weights or "lm_head.weight" not in whole.weights[units.HEAD]
    bodies = [whole.body(range(2)), whole.body(range(2, 3))]
    assert whole.asked[-1] == units.EMBED
    torch.testing.assert_close(logits(bodies, PROMPT), expected(tiny, PROMPT), atol=1e-4, rtol=0)


def test_a_tied_head_unit_that_lists_embed_s_tensor_is_enough_for_the_last_span() -> None:
    """As packed units are: the head unit refers to embed's bytes."""
    tiny = model("granitemoe", tie_word_embeddings=True)
    whole = Units(tiny)
    whole.weights[units.HEAD] |= whole.weights[units.EMBED]
    bodies = [whole.body(range(2)), whole.body(range(2, 3))]
    assert whole.asked.count(units.EMBED) == 1
    torch.testing.assert_close(logits(bodies, PROMPT), expected(tiny, PROMPT), atol=1e-4, rtol=0)


# What does not fit


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        (units.EMBED, "embed_tokens.weight"),
        (units.trunk(1), "self_attn.k_proj.weight"),
        (units.trunk(2), "mlp.gate.weight"),
        (units.HEAD, "norm.weight"),
        (units.HEAD, "lm_head.weight"),
    ],
)
def test_a_unit_without_one_of_its_tensors_is_refused_by_the_tensor_s_name(
    mixtral: Units, unit: UnitName, name: str
) -> None:
    del mixtral.weights[unit][name]
    with pytest.raises(UnsupportedModel, match=name.replace(".", r"\.")):
        mixtral.body(range(3))


def test_a_tensor_that_the_model_does_not_have_is_refused_by_its_name(mixtral: Units) -> None:
    mixtral.weights[units.trunk(1)]["self_attn.extra.weight"] = torch.zeros(3)
    with pytest.raises(InvalidManifest, match=r"trunk\.1.*self_attn\.extra\.weight"):
        mixtral.body(range(3))


def test_a_tensor_of_another_shape_is_refused_by_its_name(mixtral: Units) -> None:
    trunk = mixtral.weights[units.trunk(1)]
    trunk["self_attn.q_proj.weight"] = trunk["self_attn.q_proj.weight"][:16]
    with pytest.raises(InvalidManifest, match=r"trunk\.1.*self_attn\.q_proj\.weight.*\(16, 32\).*\(32, 32\)"):
        mixtral.body(range(3))


def test_a_type_that_transformers_does_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="from_the_future"):
        parse_config(b'{"model_type": "from_the_future"}')


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff", b'{"model_type": ["mixtral"]}', b"{}"])
def test_a_config_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises((UnsupportedModel, InvalidManifest)):
        parse_config(data)


def test_a_model_with_longrope_by_layer_type_is_refused() -> None:
    base = model("mixtral").base_model
    longrope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    base.config.rope_parameters = {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(UnsupportedModel, match="longrope"):
        RegimeRotary.over(base)


def test_masks_of_a_model_s_own_making_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="mask"):
        attention.window(use_vmap=True)
    assert attention.window(local_size=8) == 8
    assert attention.window() is None


# RoPE regimes


def test_sessions_on_both_sides_of_longrope_s_boundary_get_in_one_batch_what_each_gets_alone() -> None:
    tiny = model("phimoe")
    assert rope_boundary(tiny.config) == BOUNDARY
    prompts = {"short": list(range(5, 15)), "at": list(range(40, 40 + BOUNDARY)), "long": list(range(60, 110))}
    together, alone = Chain(tiny, recompute_at=BOUNDARY), Chain(tiny, recompute_at=BOUNDARY)
    sessions = [together.open(name, prompt, 6) for name, prompt in prompts.items()]
    for name, prompt in prompts.items():
        session = alone.open(name, prompt, 6)
        for _ in range(6):
            alone.feed(session)
    for _ in range(6):
        together.feed(*sessions)
    for session in sessions:
        ours, theirs = together.answers[session], alone.answers[session]
        assert ours.log == theirs.log
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_boundary_changes_the_logits_so_that_mixing_sides_would_show() -> None:
    tiny = model("phimoe")
    log = list(range(5, 5 + BOUNDARY))
    longer = expected(tiny, [*log, 3])[: len(log)]
    assert float((longer - expected(tiny, log)).abs().max()) > 1e-2


@pytest.mark.parametrize("length", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 50])
def test_all_rows_of_a_feed_take_the_side_of_its_end_also_in_chunks(length: int) -> None:
    tiny = model("phimoe")
    log = list(range(60, 60 + length))
    chain = Chain(tiny, rows_max=7, recompute_at=BOUNDARY)
    session = chain.open("one", log, 1)
    chain.feed(session)
    torch.testing.assert_close(chain.answers[session].logits[0], expected(tiny, log)[-1], atol=1e-4, rtol=0)


# Layers that read their slabs, and layers that are handed packed contexts


@pytest.mark.parametrize(
    ("family", "direct"), [("mixtral", {0, 1, 2}), ("gpt_oss", {0, 1, 2, 3}), ("deepseek_v3", set())]
)
def test_the_probe_tells_which_layers_attend_to_their_slabs(family: str, direct: set[int]) -> None:
    assert Chain(model(family)).stages[0].body.direct == direct


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_direct_and_packed_contexts_give_the_same_to_the_bit(family: str) -> None:
    tiny = model(family)
    direct, packed = Chain(tiny), Chain(tiny)
    packed.stages[0].body.direct = frozenset()
    for chain in (direct, packed):
        sessions = [chain.open(str(n), range(5, 12 + 8 * n), 5) for n in range(3)]
        for _ in range(5):
            chain.feed(*sessions)
    for name in map(SessionId, "012"):
        ours, theirs = direct.answers[name], packed.answers[name]
        assert ours.log == theirs.log
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_the_probe_asks_no_expert() -> None:
    def nobody(layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the probe must not need experts: their holders may not be there yet")

    whole = Units(model("mixtral"))
    body = Body(whole.config, torch.float32, range(3), whole, nobody, CPU)
    with pytest.raises(AssertionError, match="the probe"):
        logits([body], PROMPT)


def test_a_config_survives_the_cut_unchanged() -> None:
    tiny_config = config("mixtral", output_router_logits=True)
    before = tiny_config.to_json_string()
    whole = Units(model("mixtral"))
    whole.config = tiny_config
    whole.body(range(3))
    assert tiny_config.to_json_string() == before
