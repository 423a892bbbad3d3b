"""The preflight: one sentence that says whether a recipe can learn, and what to paste if not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grpo_lite.evaluation.probe import Probe, _cuts_cost, probe_lines, probe_recipe, verdict
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_for_sampling, load_tokenizer
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.prompts import load_prompts

HEALTHY = Probe(
    prompts=32, samples=8, pass_at_1=0.3, pass_at_k=0.8, equal_groups=0.2, cap=512, truncated={128: 0.9, 512: 0.05},
    format_rate=0.5, rewarded=0.4, opened=None, tokens_per_s=100.0, step_s=10.0, steps=100,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "it can learn"),
        (
            {"truncated": {512: 0.6}},
            "60% of the completions are cut off at 512 tokens; paste: grpo.max_completion",
        ),
        ({"truncated": {512: 1.0}, "cuts_cost": False}, "it can learn"),  # the answer comes first, the text runs on
        ({"pass_at_1": 0.0, "pass_at_k": 0.0, "equal_groups": 1.0}, "too hard: none of 32 prompts is solved"),
        ({"pass_at_1": 0.95, "equal_groups": 0.9}, "too easy: 95% of single samples are right already"),
        ({"format_rate": 0.0}, "the agreed format never occurs"),
        (
            {"equal_groups": 0.7},
            "70% of the groups have equal rewards and give no gradient; paste: grpo.num_generations=16",
        ),
        ({"opened": "think", "format_rate": 0.0}, "the chat template opens <think> itself"),
        ({"opened": "think"}, "it can learn"),
        ({"notes": ("no probed prompt has a usable gold answer",)}, "no probed prompt has a usable gold answer"),
        ({"format_rate": None}, "it can learn"),
        # Unsolved, but rewards differ (a format reward): that can be learnt.
        ({"pass_at_1": 0.0, "pass_at_k": 0.0, "equal_groups": 0.3}, "it can learn"),
    ],
)
def test_the_gravest_finding_wins(changes: dict[str, object], expected: str) -> None:
    recipe = load_recipe("gsm8k", ["grpo.max_completion_length=512"])
    assert expected in verdict(replace(HEALTHY, **changes), recipe)  # type: ignore[arg-type]


def test_a_longer_cap_is_advised_for_the_rewards_that_know_it_too() -> None:
    recipe = load_recipe("smoke")  # its second reward takes the cap of 8 tokens as an argument
    cut = replace(HEALTHY, cap=8, truncated={8: 0.6})
    assert verdict(cut, recipe).endswith(
        "paste: grpo.max_completion_length=16 rewards[1].kwargs.max_completion_length=16"
    )


def test_a_random_model_is_found_too_weak_or_cut_short_and_measured() -> None:
    recipe = load_recipe("smoke")
    base = Base.resolve(recipe.model)
    tokenizer = load_tokenizer(base)
    model = load_for_sampling(base, recipe.rollout)
    said: list[str] = []
    prompts = load_prompts(recipe, tokenizer)
    probe = probe_recipe(recipe, model, prompts, count=5, samples=3, show=said.append)
    assert (probe.prompts, probe.samples, probe.cap, probe.steps) == (5, 3, 8, 3)
    assert 0 <= probe.pass_at_1 <= probe.pass_at_k <= 1
    assert probe.truncated[2] >= probe.truncated[4] >= probe.truncated[8]
    assert probe.truncated[8] > 0.3  # random tokens rarely end by themselves
    assert probe.tokens_per_s > 1
    assert probe.eta_s == pytest.approx(3 * probe.step_s)
    assert probe.format_rate is None
    text = "\n".join(probe_lines(probe))
    assert "verdict: the cap is too short" in text
    assert "pass@3" in text


@pytest.mark.parametrize(
    "right, cut, expected",
    [
        ([True, False, True, False], [True, True, False, False], False),  # 50 % of both
        ([False, False, True, False], [True, True, False, False], True),  # none of the cut ones
        ([True, False, False, True], [True, True, True, True], False),  # all are cut, some are right
        ([False, False, None, False], [True, True, True, True], True),  # nothing is right: the cap comes first
        ([True, True, True, False, False], [False, False, True, True, True], True),  # a third against all
        ([False, False], [False, False], True),
    ],
)
def test_a_cap_is_too_short_where_reaching_it_costs_rewards(
    right: list[bool | None], cut: list[bool], expected: bool
) -> None:
    assert _cuts_cost(right, cut) is expected
