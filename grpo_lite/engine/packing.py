"""Pack the completions of one prompt behind a single copy of it: pure tensor code, no model, no trainer.

A padded batch holds a prompt G times and every completion at the length of the longest. Here it becomes one flat row
without padding, `[prompt | c1 | … | cG | next prompt | …]`; positions restart after the prompt, and the attention
(`attention.py`) lets a completion see its prompt and itself. `unpack` scatters the results back to padded shape.

Completions that begin alike, as those with the same first tool call do, share more than the prompt. The rows with one
copy of a prompt are a piece. The tokens with which all completions of a piece begin are laid out once, behind the
prompt, and one that repeats another, whole or up to where it ends, is not laid out at all. Each such token is predicted
once and its results go to every row that has it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding

# Completions of which the best pieces are sought: the search goes as deep as there are forks.
MOST_DIVIDED = 100


@dataclass(frozen=True)
class PaddedBatch:
    """A padded batch as TRL holds it: prompts padded on the left, completions on the right."""

    input_ids: Tensor  # (B, P + C)
    prompt_lengths: list[int]
    completions: list[list[int]]  # token ids
    prompt_width: int  # P
    groups: list[list[int]]  # rows with the same prompt, in order of first appearance

    @cached_property
    def completion_lengths(self) -> list[int]:
        """Return the tokens of each completion."""
        return [len(ids) for ids in self.completions]

    @property
    def completion_width(self) -> int:
        """Return C, the padded length of the completions."""
        return self.input_ids.size(1) - self.prompt_width


@dataclass(frozen=True)
class PackedBatch:
    """Pieces of a padded batch as one flat row of T tokens, N of them completion tokens to be scored, for M of its."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    segments: tuple[tuple[int, tuple[int, ...]], ...]  # per piece: tokens of all its rows, and behind them of each
    predictors: Tensor  # (N,) position in T of the hidden state that predicts each completion token
    targets: Tensor  # (N,) the completion tokens
    scatter: Tensor  # (M,) position of each of the rows' completion tokens in the flattened (B, C) result
    scored: Tensor  # (M,) which of the N it is
    padded_width: int  # tokens of the rows it was packed from, padding included

    @property
    def num_tokens(self) -> int:
        """Return T, the tokens the model has to process."""
        return self.input_ids.size(1)


def read_padded_batch(input_ids: Tensor, attention_mask: Tensor, completion_width: int) -> PaddedBatch | None:
    """Find the true lengths and the groups of a padded batch.

    Args:
        input_ids: `(B, P + C)`.
        attention_mask: `(B, P + C)`, 1 on real tokens.
        completion_width: C.

    Returns:
        The batch, or None when it cannot be packed: padding in the middle, or a row without a prompt.
    """
    prompt_width = input_ids.size(1) - completion_width
    mask = attention_mask.bool()
    prompt_mask, completion_mask = mask[:, :prompt_width], mask[:, prompt_width:]
    ragged_inside = (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any() | (
        completion_mask[:, 1:] & ~completion_mask[:, :-1]
    ).any()
    prompt_lengths = prompt_mask.sum(1).tolist()
    if bool(ragged_inside) or min(prompt_lengths, default=0) == 0:
        return None
    groups: dict[tuple[int, ...], list[int]] = {}
    completions: list[list[int]] = []
    lengths = zip(prompt_lengths, completion_mask.sum(1).tolist(), strict=True)
    for row, (ids, (before, after)) in enumerate(zip(input_ids.tolist(), lengths, strict=True)):
        groups.setdefault(tuple(ids[prompt_width - before : prompt_width]), []).append(row)
        completions.append(ids[prompt_width : prompt_width + after])
    return PaddedBatch(input_ids, prompt_lengths, completions, prompt_width, list(groups.values()))


def plan_microbatches(
    batch: PaddedBatch, rows: Sequence[int], budget: int | None, every_prompt: bool = False
) -> list[list[list[int]]]:
    """Divide rows into micro-batches of at most `budget` tokens, groups kept together where they fit.

    A group longer than the budget is split into parts that repeat the prompt; one completion that is too long on
    its own gets a micro-batch to itself. Rows without completion tokens cost nothing and are left out, and so do
    completions with which another begins. What else completions have in common is not taken off the budget: attention
    reads it for each, and the memory plan counts it for each. Within its micro-batch a part becomes the pieces that
    have the fewest tokens.

    Args:
        batch: The padded batch.
        rows: Which of its rows to process.
        budget: Tokens per micro-batch; None for one micro-batch.
        every_prompt: Whether a prompt of which no row has completion tokens is a piece too, of one such row.

    Returns:
        Micro-batches, each a list of pieces, each a list of rows with the same prompt.
    """
    wanted, lengths = set(rows), batch.completion_lengths
    parts: list[tuple[int, list[list[int]]]] = []  # tokens, pieces
    for group in batch.groups:
        chosen = [row for row in group if row in wanted]
        live = [row for row in chosen if lengths[row] > 0]
        if not live and chosen and every_prompt:
            live = chosen[:1]
        if not live:
            continue
        prompt_length = batch.prompt_lengths[live[0]]
        room = None if budget is None else budget - prompt_length
        branches = _branches(batch, live)
        for part in _first_fit(list(branches), [lengths[row] for row in branches], room):
            pieces = [
                sorted(row for branch in piece for row in branches[branch])
                for piece in _divide(batch.completions, part, prompt_length)
            ]
            parts.append((prompt_length + sum(lengths[row] for row in part), pieces))
    bins = _first_fit(list(range(len(parts))), [tokens for tokens, _ in parts], budget)
    return [[piece for index in members for piece in parts[index][1]] for members in bins]


def planned_tokens(batch: PaddedBatch, pieces: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the tokens of a micro-batch, counted as `plan_microbatches` counts them, and those of its longest row."""
    group_of = {row: index for index, group in enumerate(batch.groups) for row in group}
    prompts: dict[int, int] = {}
    rows: list[tuple[int, int]] = []  # tokens of the prompt and of the completion
    for piece in pieces:
        prompts[group_of[piece[0]]] = prompt = batch.prompt_lengths[piece[0]]
        rows += [(prompt, batch.completion_lengths[row]) for row in _branches(batch, piece)]
    return sum(prompts.values()) + sum(own for _, own in rows), max(prompt + own for prompt, own in rows)


def _first_fit(items: list[int], sizes: list[int], capacity: int | None) -> list[list[int]]:
    """Put items into as few bins as first-fit-decreasing finds, keeping their order inside each bin."""
    if capacity is None:
        return [items] if items else []
    bins: list[tuple[int, list[int]]] = []  # free room, indices
    for index in sorted(range(len(items)), key=lambda i: -sizes[i]):
        for slot, (free, members) in enumerate(bins):
            if sizes[index] <= free:
                bins[slot] = (free - sizes[index], [*members, index])
                break
        else:
            bins.append((capacity - sizes[index], [index]))
    return [[items[index] for index in sorted(members)] for _, members in bins]


def _branches(batch: PaddedBatch, rows: Sequence[int]) -> dict[int, list[int]]:
    """Return the rows whose completions no other begins with, each with the rows that it begins with and itself.

    Of equal completions the first row stands for all.
    """
    order = sorted(rows, key=lambda row: (batch.completions[row], -row))
    branch = order[-1]
    members: dict[int, list[int]] = {row: [] for row in rows}
    for row in reversed(order):  # a completion stands right before those that begin with it
        ids = batch.completions[row]
        branch = branch if batch.completions[branch][: len(ids)] == ids else row
        members[branch].append(row)
    return {row: sorted(own) for row, own in members.items() if own}


def _divide(completions: Sequence[list[int]], branches: Sequence[int], prompt_length: int) -> list[list[int]]:
    """Divide completions of a prompt, none of which begins with another, into pieces that have the fewest tokens.

    A piece of n completions that begin with the same m tokens saves the prompt and these tokens n - 1 times. So at each
    fork of the tree of completions there either begins a piece or not, and a completion belongs to the last before it.
    """
    if len(branches) > MOST_DIVIDED:
        return [list(branches)]
    order = sorted(branches, key=lambda row: completions[row])
    common = [count_shared(completions[a], completions[b]) for a, b in pairwise(order)]

    @cache
    def best(first: int, last: int, gain: int) -> tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Return for `order[first : last + 1]` the tokens saved, who stays with the piece above, and the other pieces.

        `gain` is what the piece above saves with each completion; 0: there is none.
        """
        if first == last:
            return (gain, (order[first],), ()) if gain else (0, (), ((order[first],),))
        shared = min(common[first:last])
        ends = [i for i in range(first, last) if common[i] == shared]
        forks = list(zip([first, *(i + 1 for i in ends)], [*ends, last], strict=True))

        def joined(gain: int) -> tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]:
            saved, rows, pieces = zip(*(best(a, b, gain) for a, b in forks), strict=True)
            return sum(saved), tuple(chain.from_iterable(rows)), tuple(chain.from_iterable(pieces))

        above, (saved, rows, pieces) = joined(gain), joined(prompt_length + shared)
        here = saved - prompt_length - shared
        return above if above[0] >= here else (here, (), (rows, *pieces))

    return [sorted(piece) for piece in best(0, len(order) - 1, 0)[2]]


def _shared_tokens(batch: PaddedBatch, branches: Iterable[int]) -> int:
    """Return how many completion tokens a piece lays out for all its branches: none where there is only one."""
    completions = sorted(batch.completions[row] for row in branches)
    return count_shared(completions[0], completions[-1]) if len(completions) > 1 else 0


def pack(batch: PaddedBatch, pieces: Sequence[Sequence[int]]) -> PackedBatch:
    """Lay out the given pieces (rows with one prompt each) as one flat row."""
    device = batch.input_ids.device
    width, prompt_width = batch.input_ids.size(1), batch.prompt_width
    sources: list[Tensor] = []  # where each token of the flat row lies in the flattened padded batch
    positions: list[Tensor] = []
    predictors: list[Tensor] = []
    targets: list[Tensor] = []  # where each lies in the flattened padded batch
    scatter: list[Tensor] = []
    scored: list[Tensor] = []
    segments: list[tuple[int, tuple[int, ...]]] = []
    offset = count = 0  # in T, in N
    for piece in pieces:
        branches = _branches(batch, piece)
        shared, prompt_length = _shared_tokens(batch, branches), batch.prompt_lengths[piece[0]]
        root = prompt_length + shared
        start = next(iter(branches)) * width + prompt_width
        sources.append(torch.arange(start - prompt_length, start + shared))
        positions.append(torch.arange(root))
        predictors.append(torch.arange(offset + prompt_length - 1, offset + root - 1))
        targets.append(torch.arange(start, start + shared))
        of_all = torch.arange(count, count + shared)
        offset, count = offset + root, count + shared
        last_shared = torch.tensor([offset - 1])
        for branch, rows in branches.items():
            length = batch.completion_lengths[branch]
            tail = length - shared
            own = torch.arange(shared, length) + branch * width + prompt_width
            sources.append(own)
            positions.append(torch.arange(root, prompt_length + length))
            predictors.append(torch.cat([last_shared, torch.arange(offset, offset + tail)])[:tail])
            targets.append(own)
            path = torch.cat([of_all, torch.arange(count, count + tail)])
            for row in rows:
                scored.append(path[: batch.completion_lengths[row]])
                scatter.append(torch.arange(batch.completion_lengths[row]) + row * batch.completion_width)
            offset, count = offset + tail, count + tail
        tails = (batch.completion_lengths[branch] - shared for branch in branches)
        segments.append((root, tuple(tail for tail in tails if tail > 0)))
    flat_ids = batch.input_ids.reshape(-1)
    return PackedBatch(
        input_ids=flat_ids[torch.cat(sources).to(device)].unsqueeze(0),
        position_ids=torch.cat(positions).to(device).unsqueeze(0),
        segments=tuple(segments),
        predictors=torch.cat(predictors).to(device),
        targets=flat_ids[torch.cat(targets).to(device)],
        scatter=torch.cat(scatter).to(device),
        scored=torch.cat(scored).to(device),
        padded_width=width,
    )


def token_weights(batch: PaddedBatch, microbatches: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """Return how many tokens of the padded rows each token of the packed ones stands for: `(T,)` per micro-batch.

    Args:
        batch: The padded batch.
        microbatches: From `plan_microbatches` for all rows, with every prompt.
    """
    group_of = {row: index for index, group in enumerate(batch.groups) for row in group}
    # Rows without completion tokens are in no piece: the first piece of their group stands for them.
    absent = [sum(batch.completion_lengths[row] == 0 for row in group) for group in batch.groups]
    weights = []
    for pieces in microbatches:
        parts = []
        for piece in pieces:
            branches, group = _branches(batch, piece), group_of[piece[0]]
            shared, lengths = _shared_tokens(batch, branches), [batch.completion_lengths[row] for row in piece]
            of_prompt, absent[group] = sum(length > 0 for length in lengths) + absent[group], 0
            parts.append(torch.full((batch.prompt_lengths[piece[0]],), float(of_prompt)))
            parts.append(_reaching(lengths, 0, shared))
            for branch, rows in branches.items():
                own = [batch.completion_lengths[row] for row in rows]
                parts.append(_reaching(own, shared, batch.completion_lengths[branch]))
        weights.append(torch.cat(parts).to(batch.input_ids.device))
    return weights


def _reaching(lengths: Sequence[int], first: int, last: int) -> Tensor:
    """Return for each of the columns from `first` to before `last` how many lengths reach beyond it."""
    return (torch.tensor(lengths).unsqueeze(1) > torch.arange(first, last)).sum(0).float()


def pack_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PackedBatch:
    """Lay out rows that share no prompt as one flat row.

    Args:
        input_ids: `(B, L)`, padded on the right.
        attention_mask: `(B, L)`, 1 on real tokens.
        labels: `(B, L)`, the token where it is to be scored, -100 elsewhere; in each row at least one token stands
            before the first that is scored.
    """
    mask = attention_mask.bool()
    lengths, scored = mask.sum(1).tolist(), (labels != -100).sum(1).tolist()
    flat_labels = labels[mask]
    places = (flat_labels != -100).nonzero().squeeze(1)
    return PackedBatch(
        input_ids=input_ids[mask].unsqueeze(0),
        position_ids=(mask.cumsum(1) - 1)[mask].unsqueeze(0),
        segments=tuple((length - count, (count,)) for length, count in zip(lengths, scored, strict=True)),
        predictors=places - 1,
        targets=flat_labels[places],
        scatter=(labels != -100).reshape(-1).nonzero().squeeze(1),
        scored=torch.arange(len(places), device=places.device),
        padded_width=input_ids.size(1),
    )


def count_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return with how many equal tokens two sequences begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def unpack(values: Tensor, packed: PackedBatch, out: Tensor) -> Tensor:
    """Return `out` `(B, C)` with the packed tokens' `values` `(N,)` put in their places; differentiable in both."""
    # An embedding's backward adds up the rows of a token in one order, on a GPU too; that of an index does not.
    values = embedding(packed.scored, values.unsqueeze(1)).squeeze(1)  # (M,)
    return out.reshape(-1).index_put((packed.scatter,), values).view(out.shape)
