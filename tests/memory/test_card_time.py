"""Hours on a card that is not here: an estimate that says so, with a range, and nothing where none is honest."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_lite.memory.card_time import GUESSES, LIKELY, card_times, estimate
from grpo_lite.memory.report import plan_recipe
from grpo_lite.memory.times import Times
from grpo_lite.models.device import CARDS, Card, find_card
from grpo_lite.recipe.load import load_recipe
from grpo_lite.units import span


def times(name: str, card: str | Card = "t4", *overrides: str) -> Times | None:
    recipe, gpu = load_recipe(name, overrides), find_card(card) if isinstance(card, str) else card
    return card_times(recipe, plan_recipe(recipe, gpu).job, gpu)


def likely(name: str, card: str, *overrides: str) -> Times:
    made = times(name, card, *overrides)
    assert made is not None
    return made


def test_an_estimate_says_that_it_is_one_and_how_wide() -> None:
    made = likely("gsm8k", "t4")
    assert made.is_estimate
    assert "not measured on a GPU" in made.source
    assert 0.3 < made.range[0] < 0.8
    assert 1.3 < made.range[1] < 3


def test_a_decoding_step_is_as_long_as_the_page_on_decoding_estimates() -> None:
    """32 rows of a 1.5B base in NF4: 14 ms on a T4, 6 on an RTX 4090, 4 on an H100 (docs/measurements/decode.md)."""
    for card, ms in (("t4", 14), ("rtx4090", 6), ("h100", 4)):
        keys = ("grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=8")
        recipe, gpu = load_recipe("gsm8k", keys), find_card(card)
        made = estimate(recipe, plan_recipe(recipe, gpu).job, gpu, LIKELY)
        steps = LIKELY["longest"] * recipe.max_completion_length
        assert 1000 * made.rollout_s / steps == pytest.approx(ms, rel=0.35)


def test_a_faster_card_is_faster_and_more_of_anything_takes_longer() -> None:
    steps = {name: likely("gsm8k", name).step_s for name in CARDS}
    assert steps["h100"] < steps["a100-40"] < steps["a10"] < steps["l4"] < steps["t4"]
    step = likely("gsm8k", "t4").step_s
    assert likely("gsm8k", "t4", "grpo.max_completion_length=1024").step_s > 1.5 * step
    assert likely("gsm8k", "t4", "grpo.beta=0.1").step_s > step
    assert likely("gsm8k", "t4", "model.id=Qwen/Qwen2.5-3B-Instruct").step_s > 1.4 * step
    assert likely("gsm8k", "t4", "grpo.num_iterations=2").step_s < step  # a round serves two steps


@pytest.mark.parametrize("name", GUESSES)
def test_every_guess_runs_from_fast_to_slow(name: str) -> None:
    recipe, card = load_recipe("gsm8k"), find_card("t4")
    job = plan_recipe(recipe, card).job
    fast, middle, slow = (estimate(recipe, job, card, {**LIKELY, name: value}) for value in GUESSES[name])
    assert fast.step_s <= middle.step_s <= slow.step_s
    assert fast.step_s < slow.step_s


@pytest.mark.parametrize(
    "name, card",
    [
        ("qwen3.5-2b", "t4"),  # recurrent layers: with or without their kernels?
        ("wordle", "t4"),  # episodes
        ("gemma3-4b", "t4"),  # float32 there
        ("gsm8k", "11GiB"),  # no published speed
    ],
)
def test_where_nothing_honest_can_be_said_there_is_no_estimate(name: str, card: Any) -> None:
    assert times(name, card) is None


def test_a_warm_up_s_steps_count() -> None:
    assert likely("quickstart", "t4").warmup_s > 0
    assert likely("gsm8k", "t4").warmup_s == 0


def test_a_range_of_times_is_written_in_one_unit() -> None:
    assert span(3600, 8 * 3600) == "1 to 8 h"
    assert span(100, 110) == "about 2 min"
