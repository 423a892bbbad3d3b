"""Rewards and penalties on length, in tokens (`completion_ids`, which TRL passes), built so that none of them can make
a wrong short answer beat a correct long one.

`soft_overlong_punishment` and `repetition_penalty_reward` know nothing of correctness; gate them (`rewards.gate`), or
keep the sum of their weights under the accuracy reward's. `cosine_length_reward` and `concise_reward` judge correctness
themselves, with `accuracy_reward` or the reward you name.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

from .accuracy import accuracy_reward
from .completion import Completion, completion_text
from .facts import Reward, states

TokenIds = Sequence[Sequence[int]]


@states(top=0.0)
def soft_overlong_punishment(
    completions: Sequence[Completion],
    completion_ids: TokenIds,
    *,
    max_completion_length: int,
    cache_length: int,
    **kwargs: Any,
) -> list[float | None]:
    """Punish a completion that comes close to the length limit, before truncation punishes it blindly.

    Formula, with length L, limit M and cache C in tokens: 0 where L ≤ M − C; ((M − C) − L) / C where M − C < L ≤ M;
    −1 where L > M.

    Args:
        completions: not looked at.
        completion_ids: token ids per completion, without padding; TRL passes them.
        max_completion_length: M, tokens; the run's own limit.
        cache_length: C, tokens, 0 < C ≤ M: how long before the limit the punishment starts.

    Returns:
        One value in [−1, 0] per completion.

    Source: DAPO (arXiv 2503.14476), equation 13.

    >>> ids = [[0] * n for n in (80, 90, 100, 101)]
    >>> soft_overlong_punishment([""] * 4, ids, max_completion_length=100, cache_length=20)
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < cache_length <= max_completion_length:
        raise ValueError(
            f"soft_overlong_punishment: cache_length is {cache_length}; allowed: 1 to max_completion_length "
            f"({max_completion_length})"
        )
    start = max_completion_length - cache_length
    return [-min(1.0, max(0, len(ids) - start) / cache_length) + 0.0 for ids in completion_ids]


def cosine_length_reward(
    completions: Sequence[Completion],
    completion_ids: TokenIds,
    *,
    max_completion_length: int,
    min_correct: float = 0.5,
    max_correct: float = 1.0,
    min_wrong: float = -1.0,
    max_wrong: float = -0.5,
    correct: Reward = accuracy_reward,
    threshold: float = 1.0,
    **kwargs: Any,
) -> list[float | None]:
    """Pay a correct answer more the shorter it is, and a wrong one less the shorter it is.

    Formula, with t = min(L / M, 1): low + ½ (high − low)(1 + cos πt), where (low, high) is (min_correct, max_correct)
    for a correct completion and (max_wrong, min_wrong) for a wrong one. Lengths beyond M are clamped: unclamped, the
    cosine pays full reward again at 2M.

    Args:
        completions: text or chat messages.
        completion_ids: token ids per completion; TRL passes them.
        max_completion_length: M, tokens.
        min_correct, max_correct, min_wrong, max_wrong: rewards at t = 1 and t = 0, correct; at t = 0 and t = 1, wrong.
            min_wrong ≤ max_wrong ≤ min_correct ≤ max_correct, so every correct completion beats every wrong one.
        correct: the reward that judges correctness; it gets all other keyword arguments (dataset columns).
        threshold: its value from which a completion counts as correct.

    Returns:
        One value in [min_wrong, max_correct] per completion; None where `correct` says None.

    Source: open-r1 `get_cosine_scaled_reward` (counts characters and does not clamp), after arXiv 2502.03373.

    >>> ids = [[0] * n for n in (0, 100, 0, 100)]
    >>> cosine_length_reward(["#### 4", "#### 4", "#### 5", "#### 5"], ids, max_completion_length=100, answer=["4"] * 4)
    [1.0, 0.5, -1.0, -0.5]
    """
    if not min_wrong <= max_wrong <= min_correct <= max_correct:
        raise ValueError(
            "cosine_length_reward: needs min_wrong <= max_wrong <= min_correct <= max_correct, got "
            f"{min_wrong}, {max_wrong}, {min_correct}, {max_correct}"
        )
    scores = correct(completions=completions, completion_ids=completion_ids, **kwargs)
    result: list[float | None] = []
    for ids, score in zip(completion_ids, scores, strict=True):
        if score is None:
            result.append(None)
            continue
        low, high = (min_correct, max_correct) if score >= threshold else (max_wrong, min_wrong)
        progress = min(len(ids) / max_completion_length, 1.0)
        result.append(low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * progress)))
    return result


@states(top=0.0)
def repetition_penalty_reward(
    completions: Sequence[Completion],
    completion_ids: TokenIds | None = None,
    *,
    ngram_size: int = 4,
    max_penalty: float = -1.0,
    **kwargs: Any,
) -> list[float | None]:
    """Punish a completion that repeats itself.

    Formula: max_penalty · (1 − distinct n-grams / n-grams), over token n-grams; 0 for a completion shorter than one
    n-gram.

    Args:
        completions: text or chat messages; looked at only without `completion_ids` (then n-grams of words).
        completion_ids: token ids per completion; TRL passes them.
        ngram_size: n, tokens.
        max_penalty: the penalty of endless repetition, ≤ 0.

    Returns:
        One value in [max_penalty, 0] per completion.

    Source: open-r1 `get_repetition_penalty_reward` (n-grams of words), after arXiv 2502.03373, appendix.

    >>> repetition_penalty_reward(["", ""], [[1, 2, 3, 4], [7, 7, 7, 7, 7]], ngram_size=2)
    [0.0, -0.75]
    """
    if max_penalty > 0 or ngram_size < 1:
        raise ValueError(
            f"repetition_penalty_reward: needs max_penalty <= 0, ngram_size >= 1, got {max_penalty}, {ngram_size}"
        )
    units: Sequence[Sequence[Hashable]] = (
        completion_ids if completion_ids is not None else [completion_text(c).lower().split() for c in completions]
    )
    penalties: list[float | None] = []
    for sequence in units:
        grams = [tuple(sequence[i : i + ngram_size]) for i in range(len(sequence) - ngram_size + 1)]
        repeated = 1.0 - len(set(grams)) / len(grams) if grams else 0.0
        penalties.append(max_penalty * repeated + 0.0)
    return penalties


def concise_reward(
    completions: Sequence[Completion],
    completion_ids: TokenIds,
    *,
    prompts: Sequence[Completion] | None = None,
    num_generations: int | None = None,
    correct: Reward = accuracy_reward,
    threshold: float = 1.0,
    **kwargs: Any,
) -> list[float | None]:
    """Pay the shorter ones among the correct completions of a group.

    Formula, over the correct completions of one group: (L_max − L) / (L_max − L_min); 0 where they are all equally
    long, and 0 for a wrong completion however short.

    Args:
        completions: text or chat messages.
        completion_ids: token ids per completion; TRL passes them.
        prompts: passed by TRL; equal prompts form a group.
        num_generations: group size, if `prompts` are not given (groups are then consecutive).
        correct: the reward that judges correctness; it gets all other keyword arguments (dataset columns).
        threshold: its value from which a completion counts as correct.

    Returns:
        One value in [0, 1] per completion; None where `correct` says None.

    Source: Kimi k1.5 (arXiv 2501.12599), section 2.3.3, whose λ = ½ − (L − L_min) / (L_max − L_min) is taken here over
    the correct completions only and shifted by ½, so that it is never a punishment; its min(0, λ) for wrong ones is 0.

    >>> ids = [[0] * n for n in (10, 20, 30, 5)]
    >>> concise_reward(["#### 4", "#### 4", "#### 4", "#### 5"], ids, answer=["4"] * 4, num_generations=4)
    [1.0, 0.5, 0.0, 0.0]
    """
    if prompts is None and num_generations is None:
        raise ValueError("concise_reward: needs prompts (TRL passes them) or num_generations, to know the groups")
    scores = correct(completions=completions, completion_ids=completion_ids, prompts=prompts, **kwargs)
    groups: dict[Hashable, list[int]] = {}
    for index in range(len(completions)):
        key: Hashable = (
            index // num_generations if prompts is None and num_generations else repr(prompts and prompts[index])
        )
        groups.setdefault(key, []).append(index)
    result: list[float | None] = [None if score is None else 0.0 for score in scores]
    for members in groups.values():
        lengths = {
            i: len(completion_ids[i]) for i in members if (score := scores[i]) is not None and score >= threshold
        }
        longest, shortest = max(lengths.values(), default=0), min(lengths.values(), default=0)
        if longest > shortest:
            result = [
                (longest - lengths[i]) / (longest - shortest) if i in lengths else old for i, old in enumerate(result)
            ]
    return result
