"""`Conversations`: what is kept of the rows of a batch between their turns, so that a turn reads only what is new.

A conversation is a prompt that its group shares, and behind it all that the model wrote and was answered. Where the
model ends a turn, `decode.GroupDecoder` copies the row's keys and values out of its cache before the row leaves it;
`static_decode.StaticDecoder` leaves them where they lie in its buffers. The next turn's row is found again by its
tokens: it has to begin with those that are held. Where it does not (a template rewrote something) it is read again from
the first token that differs. Rows that do not come back are dropped as the next turn begins.

Copies count within the budget of cached tokens: `make_room` drops rows. In the buffers a row is dropped where another
takes its place. What is dropped is read again whole.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from grpo_lite.engine.cache import GroupCache, KeysValues, RowContents
from grpo_lite.engine.packing import count_shared

logger = logging.getLogger(__name__)

Prompt = tuple[int, ...]


class Holder:
    """What buffers hold between two turns; another one as soon as other rows are decoded there."""


@dataclass(frozen=True)
class Place:
    """Where a row lies whose keys and values stay in a decoder's buffers."""

    holder: weakref.ref[Holder]  # alone, so that buffers that are given back are freed
    row: int
    is_recurrent: bool

    def cut(self, tokens: int) -> None:
        """Nothing: a row's further turn overwrites what stands behind its first tokens."""


@dataclass(eq=False)
class KeptRow:
    """A row between two turns."""

    prompt: Prompt  # of its first turn
    tokens: Prompt  # behind it, whose keys and values are held
    contents: RowContents | Place

    def cut(self, count: int) -> bool:
        """Keep the first tokens only; return whether that can be done: a recurrent state cannot be taken back."""
        if count < len(self.tokens):
            if self.contents.is_recurrent:
                return False
            self.tokens = self.tokens[:count]
            self.contents.cut(count)
        return True

    def is_held_by(self, holder: Holder | None) -> bool:
        """Return whether the row lies there; with None, whether it is a copy."""
        if isinstance(self.contents, Place):
            return holder is not None and self.contents.holder() is holder
        return holder is None


@dataclass
class Conversations:
    """The rows of a batch between their turns.

    Args:
        longest: most tokens behind a row's first prompt, over all turns.
    """

    longest: int
    state_tokens: int = 0  # what a row's recurrent states are worth, in tokens
    reused_tokens: int = 0  # that no turn had to read again
    changed_rows: int = 0  # that came back with other tokens than are held
    reread_rows: int = 0  # that came back after they were dropped
    widest_pass: int = 0  # tokens that were read at once
    _starts: list[Prompt] = field(default_factory=list)  # the first turn's prompts, the longest first
    _prompts: dict[Prompt, dict[int, KeysValues]] = field(default_factory=dict)
    _waiting: dict[int, KeptRow] = field(default_factory=dict)  # by row of this turn: what is held of it
    _ended: list[KeptRow] = field(default_factory=list)  # rows that have ended their turn
    _dropped: dict[Prompt, list[Prompt]] = field(default_factory=dict)  # tokens of rows that `make_room` dropped

    def meet(self, rows: Sequence[Prompt]) -> None:
        """Take the rows of the first turn for what later ones begin with."""
        if not self._starts:
            self._starts = sorted(set(rows), key=len, reverse=True)

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest row, over all turns."""
        return max(map(len, self._starts)) + self.longest

    def begin(self, rows: Sequence[Prompt], holder: Holder | None = None) -> None:
        """Begin a turn of these rows, and drop what none of them begins with.

        Args:
            rows: in the order of the batch.
            holder: of the buffers that they are decoded in, where rows may still lie; None: rows were copied.
        """
        self.meet(rows)
        lost = [kept for kept in self._ended if not kept.is_held_by(holder)]
        self._ended = [kept for kept in self._ended if kept.is_held_by(holder)]
        for kept in lost:
            self.drop(kept.prompt, kept.tokens)
        starts = [self.start(ids) for ids in rows]
        behind = [ids[len(start) :] for ids, start in zip(rows, starts, strict=True)]
        rest: dict[Prompt, list[int]] = {}  # rows without what is held of one, by their first prompt
        for i, start in enumerate(starts):
            if behind[i]:  # else it is read whole
                rest.setdefault(start, []).append(i)
        unclaimed: dict[Prompt, list[KeptRow]] = {}
        taken: dict[int, KeptRow] = {}
        for kept in sorted(self._ended, key=lambda kept: -len(kept.tokens)):  # a short one fits longer rows, too
            own = rest.get(kept.prompt, [])
            found = next((i for i in own if behind[i][: len(kept.tokens)] == kept.tokens), None)
            if found is None:
                unclaimed.setdefault(kept.prompt, []).append(kept)
            else:
                own.remove(found)
                taken[found] = kept
        changed = 0
        for start, members in rest.items():
            candidates = unclaimed.get(start, [])
            for i in members:
                was_dropped = any(behind[i][: len(tokens)] == tokens for tokens in self._dropped.get(start, ()))
                self.reread_rows += was_dropped
                changed += bool(candidates) and not was_dropped
                if candidates:
                    taken[i] = max(candidates, key=lambda kept: count_shared(kept.tokens, behind[i]))
                    candidates.remove(taken[i])
        self._waiting, self._ended, self._dropped = {}, [], {}
        for i, kept in sorted(taken.items()):
            # At least one is read: what follows it is asked.
            if kept.cut(min(count_shared(kept.tokens, behind[i]), len(behind[i]) - 1)):
                self._waiting[i] = kept
        if changed:
            self.changed_rows += changed
            logger.warning(
                "%d rows came back from a tool with earlier turns changed (by the chat template?): they are read again "
                "from the first changed token.",
                changed,
            )
        self._drop_unused_prompts()

    def start(self, ids: Prompt) -> Prompt:
        """Return the first turn's prompt of a row; a row that began with none of them is its own."""
        return next((start for start in self._starts if ids[: len(start)] == start), ids)

    def left(self, ids: Prompt) -> int:
        """Return how many tokens a row may still get, at least one."""
        return max(1, len(self.start(ids)) + self.longest - len(ids))

    def is_held(self, row: int) -> bool:
        """Return whether keys and values of a row of this turn are held."""
        return row in self._waiting

    def resume(
        self, groups: Sequence[tuple[Prompt, Sequence[int]]], rows: Sequence[Prompt]
    ) -> tuple[GroupCache, list[int]]:
        """Return a cache of held rows, which leave, and how many tokens of each are new: `extend` it by them.

        Args:
            groups: prompts, and which rows of this turn begin with each.
            rows: this turn's.
        """
        members = [i for _, own in groups for i in own]
        kept = self._take(members)
        needed = {other.prompt for other in self._waiting.values()}
        prompts = [
            (len(prompt), dict(self._prompts[prompt]) if prompt in needed else self._prompts.pop(prompt))
            for prompt, _ in groups
        ]
        held = [len(row.tokens) for row in kept]
        new = [len(rows[i]) - len(row.prompt) - len(row.tokens) for i, row in zip(members, kept, strict=True)]
        device = next(iter(prompts[0][1].values()))[0].device
        index = torch.tensor([group for group, (_, own) in enumerate(groups) for _ in own], device=device)
        contents = [cast(RowContents, row.contents) for row in kept]
        return GroupCache.resume(prompts, index, contents, list(zip(held, new, strict=True))), new

    def places(self, most: int) -> dict[int, tuple[int, int]]:
        """Return where rows of this turn lie in the buffers, and how many tokens of each are held there.

        Of no more than `most`; the others are dropped.
        """
        for row in sorted(self._waiting)[most:]:
            self._drop_waiting(row)
        rows = sorted(self._waiting)
        return {
            row: (cast(Place, kept.contents).row, len(kept.prompt) + len(kept.tokens))
            for row, kept in zip(rows, self._take(rows), strict=True)
        }

    def _take(self, rows: Sequence[int]) -> list[KeptRow]:
        kept = [self._waiting.pop(row) for row in rows]
        self.reused_tokens += sum(len(row.prompt) + len(row.tokens) for row in kept)
        return kept

    def keep(self, prompt: Prompt, tokens: Prompt, contents: RowContents | Place) -> None:
        """Keep a row that has ended its turn."""
        self._ended.append(KeptRow(prompt, tokens, contents))

    def drop(self, prompt: Prompt, tokens: Prompt) -> None:
        """Note that a row that has ended its turn is not kept: it has not changed when it is read again."""
        self._dropped.setdefault(prompt, []).append(tokens)

    def finish(self, prompts: Sequence[Prompt], cache: GroupCache) -> None:
        """Keep the prompts of a cache whose rows have all ended their turn."""
        self._prompts |= {prompts[number]: layers for number, layers in cache.take_prompts().items()}
        self._drop_unused_prompts()

    def make_room(self, tokens: int) -> None:
        """Drop copies until no more than so many tokens are held here: those that may not come back first."""
        while self._ended or self._waiting:
            rows = [*self._ended, *self._waiting.values()]
            of_rows = sum(len(row.tokens) + self.state_tokens for row in rows)
            if sum(map(len, self._prompts)) + of_rows <= tokens:
                return
            if self._ended:
                row = self._ended.pop()
                self.drop(row.prompt, row.tokens)
            else:
                self._drop_waiting(max(self._waiting))
            self._drop_unused_prompts()

    def _drop_waiting(self, row: int) -> None:
        kept = self._waiting.pop(row)
        self.drop(kept.prompt, kept.tokens)
        self.reread_rows += 1

    def clear(self) -> None:
        """Drop everything that is held."""
        self._prompts, self._waiting, self._ended, self._dropped = {}, {}, [], {}

    def _drop_unused_prompts(self) -> None:
        used = {row.prompt for row in (*self._ended, *self._waiting.values())}
        self._prompts = {prompt: layers for prompt, layers in self._prompts.items() if prompt in used}
