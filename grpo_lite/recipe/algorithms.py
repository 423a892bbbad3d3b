"""Algorithms by one word: `algorithm: dapo` in a recipe sets the keys of `grpo` that belong together in a paper.

A word sets the objective: loss, clipping, scaling of rewards, KL. A key that the recipe gives itself wins; a word on
the command line wins over the recipe's keys, and loses to keys on the command line. The learning rate, the batch, the
rewards and what is generated stay the recipe's, since papers train all weights on other machines;
`grpo_lite.recipe.objective` says what a paper has besides. Sources, key by key: docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from grpo_lite.recipe.upstream import config_fields, installed_versions

Word = Literal[
    "trl", "grpo", "dr_grpo", "dapo", "dapo_80_20", "lite_ppo", "gspo", "luspo", "cispo", "scalerl", "sapo", "vespo",
    "intellect_2", "gdpo",
]  # fmt: skip


@dataclass(frozen=True)
class Algorithm:
    """What one word stands for."""

    paper: str  # title and arXiv number
    grpo: Mapping[str, Any] = field(default_factory=dict)  # keys of trl.GRPOConfig
    on_policy: str | None = None  # the loss that it equals while no policy has moved since it generated
    besides: str | None = None  # what the paper has and the word leaves to the recipe, with the key


_REFILL = "dynamic sampling is sampling.refill (one process), the soft overlong punishment a reward of its own"
_DAPO = {"loss_type": "dapo", "mask_truncated_completions": True, "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0}
ALGORITHMS: dict[Word, Algorithm] = {
    "trl": Algorithm("TRL's defaults: the mean over tokens of DAPO with symmetric clipping"),
    "grpo": Algorithm(
        "DeepSeekMath, arXiv 2402.03300",
        {
            "loss_type": "grpo",
            "scale_rewards": "group",
            "importance_sampling_level": "token",
            "beta": 0.001,
            "use_bias_correction_kl": False,
        },
    ),
    "dr_grpo": Algorithm("Dr. GRPO, arXiv 2503.20783", {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}),
    "dapo": Algorithm("DAPO, arXiv 2503.14476", _DAPO, besides=_REFILL),
    "dapo_80_20": Algorithm(
        "Beyond the 80/20 Rule, arXiv 2506.01939", {**_DAPO, "top_entropy_quantile": 0.2}, besides=_REFILL
    ),
    "lite_ppo": Algorithm(
        "Tricks or Traps? (Lite PPO), arXiv 2508.08221", {"loss_type": "dapo", "scale_rewards": "batch", "beta": 0.0}
    ),
    "gspo": Algorithm(
        "GSPO, arXiv 2507.18071",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
            "beta": 0.0,
        },
        on_policy="grpo",
    ),
    "luspo": Algorithm(
        "LUSPO, arXiv 2602.05261",
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
    ),
    "cispo": Algorithm("CISPO (MiniMax-M1), arXiv 2506.13585", {"loss_type": "cispo", "epsilon_high": 5.0}, "dapo"),
    "scalerl": Algorithm(
        "ScaleRL, arXiv 2510.13786",
        {"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "batch"},
        on_policy="dapo",
        besides="the head in float32 is grpo.cast_lm_head_to_fp32=true, for models whose head is not their embedding",
    ),
    "sapo": Algorithm(
        "SAPO, arXiv 2511.20347",
        {
            "loss_type": "sapo",
            "sapo_temperature_pos": 1.0,
            "sapo_temperature_neg": 1.05,
            "scale_rewards": "group",
        },
        on_policy="grpo",
    ),
    "vespo": Algorithm(
        "VESPO, arXiv 2602.10693",
        {
            "loss_type": "vespo",
            "importance_sampling_level": "token",  # the loss takes the ratio of the whole sequence itself
            "vespo_k_pos": 2.0,
            "vespo_lambda_pos": 3.0,
            "vespo_k_neg": 3.0,
            "vespo_lambda_neg": 2.0,
        },
        on_policy="dapo",
    ),
    "intellect_2": Algorithm(
        "INTELLECT-2, arXiv 2505.07291", {"epsilon": 0.2, "delta": 4.0, "beta": 0.001}, on_policy="dapo"
    ),
    "gdpo": Algorithm("GDPO, arXiv 2601.05242", {"multi_objective_aggregation": "normalize_then_sum"}),
}


def expand_algorithm(raw: dict[str, Any]) -> list[str]:
    """Add the keys of a recipe's `algorithm` to its section `grpo`, in place, except those that it gives itself.

    Args:
        raw: the recipe as read; `algorithm` and `grpo` may be anything.

    Returns:
        One fault where the installed TRL lacks a key of the word.
    """
    algorithm, given = _algorithm(raw), raw.get("grpo") or {}
    if algorithm is None or not isinstance(given, dict):
        return []
    missing = [key for key in algorithm.grpo if key not in config_fields("grpo")]
    if missing:
        return [
            f"algorithm: {raw['algorithm']} sets grpo.{', grpo.'.join(missing)}, which the installed trl "
            f"{installed_versions()['trl']} does not have. Install a newer trl, or choose another word."
        ]
    raw["grpo"] = {**algorithm.grpo, **given}
    return []


def follow_new_word(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drop from a recipe's section `grpo`, in place, what an `algorithm=…` on the command line sets instead.

    Args:
        raw: the recipe as read, with the overrides applied.
        overrides: the overrides; a key of `grpo` among them stays.
    """
    algorithm, given = _algorithm(raw), raw.get("grpo")
    if algorithm is None or not isinstance(given, dict):
        return
    on_the_line = {override.partition("=")[0].strip() for override in overrides}
    if "algorithm" in on_the_line:
        raw["grpo"] = {k: v for k, v in given.items() if k not in algorithm.grpo or f"grpo.{k}" in on_the_line}


def _algorithm(raw: Mapping[str, Any]) -> Algorithm | None:
    """Return what a recipe's word stands for; None for a word that is not known, which pydantic refuses."""
    word = raw.get("algorithm")
    return ALGORITHMS.get(cast(Word, word)) if isinstance(word, str) else None
