"""`WarmupTrainer`: TRL's SFTTrainer on rows whose tokens are known, a step's rows divided to fit the memory.

TRL keeps the training: batches, optimizer, schedule, logs. The log-probabilities come from the packed engine that GRPO
uses, where it serves the model: no padding, only completion tokens scored. Elsewhere TRL's own loss is taken; they are
the same number. What is added is what every training here has: whole checkpoints, no NaN in the weights, the mean
gradient of several processes, and a step that runs out of memory is repeated in smaller parts with the same gradient.
Read in trl 1.14.0 and 1.16.0.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.models.utils import disable_gradient_checkpointing

from grpo_lite.engine import attention
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.engine.packing import pack_rows
from grpo_lite.engine.quantised import keep_weights_unpacked
from grpo_lite.engine.recompute import keep_less
from grpo_lite.engine.score import Scoring, base_model, score, scores_from_logits
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.task.traces import Trace
from grpo_lite.trainer.finite import Faults, LossScale
from grpo_lite.trainer.journal import Journal
from grpo_lite.trainer.parallel import Peers
from grpo_lite.trainer.recovery import random_state, set_random_state, smaller_budgets, until_it_fits
from grpo_lite.trainer.state import Checkpoints
from grpo_lite.trainer.support import model_obstacle, pack_attention

logger = logging.getLogger(__name__)
BUDGET = "warmup_tokens"  # of EngineOptions
SCORED, READ = "tokens scored", "tokens read"  # in a step's figures: those in the loss, and all
IGNORED = -100  # the label of tokens outside the loss


@dataclass(frozen=True)
class Order:
    """Which rows each step takes.

    Args:
        steps: indices of rows, a list for each optimizer step.
        epochs: passes over the rows that these steps make.
    """

    steps: list[list[int]]
    epochs: float


def order_rows(
    lengths: Sequence[int], tokens: int, steps: int | None, epochs: float | None, seed: int, least: int = 1
) -> Order:
    """Divide shuffled passes over the rows into steps of at most so many tokens.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a step; at least `least` rows are taken all the same, and no row twice beyond those.
        steps: how many steps; None: as many as `epochs` take.
        epochs: passes over the rows; None with `steps`.
        seed: of the order; each pass has its own.
        least: fewest rows of a step, the number of processes.
    """
    wanted = math.inf if steps is not None else math.ceil((1.0 if epochs is None else epochs) * len(lengths))
    divided: list[list[int]] = [[]]
    taken = filled = 0
    for index in _passes(len(lengths), seed):
        step = divided[-1]
        is_twice = index in step or len(set(step)) < len(step)
        if len(step) >= least and (filled + lengths[index] > tokens or is_twice):
            if len(divided) == steps:
                break
            divided.append(step := [])
            filled = 0
        step.append(index)
        filled, taken = filled + lengths[index], taken + 1
        if taken >= wanted and len(step) >= least:
            break
    return Order(divided, taken / len(lengths))


def _passes(rows: int, seed: int) -> Iterator[int]:
    for number in itertools.count():
        order = list(range(rows))
        random.Random(f"{seed} {number}").shuffle(order)
        yield from order


class StepRows:
    """The trainer's collator: turns what the dataset holds of a step into padded tensors.

    Args:
        rows: all rows, of which a step holds indices.
        pad: the id of the padding.
    """

    def __init__(self, rows: Sequence[Trace], pad: int) -> None:
        self.rows, self.pad = rows, pad

    def __call__(self, steps: list[dict[str, Any]]) -> dict[str, Tensor]:
        (step,) = steps
        return self.padded([self.rows[index] for index in step["rows"]])

    def padded(self, rows: Sequence[Trace]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels `(rows, longest)`, padded on the right, longest row first."""
        rows = sorted(rows, key=len, reverse=True)
        ids = torch.full((len(rows), len(rows[0])), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor([*row.prompt_ids, *row.completion_ids])
            mask[i, : len(row)] = 1
            written = torch.tensor(row.completion_ids)
            if row.tool_mask is not None:
                written = written.masked_fill(torch.tensor(row.tool_mask) == 0, IGNORED)
            labels[i, len(row.prompt_ids) : len(row)] = written
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def as_dataset(order: Order, rows: Sequence[Trace], world: int) -> Dataset:
    """Return a dataset with one row for each step and process, in the order in which the processes take them."""
    parts: list[dict[str, list[int]]] = []
    for step in order.steps:
        by_length = sorted(step, key=lambda index: len(rows[index]), reverse=True)
        parts += [{"rows": by_length[rank::world]} for rank in range(world)]
    return Dataset.from_list(parts)


def divide(inputs: dict[str, Tensor], tokens: int | None) -> Iterator[dict[str, Tensor]]:
    """Yield consecutive rows of a padded batch, each part of at most `tokens` padded tokens and without empty columns.

    Args:
        inputs: tensors `(rows, longest)`, the longest row first.
        tokens: None: all rows at once; a part has at least one row.
    """
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    start = 0
    while start < len(lengths):
        width = lengths[start]
        count = len(lengths) if tokens is None else max(1, tokens // width)
        yield {name: values[start : start + count, :width] for name, values in inputs.items()}
        start += count


class WarmupTrainer(SFTTrainer):
    """SFTTrainer whose batch is a step.

    Args:
        options: the switches of the engine, with the budget `warmup_tokens`.
        show: gets lines for people.
        advice: shown if a step cannot be divided further; the cheapest changes.
        recover: whether a step that runs out of memory is repeated in smaller parts.
        held: rows that are not trained on, whose loss is logged as `heldout_loss`.
        own_layers: whether the LoRA layers compute as ours do; not where another library has replaced them (Unsloth).
        epochs: passes over the rows that all steps make, for the log.
    """

    def __init__(
        self,
        *args: Any,
        options: EngineOptions,
        show: Callable[[str], None],
        advice: str | None = None,
        recover: bool = True,
        held: Sequence[Trace] = (),
        epochs: float = 1.0,
        own_layers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._total_train_tokens: int = 0  # SFTTrainer's
        self._metrics: dict[str, dict[str, list[float]]]  # SFTTrainer's
        self.options, self.show, self.recover, self.held, self.epochs = options, show, recover, held, epochs
        self.advice = advice or "Lower warmup.max_completion_tokens, or model.load_in."
        self.journal = Journal(self)
        self.peers = Peers(self)
        self.faults = Faults(self, options.max_skipped_steps, self.peers.all_agree)
        self.loss_scale = LossScale(self, show)
        self.checkpoints = Checkpoints(self, self.peers, facts=lambda: {"budget": {BUDGET: self.options.warmup_tokens}})
        self._packable: bool | None = None  # decided before the first loss
        keep_weights_unpacked(self.model)
        if own_layers:
            shorten_lora(self.model)
            if not self.args.gradient_checkpointing:
                keep_less(self.model)
        if held:
            self.add_callback(HeldOutLoss(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.journal.start()
        self._is_packable()
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    # A step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model = self.peers.unwrapped(model)
        before = random_state()

        def lower(failure: str) -> None:
            model.zero_grad(set_to_none=True)
            set_random_state(before)
            self._halve(inputs, failure)

        begun, count = time.perf_counter(), num_items_in_batch  # of all processes
        if count is None:
            count = int(self.peers.sums([float((inputs["labels"] != IGNORED).sum())])[0])
        loss, figures = until_it_fits(lambda: self._in_parts(model, inputs, count), lower)
        self.journal.log_with_step("step_time", time.perf_counter() - begun)
        self._log_figures(figures)
        return self.peers.average(self.faults.note_loss(loss))

    def _in_parts(self, model: nn.Module, inputs: dict[str, Tensor], count: Any) -> tuple[Tensor, dict[str, float]]:
        """Return the step's loss, its gradient added up part by part, and its figures, summed over tokens.

        A part is a micro-step of transformers' own, so what patches that (Unsloth) holds here too.
        """
        total, figures = torch.zeros((), device=self.accelerator.device), defaultdict[str, float](float)
        for part in divide(self._prepare_inputs(inputs), self.options.warmup_tokens):
            scored = int((part["labels"] != IGNORED).sum())
            with self._unlogged() as log:
                total += super().training_step(model, dict(part), num_items_in_batch=count)
            means = {name: scored * values[-1] for name, values in log.items()}
            for name, value in {**means, SCORED: scored, READ: int(part["attention_mask"].sum())}.items():
                figures[name] += value
        return total, figures

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a part's share of the mean loss of the step's completion tokens: packed, or TRL's own."""
        if return_outputs or num_items_in_batch is None or not self._is_packable():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        packed = pack_rows(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        top1 = torch.zeros_like(packed.targets, dtype=torch.bool)
        logps, entropies = score(model, packed, Scoring(temperature=1.0), self.accelerator.autocast, top1)
        assert entropies is not None
        self._metrics["train"]["entropy"].append(float(entropies.mean()))
        self._metrics["train"]["mean_token_accuracy"].append(float(top1.float().mean()))
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return -logps.sum() / num_items_in_batch * processes

    def _is_packable(self) -> bool:
        """Return whether the packed engine serves the model and its rows; the first call checks it against logits."""
        if self._packable is None:
            reason = self._obstacle() if self.options.compute == "packed" else "compute: plain"
            if reason and self.options.compute == "packed":
                logger.warning("Packed compute is off in the warm-up, TRL's own is used: %s.", reason)
            self._packable = reason is None
        return self._packable

    def _obstacle(self) -> str | None:
        model, autocast = self.accelerator.unwrap_model(self.model), self.accelerator.autocast
        if reason := model_obstacle(model):
            return reason
        inner = base_model(model)
        longest = max((len(row) for row in self.data_collator.rows), default=0)
        if border := attention.dynamic_rope_border(inner, longest):
            return f"{type(inner).__name__} changes its rotary frequencies at {border} tokens, and rows cross that"
        with disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs):
            plain = partial(scores_from_logits, model, autocast, 1.0)
            return pack_attention(model, Scoring(temperature=1.0), autocast, plain)

    @contextmanager
    def _unlogged(self) -> Iterator[dict[str, list[float]]]:
        """Let TRL's loss leave its metrics, which are of one part in one process, in the dictionary yielded."""
        metrics, tokens = self._metrics, self._total_train_tokens
        log: dict[str, list[float]] = defaultdict(list)
        self._metrics = {"train": log, "eval": defaultdict(list)}
        try:
            with self.peers.silent():
                yield log
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens
            log.pop("num_tokens", None)

    def _log_figures(self, figures: dict[str, float]) -> None:
        """Log TRL's metrics as means over the scored tokens of the step, of all its parts and processes."""
        names = sorted(figures)
        sums = dict(zip(names, self.peers.sums([figures[name] for name in names]), strict=True))
        scored = sums.pop(SCORED)
        self._total_train_tokens += int(sums.pop(READ))
        for name, value in sums.items():
            self.journal.log_with_step(name, value / max(1.0, scored))
        self.journal.log_with_step("num_tokens", self._total_train_tokens)

    def _halve(self, inputs: dict[str, Tensor], failure: str) -> None:
        rows, longest = inputs["input_ids"].shape
        step = self.state.global_step + 1
        budget = min(self.options.warmup_tokens or rows * longest, rows * longest)
        free_memory()
        if not self.recover or budget <= longest:
            nothing_left = ", with nothing left to divide" if self.recover else ""
            where = f"out of memory in step {step} of the warm-up{nothing_left}"
            raise MemoryBudgetError(f"{where}: {failure}\n{self.advice}")
        self.options = replace(self.options, warmup_tokens=max(longest, budget // 2))
        self.show(
            f"out of memory in step {step} of the warm-up: at most {self.options.warmup_tokens} tokens now go through "
            f"the model at once, the same step is repeated ({failure})"
        )

    def held_out_loss(self) -> float:
        """Return the mean loss of a completion token over the held rows; changes nothing else."""
        collator = self.data_collator
        inputs = self._prepare_inputs(collator.padded(self.held))
        count = (inputs["labels"] != IGNORED).sum()
        total = 0.0
        model = self.accelerator.unwrap_model(self.model)
        for part in divide(inputs, self.options.warmup_tokens or inputs["input_ids"].numel()):
            with torch.no_grad(), self.compute_loss_context_manager(), self._unlogged():
                total += float(self.compute_loss(model, dict(part), num_items_in_batch=count))
        return total / self.accelerator.num_processes if self.args.average_tokens_across_devices else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = self.epochs * self.state.global_step / self.state.max_steps  # of the rows, not the batches
        self.journal.write_figures()
        super().log({**logs, **(self.loss_scale.metrics() if "loss" in logs else {})}, start_time)

    # A checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save(partial(super()._save_checkpoint, model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.folder or super()._get_output_dir(trial))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: `push` writes one from what was measured."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Continue the counts too, and use the smaller of the budgets in the checkpoint and now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.checkpoints.load(Path(checkpoint))
        self.options = smaller_budgets(self.options, Path(checkpoint), (BUDGET,))
        logged = [record["num_tokens"] for record in self.state.log_history if "num_tokens" in record]
        self._total_train_tokens = int(logged[-1]) if logged else 0


class HeldOutLoss(TrainerCallback):
    """Logs the loss on held rows four times, the last time at the last step."""

    TIMES = 4

    def __init__(self, trainer: WarmupTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % math.ceil(state.max_steps / self.TIMES) and state.global_step != state.max_steps:
            return
        with self.trainer.journal.spending("heldout"):
            loss = self.trainer.held_out_loss()
        self.trainer.journal.log_with_step("heldout_loss", loss)
