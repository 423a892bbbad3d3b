"""Which prompts a step trains on: the order over a dataset, prompts for refilling, and batches joined by rows.

A group whose rewards are all equal has no advantage and teaches nothing. Refilling replaces such groups within the step
by groups of further prompts (`refill_batch`). Pure functions and two small classes; `refill.py` connects them to TRL.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

STATE_FILE = "sampling_state.json"


class GroupSampler(Sampler[int]):
    """Yield dataset rows as TRL's RepeatSampler does, each prompt `num_generations` times, each round `repeats` times.

    The order is RepeatSampler's, except that it depends on the epoch alone, so that a run resumed in a later epoch
    continues where it stopped (trl 1.16 starts again with the first epoch's order).
    """

    def __init__(
        self, size: int, num_generations: int, prompts_per_round: int, repeats: int, shuffle: bool, seed: int
    ) -> None:
        self.size = size
        self.num_generations = num_generations
        self.prompts_per_round = prompts_per_round
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        rounds = self.size // self.prompts_per_round
        return rounds * self.prompts_per_round * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        rounds = self.size // self.prompts_per_round
        order = self._order()
        for number in range(rounds):
            chosen = order[number * self.prompts_per_round : (number + 1) * self.prompts_per_round]
            for _ in range(self.repeats):
                for row in chosen:
                    yield from [row] * self.num_generations

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch):
            torch.randperm(self.size, generator=generator)
        return torch.randperm(self.size, generator=generator).tolist()


class PromptQueue:
    """An endless shuffled walk over the rows of a dataset, for refilling."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.taken = 0

    def take(self) -> int:
        """Return the next row."""
        epoch, position = divmod(self.taken, self.size)
        self.taken += 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_000 + epoch)
        return int(torch.randperm(self.size, generator=generator)[position])


def shuffle_groups(batch: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """Permute whole groups of a scored batch, so that its parts pack as many completions per prompt as possible."""
    count = len(batch["prompt_ids"]) // num_generations
    rows = (torch.randperm(count).unsqueeze(1) * num_generations + torch.arange(num_generations)).reshape(-1)
    return {
        key: value[rows.to(value.device)] if isinstance(value, Tensor) and value.ndim > 0 else value
        for key, value in batch.items()
    }


def groups_without_signal(advantages: Tensor, num_generations: int) -> list[int]:
    """Return the groups whose advantages are all zero."""
    return (advantages.view(-1, num_generations) == 0).all(1).nonzero().squeeze(1).tolist()


# Per-completion tensors of a scored batch: on which side they are padded, and with what (None: the pad token).
PADDING: dict[str, tuple[str, int | None]] = {
    "prompt_ids": ("left", None),
    "prompt_mask": ("left", 0),
    "completion_ids": ("right", None),
    "completion_mask": ("right", 0),
    "tool_mask": ("right", 1),
    "old_per_token_logps": ("right", 0),
    "ref_per_token_logps": ("right", 0),
    "sampling_per_token_logps": ("right", 0),
    "sampled_logps": ("right", 0),
    "rollout_entropies": ("right", 0),
}
# What our decoder notes and TRL's own generation does not: of a batch joined from both, it is left out.
NOTED = {"sampled_logps", "rollout_entropies"}


KNOWN_KEYS = PADDING.keys() | {"advantages", "num_items_in_batch"}  # of a scored batch whose rows can be replaced


def require_group_advantages(what: str, scale_rewards: str, aggregation: str) -> None:
    """Check that a group's advantages depend on that group alone, so that it can be put into another batch.

    Raises:
        ValueError: they do not; `what` needs it.
    """
    if scale_rewards == "batch" or aggregation == "normalize_then_sum":
        raise ValueError(
            f"{what} needs advantages that depend on one group only: not scale_rewards='batch', nor "
            "multi_objective_aggregation='normalize_then_sum'"
        )


def refill_batch(
    batch: dict[str, Any], rows: Sequence[int], extra: dict[str, Any], extra_rows: Sequence[int], pad_token_id: int
) -> dict[str, Any]:
    """Return `batch` with `rows` replaced by `extra_rows` of another scored batch.

    Raises:
        KeyError: a tensor that no decoder notes is in only one of them, or it is not known how to pad it.
    """
    merged: dict[str, Any] = {}
    left_out = {"num_items_in_batch"} | (NOTED & (batch.keys() ^ extra.keys()))
    for key in (batch.keys() | extra.keys()) - left_out:
        mine, theirs = batch[key], extra[key]
        if key != "advantages":
            side, value = PADDING[key]
            width = max(mine.size(1), theirs.size(1))
            mine, theirs = (
                _pad(states, width, side, pad_token_id if value is None else value) for states in (mine, theirs)
            )
        merged[key] = mine.index_copy(0, _index(rows, mine), theirs[_index(extra_rows, mine)])
    mask = merged["completion_mask"]
    merged["num_items_in_batch"] = (mask * merged["tool_mask"] if "tool_mask" in merged else mask).sum()
    return merged


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.long, device=like.device)


def _pad(states: Tensor, width: int, side: str, value: int) -> Tensor:
    missing = width - states.size(1)
    return torch.nn.functional.pad(states, (missing, 0) if side == "left" else (0, missing), value=value)


def save_state(folder: Path, queue: PromptQueue) -> None:
    """Write how far the queue has come into a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps({"taken": queue.taken}))


def load_state(folder: Path, queue: PromptQueue) -> None:
    """Restore how far the queue had come, if the checkpoint says so; solve rates of an older release are ignored."""
    if (folder / STATE_FILE).is_file():
        queue.taken = json.loads((folder / STATE_FILE).read_text())["taken"] or 0
