"""Compare the estimate of a step (`grpo_lite/memory/card_time.py`) with measured steps, on this CPU as the card.

    python bench/card_time.py [--rounds 3]

The multiplications and the bandwidth are measured between the steps, in the same process, so that other jobs slow both
down alike. What is known here takes the place of guesses: lengths, weights unpacked once a rollout, the cost of a call.
The shares of the speeds that are reached and the cost of a backward pass stay guesses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from grpo_lite.cli import quieten
from grpo_lite.evaluation.probe import probe_base
from grpo_lite.memory.card_time import GUESSES, LIKELY, estimate
from grpo_lite.memory.report import plan_recipe
from grpo_lite.models.base import Base
from grpo_lite.models.device import Card, detect_device
from grpo_lite.models.load import load_tokenizer
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.prompts import load_prompts
from grpo_lite.task.tokens import prompt_ids

SHAPES = {
    "sums": [],
    "long": [
        "grpo.max_completion_length=48",
        "grpo.per_device_train_batch_size=16",
        "grpo.gradient_accumulation_steps=2",
    ],
}


def seconds(call: Callable[[], object], times: int) -> float:
    """Return the mean seconds of a call."""
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def speeds() -> tuple[float, float, float]:
    """Return this CPU's TFLOPS in bfloat16, its GB/s, and the seconds of a call of torch that does next to nothing."""
    a = torch.randn(1024, 2048).bfloat16()
    b = torch.randn(2048, 1024).bfloat16()
    flops = 2 * 1024 * 2048 * 1024 / seconds(lambda: a @ b, 3)
    large, small = torch.zeros(1 << 26, dtype=torch.uint8), torch.zeros(8)
    out = torch.empty_like(large)
    moved = 2 * large.numel() / seconds(lambda: out.copy_(large), 2)
    return flops / 1e12, moved / 1e9, seconds(lambda: small + small, 500)


def main() -> None:
    """Print predicted and measured seconds of each shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    quieten(False)
    print(f"{detect_device().name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| shape | part | estimated s | measured s | estimated / measured |\n|---|---|---|---|---|")
    for name, overrides in SHAPES.items():
        recipe = load_recipe("sums", [*overrides, "check.enabled=false"])
        base = Base.resolve(recipe.model, detect_device())
        prompts = load_prompts(recipe, load_tokenizer(base))
        count = max(1, recipe.schedule.prompts_per_round)
        measured, known = [], [speeds()]
        for _ in range(rounds):
            measured.append(probe_base(recipe, base, prompts, count=count, samples=recipe.num_generations)[0])
            known.append(speeds())
        tflops, gb_per_s, call_s = (statistics.median(values) for values in zip(*known, strict=True))
        card = Card("this CPU", 1 << 36, True, tflops, gb_per_s)
        lengths = [len(prompt_ids(row["prompt"], prompts.tokenizer, None)) for row in prompts.train[:64]]
        job = plan_recipe(recipe, card, max(lengths)).job
        cut = measured[0].truncated[recipe.max_completion_length] > 0.9  # few-shot sums run on to the cap
        assert cut, "completions end before the cap: their mean length would be a guess"
        guess = {
            **LIKELY, "launch_s": call_s, "kernel_s": call_s, "weight_bytes": 2.0, "longest": 1.0, "trained": 1.0,
            "prompt": statistics.fmean(lengths) / max(lengths), "length": 1.0,
        }  # fmt: skip
        made = estimate(recipe, job, card, guess)
        size = 1 + max(lengths) / job.group + guess["length"] * job.completion
        training = statistics.median(probe.token_s for probe in measured) * size * recipe.schedule.trained_per_step
        rollout = statistics.median(probe.step_s for probe in measured) - training
        for part, predicted, real in (
            ("rollout", made.rollout_s, rollout),
            ("training", made.training_s, training),
            ("step", made.step_s, rollout + training),
        ):
            print(f"| {name} | {part} | {predicted:.2f} | {real:.2f} | {predicted / real:.2f} |", flush=True)
        print(f"  {tflops:.3f} TFLOPS, {gb_per_s:.1f} GB/s, {1e6 * call_s:.1f} us a call; guesses: {list(GUESSES)}")


if __name__ == "__main__":
    main()
