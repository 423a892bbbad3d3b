"""card_times: an estimate of how long a recipe takes on a card, from the card's published speeds. Torch-free.

Place in the line: for the tables of hours, and for a budget on a card that nobody has probed. **No time here was
measured on a GPU.** Each pass takes what moving its bytes or doing its multiplications takes, whichever is longer,
plus its launches (a roofline). What is not known is a guess with a fast, a likely and a slow value. Each is varied
alone, and the ranges are joined as independent errors. They say how wide the guess is, not how good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from grpo_lite.memory.phases import Job, wave
from grpo_lite.memory.times import START_S, Times, merge_seconds, warmup_tokens_trained
from grpo_lite.models.device import Card
from grpo_lite.recipe.recipe import Recipe

LAUNCHES_TRAINING = (
    367  # a layer, of a micro-batch's forward and backward: 10,263 in 28 (docs/measurements/launches.md)
)
LAUNCHES_DECODING = 39  # a layer, of a decoding step: 1,073 in 28 (docs/measurements/decode.md)
UNPACKING_BYTES = 4.6  # a 4-bit weight is read, written in 16 bits, and read again
SOURCE = "estimated from the card's published speeds, not measured on a GPU"

# Fast, likely, slow.
GUESSES = {
    "compute": (0.5, 0.3, 0.15),  # share of the published TFLOPS that is reached
    "bandwidth": (0.85, 0.65, 0.4),  # share of the published GB/s
    "launch_s": (11e-6, 20e-6, 39e-6),  # of the host, a kernel in training; derived from public tokens/s
    "kernel_s": (2e-6, 3.5e-6, 6e-6),  # a kernel inside a CUDA graph
    "weight_bytes": (0.55, 1.5, UNPACKING_BYTES),  # moved for a 4-bit weight in a decoding step: fused or unpacked
    "length": (0.25, 0.45, 0.7),  # mean completion as a share of the cap
    "longest": (0.7, 0.95, 1.0),  # the longest of a round
    "prompt": (0.3, 0.5, 0.8),  # mean prompt as a share of the longest
    "trained": (0.5, 0.75, 1.0),  # groups whose rewards differ; the others are not trained on
    "backward": (1.0, 1.5, 2.0),  # in forward passes: a frozen weight needs no gradient of its own
}
LIKELY = {name: values[1] for name, values in GUESSES.items()}


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step, of an evaluated completion and of the warm-up's tokens, for one set of guesses."""

    rollout_s: float
    training_s: float
    completion_s: float
    warmup_s: float

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.rollout_s + self.training_s


def card_times(recipe: Recipe, job: Job, card: Card) -> Times | None:
    """Return the estimate, or None where nothing honest can be said (`not_estimated`).

    Args:
        recipe: the recipe.
        job: its job on the card, budgets chosen (`MemoryPlan.job`).
        card: with its speeds.
    """
    if not_estimated(recipe, job, card):
        return None
    likely = estimate(recipe, job, card, LIKELY)
    return Times(
        step_s=likely.step_s,
        completion_s=likely.completion_s,
        merge_s=merge_seconds(2 * job.shape.parameters),
        source=SOURCE,
        is_estimate=True,
        range=_range(recipe, job, card),
        warmup_s=likely.warmup_s,
        start_s=START_S,
    )


def not_estimated(recipe: Recipe, job: Job, card: Card) -> str:
    """Return what keeps this from being estimated, after "it is not estimated"; empty where it is."""
    blocks = [block for block, _ in job.shape.blocks]
    reasons = {
        "for a card whose speed is not in our table": not (card.tflops and card.gb_per_s),
        "for recipes with tools": recipe.has_tools,
        "for models with recurrent layers": any(block.recurrent for block in blocks),  # kernels may not be installed
        "for models with experts": any(block.experts for block in blocks),
        "where it computes in float32": job.dtype_bytes == 4,
        "with vLLM": job.rollout == "vllm",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _range(recipe: Recipe, job: Job, card: Card) -> tuple[float, float]:
    """Return factors from the likely step to a fast and a slow one, every guess varied alone."""
    middle = math.log(estimate(recipe, job, card, LIKELY).step_s)
    factors = []
    for end in (0, 2):
        steps = (estimate(recipe, job, card, {**LIKELY, name: values[end]}) for name, values in GUESSES.items())
        factors.append(math.sqrt(sum((math.log(step.step_s) - middle) ** 2 for step in steps)))
    return math.exp(-factors[0]), math.exp(factors[1])


def estimate(recipe: Recipe, job: Job, card: Card, guess: Mapping[str, float]) -> Estimate:
    """Return the seconds for one set of guesses, by the names of GUESSES."""
    schedule = recipe.schedule
    rows, _ = wave(job)
    waves = math.ceil(job.batch / rows)
    prompt, length = guess["prompt"] * job.prompt, guess["length"] * job.completion
    steps = guess["longest"] * job.completion
    round_s = waves * steps * _decoding_step_s(job, card, guess, rows, prompt + length / 2)
    round_s += _multiplying_s(job, card, guess, job.batch / job.group * prompt)  # reading the prompts
    rollout_s = round_s * schedule.sampled_per_step / job.batch

    completions = guess["trained"] * schedule.trained_per_step
    tokens = completions * (length + (prompt / job.group if job.is_packed else prompt))
    pieces = math.ceil(job.step_tokens / job.microbatch_tokens) * schedule.accumulation * guess["trained"]
    passes = _passes(recipe, job, guess)
    training_s = passes * _multiplying_s(job, card, guess, tokens) + pieces * _piece_s(job, card, guess, passes)

    at_once = max(1, job.eval_rows)
    step_s = _decoding_step_s(job, card, guess, at_once, prompt + guess["length"] * job.eval_completion / 2)
    completion_s = guess["longest"] * job.eval_completion * step_s / at_once
    warm = warmup_tokens_trained(recipe)
    warmup_s = passes * _multiplying_s(job, card, guess, warm)
    warmup_s += warm / max(1, job.warmup_step or 1) * _piece_s(job, card, guess, passes)
    return Estimate(rollout_s, training_s, completion_s, warmup_s)


def _passes(recipe: Recipe, job: Job, guess: Mapping[str, float]) -> float:
    """Return forward passes that a training pass costs: itself, backward, checkpointing, and the reference for KL."""
    return 1.0 + guess["backward"] + bool(job.checkpointing) + bool(recipe.grpo.get("beta"))


def _multiplied(job: Job) -> int:
    """Return the weights that a token is multiplied with, the output head included."""
    return job.shape.linear_parameters + job.shape.embedding_parameters


def _multiplying_s(job: Job, card: Card, guess: Mapping[str, float], tokens: float) -> float:
    return 2 * _multiplied(job) * tokens / (card.tflops * 1e12 * guess["compute"])


def _piece_s(job: Job, card: Card, guess: Mapping[str, float], passes: float) -> float:
    """Return what a micro-batch costs however few tokens it has: launches, and unpacking quantized weights."""
    unpacked = UNPACKING_BYTES * job.shape.linear_parameters if job.load_in in ("4bit", "8bit") else 0.0
    unpacking_s = passes * unpacked / (card.gb_per_s * 1e9 * guess["bandwidth"])
    return job.shape.layers * LAUNCHES_TRAINING * guess["launch_s"] + unpacking_s


def _decoding_step_s(job: Job, card: Card, guess: Mapping[str, float], rows: int, tokens: float) -> float:
    """Return the seconds of one token of every row, each `tokens` long so far."""
    width = job.dtype_bytes
    weight = guess["weight_bytes"] if job.load_in == "4bit" else 1.0 if job.load_in == "8bit" else width
    moved = weight * job.shape.linear_parameters + width * job.shape.embedding_parameters
    moved += rows * tokens * width * job.shape.cached
    moving_s = moved / (card.gb_per_s * 1e9 * guess["bandwidth"])
    return (
        max(moving_s, _multiplying_s(job, card, guess, rows)) + job.shape.layers * LAUNCHES_DECODING * guess["kernel_s"]
    )
