"""Run a real GRPO trainer on scripted completions and rewards, and say what it should have computed.

`make_trainer` builds GRPOTrainer, or any subclass of it, around a 2-layer random Llama with LoRA in fp32 on the CPU;
only the sampling is replaced. After `trainer.train()`, `replay` recomputes every micro-batch with grpo_reference:
log-probabilities from a float64 twin of the model that sees one unpadded sequence at a time, everything else in numpy.
`assert_trained_as_reference` compares the two, down to the weights after each optimizer step.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from tests.trainer.grpo_reference import (
    Array,
    Loss,
    group_advantages,
    grpo_loss,
    logits_gradient,
    masked_mean,
    token_entropies,
    token_log_probs,
    total_rewards,
)
from tests.trainer.grpo_tiny import EOS, PAD, tiny_lora, tiny_model, tiny_tokenizer, word_ids

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """One prompt and its completions in words ("a b <eos>"), each with one reward per reward function.

    Prompts differ from each other, and so do the completions of one prompt: rows are recognised by their tokens.
    """

    prompt: str
    completions: Sequence[str]
    rewards: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class MicroBatch:
    """One call of the trainer's `_compute_loss`: what it met and gave, and what the reference gives."""

    weights: Weights
    loss: float
    metrics: dict[str, float]
    reference: Loss
    reference_gradient: Weights


def make_trainer(
    output_dir: Path, groups: Sequence[Group], trainer_class: type[GRPOTrainer] = GRPOTrainer, **config: Any
) -> Any:
    """Build a recording `trainer_class` that samples the completions of `groups` and pays their rewards.

    One generation batch holds all groups. The optimizer is plain SGD without clipping or decay, so that every step
    moves a weight by exactly −lr × gradient. `config` goes to GRPOConfig.
    """
    size = len(groups[0].completions)
    settings: dict[str, Any] = {
        "num_generations": size,
        "per_device_train_batch_size": size * len(groups),
        "max_completion_length": 10,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | config
    trainer = _recording(trainer_class)(
        model=tiny_model(),
        reward_funcs=_scripted_rewards(groups),
        args=GRPOConfig(output_dir=str(output_dir), **settings),
        train_dataset=Dataset.from_list([{"prompt": group.prompt} for group in groups]),
        processing_class=tiny_tokenizer(),
        peft_config=tiny_lora(),
    )
    trainer.groups = groups
    trainer.start = None  # the weights that KL is measured against; None: the base
    # LoRA's B starts at 0, where policy and reference agree and the gradient by A vanishes: start elsewhere.
    generator = torch.Generator().manual_seed(1)
    for weight in lora_weights(trainer.model).values():
        weight.data.normal_(0.0, 0.1, generator=generator)
    return trainer


def lora_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """Give the trainable parameters by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def snapshot(model: Any) -> Weights:
    """Copy the trainable weights."""
    return {name: weight.detach().clone() for name, weight in lora_weights(model).items()}


def expected_advantages(trainer: Any) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Give the reference's advantage of each (prompt ids, completion ids)."""
    rewards = [row for group in trainer.groups for row in group.rewards]
    rows = [(_ids(group.prompt), _ids(text)) for group in trainer.groups for text in group.completions]
    totals = total_rewards(np.array(rewards, dtype=np.float64), trainer.args.reward_weights)
    advantages = group_advantages(totals, trainer.num_generations, trainer.args.scale_rewards)
    return dict(zip(rows, advantages.tolist(), strict=True))


def replay(trainer: Any) -> list[MicroBatch]:
    """Recompute all micro-batches of a finished `trainer.train()`, in order."""
    twin = get_peft_model(tiny_model(), tiny_lora()).double().eval()
    return [_replay_micro_batch(trainer, twin, record) for record in trainer.records]


def assert_trained_as_reference(trainer: Any, rtol: float = 2e-5) -> list[MicroBatch]:
    """Demand that a finished `trainer.train()` did what the reference says; give the replayed micro-batches.

    Compared: advantages, losses, metrics of each micro-batch, and the change of every LoRA weight at each optimizer
    step, which under plain SGD is −lr × gradient.
    """
    assert_advantages_as_reference(trainer)
    batches = replay(trainer)
    assert len(batches) == trainer.state.global_step * trainer.args.gradient_accumulation_steps
    for batch in batches:
        np.testing.assert_allclose(batch.loss, batch.reference.loss, rtol=rtol, atol=1e-6, err_msg="loss")
        for name, value in batch.reference.metrics.items():
            np.testing.assert_allclose(batch.metrics[name], value, rtol=rtol, atol=1e-6, err_msg=name)
    size = trainer.args.gradient_accumulation_steps
    steps = [batches[i : i + size] for i in range(0, len(batches), size)]
    after = [step[0].weights for step in steps[1:]] + [snapshot(trainer.model)]
    for step, new in zip(steps, after, strict=True):
        for name, old in step[0].weights.items():
            gradient = sum(batch.reference_gradient[name] for batch in step)
            expected = (-trainer.args.learning_rate * gradient).numpy()
            moved = (new[name].double() - old.double()).numpy()
            # Relative to the tensor's largest move; fp32 weights near 0.1 cannot hold moves below 1e-8.
            np.testing.assert_allclose(moved, expected, rtol=0, atol=rtol * abs(expected).max() + 3e-8, err_msg=name)
    return batches


def assert_advantages_as_reference(trainer: Any) -> None:
    """Demand the reference's advantages in every batch that the trainer scored."""
    expected = expected_advantages(trainer)
    assert trainer.scored
    for batch in trainer.scored:
        reference = [expected[row] for row in batch_rows(batch)]
        np.testing.assert_allclose(batch["advantages"].numpy(), reference, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class _Record:
    weights: Weights
    weights_at_generation: Weights
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]]
    loss: float
    metrics: dict[str, float]


def _recording(trainer_class: type[GRPOTrainer]) -> type[Any]:
    class RecordingTrainer(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.records: list[_Record] = []
            self.scored: list[dict[str, torch.Tensor]] = []
            super().__init__(*args, **kwargs)

        # Private in TRL 1.14 to 1.16, and the only hook that leaves everything after the sampling to the trainer.
        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            remaining = {_ids(group.prompt): list(group.completions) for group in self.groups}
            return [word_ids(remaining[tuple(ids)].pop(0)) for ids in prompt_ids], None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self.weights_at_generation = snapshot(self.model)
            batch = super()._generate_and_score_completions(inputs)
            self.scored.append(copy.copy(batch))
            return batch

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            weights, rows = snapshot(self.model), batch_rows(inputs)
            loss = super()._compute_loss(model, inputs)
            metrics = {name: values[-1] for name, values in self._metrics["train"].items()}
            self.records.append(_Record(weights, self.weights_at_generation, rows, loss.item(), metrics))
            return loss

    return RecordingTrainer


def batch_rows(inputs: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give (prompt ids, completion ids) of each row, unpadded; by the pad token, since masks may hide a whole row."""
    sides = (inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist())
    return [(tuple(t for t in p if t != PAD), tuple(t for t in c if t != PAD)) for p, c in zip(*sides, strict=True)]


def _replay_micro_batch(trainer: Any, twin: PeftModel, record: _Record) -> MicroBatch:
    args, rows = trainer.args, record.rows
    advantages, temperature = expected_advantages(trainer), args.temperature
    counts = [_counts(args, completion) for _, completion in rows]
    mask = _padded([np.full(len(c), float(k)) for (_, c), k in zip(rows, counts, strict=True)])

    def log_probs() -> list[Array]:
        return [token_log_probs(_logits(twin, *row).detach().numpy(), np.array(row[1]), temperature) for row in rows]

    _load(twin, record.weights_at_generation)
    old_logps = log_probs()
    if trainer.start is None:
        with twin.disable_adapter():
            ref_logps = log_probs()
    else:
        _load(twin, trainer.start)
        ref_logps = log_probs()
    _load(twin, record.weights)
    logits = [_logits(twin, *row) for row in rows]
    values = [x.detach().numpy() for x in logits]
    tokens = [np.array(completion) for _, completion in rows]
    reference = grpo_loss(
        _padded([token_log_probs(x, t, temperature) for x, t in zip(values, tokens, strict=True)]),
        _padded(old_logps),
        np.array([advantages[row] for row in rows]),
        mask,
        loss_type=args.loss_type,
        max_completion_length=args.max_completion_length,
        window_tokens=_generated_tokens(trainer) * args.gradient_accumulation_steps / args.steps_per_generation,
        accumulation_steps=args.gradient_accumulation_steps,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        beta=args.beta,
        ref_logps=_padded(ref_logps),
        use_bias_correction_kl=args.use_bias_correction_kl,
    )
    entropies = _padded([token_entropies(x, temperature) for x in values])
    reference.metrics["entropy"] = masked_mean(entropies, mask)
    twin.zero_grad()
    for x, value, token, row in zip(logits, values, tokens, reference.gradient, strict=True):
        x.backward(torch.from_numpy(logits_gradient(row[: len(token)], value, token, temperature)))
    gradient = {name: weight.grad.clone() for name, weight in lora_weights(twin).items() if weight.grad is not None}
    return MicroBatch(record.weights, record.loss, record.metrics, reference, gradient)


def _counts(args: GRPOConfig, completion: tuple[int, ...]) -> bool:
    return completion[-1] == EOS or not args.mask_truncated_completions


def _generated_tokens(trainer: Any) -> int:
    completions = [_ids(text) for group in trainer.groups for text in group.completions]
    return sum(len(completion) for completion in completions if _counts(trainer.args, completion))


def _logits(twin: PeftModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Logits (C, V) from which each completion token was drawn: those of the position before it."""
    logits: torch.Tensor = twin(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1]


def _load(twin: PeftModel, weights: Weights) -> None:
    for name, weight in lora_weights(twin).items():
        weight.data.copy_(weights[name])


def _padded(rows: Sequence[Array]) -> Array:
    padded = np.zeros((len(rows), max(map(len, rows))))
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _ids(text: str) -> tuple[int, ...]:
    return tuple(word_ids(text))


def _scripted_rewards(groups: Sequence[Group]) -> list[Callable[..., list[float | None]]]:
    table = {
        (group.prompt, tuple(word_ids(text))): row
        for group in groups
        for text, row in zip(group.completions, group.rewards, strict=True)
    }

    def reward(index: int) -> Callable[..., list[float | None]]:
        def scripted(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
            return [table[p, tuple(ids)][index] for p, ids in zip(prompts, completion_ids, strict=True)]

        scripted.__name__ = f"reward_{index}"
        return scripted

    return [reward(index) for index in range(len(groups[0].rewards[0]))]
