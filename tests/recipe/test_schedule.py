"""What the batch keys mean in completions and steps: as TRL and transformers count them."""

from __future__ import annotations

import pytest

from grpo_lite.recipe.load import load_recipe

BATCH = ("grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=8")


@pytest.mark.parametrize(
    "overrides, rows, expected",
    [
        # 4 rows × 8 micro-steps = 32 completions = 4 prompts a step; 100 prompts are 25 rounds an epoch.
        (["grpo.max_steps=-1", "grpo.num_train_epochs=2"], 100, (50, 32, 32)),
        (["grpo.max_steps=-1", "grpo.num_train_epochs=1"], 103, (25, 32, 32)),  # what fills no round is dropped
        (["grpo.max_steps=7"], 100, (7, 32, 32)),
        # Each round is trained on twice: half as many completions a step, twice the steps.
        (["grpo.max_steps=-1", "grpo.num_train_epochs=1", "grpo.num_iterations=2"], 100, (50, 16, 32)),
        # A round of 64 completions serves two optimizer steps.
        (["grpo.max_steps=-1", "grpo.num_train_epochs=1", "grpo.generation_batch_size=64"], 104, (26, 32, 32)),
        (["grpo.max_steps=-1", "grpo.num_train_epochs=0.5"], 2, (1, 32, 32)),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    overrides: list[str], rows: int, expected: tuple[int, int, int]
) -> None:
    schedule = load_recipe("gsm8k", [*BATCH, *overrides]).schedule
    assert (schedule.steps(rows), schedule.sampled_per_step, schedule.trained_per_step) == expected


@pytest.mark.parametrize(
    "overrides, steps",
    [
        ([], 1),
        (["grpo.num_iterations=3"], 3),  # each round is trained on three times
        (["grpo.generation_batch_size=64"], 2),  # 16 micro-steps of 4 rows, 8 a step
        (["grpo.generation_batch_size=64", "grpo.num_iterations=2"], 4),
        (["grpo.steps_per_generation=2"], 1),  # a quarter of a step's micro-steps: a step needs several rounds
        (["grpo.steps_per_generation=12"], 2),  # one and a half steps
    ],
)
def test_a_round_is_trained_on_in_so_many_steps(overrides: list[str], steps: int) -> None:
    assert load_recipe("gsm8k", [*BATCH, *overrides]).schedule.steps_per_round == steps
