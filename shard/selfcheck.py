"""Does shoal answer as transformers does for this family?  Asked with a tiny random model before packing.

The tiny model keeps the checkpoint's whole configuration except sizes; the sliding window and the original RoPE
length shrink too, so that short sessions lie on both sides of every boundary. It runs both ways: `generate` alone,
and here packed, ragged, chunked, cut into two spans, with the experts on two holders. A family that differs is
refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from protos.errors import UnsupportedModel
from shard.anatomy import Anatomy
from shard.body import Body
from shard.experts import ExpertBank, Pairs
from shard.family import meta_model, refuse_foreign
from shard.kv import RaggedCache, SessionKv, Slice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig

    from protos.ids import UnitName

TOLERANCE = (
    1e-4  # logits, relative to the largest; correct families give 1e-6 to 4e-5, a wrong mask or factor 1e-3 and more
)
WINDOW = 8
ORIGINAL_LENGTH = 24
PROMPTS = (5, 19, 31)  # below, near and beyond both boundaries; the middle one crosses the RoPE length while it decodes
NEW_TOKENS = 8
CHUNK = 7
SEED = 20


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """A family's result.  `recompute_at`: all KV is computed anew when a session first exceeds it (longrope)."""

    recompute_at: int | None
    difference: float


def check(config: PretrainedConfig) -> SelfCheck:
    """Compares both ways.  Raises UnsupportedModel, naming the family and what differs."""
    refuse_foreign(config)
    name = config.model_type
    try:
        tiny = shrink(config)
        meta_model(tiny, torch.float32)  # refuses what has no experts
        model = random_model(tiny)
        references = [_reference(model, prompt) for prompt in _prompts(tiny.vocab_size)]
        difference, at = _difference(model, references, None), None
        if not difference <= TOLERANCE and (boundary := rope_boundary(tiny)):
            difference, at = _difference(model, references, boundary), rope_boundary(config)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{name}: its tiny model does not run in shoal: {type(error).__name__}: {error}"
        ) from error
    if not difference <= TOLERANCE:
        raise UnsupportedModel(
            f"{name}: logits differ from transformers' by {difference:.1e} (allowed: {TOLERANCE:.0e})"
        )
    return SelfCheck(at, difference)


def rope_boundary(config: PretrainedConfig) -> int | None:
    """The original length of a longrope configuration: RoPE factors differ beyond it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    length = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(length) if length else None


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration with small sizes.  Head size, layer kinds, scalings and RoPE factors stay."""
    fields = config.to_dict()
    heads, groups = (
        int(config.num_attention_heads),
        int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
    )
    latent = "kv_lora_rank" in fields
    head = fields.get("head_dim") or int(config.hidden_size) // heads
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64 if latent else 4 * head,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "shared_intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if groups < heads else 4,
        "num_experts": 8,
        "num_local_experts": 8,
        "n_routed_experts": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "sliding_window": WINDOW,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    fields |= {key: value for key, value in sizes.items() if fields.get(key) is not None}
    fields |= _shrunk_routing(fields) | _shrunk_layers(fields) | _shrunk_rope(fields)
    fields["dtype"] = "float32"
    return type(config).from_dict(fields)


def _shrunk_routing(fields: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key in ("num_experts_per_tok", "top_k", "moe_k"):
        if isinstance(fields.get(key), int):
            small[key] = min(fields[key], 4)
    if fields.get("n_group"):
        small["n_group"] = fields["n_group"] if 8 % fields["n_group"] == 0 and fields["n_group"] <= 4 else 4
        small["topk_group"] = min(fields.get("topk_group") or 1, small["n_group"])
        if fields.get("num_experts_per_tok"):
            small["num_experts_per_tok"] = min(
                small["num_experts_per_tok"], small["topk_group"] * (8 // small["n_group"])
            )
    return small


def _shrunk_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Four layers that have every kind the checkpoint has: dense and sparse, each attention type."""
    count = min(4, fields["num_hidden_layers"])
    small: dict[str, Any] = {"num_hidden_layers": count}
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        kinds = fields.get(key)
        if isinstance(kinds, list) and kinds:
            missing = [kind for kind in dict.fromkeys(kinds) if kind not in kinds[:count]]
            small[key] = kinds[: count - len(missing)] + missing
    if fields.get("first_k_dense_replace"):
        small["first_k_dense_replace"] = 1
    if fields.get("mlp_only_layers"):
        small["mlp_only_layers"] = [0]
    for key in ("num_mtp_layers", "num_nextn_predict_layers"):
        if key in fields:
            small[key] = 0
    return small


def _shrunk_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    context = 512
    rope = dict(fields.get("rope_parameters") or {})
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or fields["original_max_position_embeddings"]
        rope["original_max_position_embeddings"] = ORIGINAL_LENGTH
        context = max(64, ORIGINAL_LENGTH * fields["max_position_embeddings"] // original)
    elif "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = ORIGINAL_LENGTH
    small: dict[str, Any] = {"max_position_embeddings": context, "rope_parameters": rope or None}
    if fields.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = ORIGINAL_LENGTH
    return small


def random_model(config: PretrainedConfig) -> Any:
    """A CausalLM whose random weights give every part a say in the logits; experts run as `grouped_mm`."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and tensor.dim() == 1:
            tensor.copy_(1.0 + 0.1 * noise)
        else:
            tensor.copy_(noise * (tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.1))
    return model


def _prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in PROMPTS]


@dataclass(frozen=True, slots=True, eq=False)
class _Reference:
    log: list[int]
    prompt_len: int
    logits: torch.Tensor  # [NEW_TOKENS, V]: what each of the last NEW_TOKENS tokens of the log was chosen from


def _reference(model: Any, prompt: Sequence[int]) -> _Reference:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return _Reference(output.sequences[0].tolist(), len(prompt), torch.cat(output.logits))


class _TwoHolders:
    """Even experts on one bank, odd ones on another; the port as a network of two would fill it."""

    def __init__(self, anatomy: Anatomy, weights: Mapping[UnitName, Mapping[str, torch.Tensor]]) -> None:
        from protos import units

        self.banks = (ExpertBank(), ExpertBank())
        for layer, (_, module) in anatomy.experts.items():
            for bank in self.banks:
                bank.add_layer(layer, module)
            for expert in range(anatomy.expert_count(layer)):
                self.banks[expert % 2].add(layer, expert, weights[units.expert(layer, expert)])

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        pairs = Pairs(index)
        parts = [pairs.part([expert for expert in pairs.experts if expert % 2 == side]) for side in (0, 1)]
        replies = [bank.rows(layer, hidden, part) for bank, part in zip(self.banks, parts, strict=True)]
        return pairs.join(zip(parts, replies, strict=True), hidden)


class _Feed:
    """One session of the comparison: how far it has come, and the largest difference so far."""

    def __init__(self, reference: _Reference, bodies: Sequence[Body]) -> None:
        self.reference = reference
        self.until = reference.prompt_len
        self.at = 0
        self.kv = [SessionKv(body.kv_layers, len(reference.log), body.device) for body in bodies]

    @property
    def is_done(self) -> bool:
        return self.until == len(self.reference.log)

    def advance(self, recompute_at: int | None) -> None:
        """Its next feed: one more token, or the whole log where the family wants its KV computed anew."""
        self.until += 1
        if self.until - 1 == recompute_at:
            self.at = 0


def _difference(model: Any, references: Sequence[_Reference], recompute_at: int | None) -> float:
    """The largest difference of logits over all sessions, packed together, in chunks, through two spans."""
    anatomy = Anatomy(model)
    weights = anatomy.tensors()
    experts, cut, cpu = _TwoHolders(anatomy, weights), max(1, anatomy.layers // 2), torch.device("cpu")
    spans = [range(cut), range(cut, anatomy.layers)] if anatomy.layers > 1 else [range(1)]
    bodies = [Body(model.config, torch.float32, span, weights.__getitem__, experts, cpu) for span in spans]
    feeds = [_Feed(reference, bodies) for reference in references]
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        while running := [feed for feed in feeds if not feed.is_done]:
            logits = _forward(bodies, running)
            for feed, row in zip(running, logits, strict=True):
                feed.at = min(feed.until, feed.at + CHUNK)
                if feed.at == feed.until:
                    expected = feed.reference.logits[feed.until - feed.reference.prompt_len]
                    found.append((row - expected).abs().max() / expected.abs().max())
                    feed.advance(recompute_at)
    return float(torch.stack(found).max())  # torch's maximum of NaN and others is NaN


def _forward(bodies: Sequence[Body], feeds: Sequence[_Feed]) -> torch.Tensor:
    """One packed chunk of every feed through all spans; logits of each feed's last row."""
    tokens: list[int] = []
    positions: list[int] = []
    bounds = [0]
    for feed in feeds:
        end = min(feed.until, feed.at + CHUNK)
        tokens += feed.reference.log[feed.at : end]
        positions += range(feed.at, end)
        bounds.append(len(tokens))
    rows = None
    for index, body in enumerate(bodies):
        slices = [Slice(f.kv[index], f.at, a, b) for f, a, b in zip(feeds, bounds, bounds[1:], strict=False)]
        cache = RaggedCache(slices, body.direct)
        ids = torch.tensor([tokens]) if index == 0 else None
        rows = body.forward(ids, rows, torch.tensor([positions]), cache, [feed.until for feed in feeds])
    assert rows is not None
    return bodies[-1].head(rows[[b - 1 for b in bounds[1:]]])
