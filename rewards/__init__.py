"""Reward functions for RL with verifiable answers: right, fast and hard to fool. Usable with plain TRL.

Every reward has TRL's signature, `reward(completions, <dataset columns>, **kwargs) -> list[float | None]`, takes text
and chat completions alike and imports neither torch nor grpo_lite. A reward is `None` where the *gold* is unusable, its
lowest value where the *completion* is wrong, and an exception where the *reward* itself is broken.

    >>> from rewards import accuracy_reward
    >>> accuracy_reward([r"so it is \\boxed{\\frac{2}{4}}", "The answer is 3."], ["1/2", "4"])
    [1.0, 0.0]

A reward states facts about itself as attributes (`rewards.facts`): `top`, the score of a perfect completion;
`second_opinion`, an independent judge to log beside it; `runs_code`, whether it runs the model's programs;
`needs_one_of`, columns of which it needs one.

    >>> accuracy_reward.top, accuracy_reward.second_opinion.__name__, accuracy_reward.runs_code
    (1.0, 'honest_accuracy', False)

Installed, the package is `grpo_lite.rewards`: PyPI has another `rewards`. In a checkout both names work.
Importing it loads nothing but this file; each reward loads its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# The module of each public name.
_HOME = {
    "accuracy_reward": "accuracy",
    "choice_reward": "text",
    "concise_reward": "length",
    "cosine_length_reward": "length",
    "countdown_reward": "countdown",
    "each_row": "waiting",
    "exact_match_reward": "text",
    "format_reward": "format",
    "gated": "gate",
    "honest_accuracy": "honest",
    "judge_reward": "rubric",
    "memoised": "gate",
    "reasoning_gym_reward": "reasoning_gym",
    "repetition_penalty_reward": "length",
    "soft_overlong_punishment": "length",
    "unit_test_reward": "code",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Load a reward's module when the reward is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
