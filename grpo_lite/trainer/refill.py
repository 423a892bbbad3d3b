"""`SamplingGRPOTrainer`: which prompts TRL's GRPOTrainer trains on, and what it remembers of them across checkpoints.

The part of the seam to TRL (`trainer.py`) that concerns data: the order over the dataset, remembered solve rates,
groups without a signal replaced by groups of further prompts. Read in trl 1.14.0 and 1.16.0.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grpo_lite.engine.options import EngineOptions
from grpo_lite.trainer.journal import TimedGRPOTrainer
from grpo_lite.trainer.prompts import (
    PADDING,
    GroupSampler,
    PromptQueue,
    SolveRates,
    groups_without_signal,
    load_state,
    prompt_key,
    refill_batch,
    save_state,
)


class SamplingGRPOTrainer(TimedGRPOTrainer):
    """GRPOTrainer with refilling and a difficulty-aware order; see `EngineOptions`."""

    # TRL's own attributes that we also write
    _logs: dict[str, Any]
    _step: int

    def __init__(self, *args: Any, options: EngineOptions | None = None, **kwargs: Any) -> None:
        self.options = options or EngineOptions()
        super().__init__(*args, **kwargs)
        self._rates: SolveRates | None = None
        self._queue: PromptQueue | None = None
        self._rewards: Tensor | None = None  # of the last generation, weighted and summed
        if self.options.refill == 0 and not self.options.difficulty:
            return
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError("refill and difficulty need a dataset of known length, not an iterable one")
        if self.options.difficulty:
            self._rates = SolveRates([prompt_key(prompt) for prompt in self.train_dataset["prompt"]])
        if self.options.refill:
            if self.scale_rewards == "batch" or self.multi_objective_aggregation == "normalize_then_sum":
                raise ValueError(
                    "refill needs advantages that depend on one group only: not scale_rewards='batch', nor "
                    "multi_objective_aggregation='normalize_then_sum'"
                )
            self._queue = PromptQueue(len(self.train_dataset), self.args.seed)

    # The order over the dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self.options.is_plain:
            return super()._get_train_sampler(dataset)
        return GroupSampler(
            len(self.train_dataset if dataset is None else dataset),
            num_generations=self.num_generations,
            prompts_per_round=self.args.generation_batch_size // self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            rates=self._rates,
        )

    # A round of generation

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = self._score_generation(inputs)
        if not self.model.training:
            return output
        self._remember(inputs)
        if self._queue is not None and output.keys() <= PADDING.keys() | {"advantages", "num_items_in_batch"}:
            output = self._refill(self._queue, inputs, output)
        if self._rates is not None:
            self._rates.end_round()
        return output

    def _score_generation(self, inputs: Any) -> dict[str, Any]:
        """Generate completions, score them and compute advantages: TRL's step, for subclasses to extend."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
        self._rewards = weighted
        self._log_rows(*args)
        return rewards

    def _log_rows(self, inputs: Any, prompts: Any, completions: Any, completion_ids: list[list[int]]) -> None:
        """Keep each completion's length, whether the cap cut it off, and its gold beside TRL's logged completions."""
        ends = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        self._log_completion_extra("completion_tokens", [len(ids) for ids in completion_ids])
        self._log_completion_extra("completion_truncated", [not ids or ids[-1] not in ends for ids in completion_ids])
        self._log_completion_extra("gold", [row.get("answer") for row in inputs])

    def _remember(self, inputs: list[dict[str, Any]]) -> None:
        if self._rates is None or self._rewards is None:
            return
        size = self.num_generations
        for start in range(0, len(inputs), size):
            self._rates.record(prompt_key(inputs[start]["prompt"]), self._rewards[start : start + size].tolist())

    def _refill(self, queue: PromptQueue, inputs: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Any]:
        """Replace groups without a signal by groups of further prompts, at most `refill` of which are generated.

        TRL's metrics keep describing the first draw, which is an unbiased one; tokens count everything generated.
        """
        size, metrics = self.num_generations, self._metrics["train"]
        dead = groups_without_signal(output["advantages"], size)
        drawn = len(output["advantages"]) // size
        tried = kept = 0
        tokens_before = self.state.num_input_tokens_seen
        pad_token_id = int(self._tokenizer.pad_token_id)
        used = {prompt_key(example["prompt"]) for example in inputs}
        while dead and tried < self.options.refill:
            examples = self._further_examples(queue, min(len(dead), self.options.refill - tried), used)
            if not examples:
                break
            extra_inputs = [dict(example) for example in examples for _ in range(size)]
            with self._unlogged():
                extra = self._score_generation(extra_inputs)
            self._remember(extra_inputs)
            tried += len(examples)
            without = set(groups_without_signal(extra["advantages"], size))
            good = [group for group in range(len(examples)) if group not in without]
            replaced, dead = dead[: len(good)], dead[len(good) :]
            output = refill_batch(output, _rows(replaced, size), extra, _rows(good, size), pad_token_id)
            kept += len(good)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        metrics["refill/groups_generated"].append(tried)
        metrics["refill/groups_kept"].append(kept)
        metrics["refill/extra_tokens"].append(self.state.num_input_tokens_seen - tokens_before)
        metrics["refill/frac_without_signal"].append(len(dead) / drawn)
        return output

    def _further_examples(self, queue: PromptQueue, count: int, used: set[str]) -> list[dict[str, Any]]:
        """Take prompts that are not yet in this step; none are left when all of the dataset is."""
        found: list[dict[str, Any]] = []
        for _ in range(queue.size):
            if len(found) == count:
                break
            example = self.train_dataset[queue.take()]
            key = prompt_key(example["prompt"])
            if key not in used:
                used.add(key)
                found.append(example)
        return found

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Let TRL generate and score without metrics and without changing the logged completions."""
        metrics, logs = self._metrics, self._logs
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs = {
            key: type(value)(value) if not isinstance(value, dict) else defaultdict(list) for key, value in logs.items()
        }
        try:
            yield
        finally:
            self._metrics, self._logs = metrics, logs

    # Checkpoints

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: TRL's has placeholders for licence and base; `push` writes one from what was measured."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        card = Path(output_dir or self.args.output_dir) / "README.md"
        there = card.exists()
        super()._save(output_dir, state_dict)
        if not there:
            card.unlink(missing_ok=True)  # PEFT's, an empty form with a path of this machine

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if (self._rates or self._queue) and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_state(Path(self._get_output_dir(trial=trial)) / folder, self._rates, self._queue)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        load_state(Path(checkpoint), self._rates, self._queue)
        if not self.options.is_plain:
            # TRL does not save its count of micro-steps, so that rounds of generation would start out of step with
            # the data loader when a round spans several optimizer steps (trl 1.16).
            self._step = self._micro_steps(self.state.global_step)

    def _micro_steps(self, steps: int) -> int:
        """Return after how many micro-steps `steps` optimizer steps are done; an epoch's last one may be short."""
        accumulation = self.args.gradient_accumulation_steps
        if not isinstance(self.train_dataset, Dataset):
            return steps * accumulation
        rows = self._train_batch_size * self.args.steps_per_generation
        per_epoch = max(1, len(self._get_train_sampler()) // rows)
        epochs, rest = divmod(steps, math.ceil(per_epoch / accumulation))
        return epochs * per_epoch + rest * accumulation


def _rows(groups: list[int], size: int) -> list[int]:
    return [group * size + member for group in groups for member in range(size)]
