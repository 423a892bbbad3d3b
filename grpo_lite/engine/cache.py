"""Keys and values during a rollout: one copy per prompt, one buffer per completion.

`attention.py` hands every attention call of the model to `attend`. The first pass (all prompts in one flat row) fills
the prompts' part; each later pass brings one token per row, which attends to its group's prompt and to its own
completion, two attentions joined by their log-sum-exps. No mask is needed for the completions: all rows of a cache
have generated the same number of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lite.engine.attention import PackedLayout, packed_attention

KeysValues = tuple[Tensor, Tensor]


class GroupCache:
    """The keys and values of some groups; stands where a `PackedLayout` stands in training."""

    def __init__(self, prompt_lengths: Sequence[int], groups: Tensor) -> None:
        """Prepare for prompts of these lengths and for rows belonging to `groups` `(rows,)`, sorted."""
        self.prompts: dict[int, KeysValues] = {}  # per layer: (groups, key/value heads, P, D)
        self.completions: dict[int, KeysValues] = {}  # per layer: (rows, key/value heads, capacity, D)
        self.generated = -1  # tokens per row already in `completions`; -1 before the prompts are in
        self.lengths = torch.tensor(list(prompt_lengths), device=groups.device)
        self._prefill = PackedLayout([(length, ()) for length in prompt_lengths], groups.device)
        self._assign(groups)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attend as `packed_attention` does, for a layer of the prefill or of a decoding step."""
        if self.generated < 0:
            self.prompts[layer] = self._pad(key), self._pad(value)
            return packed_attention(query, key, value, self._prefill, scaling)
        return self._step(layer, query, key, value, scaling)

    def advance(self) -> None:
        """Note that a pass over all layers is complete."""
        self.generated += 1

    def fill(self, tokens: int, capacity: int) -> None:
        """Stand as after so many generated tokens per row, all zeros, in buffers for `capacity`; for a rehearsal."""
        rows = len(self.groups)
        for layer, (keys, _) in self.prompts.items():
            shape = (rows, keys.size(1), capacity, keys.size(3))
            self.completions[layer] = keys.new_zeros(shape), keys.new_zeros(shape)
        self.generated = tokens

    def keep_rows(self, keep: Tensor) -> None:
        """Forget all rows but `keep`, and the prompts that no row needs any more."""
        for layer, (keys, values) in self.completions.items():
            self.completions[layer] = keys[keep], values[keep]
        groups = self.groups[keep]
        used, groups = torch.unique(groups, return_inverse=True)
        if len(used) < len(self.lengths):
            self.lengths = self.lengths[used]
            width = int(self.lengths.max())
            for layer, (keys, values) in self.prompts.items():
                self.prompts[layer] = keys[used, :, :width].contiguous(), values[used, :, :width].contiguous()
        self._assign(groups)

    def _assign(self, groups: Tensor) -> None:
        """Give each row a slot in its group, so that a group's rows attend to its prompt in one product."""
        self.groups = groups
        sizes = torch.bincount(groups, minlength=len(self.lengths))
        self.slots = torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups]
        self.slots_per_group = int(sizes.max())
        width = int(self.lengths.max())
        self._mask: Tensor | None = None
        if int(self.lengths.min()) < width:
            seen = torch.arange(width, device=groups.device) < self.lengths.unsqueeze(1)
            self._mask = torch.zeros(seen.shape, device=groups.device).masked_fill_(~seen, float("-inf"))

    def _pad(self, states: Tensor) -> Tensor:
        """Turn flat prompt states `(1, heads, T, D)` into `(groups, heads, P, D)`, padded on the right."""
        pieces = states[0].transpose(0, 1).split(self.lengths.tolist())  # each (P_g, heads, D)
        return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True).transpose(1, 2).contiguous()

    def _append(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        rows, heads, _, size = key.shape
        keys, values = self.completions.get(layer, (key[:, :, :0], value[:, :, :0]))
        if keys.size(2) == self.generated:
            more = (rows, heads, max(16, self.generated), size)
            keys, values = torch.cat([keys, key.new_empty(more)], 2), torch.cat([values, value.new_empty(more)], 2)
            self.completions[layer] = keys, values
        keys[:, :, self.generated], values[:, :, self.generated] = key[:, :, 0], value[:, :, 0]
        count = self.generated + 1
        return keys[:, :, :count], values[:, :, :count]

    def _step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        own_keys, own_values = self._append(layer, key, value)
        rows, heads, _, size = query.shape
        kv_heads = key.size(1)
        grouped = query.view(rows, kv_heads, heads // kv_heads, size)  # queries that share keys stand together
        own, own_weight = attend_with_weight(grouped, own_keys, own_values, None, scaling)
        slots = query.new_zeros(len(self.lengths), self.slots_per_group, *grouped.shape[1:])
        slots[self.groups, self.slots] = grouped
        slots = slots.transpose(1, 2).flatten(2, 3)  # (groups, key/value heads, slots * repeats, D)
        prompt, prompt_weight = attend_with_weight(slots, *self.prompts[layer], self._mask, scaling)
        shape = (len(self.lengths), kv_heads, self.slots_per_group, heads // kv_heads)
        prompt = prompt.view(*shape, size).transpose(1, 2)[self.groups, self.slots]
        prompt_weight = prompt_weight.view(shape).transpose(1, 2)[self.groups, self.slots]
        share = torch.sigmoid(prompt_weight - own_weight).unsqueeze(-1)  # softmax over the two parts
        joined = torch.lerp(own.float(), prompt.float(), share)
        return joined.to(query.dtype).view(rows, heads, 1, size).transpose(1, 2)


def attend_with_weight(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Attend without causality and also return the log-sum-exp of the scores.

    Args:
        query: `(B, heads, L, D)`.
        key: `(B, heads, S, D)`.
        value: `(B, heads, S, D)`.
        mask: Added to the scores: `(B, S)`, fp32.
        scaling: Of the scores; None for `D ** -0.5`.

    Returns:
        The attention `(B, heads, L, D)` and the log-sum-exps `(B, heads, L)`, fp32.
    """
    if mask is not None:
        mask = mask[:, None, None, :]
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        if key.size(2) <= 64:  # the kernel is faster in fp32 on small blocks
            query, key, value = query.float(), key.float(), value.float()
        if mask is not None:
            mask = mask.to(query.dtype).expand(query.size(0), 1, query.size(2), -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scaling
        )
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # which would multiply in 16 bit all the same
        scores = (query.to(wide) * scale) @ key.to(wide).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        weight = scores.logsumexp(-1)
        return torch.exp(scores - weight.unsqueeze(-1)).to(value.dtype) @ value, weight
