"""Attention for packed rows: a completion sees its prompt and itself, nothing else, each as far as its window.

It enters a Hugging Face model through transformers' attention interface, as the implementation `grpo_lite`: calls
that carry a `packed_layout` are computed here, all others go to SDPA unchanged, so `generate` and plain TRL compute
are untouched. Models that SDPA does not serve (capped scores, sinks) get `grpo_lite_eager`, whose other calls go to the
model's own function. The layout travels as a keyword argument because gradient checkpointing replays the layers'
arguments; what a layer does to its scores arrives the same way, from the layer itself (`Rule`).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from grpo_lite.engine import blockwise, states, varlen

IMPLEMENTATION = "grpo_lite"
EAGER_IMPLEMENTATION = "grpo_lite_eager"

# Up to this many tokens per group (prompt and all its completions) one masked call over whole groups is cheaper than
# a call per completion; see docs/measurements/compare_trl.md.
DENSE_TOKENS = 192
# What layers with a window see in a self-check, whose sequences of about ten tokens would fit into any real one.
CHECK_WINDOW = 4


@dataclass(frozen=True, eq=False)
class Rule:
    """What a layer does to its scores, besides hiding later tokens."""

    scaling: float | None = None  # of the scores; None for `D ** -0.5`
    window: int | None = None  # a query at position p sees keys at positions > p - window; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # (heads,) scores that take a share of the weight and add nothing

    @property
    def is_plain(self) -> bool:
        """Whether SDPA computes it, given a mask."""
        return self.softcap is None and self.sinks is None

    def within(self, longest: int) -> "Rule":
        """Return the rule for sequences up to `longest` tokens: without a window that hides none of them."""
        return self if self.window is None or self.window < longest else replace(self, window=None)


class Layout(Protocol):
    """What a packed call carries: it knows which keys each query may see."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return the attention `(B, L, heads, D)` of queries `(B, heads, L, D)`."""

    def mix(self, layer: int, hidden: Tensor, run: states.Run) -> Tensor:
        """Run a recurrent layer over hidden states `(B, L, H)`; see `states.py`."""


class PackedLayout:
    """How the flat row is cut into groups, and the index tensors and masks its attention needs (built once)."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self.calls = 0  # of attentions and recurrent layers; `score` compares it with the number of layers
        group_lengths = [prompt + sum(completions) for prompt, completions in segments]
        self.longest = max(prompt + max(completions, default=0) for prompt, completions in segments)
        self.dense = max(group_lengths) <= DENSE_TOKENS
        self.lengths = [length for prompt, completions in segments for length in (prompt, *completions)]
        self._masks: dict[tuple[int, int, torch.dtype, int | None], Tensor] = {}
        self._group_masks: dict[int | None, Tensor] = {}
        self._index: varlen.VarlenIndex | None = None
        self._branches: states.Branches | None = None
        if self.dense:
            self._index_dense(group_lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Compute `packed_attention` for one layer."""
        del layer
        return packed_attention(query, key, value, self, rule)

    def mix(self, layer: int, hidden: Tensor, run: states.Run) -> Tensor:
        """Run a recurrent layer: each prompt once, each completion from its prompt's final state."""
        del layer
        self.calls += 1
        return self.branches.mix(hidden, run)[0]

    @property
    def branches(self) -> states.Branches:
        """The layout as recurrent layers take it; built at first use."""
        if self._branches is None:
            self._branches = states.Branches(self.segments, self.device)
        return self._branches

    def _index_dense(self, group_lengths: list[int]) -> None:
        width = max(group_lengths)
        owners: list[list[int]] = []  # completion a token belongs to; 0 is the prompt, -1 is padding
        positions: list[list[int]] = []
        gather: list[list[int]] = []
        offset = 0
        for (prompt, completions), length in zip(self.segments, group_lengths, strict=True):
            parts = [index for index, size in enumerate([prompt, *completions]) for _ in range(size)]
            owners.append(parts + [-1] * (width - length))
            own = [*range(prompt), *(prompt + t for size in completions for t in range(size))]
            positions.append(own + [0] * (width - length))
            gather.append([*range(offset, offset + length)] + [0] * (width - length))
            offset += length
        scatter = [i for i, part in enumerate(part for row in owners for part in row) if part >= 0]
        owner = torch.tensor(owners).to(self.device)
        order = torch.arange(width, device=self.device)
        same = (owner.unsqueeze(1) == owner.unsqueeze(2)) | (owner == 0).unsqueeze(1)
        # Padded queries see themselves, so that no row of the softmax is empty.
        mask = same & (order.unsqueeze(0) <= order.unsqueeze(1))
        self._group_masks[None] = mask.unsqueeze(1)  # (groups, 1, L, L)
        self._positions = torch.tensor(positions).to(self.device)
        self.gather = torch.tensor(gather).to(self.device)
        self.scatter = torch.tensor(scatter).to(self.device)

    @property
    def index(self) -> varlen.VarlenIndex:
        """The layout as a varlen kernel takes it; built at first use."""
        if self._index is None:
            self._index = varlen.VarlenIndex(self.segments, self.device)
        return self._index

    def group_mask(self, window: int | None) -> Tensor:
        """Return which keys each token of a group sees, `(groups, 1, L, L)`; of a dense layout."""
        if window not in self._group_masks:
            assert window is not None
            near = self._positions.unsqueeze(1) > self._positions.unsqueeze(2) - window
            self._group_masks[window] = self._group_masks[None] & near.unsqueeze(1)
        return self._group_masks[window]

    def causal_mask(self, queries: int, before: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Return the additive mask `(queries, before + queries)` of a prompt, or of a completion behind its prompt.

        Args:
            queries: tokens that attend.
            before: tokens of the prompt that they attend to besides themselves.
            dtype: of the mask.
            window: how many tokens each sees, its own among them; None for all.
        """
        if self.device.type != "cpu":  # CUDA kernels want masks aligned; a view into a larger one is not
            key = (queries, before, dtype, window)
            if key not in self._masks:
                self._masks[key] = suffix_mask(queries, before, dtype, self.device, window)
            return self._masks[key]
        widest = before and max(prompt for prompt, _ in self.segments)
        widest = widest if window is None else min(widest, window - 1)
        longest = max(length for _, completions in self.segments for length in completions) if before else self.longest
        key = (longest, widest, dtype, window)
        if key not in self._masks:
            self._masks[key] = suffix_mask(longest, widest, dtype, self.device, window)
        shift = widest - before
        return self._masks[key][:queries, shift : shift + before + queries]


def suffix_mask(
    queries: int, before: int, dtype: torch.dtype, device: torch.device, window: int | None = None
) -> Tensor:
    """Return the mask `(queries, before + queries)` that lets the last `queries` tokens see those before them."""
    mask = torch.full((queries, before + queries), float("-inf"), device=device, dtype=dtype)
    if window is None:
        return mask.triu_(before + 1)
    return mask.triu(before + 1) + mask.tril_(before - window)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    """Attend within each completion and its prompt.

    Args:
        query: `(1, heads, T, D)`.
        key: `(1, key/value heads, T, D)`.
        value: `(1, key/value heads, T, D)`.
        layout: How T is cut into groups.
        rule: What the layer does to its scores.

    Returns:
        `(1, T, heads, D)`, the order transformers expects.
    """
    layout.calls += 1
    rule = rule.within(layout.longest)
    dtype = query.dtype
    if not layout.dense and rule.is_plain and blockwise.serves(query):
        return blockwise.attend(query, key, value, layout.segments, rule.scaling, rule.window)
    if blockwise.serves(query) and dtype in (torch.float16, torch.bfloat16):
        # PyTorch 2.13's CPU flash kernel takes 1.5-5 times as long in 16 bit as in fp32 on short blocks.
        query, key, value = query.float(), key.float(), value.float()
    if layout.dense:
        return _dense(query, key, value, layout, rule).to(dtype)
    kernel = varlen.choose_kernel(query, key, rule.scaling, rule.window is not None) if rule.is_plain else None
    if kernel is not None:
        return varlen.attend(query, key, value, layout.index, rule.scaling, kernel, rule.window)
    return _segmented(query, key, value, layout, rule).to(dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule, sinks: Tensor | None = None
) -> Tensor:
    """Attend to the keys that a mask leaves; the rule's window is the mask's matter.

    Args:
        query: `(B, heads, L, D)`.
        key: `(B, heads, S, D)`.
        value: `(B, heads, S, D)`.
        mask: truth values, or added to the scores: broadcast to `(B, heads, L, S)`; None: causal.
        rule: what the layer does to its scores.
        sinks: the rule's, in a shape that broadcasts to `(heads, L)`; None: one a head.
    """
    if rule.is_plain:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=rule.scaling
        )
    if mask is None:
        mask = suffix_mask(query.size(2), key.size(2) - query.size(2), query.dtype, query.device)
    out, weight = explicit_attention(query, key, value, mask, rule)
    if sinks is None and rule.sinks is not None:
        sinks = rule.sinks.unsqueeze(-1)
    return beside_sinks(out, weight, sinks)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Attend score by score, without sinks; return the attention and the log-sum-exp `(B, heads, L)` of the scores."""
    scale = query.size(-1) ** -0.5 if rule.scaling is None else rule.scaling
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # which would multiply in 16 bit all the same
        scores = (query.to(wide) * scale) @ key.to(wide).transpose(-1, -2)
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weight = scores.logsumexp(-1)
        return torch.exp(scores - weight.unsqueeze(-1)).to(value.dtype) @ value, weight


def beside_sinks(out: Tensor, weight: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the attention of keys that share the softmax with sinks.

    Args:
        out: `(…, D)`, the attention without them.
        weight: `(…)`, the log-sum-exp of its scores.
        sinks: scores, broadcast to `weight`; None: there are none.
    """
    if sinks is None:
        return out
    return out * torch.sigmoid(weight - sinks.to(weight.dtype)).unsqueeze(-1).to(out.dtype)


def _dense(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    """One call over groups padded to the longest, with a boolean mask."""

    def rows(states: Tensor, repeat: int = 1) -> Tensor:
        tokens = states[0].transpose(0, 1)  # (T, heads, D)
        padded = tokens.index_select(0, layout.gather.reshape(-1)).view(*layout.gather.shape, *tokens.shape[1:])
        return padded.transpose(1, 2).repeat_interleave(repeat, dim=1)  # (groups, heads, L, D)

    repeat = query.size(1) // key.size(1)
    out = attend(rows(query), rows(key, repeat), rows(value, repeat), layout.group_mask(rule.window), rule)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.scatter).unsqueeze(0)


def _segmented(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    """One call per prompt and per completion against its prompt's keys: no mask over the whole row, no padding."""
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    # One split: its backward is one concatenation, where slices would each add into a zero tensor of full size.
    queries, keys, values = (states.split(layout.lengths, dim=2) for states in (query, key, value))
    outs: list[Tensor] = []
    for prompt, completions in layout.segments:
        first = len(outs)
        window = rule.within(prompt).window
        mask = None if window is None else layout.causal_mask(prompt, 0, query.dtype, window)
        outs.append(attend(queries[first], keys[first], values[first], mask, rule))
        for index in range(first + 1, first + 1 + len(completions)):
            length = queries[index].size(2)
            window = rule.within(prompt + length).window
            seen = prompt if window is None else min(prompt, window - 1)  # by the first token, the others see less
            mask = layout.causal_mask(length, seen, query.dtype, window)
            last = (keys[first][:, :, prompt - seen :], values[first][:, :, prompt - seen :])
            both = torch.cat([last[0], keys[index]], dim=2), torch.cat([last[1], values[index]], dim=2)
            outs.append(attend(queries[index], *both, mask, rule))
    return torch.cat(outs, dim=2).transpose(1, 2)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Serve transformers' attention interface: packed calls here, all others by SDPA."""
    if packed_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _attend_packed(module, query, key, value, packed_layout, **kwargs), None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Serve models without SDPA: packed calls here, all others by the function beside the layer's class."""
    if packed_layout is None:
        plain = sys.modules[type(module).__module__].eager_attention_forward
        out: tuple[Tensor, Tensor | None] = plain(module, query, key, value, attention_mask, **kwargs)
        return out
    return _attend_packed(module, query, key, value, packed_layout, **kwargs), None


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if dropout or position_bias is not None:
        raise NotImplementedError(f"packed attention knows no {'dropout' if dropout else 'position bias'}")
    layer = cast(int, module.layer_idx)
    return layout.attend(layer, query, key, value, Rule(scaling, sliding_window, softcap, s_aux)).contiguous()


def _sdpa_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Make SDPA's mask as transformers does.

    Gemma 4's layers with shared keys skip the queries of the prompt in `generate`, under `sdpa` only where there is a
    mask (transformers 5.23); under another name it would not look.
    """
    if getattr(config, "num_kv_shared_layers", 0):
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, config=config, **kwargs)
    return mask


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _sdpa_mask)
AttentionInterface.register(EAGER_IMPLEMENTATION, eager_attention_forward)
AttentionMaskInterface.register(EAGER_IMPLEMENTATION, eager_mask)


def install(model: PreTrainedModel) -> None:
    """Let `model`'s attention and recurrent layers accept a `packed_layout`; see `obstacle` for which models may."""
    model.config._attn_implementation = EAGER_IMPLEMENTATION if _is_eager_only(model) else IMPLEMENTATION
    states.install(model)


def uninstall(model: PreTrainedModel) -> None:
    """Give `model` the attention back that transformers would choose."""
    model.config._attn_implementation = "eager" if _is_eager_only(model) else "sdpa"


def is_installed(model: PreTrainedModel) -> bool:
    """Return whether `install` has prepared this model."""
    return model.config._attn_implementation in (IMPLEMENTATION, EAGER_IMPLEMENTATION)


def is_explicit(model: PreTrainedModel) -> bool:
    """Return whether a model that `install` has prepared computes its attention score by score."""
    return model.config._attn_implementation == EAGER_IMPLEMENTATION


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why `model` cannot run packed, or None.

    Everything that makes a token depend on more than "its prompt, its own earlier tokens, and relative positions" is
    refused here by its configuration; `score.self_check` also compares both computations once, on the real weights.
    """
    config = model.config
    implementation = config._attn_implementation
    recurrent = bool(states.mixers(model))  # transformers names no backend for these, and some have no positions
    reason = states.obstacle(model)
    served = ("eager", EAGER_IMPLEMENTATION) if _is_eager_only(model) else ("sdpa", IMPLEMENTATION)
    checks: list[tuple[bool, str]] = [
        (config.get_text_config() is not config, "it is a multimodal model whose text tower does not load alone"),
        (not _has_plain_head(model), "its output layer is not a plain linear layer"),
        (implementation not in served, f"its attention implementation is {implementation!r}, not {served[0]!r}"),
        (reason is not None, str(reason)),
        (
            not getattr(type(model), "_supports_attention_backend", False) and not recurrent,
            "it does not use transformers' attention interface",
        ),
        (getattr(config, "is_encoder_decoder", False), "it is an encoder-decoder"),
        (not getattr(config, "rope_parameters", None) and not recurrent, "its positions are not rotary"),
        (bool(getattr(config, "attention_dropout", 0.0)), "it has attention dropout"),
        (len({window for _, window in _windows(model)}) > 1, "its layers have attention windows of different lengths"),
    ]
    return next((reason for failed, reason in checks if failed), None)


def rope_border(model: PreTrainedModel, shortest: int, longest: int) -> int | None:
    """Return the length at which the rotary frequencies change while rows of these lengths are decoded, or None.

    transformers chooses them by the longest position in a call: longrope has one set up to the original length and
    one beyond, dynamic scaling another one for every length beyond. The passes over a prompt and those of a decoding
    step have different longest positions, and agree only where all of them choose the same.

    Args:
        model: the causal language model.
        shortest: tokens of the shortest row.
        longest: tokens of the longest one, padding included.
    """
    original = _longrope_length(model)
    if original is not None and shortest <= original < longest:
        return original
    return dynamic_rope_border(model, longest)


def dynamic_rope_border(model: PreTrainedModel, longest: int) -> int | None:
    """Return the length from which rotary frequencies depend on what was computed before, or None below it.

    Dynamic scaling keeps the frequencies of the longest row so far, and at that length those of the call before
    (transformers 5.24).
    """
    dynamic = any("dynamic" in (kind.get("rope_type") or "") for kind in _rope_kinds(model))
    border = int(model.config.get_text_config().max_position_embeddings) if dynamic else None
    return border if border is not None and longest >= border else None


def longrope_shift(model: PreTrainedModel, longest: int, padded: int) -> int:
    """Return what to add to the positions of packed rows, so that longrope chooses the factors of the padded rows.

    transformers takes the long ones where the largest position of a call, padding counted, is beyond the original
    length. Attention sees differences of positions only.

    Args:
        model: the causal language model.
        longest: tokens of the longest row.
        padded: tokens of a row with its padding.
    """
    original = _longrope_length(model)
    return padded - longest if original is not None and longest <= original < padded else 0


def _longrope_length(model: PreTrainedModel) -> int | None:
    """Return up to how many tokens longrope has short factors, or None for other models."""
    for kind in _rope_kinds(model):
        if kind.get("rope_type") == "longrope":
            length = kind.get("original_max_position_embeddings")
            return int(length or model.config.get_text_config().max_position_embeddings)
    return None


def _rope_kinds(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the rotary parameters of all kinds of layers."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


@contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[None]:
    """Let layers with a window see no more than `CHECK_WINDOW` tokens inside the context, however they compute."""
    before = _windows(model)
    for place, own in before:
        place.sliding_window = min(own, CHECK_WINDOW)
    try:
        yield
    finally:
        for place, own in before:
            place.sliding_window = own


def _windows(model: PreTrainedModel) -> list[tuple[Any, int]]:
    """Return every place that holds an attention window, with its length: the configuration and the layers."""
    places = [model.config.get_text_config(), *model.modules()]
    windows = [(place, getattr(place, "sliding_window", None)) for place in places]
    return [(place, window) for place, window in windows if isinstance(window, int)]


def _is_eager_only(model: PreTrainedModel) -> bool:
    """Return whether SDPA does not compute this model: transformers 5.17 offers it, and leaves out Gemma 2's cap."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    has_own = hasattr(sys.modules[type(model).__module__], "eager_attention_forward")
    return has_own and (capped or not getattr(type(model), "_supports_sdpa", False))


def _has_plain_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and head.weight.is_floating_point() and not hasattr(head, "base_layer")
