"""The self-check lets published configurations of correct families through, and nothing that differs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import NAMED, OTHERS
from tiny import FAMILIES, config
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from protos.errors import UnsupportedModel
from shard import attention, selfcheck
from shard.body import _Inlet
from shard.experts import ExpertBank, Part
from shard.selfcheck import ORIGINAL_LENGTH, TOLERANCE, WINDOW, check, rope_boundary, shrink

Attend = Callable[..., torch.Tensor]


def published(family: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[family].from_dict((NAMED | OTHERS)[family] | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_must_work_passes_as_it_is_published(family: str) -> None:
    found = check(published(family))
    assert found.difference <= TOLERANCE / 5
    assert found.recompute_at is None


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_a_family_passes_as_well(family: str) -> None:
    assert check(config(family)).difference <= TOLERANCE / 5


@pytest.mark.families
@pytest.mark.parametrize("family", OTHERS)
def test_another_family_that_works_is_not_refused(family: str) -> None:
    assert check(published(family)).difference <= TOLERANCE / 5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 12}),
        ("mixtral", {"sliding_window": 4096}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 0}),
        ("qwen2_moe", {"mlp_only_layers": [3, 4], "decoder_sparse_step": 2}),
        ("deepseek_v3", {"tie_word_embeddings": True}),
        (
            "qwen3_moe",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_what_a_checkpoint_may_switch_on_passes(family: str, changes: dict[str, Any]) -> None:
    check(published(family, **changes))


# What is refused


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", "dense"),
        ("qwen3", "dense"),
        ("qwen3_next", "layers of another kind than attention over all positions or a window (linear_attention)"),
        ("jamba", "layers of another kind"),
        ("llama4", "multimodal"),
        ("aria", "multimodal"),
        ("qwen3_vl_moe", "multimodal"),
        ("t5", "encoder-decoder"),
        ("vit", "no causal language model"),
    ],
)
def test_a_family_that_cannot_be_served_is_refused_by_its_name_and_the_reason(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        check(AutoConfig.for_model(family))
    assert str(refused.value).startswith(f"{family} ")
    assert reason in str(refused.value)


def test_chunked_attention_is_refused_by_the_layer_s_kind() -> None:
    with pytest.raises(UnsupportedModel, match=r"mixtral has layers of another kind .*\(chunked_attention\)"):
        check(published("mixtral", layer_types=["chunked_attention"] * 32))


def test_a_configuration_that_transformers_cannot_build_is_refused_by_the_family_s_name() -> None:
    with pytest.raises(UnsupportedModel, match="hunyuan_v1_moe: transformers cannot build it: "):
        check(CONFIG_MAPPING["hunyuan_v1_moe"].from_dict({"head_dim": None, "num_experts": 4}))


# Broken seams: each of these mistakes was made once, or nearly


def patch_attend(monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, Any]]) -> None:
    inner: Attend = attention.attend
    names = ("query", "key", "value", "start", "scaling", "width", "sinks")

    def broken(*arguments: Any) -> torch.Tensor:
        given = dict(zip(names, arguments, strict=True))
        return inner(**(given | change(**given)))

    monkeypatch.setattr(attention, "attend", broken)


def another_scaling(query: torch.Tensor, scaling: float | None, **_: Any) -> dict[str, Any]:
    return {"scaling": (scaling or query.shape[-1] ** -0.5) * 1.05}


def no_window(**_: Any) -> dict[str, Any]:
    return {"width": None}


def a_window_too_wide_by_one(width: int | None, **_: Any) -> dict[str, Any]:
    return {"width": width and width + 1}


def no_sinks(**_: Any) -> dict[str, Any]:
    return {"sinks": None}


def old_values_in_second_chunks(value: torch.Tensor, start: int, **_: Any) -> dict[str, Any]:
    return {"value": torch.roll(value, 1, 2)} if start == selfcheck.CHUNK else {}


def garbage_in_one_place(value: torch.Tensor, start: int, **_: Any) -> dict[str, Any]:
    return {"value": value * math.nan} if start == 2 * selfcheck.CHUNK else {}


WINDOWED = ("gpt_oss", "afmoe", "cohere2_moe", "granitemoe_swa", "mimo_v2_flash")


@pytest.mark.families
@pytest.mark.parametrize(
    ("family", "change"),
    [
        *((family, another_scaling) for family in FAMILIES),
        *((family, old_values_in_second_chunks) for family in FAMILIES),
        *((family, no_window) for family in WINDOWED),
        *((family, a_window_too_wide_by_one) for family in WINDOWED),
        ("mimo_v2_flash", no_sinks),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_attention_that_differs_is_refused(
    family: str, change: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_attend(monkeypatch, change)
    with pytest.raises(UnsupportedModel, match=f"{family}: logits differ"):
        check(published(family))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", another_scaling),
        ("gpt_oss", a_window_too_wide_by_one),
        ("gpt_oss", no_sinks),
        ("mixtral", garbage_in_one_place),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_seam_is_refused(
    family: str, change: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast suite's share of what all families go through."""
    patch_attend(monkeypatch, change)
    with pytest.raises(UnsupportedModel, match=f"{family}: logits differ"):
        check(published(family))


def test_small_logits_are_compared_by_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small = published("granitemoe", logits_scaling=6000.0)
    check(small)
    patch_attend(monkeypatch, another_scaling)
    with pytest.raises(UnsupportedModel, match="granitemoe: logits differ"):
        check(small)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_is_dropped_in_silence_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = ExpertBank.rows

    def rows(bank: ExpertBank, layer: int, hidden: torch.Tensor, part: Part) -> torch.Tensor:
        out = inner(bank, layer, hidden, part)
        for expert, rows in zip(part.experts, out.split_with_sizes(list(part.counts)), strict=True):
            if expert == 5:
                rows.zero_()
        return out

    monkeypatch.setattr(ExpertBank, "rows", rows)
    with pytest.raises(UnsupportedModel, match=f"{family}: logits differ"):
        check(published(family))


def test_a_base_model_that_multiplies_what_enters_a_second_span_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Inlet, "forward", lambda inlet, hidden, *_, **__: hidden)
    check(published("mixtral"))
    with pytest.raises(UnsupportedModel, match="granitemoe: logits differ"):
        check(published("granitemoe"))


def test_longrope_that_mixes_the_sides_of_a_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard.body.RegimeRotary.over", lambda base: None)
    with pytest.raises(UnsupportedModel, match="phimoe: logits differ"):
        check(two_sided_phimoe())


def two_sided_phimoe() -> Any:
    """transformers' PhiMoE keeps the short factors; what changes at the boundary is mscale, published equal."""
    return published("phimoe", rope_scaling=NAMED["phimoe"]["rope_scaling"] | {"long_mscale": 1.4})


def test_kv_is_computed_anew_at_longrope_s_boundary_only_where_something_changes_there() -> None:
    assert check(two_sided_phimoe()).recompute_at == rope_boundary(two_sided_phimoe()) == 4096
    assert check(published("phimoe")).recompute_at is None
    assert rope_boundary(published("mixtral")) is None


# The tiny model


def test_the_tiny_model_keeps_what_counts_and_shrinks_what_costs() -> None:
    original = published("gpt_oss")
    small = shrink(original)
    assert (small.sliding_window, small.rope_parameters["original_max_position_embeddings"]) == (
        WINDOW,
        ORIGINAL_LENGTH,
    )
    assert small.rope_parameters["factor"] == original.rope_parameters["factor"]
    assert small.head_dim == original.head_dim
    assert small.layer_types == ["sliding_attention", "full_attention"] * 2
    assert (small.hidden_size, small.vocab_size, small.num_hidden_layers) == (256, 128, 4)


def test_the_tiny_model_has_layers_of_every_kind_that_the_checkpoint_has() -> None:
    rare = ["sliding_attention"] * 23 + ["full_attention"]
    assert shrink(published("gpt_oss", layer_types=rare)).layer_types == ["sliding_attention"] * 3 + ["full_attention"]


def test_groups_of_experts_stay_in_proportion() -> None:
    small = shrink(published("deepseek_v3"))
    assert (small.n_routed_experts, small.n_group, small.topk_group, small.num_experts_per_tok) == (8, 4, 4, 4)


def test_the_checkpoint_s_configuration_is_left_as_it_is() -> None:
    original = published("phimoe")
    before = original.to_json_string()
    check(original)
    assert original.to_json_string() == before
