"""Attention for packed rows: a completion sees its prompt and itself, nothing else.

It enters a Hugging Face model through transformers' attention interface, as the implementation `grpo_lite`: calls
that carry a `packed_layout` are computed here, all others go to SDPA unchanged, so `generate` and plain TRL compute
are untouched. The layout travels as a keyword argument because gradient checkpointing replays the layers' arguments.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_lite.engine import varlen

IMPLEMENTATION = "grpo_lite"

# Up to this many tokens per group (prompt and all its completions) one masked call over whole groups is cheaper than
# a call per completion; see docs/measurements/compare_trl.md.
DENSE_TOKENS = 192
# Below this mean length a completion's attention is computed in fp32 on CPU.
SHORT_COMPLETION = 128


class Layout(Protocol):
    """What a packed call carries: it knows which keys each query may see."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return the attention `(B, L, heads, D)` of queries `(B, heads, L, D)`."""


class PackedLayout:
    """How the flat row is cut into groups, and the index tensors and masks its attention needs (built once)."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self.calls = 0  # attention calls served; the trainer's self-check compares it with the number of layers
        group_lengths = [prompt + sum(completions) for prompt, completions in segments]
        self.dense = max(group_lengths) <= DENSE_TOKENS
        completion_lengths = [length for _, completions in segments for length in completions]
        self.short = self.dense or sum(completion_lengths) < SHORT_COMPLETION * len(completion_lengths)
        self.lengths = [length for prompt, completions in segments for length in (prompt, *completions)]
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._index: varlen.VarlenIndex | None = None
        if self.dense:
            self._index_dense(group_lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Compute `packed_attention` for one layer."""
        del layer
        return packed_attention(query, key, value, self, scaling)

    def _index_dense(self, group_lengths: list[int]) -> None:
        width = max(group_lengths)
        owners: list[list[int]] = []  # completion a token belongs to; 0 is the prompt, -1 is padding
        gather: list[list[int]] = []
        offset = 0
        for (prompt, completions), length in zip(self.segments, group_lengths, strict=True):
            parts = [index for index, size in enumerate([prompt, *completions]) for _ in range(size)]
            owners.append(parts + [-1] * (width - length))
            gather.append([*range(offset, offset + length)] + [0] * (width - length))
            offset += length
        scatter = [i for i, part in enumerate(part for row in owners for part in row) if part >= 0]
        owner = torch.tensor(owners).to(self.device)
        order = torch.arange(width, device=self.device)
        same = (owner.unsqueeze(1) == owner.unsqueeze(2)) | (owner == 0).unsqueeze(1)
        # Padded queries see themselves, so that no row of the softmax is empty.
        mask = same & (order.unsqueeze(0) <= order.unsqueeze(1))
        self.mask = mask.unsqueeze(1)  # (groups, 1, L, L)
        self.gather = torch.tensor(gather).to(self.device)
        self.scatter = torch.tensor(scatter).to(self.device)

    @property
    def index(self) -> varlen.VarlenIndex:
        """The layout as a varlen kernel takes it; built at first use."""
        if self._index is None:
            self._index = varlen.VarlenIndex(self.segments, self.device)
        return self._index

    def causal_mask(self, queries: int, prompt: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask `(queries, prompt + queries)` of a completion behind its prompt."""
        if self.device.type != "cpu":  # CUDA kernels want masks aligned; a view into a larger one is not
            key = (queries, prompt, dtype)
            if key not in self._masks:
                self._masks[key] = suffix_mask(queries, prompt, dtype, self.device)
            return self._masks[key]
        widest = max(prompt for prompt, _ in self.segments)
        longest = max(length for _, completions in self.segments for length in completions)
        key = (longest, widest, dtype)
        if key not in self._masks:
            self._masks[key] = suffix_mask(longest, widest, dtype, self.device)
        shift = widest - prompt
        return self._masks[key][:queries, shift : shift + prompt + queries]


def suffix_mask(queries: int, prompt: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the mask `(queries, prompt + queries)` that lets the last `queries` tokens see all before them."""
    mask = torch.full((queries, prompt + queries), float("-inf"), device=device, dtype=dtype)
    return mask.triu_(prompt + 1)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None) -> Tensor:
    """Attend within each completion and its prompt.

    Args:
        query: `(1, heads, T, D)`.
        key: `(1, key/value heads, T, D)`.
        value: `(1, key/value heads, T, D)`.
        layout: How T is cut into groups.
        scaling: Of the scores; None for `D ** -0.5`.

    Returns:
        `(1, T, heads, D)`, the order transformers expects.
    """
    layout.calls += 1
    dtype = query.dtype
    if query.device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and layout.short)):
        # PyTorch 2.13's CPU flash kernel takes 1.5-5 times as long in bf16 as in fp32 on short blocks, and in fp16
        # on all.
        query, key, value = query.float(), key.float(), value.float()
    if layout.dense:
        return _dense(query, key, value, layout, scaling).to(dtype)
    kernel = varlen.choose_kernel(query, key, scaling)
    if kernel is not None:
        return varlen.attend(query, key, value, layout.index, scaling, kernel)
    return _segmented(query, key, value, layout, scaling).to(dtype)


def _dense(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None) -> Tensor:
    """One call over groups padded to the longest, with a boolean mask."""

    def rows(states: Tensor, repeat: int = 1) -> Tensor:
        tokens = states[0].transpose(0, 1)  # (T, heads, D)
        padded = tokens.index_select(0, layout.gather.reshape(-1)).view(*layout.gather.shape, *tokens.shape[1:])
        return padded.transpose(1, 2).repeat_interleave(repeat, dim=1)  # (groups, heads, L, D)

    repeat = query.size(1) // key.size(1)
    out = scaled_dot_product_attention(
        rows(query), rows(key, repeat), rows(value, repeat), attn_mask=layout.mask, scale=scaling
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.scatter).unsqueeze(0)


def _segmented(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None) -> Tensor:
    """One call per prompt and per completion against its prompt's keys: no mask over the whole row, no padding."""
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    # One split: its backward is one concatenation, where slices would each add into a zero tensor of full size.
    queries, keys, values = (states.split(layout.lengths, dim=2) for states in (query, key, value))
    outs: list[Tensor] = []
    for prompt, completions in layout.segments:
        first = len(outs)
        outs.append(
            scaled_dot_product_attention(queries[first], keys[first], values[first], is_causal=True, scale=scaling)
        )
        for index in range(first + 1, first + 1 + len(completions)):
            mask = layout.causal_mask(queries[index].size(2), prompt, query.dtype)
            seen = torch.cat([keys[first], keys[index]], dim=2), torch.cat([values[first], values[index]], dim=2)
            outs.append(scaled_dot_product_attention(queries[index], *seen, attn_mask=mask, scale=scaling))
    return torch.cat(outs, dim=2).transpose(1, 2)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: Layout | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve transformers' attention interface: packed calls here, all others by SDPA."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or kwargs.get("dropout"):
        raise NotImplementedError(f"packed attention knows no {', '.join(unknown) or 'dropout'}")
    layer = cast(int, module.layer_idx)
    return packed_layout.attend(layer, query, key, value, scaling).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def install(model: PreTrainedModel) -> None:
    """Let `model`'s attention accept a `packed_layout`; see `obstacle` for which models may."""
    model.config._attn_implementation = IMPLEMENTATION


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why `model` cannot run packed, or None.

    Everything that makes a token depend on more than "its prompt, its own earlier tokens, and relative positions" is
    refused here by its configuration; `score.self_check` also compares both computations once, on the real weights.
    """
    config = model.config
    implementation = config._attn_implementation
    checks: list[tuple[bool, str]] = [
        (config.get_text_config() is not config, "it is a multimodal model"),
        (not _has_plain_head(model), "its output layer is not a plain linear layer"),
        (
            implementation not in ("sdpa", IMPLEMENTATION),
            f"its attention implementation is {implementation!r}, not 'sdpa'",
        ),
        (
            not getattr(type(model), "_supports_attention_backend", False),
            "it does not use transformers' attention interface",
        ),
        (getattr(config, "is_encoder_decoder", False), "it is an encoder-decoder"),
        (not getattr(config, "rope_parameters", None), "its positions are not rotary"),
        (bool(getattr(config, "attention_dropout", 0.0)), "it has attention dropout"),
        (_rope_depends_on_length(config), "its rotary scaling depends on the sequence length"),
    ]
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "logit_scale",
        "logits_scaling",
        "lm_head_multiplier",
        "output_multiplier",
    ):
        given = getattr(config, name, None)
        checks.append((given is not None and given != 1.0, f"its configuration sets {name}={given}"))
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    checks.append((bool(kinds), f"it has {', '.join(sorted(kinds))} layers"))
    return next((reason for failed, reason in checks if failed), None)


def sliding_window(model: PreTrainedModel) -> int | None:
    """Return the shortest attention window in use, or None: packed rows are right only for sequences inside it."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return window if getattr(config, "use_sliding_window", True) else None


def _rope_depends_on_length(config: Any) -> bool:
    parameters = config.rope_parameters if getattr(config, "rope_parameters", None) else {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _has_plain_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and head.weight.is_floating_point() and not hasattr(head, "base_layer")
