"""Keys, values and recurrent states of decoding rows in buffers of a fixed size: what a CUDA graph can hold.

Each row has a copy of its prompt's keys and values, followed by those of its own tokens. All rows are written by one
kernel a layer and attended to by one more, whatever their lengths; a window is one mask a step. A recurrent layer has
one state for each row, of one size whatever the row's length, which a step changes in place.
`cache.GroupCache` holds each prompt once instead, which is smaller and, on a CPU, faster; its shapes change with every
token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lite.engine.attention import PackedLayout, Rule, attend, packed_attention
from grpo_lite.engine.new_tokens import NewTokens
from grpo_lite.engine.states import Run, States

# Tokens, up to: a multiple of. Prompts of nearly the same length get buffers of the same, and the graphs on them.
LENGTH_STEPS = ((512, 64), (1024, 128), (1 << 62, 256))
SEEN_STEPS = ((1024, 256), (4096, 512), (1 << 62, 1024))


def row_length(tokens: int) -> int:
    """Return how long the buffers are for rows of so many tokens, prompt and completion."""
    return _rounded(tokens, LENGTH_STEPS)


def seen_length(tokens: int) -> int:
    """Return how many places a step attends to whose longest row has so many tokens; a graph for each."""
    return _rounded(tokens, SEEN_STEPS)


def _rounded(tokens: int, steps: tuple[tuple[int, int], ...]) -> int:
    step = next(step for limit, step in steps if tokens <= limit)
    return -(-tokens // step) * step


# Of one prompt, per layer: keys and values `(P, key/value heads, D)`, or its state.
Kept = dict[int, tuple[Tensor, Tensor] | States]


class RowCache:
    """Keys, values, states and visibility of `rows` rows of up to `length` tokens; a `Layout` for `attention.py`.

    Three passes fill it: the prefill (all prompts in one flat row), new tokens of a further turn behind what rows hold
    (`new_tokens.py`), and a decoding step (one token a row).
    """

    def __init__(self, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.length, self.dtype = rows, length, dtype
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # per layer: (rows, length, key/value heads, D)
        self.recurrent: dict[int, States] = {}  # per recurrent layer
        self.position = torch.zeros(rows, dtype=torch.long, device=device)  # of the token that comes next
        self.mask = torch.full((rows, length), float("-inf"), dtype=dtype, device=device)  # added to the scores
        self._offsets = torch.arange(rows, device=device) * length
        self._place = torch.zeros(rows, dtype=torch.long, device=device)  # where the step's keys and values go
        self._prefill: _Prefill | None = None
        self._new: _Reading | None = None
        self._step = (rows, length)
        self._frozen: Tensor | None = None  # the step's rows whose recurrent states stay, as truth values
        self._windowed: dict[int, Tensor] = {}  # the step's mask for layers with a window, by its length

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys, values and recurrent states."""
        held = sum(buffer.nbytes for pair in self.states.values() for buffer in pair)
        return held + sum(states.num_bytes for states in self.recurrent.values())

    @property
    def recurrent_tensors(self) -> list[Tensor]:
        """The states of all recurrent layers, which a step reads and changes."""
        return [tensor for states in self.recurrent.values() for tensor in states.tensors]

    def begin_prefill(
        self, prompt_lengths: Sequence[int], slots: Sequence[tuple[int, int]], kept: int | None = None
    ) -> None:
        """Prepare for a flat pass over prompts of these lengths.

        Args:
            prompt_lengths: in the order of the flat row.
            slots: (row of the buffers, prompt) of every row to fill.
            kept: the prompt whose keys and values are kept for rows that are filled later, by `fill_rest`.
        """
        self._prefill = _Prefill(prompt_lengths, slots, self.length, kept, self.position.device)
        self._open([slot for slot, _ in slots], [prompt_lengths[prompt] for _, prompt in slots])

    def end_prefill(self) -> Kept:
        """Return the kept prompt's keys, values and states."""
        assert self._prefill is not None
        kept, self._prefill = self._prefill.kept_states, None
        return kept

    def fill_rest(self, states: Kept, length: int, slots: Sequence[int]) -> None:
        """Copy a kept prompt's keys, values and states into more rows."""
        self._open(slots, [length] * len(slots))
        into = torch.tensor([slot * self.length + t for slot in slots for t in range(length)])
        into = into.to(self.position.device)
        rows = torch.tensor(list(slots)).to(self.position.device)
        for layer, kept in states.items():
            if isinstance(kept, States):
                self.recurrent[layer].put(rows, kept.select(torch.zeros_like(rows)))
                continue
            for buffer, source in zip(self.states[layer], kept, strict=True):
                buffer.flatten(0, 1).index_copy_(0, into, source.repeat(len(slots), 1, 1))

    def begin_reading(self, rows: Sequence[int], held: Sequence[int], counts: Sequence[int]) -> None:
        """Prepare for a flat pass over `counts` tokens of rows that hold so many; they are read one row at a time."""
        ends = [before + count for before, count in zip(held, counts, strict=True)]
        self._show(*torch.tensor([list(rows), ends]).to(self.position.device))
        self._new = _Reading(NewTokens(rows, counts, self.position.device), held, self.length)

    def begin_step(self, rows: int, seen: int, frozen: Tensor | None = None) -> None:
        """Prepare a decoding step of the first `rows` rows, which attend to the first `seen` places.

        The recurrent states of `frozen` rows, truth values `(rows,)`, stay as they are.
        """
        self._step, self._frozen = (rows, seen), frozen
        self._windowed = {}
        torch.add(self._offsets[:rows], self.position[:rows], out=self._place[:rows])
        self.mask.view(-1).index_fill_(0, self._place[:rows], 0.0)

    def mix(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        """Run a recurrent layer: over each prompt once in the prefill, then from each row's state."""
        if self._new is not None:
            return self._new.tokens.mix(hidden, self.recurrent[layer], run)
        if self._prefill is not None:
            mixed, prompts = self._prefill.layout.branches.mix(hidden, run)
            if layer not in self.recurrent:
                self.recurrent[layer] = prompts.zeros(self.rows)
            self.recurrent[layer].put(self._prefill.slots, prompts.select(self._prefill.prompts))
            if self._prefill.kept_prompt is not None:
                self._prefill.kept_states[layer] = prompts.select(self._prefill.kept_prompt)
            return mixed
        held = self.recurrent[layer].first(self._step[0])
        before = [] if self._frozen is None else [tensor.clone() for tensor in held.tensors]
        after = States(held.conv_states[0], held.recurrent_states[0])
        mixed = run(hidden, after, None)
        held.put(None, after)  # what the layer has not changed in place
        if self._frozen is not None:
            held.freeze(self._frozen, before)
        return mixed

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Attend as `packed_attention` does, for a layer of the prefill, of new tokens or of a decoding step."""
        if self._prefill is not None:
            self._store(layer, key, value)
            return packed_attention(query, key, value, self._prefill.layout, rule)
        if self._new is not None:
            return self._attend_new(layer, query, key, value, rule, self._new)
        rows, seen = self._step
        keys, values = self.states[layer]
        place = self._place[:rows]
        keys.flatten(0, 1).index_copy_(0, place, key[:, :, 0])
        values.flatten(0, 1).index_copy_(0, place, value[:, :, 0])
        heads, size = query.size(1), query.size(3)
        grouped = query.view(rows, keys.size(2), heads // keys.size(2), size)  # queries that share keys stand together
        out = attend(
            grouped,
            keys[:rows, :seen].transpose(1, 2),
            values[:rows, :seen].transpose(1, 2),
            self._step_mask(rule.within(seen).window),
            rule,
            None if rule.sinks is None else rule.sinks.view(keys.size(2), -1),
        )
        return out.reshape(rows, 1, heads, size)

    def _attend_new(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, new: _Reading) -> Tensor:
        """Attend from new tokens `(1, heads, T, D)` to what their rows hold and to those before them."""
        held = self.states[layer]
        for buffer, fresh in zip(held, (key, value), strict=True):
            buffer.flatten(0, 1).index_copy_(0, new.into, fresh[0].transpose(0, 1))
        rows, width = len(new.tokens.rows), new.tokens.width
        heads, size, shared = query.size(1), query.size(3), key.size(1)
        keys, values = (buffer[new.chosen, : new.seen].transpose(1, 2) for buffer in held)
        out = attend(
            new.tokens.padded(query).reshape(rows, shared, heads // shared * width, size),
            keys,
            values,
            new.mask(rule.within(new.seen).window, heads // shared, self.dtype),
            rule,
            None if rule.sinks is None else rule.sinks.view(shared, -1).repeat_interleave(width, dim=1),
        )
        return new.tokens.flat(out.reshape(rows, heads, width, size))

    def _step_mask(self, window: int | None) -> Tensor:
        """Return what is added to the scores of the step's queries, `(rows, 1, 1, seen)`."""
        rows, seen = self._step
        mask = self.mask[:rows, :seen]
        if window is not None and window not in self._windowed:
            places = torch.arange(seen, device=mask.device)
            beyond = places <= (self.position[:rows] - window).unsqueeze(1)
            self._windowed[window] = mask.masked_fill(beyond, float("-inf"))
        return (mask if window is None else self._windowed[window])[:, None, None, :]

    def advance(self) -> None:
        """Note that new tokens are in. A step's `position` is the caller's, as rows that have ended stand still."""
        self._new = None

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Move rows to others, whose contents are dropped."""
        for buffers in (*self.states.values(), (self.position, self.mask)):
            for buffer in buffers:
                buffer.index_copy_(0, targets, buffer.index_select(0, sources))
        for states in self.recurrent.values():
            states.put(targets, states.select(sources))

    def _open(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Give rows a prompt's length, and let them see it."""
        index, length = torch.tensor([list(slots), list(lengths)]).to(self.position.device)
        self._show(index, length)
        for buffers in self.states.values():
            for buffer in buffers:  # a row that ended in NaN would reach the next one through the mask
                buffer.index_fill_(0, index, 0.0)

    def _show(self, index: Tensor, length: Tensor) -> None:
        """Let rows stand behind so many tokens, and see these alone."""
        self.position.index_copy_(0, index, length)
        visible = torch.arange(self.length, device=index.device) < length.unsqueeze(1)
        fresh = torch.full(visible.shape, float("-inf"), dtype=self.dtype, device=index.device)
        self.mask.index_copy_(0, index, fresh.masked_fill_(visible, 0.0))

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        assert self._prefill is not None
        if layer not in self.states:
            shape = (self.rows, self.length, key.size(1), key.size(3))
            self.states[layer] = key.new_zeros(shape, dtype=self.dtype), key.new_zeros(shape, dtype=self.dtype)
        states = []
        for buffer, new in zip(self.states[layer], (key, value), strict=True):
            flat = new[0].transpose(0, 1)  # (T, key/value heads, D)
            buffer.flatten(0, 1).index_copy_(0, self._prefill.into, flat.index_select(0, self._prefill.source))
            states.append(flat[self._prefill.kept].clone())
        if self._prefill.kept != slice(0, 0):
            self._prefill.kept_states[layer] = states[0], states[1]


class _Prefill:
    """Where the keys and values of a flat pass over prompts go."""

    def __init__(
        self,
        lengths: Sequence[int],
        slots: Sequence[tuple[int, int]],
        row_length: int,
        kept: int | None,
        device: torch.device,
    ) -> None:
        starts = [sum(lengths[:prompt]) for prompt in range(len(lengths))]
        source = [starts[prompt] + t for _, prompt in slots for t in range(lengths[prompt])]
        into = [slot * row_length + t for slot, prompt in slots for t in range(lengths[prompt])]
        self.source, self.into = torch.tensor([source, into]).to(device)
        self.layout = PackedLayout([(length, ()) for length in lengths], device)
        self.slots, self.prompts = torch.tensor([list(pair) for pair in zip(*slots, strict=True)]).to(device)
        self.kept = slice(0, 0) if kept is None else slice(starts[kept], starts[kept] + lengths[kept])
        self.kept_prompt = None if kept is None else torch.tensor([kept]).to(device)
        self.kept_states: Kept = {}


class _Reading:
    """Where the keys and values of new tokens go, and what the tokens see."""

    def __init__(self, tokens: NewTokens, held: Sequence[int], row_length: int) -> None:
        device, rows = tokens.index.device, tokens.rows
        spans = list(zip(rows, held, tokens.counts, strict=True))
        self.tokens = tokens
        self.seen = min(row_length, seen_length(max(start + count for _, start, count in spans)))
        into = [row * row_length + start + t for row, start, count in spans for t in range(count)]
        self.into = torch.tensor(into).to(device)
        # Rows that stand side by side are seen where they lie; others are copied.
        self.chosen = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else tokens.index
        self._places = (tokens.numbers + torch.tensor(list(held)).unsqueeze(1)).to(device)  # (rows, L) of the queries
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores, `(rows, 1, repeat * L, seen)`."""
        if window not in self._masks:
            places, own = torch.arange(self.seen, device=self.into.device), self._places.unsqueeze(-1)
            hidden = places > own
            if window is not None:
                hidden |= places <= own - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask.repeat(1, repeat, 1).unsqueeze(1)
        return self._masks[window]
