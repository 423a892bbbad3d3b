"""Keys and values during a rollout: one copy per prompt, one buffer per completion.

`attention.py` hands every attention call of the model to `attend`. The first pass (all prompts in one flat row) fills
the prompts' part; each later pass brings one token per row, which attends to its group's prompt and to its own
completion, two attentions joined by their log-sum-exps. No mask is needed for the completions: all rows of a cache
have generated the same number of tokens. Prompts end together, so a window, too, begins at the same place in all of
them; a layer with a window holds of a prompt only what its first completion token sees, and nothing once the
completions have left it behind.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lite.engine import states
from grpo_lite.engine.attention import PackedLayout, Rule, beside_sinks, explicit_attention, packed_attention

KeysValues = tuple[Tensor, Tensor]


class GroupCache:
    """The keys and values of some groups; stands where a `PackedLayout` stands in training."""

    def __init__(self, prompt_lengths: Sequence[int], groups: Tensor) -> None:
        """Prepare for prompts of these lengths and for rows belonging to `groups` `(rows,)`, sorted."""
        self.prompts: dict[int, KeysValues] = {}  # per layer: (groups, key/value heads, P, D), the prompts' last P
        self.completions: dict[int, KeysValues] = {}  # per layer: (rows, key/value heads, capacity, D)
        self.states: dict[int, states.States] = {}  # per recurrent layer, of every row
        self.generated = -1  # tokens per row already in `completions`; -1 before the prompts are in
        self.lengths = torch.tensor(list(prompt_lengths), device=groups.device)
        self._prefill = PackedLayout([(length, ()) for length in prompt_lengths], groups.device)
        self._assign(groups)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Attend as `packed_attention` does, for a layer of the prefill or of a decoding step."""
        if self.generated < 0:
            last = None if rule.window is None else max(1, rule.window - 1)
            self.prompts[layer] = self._pad(key, last), self._pad(value, last)
            return packed_attention(query, key, value, self._prefill, rule)
        return self._step(layer, query, key, value, rule)

    def mix(self, layer: int, hidden: Tensor, run: states.Run) -> Tensor:
        """Run a recurrent layer: over each prompt once in the prefill, then one token a row from the row's state."""
        if self.generated < 0:
            mixed, prompts = self._prefill.branches.mix(hidden, run)
            self.states[layer] = prompts.select(self.groups)
            return mixed
        return run(hidden, self.states[layer], None)

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
        for layer, rows in self.states.items():  # one by one: old and new states of all layers may not fit together
            self.states[layer] = rows.select(keep)
        groups = self.groups[keep]
        used, groups = torch.unique(groups, return_inverse=True)
        if len(used) < len(self.lengths):
            self.lengths = self.lengths[used]
            width = int(self.lengths.max())
            for layer, (keys, values) in self.prompts.items():
                self.prompts[layer] = keys[used, :, -width:].contiguous(), values[used, :, -width:].contiguous()
        self._assign(groups)

    def _assign(self, groups: Tensor) -> None:
        """Give each row a slot in its group, so that a group's rows attend to its prompt in one product."""
        self.groups = groups
        sizes = torch.bincount(groups, minlength=len(self.lengths))
        self.slots = torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups]
        self.slots_per_group = int(sizes.max())
        width = int(self.lengths.max())
        self._shortest = int(self.lengths.min())
        self._mask: Tensor | None = None  # added to the scores of the prompts' last `width` tokens
        if self._shortest < width:
            hidden = torch.arange(width, device=groups.device) < width - self.lengths.unsqueeze(1)
            self._mask = torch.zeros(hidden.shape, device=groups.device).masked_fill_(hidden, float("-inf"))

    def _pad(self, states: Tensor, last: int | None) -> Tensor:
        """Turn flat prompt states `(1, heads, T, D)` into `(groups, heads, P, D)`, padded on the left.

        Args:
            states: of all prompts.
            last: how many tokens of each prompt are seen again; None for all.
        """
        pieces = states[0].transpose(0, 1).split(self.lengths.tolist())  # each (P_g, heads, D)
        kept = [piece if last is None else piece[-last:] for piece in pieces]
        padded = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_side="left")
        return padded.transpose(1, 2).contiguous()

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

    def _step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        keys, values = self._append(layer, key, value)
        rows, heads, _, size = query.shape
        kv_heads = key.size(1)
        repeat = heads // kv_heads
        first = 0 if rule.window is None else max(0, keys.size(2) - rule.window)
        grouped = query.view(rows, kv_heads, repeat, size)  # queries that share keys stand together
        out, weight = attend_with_weight(grouped, keys[:, :, first:], values[:, :, first:], None, rule)
        seen = self._seen_of_prompts(layer, rule)
        if seen:
            slots = query.new_zeros(len(self.lengths), self.slots_per_group, *grouped.shape[1:])
            slots[self.groups, self.slots] = grouped
            slots = slots.transpose(1, 2).flatten(2, 3)  # (groups, key/value heads, slots * repeat, D)
            keys, values = (states[:, :, -seen:] for states in self.prompts[layer])
            mask = None if self._mask is None or seen <= self._shortest else self._mask[:, -seen:]
            prompt, prompt_weight = attend_with_weight(slots, keys, values, mask, rule)
            shape = (len(self.lengths), kv_heads, self.slots_per_group, repeat)
            prompt = prompt.view(*shape, size).transpose(1, 2)[self.groups, self.slots]
            prompt_weight = prompt_weight.view(shape).transpose(1, 2)[self.groups, self.slots]
            share = torch.sigmoid(prompt_weight - weight).unsqueeze(-1)  # softmax over the two parts
            out = torch.lerp(out.to(share.dtype), prompt.to(share.dtype), share)
            if rule.sinks is not None:
                weight = torch.logaddexp(weight, prompt_weight)
        sinks = None if rule.sinks is None else rule.sinks.view(kv_heads, repeat)
        out = beside_sinks(out, weight, sinks)
        return out.to(query.dtype).view(rows, heads, 1, size).transpose(1, 2)

    def _seen_of_prompts(self, layer: int, rule: Rule) -> int:
        """Return how many of a layer's last prompt tokens this step's token sees; forget those out of sight."""
        if layer not in self.prompts:
            return 0
        width = self.prompts[layer][0].size(2)
        seen = width if rule.window is None else min(width, rule.window - 1 - self.generated)
        if seen <= 0:
            del self.prompts[layer]
        return max(0, seen)


def attend_with_weight(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Attend without causality and also return the log-sum-exp of the scores.

    Args:
        query: `(B, heads, L, D)`.
        key: `(B, heads, S, D)`.
        value: `(B, heads, S, D)`.
        mask: Added to the scores: `(B, S)`, fp32.
        rule: What the layer does to its scores; its window and sinks are the caller's matter.

    Returns:
        The attention `(B, heads, L, D)` and the log-sum-exps `(B, heads, L)`, fp32 (fp64 for fp64 inputs).
    """
    if mask is not None:
        mask = mask[:, None, None, :]
    if rule.softcap is None and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        if key.size(2) <= 64:  # the kernel is faster in fp32 on small blocks
            query, key, value = query.float(), key.float(), value.float()
        if mask is not None:
            mask = mask.to(query.dtype).expand(query.size(0), 1, query.size(2), -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=rule.scaling
        )
    return explicit_attention(query, key, value, mask, rule)
