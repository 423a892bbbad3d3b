"""`PromptOrder`: which prompts TRL's GRPOTrainer trains on, in rounds that keep groups whole, with refilling.

Refilling generates for further prompts where a group's rewards are all equal; see `prompts.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.trainer.utils import split_tensor_dict

from grpo_lite.task.tokens import prompt_key
from grpo_lite.trainer.prompts import (
    KNOWN_KEYS,
    GroupSampler,
    PromptQueue,
    groups_without_signal,
    load_state,
    refill_batch,
    require_group_advantages,
    save_state,
    shuffle_groups,
)

Score = Callable[[Any], dict[str, Any]]  # generates for examples and scores: TRL's _generate_and_score_completions


class PromptOrder:
    """The order over the dataset, the round of generation in use, and the queue for refilling.

    Raises:
        ValueError: refilling is asked for with a dataset or with advantages that do not allow it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.queue: PromptQueue | None = None
        if trainer.options.refill == 0:
            return
        if not isinstance(trainer.train_dataset, Dataset):
            raise ValueError("refill needs a dataset of known length, not an iterable one")
        require_group_advantages("refill", trainer.scale_rewards, trainer.multi_objective_aggregation)
        self.queue = PromptQueue(len(trainer.train_dataset), trainer.args.seed)

    def sampler(self, dataset: Any) -> GroupSampler:
        """Return the order over the dataset; TRL's, but a later epoch can be entered directly."""
        trainer = self.trainer
        return GroupSampler(
            len(trainer.train_dataset if dataset is None else dataset),
            num_generations=trainer.num_generations,
            prompts_per_round=trainer.args.generation_batch_size // trainer.num_generations,
            repeats=trainer.num_iterations * trainer.args.steps_per_generation,
            shuffle=trainer.shuffle_dataset,
            seed=trainer.args.seed,
        )

    def inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return this micro-step's part of a round, as TRL's `_prepare_inputs`, but shuffled by whole groups."""
        trainer, steps = self.trainer, self.trainer.args.steps_per_generation
        if trainer._step % (steps * trainer.num_iterations) == 0 or trainer._buffered_inputs is None:
            scored = trainer._generate_and_score_completions(generation_batch)
            trainer._buffered_inputs = split_tensor_dict(shuffle_groups(scored, trainer.num_generations), steps)
        return trainer._buffered_inputs[trainer._step % steps]

    def refill(self, score: Score, inputs: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Any]:
        """Replace groups without a signal by groups of further prompts, at most `refill` of which are generated.

        TRL's metrics keep describing the first draw, which is an unbiased one; tokens count everything generated.
        """
        trainer, queue = self.trainer, self.queue
        if queue is None or not trainer.model.training or not output.keys() <= KNOWN_KEYS:
            return output
        size, state = trainer.num_generations, trainer.state
        dead = groups_without_signal(output["advantages"], size)
        drawn = len(output["advantages"]) // size
        tried = replacements = 0
        tokens_before = state.num_input_tokens_seen
        used = {prompt_key(example["prompt"]) for example in inputs}
        while dead and tried < trainer.options.refill:
            examples = self._further_examples(queue, min(len(dead), trainer.options.refill - tried), used)
            if not examples:
                break
            with self._unlogged():
                extra = score([dict(example) for example in examples for _ in range(size)])
            tried += len(examples)
            without = set(groups_without_signal(extra["advantages"], size))
            good = [group for group in range(len(examples)) if group not in without]
            replaced, dead = dead[: len(good)], dead[len(good) :]
            pad_token_id = int(trainer._tokenizer.pad_token_id)
            output = refill_batch(output, _rows(replaced, size), extra, _rows(good, size), pad_token_id)
            replacements += len(good)
        metrics = trainer._metrics["train"]
        metrics["num_tokens"] = [state.num_input_tokens_seen]
        metrics["refill/groups_generated"].append(tried)
        metrics["refill/groups_kept"].append(replacements)
        metrics["refill/extra_tokens"].append(state.num_input_tokens_seen - tokens_before)
        metrics["refill/frac_without_signal"].append(len(dead) / drawn)
        return output

    def _further_examples(self, queue: PromptQueue, count: int, used: set[str]) -> list[dict[str, Any]]:
        """Take prompts that are not yet in this step; none are left once the whole dataset is in it."""
        examples: list[dict[str, Any]] = []
        for _ in range(queue.size):
            if len(examples) == count:
                break
            example = self.trainer.train_dataset[queue.take()]
            key = prompt_key(example["prompt"])
            if key not in used:
                used.add(key)
                examples.append(example)
        return examples

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Let TRL generate and score without metrics and without changing the logged completions."""
        trainer = self.trainer
        metrics, logs = trainer._metrics, trainer._logs
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        trainer._logs = {
            key: type(value)(value) if not isinstance(value, dict) else defaultdict(list) for key, value in logs.items()
        }
        try:
            yield
        finally:
            trainer._metrics, trainer._logs = metrics, logs

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Write how far the queue has come into a checkpoint."""
        if self.queue is not None and self.trainer.args.should_save:
            save_state(folder, self.queue)

    def load(self, folder: Path) -> None:
        """Continue where a checkpoint was saved."""
        if self.queue is not None:
            load_state(folder, self.queue)
        if not self.trainer.options.is_plain:
            # TRL does not save its count of micro-steps, so that rounds of generation would start out of step with
            # the data loader when a round spans several optimizer steps (trl 1.16).
            self.trainer._step = self._micro_steps(self.trainer.state.global_step)

    def _micro_steps(self, steps: int) -> int:
        """Return after how many micro-steps `steps` optimizer steps are done; an epoch's last one may be short."""
        trainer, accumulation = self.trainer, self.trainer.args.gradient_accumulation_steps
        if not isinstance(trainer.train_dataset, Dataset):
            return steps * accumulation
        rows = trainer._train_batch_size * trainer.args.steps_per_generation
        per_epoch = max(1, len(trainer._get_train_sampler()) // rows)
        epochs, rest = divmod(steps, math.ceil(per_epoch / accumulation))
        return epochs * per_epoch + rest * accumulation


def _rows(groups: list[int], size: int) -> list[int]:
    return [group * size + member for group in groups for member in range(size)]
