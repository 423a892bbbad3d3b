"""Pack the completions of one prompt behind a single copy of it: pure tensor code, no model, no trainer.

A padded batch holds a prompt G times and every completion at the length of the longest. Here it becomes one flat row
without padding, `[prompt | c1 | … | cG | next prompt | …]`; positions restart after the prompt, and the attention
(`attention.py`) lets a completion see its prompt and itself. `unpack` scatters the results back to padded shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """A padded batch as TRL holds it: prompts padded on the left, completions on the right."""

    input_ids: Tensor  # (B, P + C)
    prompt_lengths: list[int]
    completion_lengths: list[int]
    prompt_width: int  # P
    groups: list[list[int]]  # rows with the same prompt, in order of first appearance

    @property
    def completion_width(self) -> int:
        """Return C, the padded length of the completions."""
        return self.input_ids.size(1) - self.prompt_width


@dataclass(frozen=True)
class PackedBatch:
    """Some groups of a padded batch as one flat row of T tokens, N of them completion tokens to be scored."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    segments: tuple[tuple[int, tuple[int, ...]], ...]  # per group: prompt length, completion lengths
    predictors: Tensor  # (N,) position in T of the hidden state that predicts each completion token
    targets: Tensor  # (N,) the completion tokens
    scatter: Tensor  # (N,) position of each completion token in the flattened (B, C) result
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
    for row, (ids, length) in enumerate(zip(input_ids[:, :prompt_width].tolist(), prompt_lengths, strict=True)):
        groups.setdefault(tuple(ids[prompt_width - length :]), []).append(row)
    return PaddedBatch(input_ids, prompt_lengths, completion_mask.sum(1).tolist(), prompt_width, list(groups.values()))


def plan_microbatches(
    batch: PaddedBatch, rows: Sequence[int], budget: int | None, every_prompt: bool = False
) -> list[list[list[int]]]:
    """Divide rows into micro-batches of at most `budget` tokens, groups kept together where they fit.

    A group longer than the budget is split into pieces that repeat the prompt; one completion that is too long on
    its own gets a micro-batch to itself. Rows without completion tokens cost nothing and are left out.

    Args:
        batch: The padded batch.
        rows: Which of its rows to process.
        budget: Tokens per micro-batch; None for one micro-batch.
        every_prompt: Whether a prompt of which no row has completion tokens is a piece too, of one such row.

    Returns:
        Micro-batches, each a list of pieces, each a list of rows with the same prompt.
    """
    wanted = set(rows)
    pieces: list[tuple[int, list[int]]] = []  # tokens, rows
    for group in batch.groups:
        chosen = [row for row in group if row in wanted]
        live = [row for row in chosen if batch.completion_lengths[row] > 0]
        if not live and chosen and every_prompt:
            live = chosen[:1]
        if not live:
            continue
        prompt_length = batch.prompt_lengths[live[0]]
        room = None if budget is None else budget - prompt_length
        for part in _first_fit(live, [batch.completion_lengths[row] for row in live], room):
            pieces.append((prompt_length + sum(batch.completion_lengths[row] for row in part), part))
    bins = _first_fit(list(range(len(pieces))), [tokens for tokens, _ in pieces], budget)
    return [[pieces[index][1] for index in members] for members in bins]


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


def pack(batch: PaddedBatch, pieces: Sequence[Sequence[int]]) -> PackedBatch:
    """Lay out the given pieces (rows with one prompt each) as one flat row."""
    device = batch.input_ids.device
    width, prompt_width = batch.input_ids.size(1), batch.prompt_width
    sources: list[Tensor] = []  # where each token of the flat row lies in the flattened padded batch
    positions: list[Tensor] = []
    predictors: list[Tensor] = []
    scatter: list[Tensor] = []
    segments: list[tuple[int, tuple[int, ...]]] = []
    offset = 0
    for piece in pieces:
        prompt_length = batch.prompt_lengths[piece[0]]
        last_prompt_token = offset + prompt_length - 1
        sources.append(torch.arange(prompt_width - prompt_length, prompt_width) + piece[0] * width)
        positions.append(torch.arange(prompt_length))
        offset += prompt_length
        completions = [row for row in piece if batch.completion_lengths[row] > 0]
        for row in completions:
            length = batch.completion_lengths[row]
            sources.append(torch.arange(prompt_width, prompt_width + length) + row * width)
            positions.append(torch.arange(prompt_length, prompt_length + length))
            predictors.append(torch.tensor([last_prompt_token]))
            predictors.append(torch.arange(offset, offset + length - 1))
            scatter.append(torch.arange(length) + row * batch.completion_width)
            offset += length
        segments.append((prompt_length, tuple(batch.completion_lengths[row] for row in completions)))
    none = torch.empty(0, dtype=torch.long)
    flat_ids = batch.input_ids.reshape(-1)
    scattered = torch.cat([none, *scatter]).to(device)
    targets = batch.input_ids[:, prompt_width:].reshape(-1)[scattered]
    return PackedBatch(
        input_ids=flat_ids[torch.cat(sources).to(device)].unsqueeze(0),
        position_ids=torch.cat(positions).to(device).unsqueeze(0),
        segments=tuple(segments),
        predictors=torch.cat([none, *predictors]).to(device),
        targets=targets,
        scatter=scattered,
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
            completions = [batch.completion_lengths[row] for row in piece if batch.completion_lengths[row] > 0]
            group = group_of[piece[0]]
            rows, absent[group] = len(completions) + absent[group], 0
            parts.append(torch.full((batch.prompt_lengths[piece[0]],), float(rows)))
            parts.append(torch.ones(sum(completions)))
        weights.append(torch.cat(parts).to(batch.input_ids.device))
    return weights


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
        padded_width=input_ids.size(1),
    )


def unpack(values: Tensor, packed: PackedBatch, out: Tensor) -> Tensor:
    """Return `out` `(B, C)` with the packed tokens' `values` `(N,)` put in their places; differentiable in both."""
    return out.reshape(-1).index_put((packed.scatter,), values).view(out.shape)
