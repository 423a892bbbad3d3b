"""Keys and values during a rollout: one copy per prompt, one buffer per completion.

`attention.py` hands every attention call of the model to `attend`. The first pass (all prompts in one flat row) fills
the prompts' part; each later pass brings one token per row, which attends to its group's prompt and to its own
completion, two attentions joined by their log-sum-exps. No mask is needed for the completions: all rows of a cache
have generated the same number of tokens. Prompts end together, so a window, too, begins at the same place in all of
them; a layer with a window holds of a prompt only what its first completion token sees, and nothing once the
completions have left it behind.

Rows that go on in a further turn (`conversations.py`) have completions of different lengths: `resume` lays them out so
that they end together, what is missing in front hidden by a mask, and `extend` reads the new tokens of all rows in one
flat row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lite.engine import states
from grpo_lite.engine.attention import PackedLayout, Rule, beside_sinks, explicit_attention, packed_attention
from grpo_lite.engine.new_tokens import NewTokens

KeysValues = tuple[Tensor, Tensor]
HIDDEN = -1e30  # added to scores of keys that are not seen; finite, so that a query that sees none stays a number


@dataclass
class RowContents:
    """What a cache holds of one row behind its prompt."""

    layers: dict[int, KeysValues]  # each (key/value heads, tokens, D); without tokens a layer may lack
    states: dict[int, states.States]  # of recurrent layers, one row each

    @property
    def is_recurrent(self) -> bool:
        """Whether there are states."""
        return bool(self.states)

    def cut(self, tokens: int) -> None:
        """Keep the keys and values of the first tokens only."""
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[:, :tokens].contiguous(), values[:, :tokens].contiguous()


class GroupCache:
    """The keys and values of some groups; stands where a `PackedLayout` stands in training."""

    def __init__(self, prompt_lengths: Sequence[int], groups: Tensor, keeps_prompts: bool = False) -> None:
        """Prepare for prompts of these lengths and for rows belonging to `groups` `(rows,)`, sorted.

        With `keeps_prompts` a prompt outlives its rows, for `take_prompts`.
        """
        self.prompts: dict[int, KeysValues] = {}  # per layer: (groups, key/value heads, P, D), the prompts' last P
        self.completions: dict[int, KeysValues] = {}  # per layer: (rows, key/value heads, capacity, D)
        self.states: dict[int, states.States] = {}  # per recurrent layer, of every row
        self.generated = -1  # places per row in use in `completions`; -1 before the prompts are in
        self.missing: Tensor | None = None  # (rows,) how many of each row's first places hold nothing; None: none do
        self.lengths = torch.tensor(list(prompt_lengths), device=groups.device)
        self._keeps_prompts = keeps_prompts
        self._numbers = list(range(len(prompt_lengths)))  # of the groups that are left, as they came
        self._set_aside: dict[int, dict[int, KeysValues]] = {}  # by such a number: a prompt without rows
        self._prefill = PackedLayout([(length, ()) for length in prompt_lengths], groups.device)
        self._extension: NewTokens | None = None
        self._place_of_token: tuple[Tensor, ...] = ()  # row and place of each new token
        self._masks: dict[tuple[int | None, int], Tensor] = {}  # of this pass
        self._assign(groups)

    @classmethod
    def resume(
        cls,
        prompts: Sequence[tuple[int, dict[int, KeysValues]]],
        groups: Tensor,
        rows: Sequence[RowContents],
        lengths: Sequence[tuple[int, int]],
    ) -> "GroupCache":
        """Return a cache with prompts and rows of earlier ones.

        Args:
            prompts: each one's tokens, and its keys and values, which are taken out of the dict.
            groups: `(rows,)`, sorted.
            rows: taken out, too.
            lengths: per row, the tokens that it has behind its prompt, and those that `extend` will add.
        """
        cache = cls([length for length, _ in prompts], groups, keeps_prompts=True)
        cache.make_place([held + new for held, new in lengths])
        width = cache.generated
        for layer in list(prompts[0][1]):
            parts = [kept.pop(layer) for _, kept in prompts]
            keys, values = (_padded([part[i].transpose(0, 1) for part in parts]) for i in (0, 1))
            cache.prompts[layer] = keys, values
            shape = (len(rows), keys.size(1), width + 16, keys.size(3))
            buffers = keys.new_zeros(shape), values.new_zeros(shape)
            for row, ((held, new), contents) in enumerate(zip(lengths, rows, strict=True)):
                for buffer, kept in zip(buffers, contents.layers.pop(layer, ()), strict=False):
                    buffer[row, :, width - new - held : width - new] = kept
            cache.completions[layer] = buffers
        for layer in list(rows[0].states):
            cache.states[layer] = states.join([contents.states.pop(layer) for contents in rows])
        return cache

    def make_place(self, lengths: Sequence[int]) -> None:
        """Let rows without own tokens have so many; `extend` brings them."""
        self.generated = max(lengths)
        missing = torch.tensor([self.generated - length for length in lengths], device=self.groups.device)
        self.missing = missing if bool(missing.any()) else None

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Let the next pass bring the last `counts` tokens of these rows, one row after the other in a flat row."""
        device, end = self.groups.device, self.generated
        self._extension = NewTokens(rows, counts, device)
        row_of_token = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        places = [place for count in counts for place in range(end - count, end)]
        self._place_of_token = tuple(torch.tensor(index).to(device) for index in (row_of_token, places))
        self._masks = {}

    def contents(self, row: int) -> RowContents:
        """Return a copy of what is held of a row."""
        first = 0 if self.missing is None else int(self.missing[row])
        own = slice(first, self.generated)
        layers = {
            layer: (keys[row, :, own].clone(), values[row, :, own].clone())
            for layer, (keys, values) in self.completions.items()
        }
        index = torch.tensor([row], device=self.groups.device)
        return RowContents(layers, {layer: of_rows.select(index) for layer, of_rows in self.states.items()})

    def take_prompts(self) -> dict[int, dict[int, KeysValues]]:
        """Return every prompt's keys and values, `(key/value heads, P, D)` per layer, by its number; they leave."""
        self._put_aside(range(len(self._numbers)))
        self.prompts = {}
        return self._set_aside

    def _put_aside(self, groups: Sequence[int]) -> None:
        lengths = self.lengths.tolist()
        for layer, (keys, values) in self.prompts.items():
            for group in groups:
                last = slice(-lengths[group], None)  # of a layer with a window, all that there is
                own = self._set_aside.setdefault(self._numbers[group], {})
                own[layer] = keys[group, :, last].clone(), values[group, :, last].clone()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Attend as `packed_attention` does, for a layer of the prefill, of new tokens or of a decoding step."""
        if self._extension is not None:
            return self._extend(layer, query, key, value, rule, self._extension)
        if self.generated < 0:
            last = None if rule.window is None else max(1, rule.window - 1)
            self.prompts[layer] = self._pad(key, last), self._pad(value, last)
            return packed_attention(query, key, value, self._prefill, rule)
        return self._step(layer, query, key, value, rule)

    def mix(self, layer: int, hidden: Tensor, run: states.Run) -> Tensor:
        """Run a recurrent layer: over each prompt once in the prefill, then from each row's state."""
        if self._extension is not None:
            return self._extension.mix(hidden, self.states[layer], run)
        if self.generated < 0:
            mixed, prompts = self._prefill.branches.mix(hidden, run)
            self.states[layer] = prompts.select(self.groups)
            return mixed
        return run(hidden, self.states[layer], None)

    def advance(self) -> None:
        """Note that a pass over all layers is complete."""
        if self._extension is None:
            self.generated += 1
        self._extension = None
        self._masks = {}

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are held, each row as long as the longest."""
        return int(self.lengths.sum()) + len(self.groups) * max(0, self.generated)

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
        if self.missing is not None:
            self.missing = self.missing[keep]
        self._masks = {}
        groups = self.groups[keep]
        used, groups = torch.unique(groups, return_inverse=True)
        if len(used) < len(self.lengths):
            if self._keeps_prompts:
                self._put_aside([group for group in range(len(self.lengths)) if group not in set(used.tolist())])
            self._numbers = [self._numbers[group] for group in used.tolist()]
            self.lengths = self.lengths[used]
            width = int(self.lengths.max())
            for layer, (keys, values) in self.prompts.items():
                self.prompts[layer] = keys[used, :, -width:].contiguous(), values[used, :, -width:].contiguous()
        self._assign(groups)

    def _assign(self, groups: Tensor) -> None:
        """Give each row a slot in its group, so that a group's rows attend to its prompt in one product."""
        self.groups = groups
        self._spreads: dict[int, tuple[Tensor, Tensor]] = {}  # by key/value heads, of all rows
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
        return _padded([piece if last is None else piece[-last:] for piece in pieces])

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
        grouped = query.view(rows, key.size(1), heads // key.size(1), size)  # queries that share keys stand together
        first = 0 if rule.window is None else max(0, keys.size(2) - rule.window)
        mask = None if self.missing is None else self._own_mask(first, keys.size(2))
        out = self._attend_rows(layer, grouped, keys[:, :, first:], values[:, :, first:], mask, rule, slice(None), 1)
        return out.reshape(rows, heads, 1, size).transpose(1, 2)

    def _extend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, extension: NewTokens
    ) -> Tensor:
        if layer not in self.completions:
            shape = (len(self.groups), key.size(1), self.generated + 16, key.size(3))
            self.completions[layer] = key.new_zeros(shape), key.new_zeros(shape)
        keys, values = self.completions[layer]
        row_of_token, places = self._place_of_token
        for buffer, new in ((keys, key), (values, value)):
            buffer[row_of_token, :, places] = new[0].transpose(0, 1).to(buffer.dtype)
        chosen, rows, width = extension.index, len(extension.rows), extension.width
        heads, size, kv_heads = query.size(1), query.size(3), key.size(1)
        grouped = extension.padded(query).reshape(rows, kv_heads, heads // kv_heads * width, size)
        out = self._attend_rows(
            layer,
            grouped,
            keys[chosen, :, : self.generated],
            values[chosen, :, : self.generated],
            self._extension_mask(rule.window, heads // kv_heads, extension),
            rule,
            chosen,
            width,
        )
        return extension.flat(out.reshape(rows, heads, width, size))

    def _attend_rows(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rule: Rule,
        rows: slice | Tensor,
        width: int,
    ) -> Tensor:
        """Let queries of rows attend to their own keys and to their prompts.

        Args:
            layer: whose prompts.
            query: `(rows, key/value heads, repeat * L, D)`.
            keys: `(rows, key/value heads, S, D)`.
            values: as `keys`.
            mask: as for `attend_with_weight`, for the rows' own keys.
            rule: what the layer does to its scores.
            rows: which ones of the cache.
            width: L, tokens a row.
        """
        _, kv_heads, queries, size = query.shape
        out, weight = attend_with_weight(query, keys, values, mask, rule)
        places = None if rule.window is None else self._places(rows, width)
        seen = self._seen_of_prompts(layer, rule, places)
        if seen:
            groups = len(self.lengths)
            source, place = self._spread(rows, kv_heads)
            spread = query.reshape(-1, queries * size).index_select(0, source).view(groups, kv_heads, -1, size)
            prompt_keys, prompt_values = (states[:, :, -seen:] for states in self.prompts[layer])
            prompt_mask = self._prompt_mask(seen, rule, places, rows, queries // width)
            prompt, prompt_weight = attend_with_weight(spread, prompt_keys, prompt_values, prompt_mask, rule)
            prompt, prompt_weight = (
                of_slots.transpose(1, 2).reshape(groups * self.slots_per_group, -1).index_select(0, place)
                for of_slots in (prompt, prompt_weight)
            )
            prompt = prompt.view(-1, queries, kv_heads, size).transpose(1, 2)
            prompt_weight = prompt_weight.view(-1, queries, kv_heads).transpose(1, 2)
            share = torch.sigmoid(prompt_weight - weight).unsqueeze(-1)  # softmax over the two parts
            out = torch.lerp(out.to(share.dtype), prompt.to(share.dtype), share)
            if rule.sinks is not None:
                weight = torch.logaddexp(weight, prompt_weight)
        sinks = None if rule.sinks is None else rule.sinks.view(kv_heads, -1).repeat_interleave(width, dim=1)
        return beside_sinks(out, weight, sinks).to(query.dtype)

    def _spread(self, rows: slice | Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return where the slots of all groups find their queries, and where rows find their slots.

        Returns:
            `(groups * key/value heads * slots,)`, among rows times heads, an empty slot repeats the first row; and
            `(rows,)`, among groups times slots.
        """
        everything = isinstance(rows, slice)
        if everything and kv_heads in self._spreads:
            return self._spreads[kv_heads]
        place = self.groups[rows] * self.slots_per_group + self.slots[rows]
        source = place.new_zeros(len(self.lengths) * self.slots_per_group)
        source[place] = torch.arange(len(place), device=place.device)
        heads = torch.arange(kv_heads, device=place.device).view(1, -1, 1)
        source = (source.view(len(self.lengths), 1, -1) * kv_heads + heads).flatten()
        if everything:
            self._spreads[kv_heads] = source, place
        return source, place

    def _places(self, rows: slice | Tensor, width: int) -> Tensor | None:
        """Return how many own tokens come before each query, `(rows, L)`; None: `generated`, in every row."""
        if self.missing is None and self._extension is None:
            return None
        end = self.generated + (self._extension is None)
        last = torch.arange(end - width, end, device=self.groups.device)
        missing = 0 if self.missing is None else self.missing[rows].unsqueeze(1)
        return (last - missing).clamp_(min=0).expand(len(self.groups[rows]), -1)

    def _own_mask(self, first: int, end: int) -> Tensor:
        """Return what hides the places that hold nothing from a step's queries, `(rows, end - first)`."""
        if (first, 0) not in self._masks:
            assert self.missing is not None
            places = torch.arange(first, end, device=self.groups.device)
            mask = torch.zeros((len(self.groups), end - first), device=self.groups.device)
            self._masks[first, 0] = mask.masked_fill_(places < self.missing.unsqueeze(1), HIDDEN)
        return self._masks[first, 0]

    def _extension_mask(self, window: int | None, repeat: int, extension: NewTokens) -> Tensor:
        """Return what hides later tokens, and those out of a window, from new ones: `(rows, repeat * L, S)`."""
        key = (window, -repeat)
        if key not in self._masks:
            width, end = extension.width, self.generated
            places = torch.arange(end, device=self.groups.device)
            own = places[end - width :].unsqueeze(1)  # of each query
            hidden = places > own
            if window is not None:
                hidden = hidden | (places <= own - window)
            hidden = hidden.expand(len(extension.rows), -1, -1)
            if self.missing is not None:
                hidden = hidden | (places < self.missing[extension.index, None, None])
            mask = torch.zeros(hidden.shape, device=places.device).masked_fill_(hidden, HIDDEN)
            self._masks[key] = mask.repeat(1, repeat, 1)
        return self._masks[key]

    def _prompt_mask(
        self, seen: int, rule: Rule, places: Tensor | None, rows: slice | Tensor, repeat: int
    ) -> Tensor | None:
        """Return what hides padding of the prompts' last `seen` tokens, and those out of a window."""
        padding = None if self._mask is None or seen <= self._shortest else self._mask[:, -seen:]
        if rule.window is None or places is None:
            return padding
        key = (rule.window, seen)
        if key not in self._masks:
            groups, slots = len(self.lengths), self.slots_per_group
            spread = places.new_zeros((groups, slots, places.size(1)))
            spread[self.groups[rows], self.slots[rows]] = places
            before = torch.arange(seen, 0, -1, device=places.device)  # how far in front of the completion
            hidden = before >= rule.window - spread.unsqueeze(-1)  # (groups, slots, L, seen)
            mask = torch.zeros(hidden.shape, device=places.device).masked_fill_(hidden, HIDDEN)
            mask = mask.unsqueeze(2).expand(-1, -1, repeat, -1, -1).reshape(groups, -1, seen)
            self._masks[key] = mask if padding is None else mask + padding.unsqueeze(1)
        return self._masks[key]

    def _seen_of_prompts(self, layer: int, rule: Rule, places: Tensor | None) -> int:
        """Return how many of a layer's last prompt tokens the pass's tokens see; forget those out of sight."""
        if layer not in self.prompts:
            return 0
        width = self.prompts[layer][0].size(2)
        if rule.window is None:
            return width
        first = self.generated if places is None else int(places.min())
        seen = min(width, rule.window - 1 - first)
        if seen <= 0 and not self._keeps_prompts:
            del self.prompts[layer]
        return max(0, seen)


def _padded(pieces: list[Tensor]) -> Tensor:
    """Return pieces `(P_g, heads, D)` as `(groups, heads, P, D)`, padded on the left."""
    padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_side="left")
    return padded.transpose(1, 2).contiguous()


def attend_with_weight(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Attend without causality and also return the log-sum-exp of the scores.

    Args:
        query: `(B, heads, L, D)`.
        key: `(B, heads, S, D)`.
        value: `(B, heads, S, D)`.
        mask: Added to the scores: `(B, S)`, or `(B, L, S)`, fp32.
        rule: What the layer does to its scores; its window and sinks are the caller's matter.

    Returns:
        The attention `(B, heads, L, D)` and the log-sum-exps `(B, heads, L)`, fp32 (fp64 for fp64 inputs).
    """
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask.unsqueeze(1)
    if rule.softcap is None and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        # With few queries the kernel is as fast in fp32, the casts included, and with one query 4 times (PyTorch 2.13).
        query, key, value = query.float(), key.float(), value.float()
        if mask is not None:
            mask = mask.to(query.dtype).expand(query.size(0), 1, query.size(2), -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=rule.scaling
        )
    return explicit_attention(query, key, value, mask, rule)
