"""The objective of a resolved recipe: where its keys come from, what in it has no effect, what cannot train together.

`show` prints the origins and the notes, `check` the notes; `load` refuses the combinations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_lite.recipe.algorithms import ALGORITHMS
from grpo_lite.recipe.overrides import yaml_text
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.recipe.upstream import config_defaults

_CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses with PPO's clipped ratio, trl 1.14 to 1.16
# Keys that only some losses read -> these losses.
_READ_BY = {
    "epsilon": _CLIPPING,
    "epsilon_high": (*_CLIPPING, "cispo"),
    "delta": _CLIPPING,
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ("sapo",)),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), ("vespo",)),
}
_WIDE = 0.01  # a clip range for tokens; the papers clip the ratios of sequences at 0.0003 to 0.0025
_OVER_BATCH = (  # keys whose value makes advantages depend on other groups, and the value that does not
    ("scale_rewards", "batch", "group"),
    ("multi_objective_aggregation", "normalize_then_sum", "sum_then_normalize"),
)
_KEY = re.compile(r"  (\w+):")  # a section's key, in the YAML of a resolved recipe


def combination_faults(recipe: Recipe) -> list[str]:
    """Return the combinations of an objective with other keys that a training would stop at, after loading."""
    grpo, faults = recipe.grpo, []
    for part, given in (("refill", recipe.sampling.refill), ("replay", recipe.sampling.replay)):
        faults += [
            f"sampling.{part}: {given} is given with grpo.{key}: {value}; the advantages of a group put in must "
            f"depend on that group only. Set grpo.{key}={allowed}, or sampling.{part}=0."
            for key, value, allowed in _OVER_BATCH
            if given and grpo.get(key) == value
        ]
    mode = grpo.get("vllm_importance_sampling_mode", "sequence_mask")
    corrected = grpo.get("use_vllm") and grpo.get("vllm_importance_sampling_correction", True)
    if grpo.get("loss_type") == "vespo" and corrected and not mode.startswith("token_"):
        faults.append(
            f"grpo.vllm_importance_sampling_mode: {mode} is in force with loss_type: vespo and use_vllm; allowed: "
            "token_truncate, token_mask, since the loss weighs whole sequences itself."
        )
    if grpo.get("sync_ref_model"):
        faults.append(
            "grpo.sync_ref_model: true is given; only false is allowed: with a LoRA the reference is the base without "
            "the adapter, and TRL synchronizes none. Remove the key; reference=start measures KL against the adapter "
            "that GRPO started with."
        )
    return faults


def notes(recipe: Recipe) -> list[str]:
    """Return what a reader should know about the objective of a recipe: overridden keys, keys without an effect."""
    word, grpo = ALGORITHMS[recipe.algorithm], recipe.grpo
    loss = grpo.get("loss_type") or config_defaults("grpo")["loss_type"]
    lines = [
        f"grpo.{key}: {yaml_text(grpo[key])} is given; {recipe.algorithm} sets {yaml_text(value)}"
        for key, value in word.grpo.items()
        if grpo.get(key) != value
    ]
    lines += [
        f"grpo.{key}: has no effect with loss_type: {loss}"
        for key, losses in _READ_BY.items()
        if grpo.get(key, config_defaults("grpo")[key]) != config_defaults("grpo")[key] and loss not in losses
    ]
    if loss == "cispo" and grpo.get("epsilon_high") is None:
        lines.append(
            "grpo.epsilon_high: not given, so cispo caps the ratio at grpo.epsilon = "
            f"{yaml_text(grpo.get('epsilon', 0.2))} and shrinks every gradient to that; algorithm: cispo sets 5.0"
        )
    lines += _on_ratios(grpo, loss, word.grpo)
    if grpo.get("multi_objective_aggregation") == "normalize_then_sum" and len(recipe.rewards) == 1:
        lines.append("grpo.multi_objective_aggregation: normalize_then_sum acts on several rewards, and here is one")
    if word.on_policy and recipe.schedule.steps_per_round == 1:
        lines.append(
            f"algorithm: {recipe.algorithm} acts on steps after the first of a round, and here a round has one: it "
            f"trains like loss_type: {word.on_policy}. Set "
            f"grpo.steps_per_generation={4 * recipe.schedule.accumulation} (four steps), or grpo.num_iterations=2"
        )
    return lines + ([f"algorithm: {recipe.algorithm}: {word.besides}"] if word.besides else [])


def _on_ratios(grpo: Mapping[str, Any], loss: str, of_word: Mapping[str, Any]) -> Iterator[str]:
    """Yield what does not fit together in a ratio's level, its loss and its clipping."""
    level, epsilon = grpo.get("importance_sampling_level", "token"), grpo.get("epsilon", 0.2)
    chosen = "importance_sampling_level" in of_word  # then the line on the overridden key says it
    if level == "sequence" and loss in ("bnpo", "dr_grpo", "dapo", "cispo"):
        yield (
            f"grpo.importance_sampling_level: sequence with loss_type: {loss} weighs each sequence by its length; "
            "algorithm: gspo takes loss_type: grpo"
        )
    if level == "token" and loss == "luspo" and not chosen:
        yield (
            "grpo.importance_sampling_level: token with loss_type: luspo is not the paper's, which takes the ratio of "
            "whole sequences; algorithm: luspo sets sequence"
        )
    if level == "sequence" and loss == "vespo" and not chosen:
        yield (
            "grpo.importance_sampling_level: sequence with loss_type: vespo, which weighs whole sequences itself; "
            "algorithm: vespo sets token"
        )
    if level == "sequence" and loss in ("grpo", "luspo") and "epsilon" not in of_word and epsilon >= _WIDE:
        yield (
            f"grpo.epsilon: {yaml_text(epsilon)} with ratios of whole sequences is a token's clipping: a sequence's "
            "ratio is a mean over its tokens and stays nearer to 1; algorithm: gspo sets 0.0003 and 0.0004, luspo "
            "0.002 and 0.0025"
        )
    above = 1 + (epsilon if grpo.get("epsilon_high") is None else grpo["epsilon_high"])
    if grpo.get("delta") is not None and loss in _CLIPPING and grpo["delta"] <= above:
        yield (
            f"grpo.delta: {yaml_text(grpo['delta'])} is not above 1 + epsilon_high = {above:g}, so it also cuts ratios "
            "that the clipping allows; algorithm: intellect_2 sets 4.0"
        )


def with_origins(text: str, recipe: Recipe, given: Mapping[str, Any]) -> str:
    """Return a resolved recipe with a comment behind each key of `grpo` that says where its value is from.

    Args:
        text: the recipe as YAML, every section and key on a line of its own.
        recipe: the same recipe.
        given: the section `grpo` as the recipe and the overrides give it.
    """
    word, lines, section = ALGORITHMS[recipe.algorithm], text.splitlines(), ""
    for place, line in enumerate(lines):
        if not line.startswith(" "):
            section = line.partition(":")[0]
            if section == "algorithm":
                lines[place] += f"  # {word.paper}"
        following = lines[place + 1] if place + 1 < len(lines) else "end"
        key = _KEY.match(line) if section == "grpo" else None
        # A comment inside a value of several lines would end it, or become a part of it.
        if key and (key.end() == len(line) or _KEY.match(following) or following[:1].strip()):
            lines[place] += f"  # {_origin(key[1], recipe, given)}"
    return "\n".join([*lines, *(f"# {note}." for note in notes(recipe))]) + "\n"


def _origin(key: str, recipe: Recipe, given: Mapping[str, Any]) -> str:
    word = ALGORITHMS[recipe.algorithm]
    if key not in given:
        return f"algorithm: {recipe.algorithm}" if key in word.grpo else "default"
    differs = key in word.grpo and recipe.grpo[key] != word.grpo[key]
    return f"recipe; {recipe.algorithm} sets {yaml_text(word.grpo[key])}" if differs else "recipe"
