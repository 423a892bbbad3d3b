"""What a reward states about itself, as attributes of the function, so that no caller has to know its name.

- `top`: the score of a perfect completion; None (or no attribute) where it depends on the arguments or on the group.
- `second_opinion`: an independent judge of the same completions, to be logged and never trained on.
- `runs_code`: True where the reward runs programs that the model wrote, so that a caller can record the isolation.
- `needs_one_of`: columns of which the reward needs one, where none of them alone is a required argument.
- `by_row`: True where a completion's score depends on its own row only, and takes milliseconds. A judge behind the gate
  of such a reward may be asked about a completion while others of its batch are still being generated.

A reward of your own may state the same: `my_reward.top = 2.0`. Ask with `getattr(reward, "top", None)`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

Reward = Callable[..., list[float | None]]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def states(
    *,
    top: float | None = None,
    second_opinion: Reward | None = None,
    runs_code: bool = False,
    needs_one_of: tuple[str, ...] = (),
    by_row: bool = False,
) -> Callable[[_Function], _Function]:
    """Return a decorator that sets a reward's facts and returns the same function.

    >>> @states(top=2.0)
    ... def my_reward(completions, **kwargs):
    ...     return [2.0 * ("please" in text) for text in completions]
    >>> my_reward.top, my_reward.second_opinion, my_reward.runs_code
    (2.0, None, False)
    """

    def decorate(function: _Function) -> _Function:
        vars(function).update(
            top=top, second_opinion=second_opinion, runs_code=runs_code, needs_one_of=needs_one_of, by_row=by_row
        )
        return function

    return decorate


def pass_on(source: Any, target: Any) -> None:
    """Give a wrapper the facts of the reward inside it, as far as that states them."""
    for fact in ("top", "second_opinion", "runs_code", "needs_one_of", "by_row"):
        if hasattr(source, fact):
            setattr(target, fact, getattr(source, fact))


def named(reference: str) -> Reward | None:
    """Return the function of this package that `module.function` names in a recipe; None for any other code.

    The module is `rewards` or `grpo_lite.rewards`, whichever of them this package is loaded as.
    For callers that read a recipe and must not import the user's code.

    >>> named("rewards.accuracy_reward") is named("rewards.accuracy.accuracy_reward")
    True
    >>> named("grpo_lite.rewards.accuracy_reward") is named("rewards.accuracy_reward")
    True
    >>> named("my_rewards.py:accuracy_reward"), named("my_rewards.accuracy_reward"), named("rewards.no_such_reward")
    (None, None, None)
    """
    module, _, name = reference.removeprefix("grpo_lite.").rpartition(".")
    top, _, below = module.partition(".")
    if top != "rewards":
        return None
    try:
        function = getattr(import_module(f"{__package__}.{below}".rstrip(".")), name, None)
    except ImportError:
        return None
    return function if callable(function) else None
