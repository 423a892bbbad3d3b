"""`NewTokens`: where the tokens lie that rows get at once, behind what is held of them.

A pass over them takes one flat row, all tokens of the first row, then those of the second. Attention takes them as rows
that end together, padded on the left; a recurrent layer takes rows with as many tokens together, without padding, as a
state would remember it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lite.engine import states


class NewTokens:
    """The new tokens of some rows: in a flat row, and as rows `(R, L)` padded on the left."""

    def __init__(self, rows: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        """Prepare for `counts` tokens of these rows of a cache, in this order."""
        self.rows, self.counts = list(rows), list(counts)
        self.index = torch.tensor(self.rows).to(device)
        self.width = max(self.counts)
        sizes = torch.tensor(self.counts).unsqueeze(1)
        # Of each place (R, L) the token's number among the row's new ones; padding repeats the first.
        self.numbers = (torch.arange(self.width) - (self.width - sizes)).clamp(min=0)
        self._gather = (sizes.cumsum(0) - sizes + self.numbers).to(device)
        ends = range(self.width, self.width * len(self.rows) + 1, self.width)
        scatter = [t for end, count in zip(ends, self.counts, strict=True) for t in range(end - count, end)]
        self._scatter = torch.tensor(scatter).to(device)
        self._together: list[tuple[list[int], Tensor]] = []  # of as many tokens: places among these rows, the rows
        for count in sorted(set(counts)):
            members = [i for i, each in enumerate(counts) if each == count]
            self._together.append((members, torch.tensor([rows[i] for i in members]).to(device)))

    def padded(self, flat: Tensor) -> Tensor:
        """Return a flat row `(1, heads, T, D)` as rows `(R, heads, L, D)`."""
        return flat[0].transpose(0, 1)[self._gather].transpose(1, 2)

    def flat(self, padded: Tensor) -> Tensor:
        """Return rows `(R, heads, L, D)` as a flat row `(1, T, heads, D)`."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self._scatter).unsqueeze(0)

    def mix(self, hidden: Tensor, held: states.States, run: states.Run) -> Tensor:
        """Run a recurrent layer over the new tokens `(1, T, H)`, from the states of all rows of the cache, in place."""
        flat = hidden[0].split(self.counts)
        outputs: dict[int, Tensor] = {}
        for members, rows in self._together:
            own = held.select(rows)
            outputs |= dict(zip(members, run(torch.stack([flat[i] for i in members]), own, None), strict=True))
            held.put(rows, own)
        return torch.cat([outputs[i] for i in range(len(flat))]).unsqueeze(0)
