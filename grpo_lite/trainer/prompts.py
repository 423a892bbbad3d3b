"""Which prompts a step trains on: the order over a dataset, remembered solve rates, and prompts for refilling.

A group whose rewards are all equal has no advantage and teaches nothing. Two remedies, both optional: refilling
replaces such groups within the step by groups of further prompts (`refill_batch`), and the difficulty-aware order
prefers prompts whose remembered solve rate lies in the middle. What they remember is saved with checkpoints.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

STATE_FILE = "sampling_state.json"

# A visit counts half as much at the next one: solve rates drift while the policy learns.
FORGETTING = 0.5
# How strongly the middle is preferred: the weight is the variance of the solve rate to this power.
SHARPNESS = 2.0
# The least weight relative to a prompt solved half the time, so that none is given up for good.
LEAST_WEIGHT = 0.02


class SolveRates:
    """Remembers how often each prompt was solved.

    Rewards of any scale are read as solve rates between the lowest and the highest reward met so far.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        """Prepare for the prompts with these keys; equal keys share a memory."""
        self.index = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        self.rows = torch.tensor([self.index[key] for key in keys])  # dataset row -> memory
        self.rounds = 0  # of generation that have been recorded
        self.lowest, self.highest = float("inf"), float("-inf")
        self.total = torch.zeros(len(self.index))  # discounted sum of rewards
        self.count = torch.zeros(len(self.index))  # discounted number of them
        self._latest: list[tuple[int, list[float]]] = []  # memory, rewards
        self._pending: list[tuple[int, list[float]]] = []

    def record(self, key: str, rewards: Sequence[float]) -> None:
        """Note the rewards of one group of the current round."""
        known = [reward for reward in rewards if reward == reward]
        if key not in self.index or not known:
            return
        self._latest.append((self.index[key], known))

    def end_round(self) -> None:
        """Let the recorded groups count from the next call of `weights` but one.

        A data loader fetches one batch ahead or not, depending on the accumulation steps. With this delay the choice
        is the same either way, and the same after resuming.
        """
        self._fold()
        self._pending, self._latest = self._latest, []
        self.rounds += 1

    def _fold(self) -> None:
        for index, rewards in self._pending:
            self.total[index] = FORGETTING * self.total[index] + sum(rewards)
            self.count[index] = FORGETTING * self.count[index] + len(rewards)
            self.lowest, self.highest = min(self.lowest, *rewards), max(self.highest, *rewards)
        self._pending = []

    def weights(self, choosing_round: int) -> Tensor:
        """Return each dataset row's weight for choosing a round's prompts, from the rounds before the last."""
        if self.rounds < choosing_round:  # chosen ahead: what is pending is the round before the last
            self._fold()
        if self.highest > self.lowest:
            solved = (self.total - self.count * self.lowest) / (self.highest - self.lowest)
        else:  # all rewards alike so far: nothing says which end of the scale they are
            solved = self.count / 2.0
        rate = (solved + 1.0) / (self.count + 2.0)  # an unseen prompt counts as solved half the time
        return ((4.0 * rate * (1.0 - rate)) ** SHARPNESS).clamp_min(LEAST_WEIGHT)[self.rows]

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
        return {
            "rounds": self.rounds,
            "lowest": self.lowest,
            "highest": self.highest,
            "total": self.total.tolist(),
            "count": self.count.tolist(),
            "pending": self._pending,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of the same dataset."""
        self.rounds, self.lowest, self.highest = state["rounds"], state["lowest"], state["highest"]
        self.total, self.count = torch.tensor(state["total"]), torch.tensor(state["count"])
        self._pending = [(int(index), list(rewards)) for index, rewards in state["pending"]]


class GroupSampler(Sampler[int]):
    """Yield dataset rows as TRL's RepeatSampler does, each prompt `num_generations` times, each round `repeats` times.

    The order is RepeatSampler's, except that it depends on the epoch alone, so that a run resumed in a later epoch
    goes on where it stopped (trl 1.16 starts again with the first epoch's order). With `rates`, each round's prompts
    are drawn by their weights instead.
    """

    def __init__(
        self,
        size: int,
        num_generations: int,
        prompts_per_round: int,
        repeats: int,
        shuffle: bool,
        seed: int,
        rates: SolveRates | None = None,
    ) -> None:
        self.size = size
        self.num_generations = num_generations
        self.prompts_per_round = prompts_per_round
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self.rates = rates
        self.epoch = 0

    def __len__(self) -> int:
        rounds = self.size // self.prompts_per_round
        return rounds * self.prompts_per_round * self.num_generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        rounds = self.size // self.prompts_per_round
        order = self._order()
        for number in range(rounds):
            if self.rates is None:
                chosen = order[number * self.prompts_per_round : (number + 1) * self.prompts_per_round]
            else:
                chosen = self._draw(self.rates, self.epoch * rounds + number)
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

    def _draw(self, rates: SolveRates, number: int) -> list[int]:
        """Draw without replacement with probabilities proportional to the weights."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        waiting = torch.empty(self.size, dtype=torch.float64).exponential_(generator=generator)
        return (waiting / rates.weights(number)).topk(self.prompts_per_round, largest=False).indices.tolist()


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


def prompt_key(prompt: Any) -> str:
    """Return what identifies a prompt, text or messages."""
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


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
    "rollout_entropies": ("right", 0),
}


def refill_batch(
    batch: dict[str, Any], rows: Sequence[int], extra: dict[str, Any], extra_rows: Sequence[int], pad_token_id: int
) -> dict[str, Any]:
    """Return `batch` with `rows` replaced by `extra_rows` of another scored batch.

    Raises:
        KeyError: a tensor is in only one of them, or it is not known how to pad it.
    """
    merged: dict[str, Any] = {}
    for key in batch.keys() | extra.keys():
        if key == "num_items_in_batch":
            continue
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


def save_state(folder: Path, rates: SolveRates | None, queue: PromptQueue | None) -> None:
    """Write what sampling remembers into a checkpoint."""
    state = {"rates": rates and rates.state(), "taken": queue and queue.taken}
    (folder / STATE_FILE).write_text(json.dumps(state))


def load_state(folder: Path, rates: SolveRates | None, queue: PromptQueue | None) -> None:
    """Restore what sampling remembered from a checkpoint, if it has such a memory."""
    if not (folder / STATE_FILE).is_file():
        return
    state = json.loads((folder / STATE_FILE).read_text())
    if rates is not None and state["rates"] is not None:
        rates.restore(state["rates"])
    if queue is not None and state["taken"] is not None:
        queue.taken = state["taken"]
