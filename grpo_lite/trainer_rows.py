"""latest_completions: read the last generation batch out of TRL's trainer."""

from __future__ import annotations

from typing import Any

_EXTRA = {"tokens": "completion_tokens", "truncated": "completion_truncated", "answer": "gold"}


def latest_completions(trainer: Any) -> list[dict[str, Any]]:
    """Return the last batch's completions with the reward of each part.

    Reads `GRPOTrainer._logs`, which TRL 1.14-1.16 fill whether or not `log_completions` is set (contract-tested).

    Returns:
        Rows `{step, prompt, completion, rewards: {name: value}, reward, advantage, tokens, truncated, answer}`.
        A reward that was None, and the sum where all were, is None.
    """
    logs = trainer._logs
    names = list(logs["rewards"])
    weights = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    extra = {ours: logs["extra"].get(theirs, ()) for ours, theirs in _EXTRA.items()}
    rows = []
    for i, (prompt, completion) in enumerate(zip(logs["prompt"], logs["completion"], strict=True)):
        parts = {name: _number(logs["rewards"][name][i]) for name in names}
        paid = [weights.get(name, 1.0) * value for name, value in parts.items() if value is not None]
        rows.append(
            {
                "step": trainer.state.global_step,
                "prompt": prompt,
                "completion": completion if isinstance(completion, str) else completion[-1]["content"],
                "rewards": parts,
                "reward": sum(paid) if paid else None,
                "advantage": _number(logs["advantages"][i]),
                **{name: column[i] for name, column in extra.items() if i < len(column)},
            }
        )
    return rows


def _number(value: Any) -> float | None:
    number = float(value)
    return number if number == number else None  # NaN: the reward was None
