"""load_rewards: `module.function` or `file.py:function` with kwargs -> functions that obey TRL's reward contract."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_lite.errors import RewardError
from grpo_lite.recipe.checks import nearest
from grpo_lite.recipe.recipe import JudgeBudget, Recipe, ScoreSection
from grpo_lite.rewards.head_start import HeadStart
from grpo_lite.rewards.waiting import BudgetSpent, RowsFailed
from grpo_lite.task.time_limit import is_async, start, wait_for

logger = logging.getLogger(__name__)

# What TRL 1.14-1.16 passes to every reward besides the dataset's columns.
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

_LARGEST = 1e18  # TRL's rewards are float32, and their squares must fit

Reward = Callable[..., list[float | None]]


class UnscoredRows(RewardError):
    """A reward has scored some rows of a batch only: those of others failed, after their retries.

    Attributes:
        scores: one a row; None for the failed ones.
        rows: the failed ones.
        spent: why nothing more can be scored in this run; None: the next batch may do better.
    """

    def __init__(self, error: RowsFailed, function: str, where: str, expected: int) -> None:
        super().__init__(f"{where}: {function}: {error}.")
        self.scores = _checked(error.scores, expected, function, where)
        self.rows = error.rows
        self.spent = str(error.__cause__) if isinstance(error.__cause__, BudgetSpent) else None


class _Scored(Protocol):
    @property
    def function(self) -> str: ...
    @property
    def kwargs(self) -> dict[str, Any]: ...


def load_rewards(recipe: Recipe, columns: Iterable[str], lead_in: str = "") -> tuple[list[Reward], list[float]]:
    """Import the recipe's rewards and check them against the columns they will get.

    Args:
        recipe: whose `rewards` section names them.
        columns: the dataset's columns, without `prompt`.
        lead_in: what completions continue (`Prompts.lead_in`); after an opening tag rewards get `prefilled=True`.

    Returns:
        Functions with distinct `__name__`s (TRL logs `rewards/<name>/mean`), and their weights.

    Raises:
        RewardError: not importable, wrong signature, or an argument that no column provides.
    """
    columns = [*columns, *(["environments"] if recipe.environment is not None else [])]
    functions: list[Reward] = []
    for i, section in enumerate(recipe.rewards):
        function = load_function(section, f"rewards[{i}]", columns, lead_in, recipe.limits.judge_budget)
        function.__name__ = recipe.reward_names[i]  # as the recipe calls it: a closure's own name may be "inner"
        functions.append(function)
    if not functions:
        return [], []  # an environment pays
    opinion = load_second_opinion(functions[0], recipe.rewards[0], "rewards[0]", columns, lead_in)
    if opinion is not None:
        functions[0] = _logging_second_opinion(functions[0], opinion)
    gated = [i for i, section in enumerate(recipe.rewards) if section.gate]
    if gated:
        from grpo_lite.rewards.gate import gated as gate
        from grpo_lite.rewards.gate import memoised

        name = functions[0].__name__
        functions[0] = memoised(functions[0])  # judged once a batch, for the trainer and every gate
        functions[0].__name__ = name
        for i in gated:
            functions[i] = gate(functions[i], by=functions[0], threshold=min(1.0, top_of(functions[0])))
    return functions, [section.weight for section in recipe.rewards]


def weighted_sum(functions: list[Reward], weights: list[float]) -> Callable[..., list[float | None]]:
    """Return TRL's total reward as one function: Σ weight × reward over the rewards that are not None."""

    def total(completions: list[Any], **columns: Any) -> list[float | None]:
        return weighted_scores([function(completions=completions, **columns) for function in functions], weights)

    return total


def weighted_scores(scores: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float | None]:
    """Return each completion's Σ weight × score, given the scores of each reward; None where the first has none."""
    sums: list[float | None] = []
    for values in zip(*scores, strict=True):
        terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        sums.append(None if values[0] is None else sum(terms))
    return sums


def top_of(function: Any) -> float:
    """Return the highest score of a reward or a second opinion: what it states, else 1."""
    return float(getattr(function, "top", None) or 1.0)


def highest_sum(
    functions: Sequence[Reward], weights: Sequence[float], scores: Sequence[Sequence[float | None]]
) -> float | None:
    """Return what a perfect completion earns: the top that a reward states, else the best of its `scores`.

    So a format that no completion keeps is found, though all then earn the same. None where a reward scores none.
    """
    highest = 0.0
    for function, weight, values in zip(functions, weights, scores, strict=True):
        usable = [score for score in values if score is not None]
        if not usable:
            return None
        highest += weight * (getattr(function, "top", None) or max(usable))  # 0: a penalty may cost all some
    return highest


def _logging_second_opinion(function: Reward, opinion: Reward) -> Reward:
    """Return the reward, logging the mean of its second opinion on the same completions; that is never trained on."""

    @functools.wraps(function)
    def judged_twice(completions: list[Any], **kwargs: Any) -> list[float | None]:
        scores = function(completions=completions, **kwargs)
        if log_metric := kwargs.get("log_metric"):
            ours = ("log_metric", "log_extra", "head_start")
            quiet = {key: value for key, value in kwargs.items() if key not in ours}
            try:
                opinions = [score for score in opinion(completions=completions, **quiet) if score is not None]
            except RewardError as error:  # it only watches: what is trained on has its scores
                logger.warning("second opinion left out: %s", error)
                opinions = []
            if opinions:
                log_metric("honest_accuracy", sum(opinions) / len(opinions))
        return scores

    return judged_twice


def load_function(
    section: _Scored, where: str, columns: Sequence[str], lead_in: str = "", budget: JudgeBudget | None = None
) -> Reward:
    """Import one reward, bind its kwargs and wrap it so that a broken contract is named.

    Where `lead_in` ends with an opening tag, the reward gets `prefilled=True` if it takes that argument; and one that
    takes `budget` gets `limits.judge_budget`.

    Raises:
        RewardError: as load_rewards.
    """
    return _bind(import_function(section.function, where), section, where, columns, lead_in, budget)


def load_second_opinion(
    reward: Reward, section: _Scored, where: str, columns: Sequence[str], lead_in: str = ""
) -> Reward | None:
    """Return the independent judge that a loaded reward states (`rewards.facts`), None where it states none.

    It gets those kwargs of the reward's section that it takes.

    Raises:
        RewardError: as load_rewards.
    """
    opinion = getattr(reward, "second_opinion", None)
    if opinion is None:
        return None
    accepts = _accepts(opinion)
    kwargs = {key: value for key, value in section.kwargs.items() if accepts is None or key in accepts}
    name = f"{opinion.__module__}.{opinion.__name__}"
    return _bind(opinion, ScoreSection(function=name, kwargs=kwargs, threshold=1.0), where, columns, lead_in)


def _bind(
    function: Callable[..., Any],
    section: _Scored,
    where: str,
    columns: Sequence[str],
    lead_in: str,
    budget: JudgeBudget | None = None,
) -> Reward:
    _check_signature(function, section, where, columns)
    defaults = _prefilled(function, section, lead_in)
    if budget is not None and "budget" in _parameters(function):
        defaults["budget"] = budget.model_dump()
    return _wrap(function, section, where, defaults)


def _prefilled(function: Callable[..., Any], section: _Scored, lead_in: str) -> dict[str, Any]:
    """Return `prefilled=True` for a reward that takes it, where the chat template writes its first opening tag.

    A chat template's `<think>` is not in the chat messages that TRL passes. For a reward on tags it is the first of
    its own that counts, for all others any thinking tag.
    """
    from grpo_lite.rewards.completion import prompt_prefills_think
    from grpo_lite.rewards.format import ends_with_tag

    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    tags = section.kwargs.get("tags", parameters["tags"].default if "tags" in parameters else ())
    is_open = ends_with_tag(lead_in, tags[0]) if tags else prompt_prefills_think(lead_in)
    return {"prefilled": True} if is_open and (open_ended or "prefilled" in parameters) else {}


def checked_reward(function: Callable[..., Any], name: str) -> Reward:
    """Return a reward that the recipe does not name, an environment's, with the same checks of what it returns."""
    return _wrap(function, ScoreSection(function=name, threshold=1.0), "environment", {})


def import_function(reference: str, where: str) -> Callable[..., Any]:
    if ":" in reference:
        file, _, name = reference.rpartition(":")
        module = _import_file(Path(file).expanduser(), f"{where}.function")
    else:
        dotted, _, name = reference.rpartition(".")
        if not dotted or name == "py":
            raise RewardError(
                f"{where}.function: {reference!r} is given; write module.name, as rewards.accuracy_reward, or "
                "file.py:name, as my_rewards.py:my_reward."
            )
        try:
            module = _import_module(dotted, name)
        except Exception as error:  # the user's module may raise anything while it is imported
            raise RewardError(
                f"{where}.function: the module {dotted!r} of {reference!r} does not import: "
                f"{type(error).__name__}: {error}. For a file, write file.py:{name}."
            ) from error
    try:
        function = getattr(module, name)
    except AttributeError:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        names += list(getattr(module, "__all__", ()))
        raise RewardError(
            f"{where}.function: {reference!r}: there is no {name!r} in it{nearest(name, names)}. "
            f"It has: {', '.join(sorted(set(names))) or 'no functions'}."
        ) from None
    if not callable(function):
        raise RewardError(f"{where}.function: {reference!r} is a {type(function).__name__}, not a function.")
    return function


def _import_module(dotted: str, name: str) -> Any:
    """Import the module of `dotted.name`.

    `rewards.x` is ours under either name; another package called `rewards` is asked only for what ours does not have.
    """
    if dotted.partition(".")[0] == "rewards":
        try:
            ours = importlib.import_module(f"grpo_lite.{dotted}")
        except ModuleNotFoundError as error:
            if error.name != f"grpo_lite.{dotted}":
                raise
        else:
            if hasattr(ours, name):
                return ours
    return importlib.import_module(dotted)


def _import_file(path: Path, where: str) -> Any:
    if not path.is_file():
        raise RewardError(f"{where}: {str(path)!r} is given, but there is no such file. Check the path.")
    name = f"grpo_lite_user_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{where}: {path} is not a Python file (it must end in .py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"{where}: {path} does not import: {type(error).__name__}: {error}.") from error
    return module


def _check_signature(function: Callable[..., Any], section: _Scored, where: str, columns: Sequence[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return  # a builtin or C callable: nothing to read, TRL's own call will tell
    named = {
        key
        for key, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "completions" not in named and not open_ended:
        raise RewardError(
            f"{where}.function: {section.function} has the signature {inspect.signature(function)}; a reward is "
            "called as f(completions=[…], <columns>=[…], **kwargs) and returns one float (or None) per completion."
        )
    for key in section.kwargs:
        if key not in named and not open_ended:
            raise RewardError(
                f"{where}.kwargs.{key}: {section.function} has no such argument{nearest(key, named)}. "
                f"It has: {', '.join(sorted(named))}."
            )
    provided = {*TRL_ARGUMENTS, *columns, *section.kwargs}
    missing = [
        key
        for key, parameter in parameters.items()
        if key in named and parameter.default is parameter.empty and key not in provided
    ]
    one_of = getattr(function, "needs_one_of", ())
    if one_of and provided.isdisjoint(one_of):
        missing.append(" or ".join(one_of))
    if missing:
        raise RewardError(
            f"{where}.function: {section.function} needs {', '.join(missing)}, and no dataset column has that name. "
            f"Columns: {', '.join(columns) or 'none'}. Rename the column, set data.answer, or give rewards kwargs."
        )


def _wrap(function: Callable[..., Any], section: _Scored, where: str, defaults: dict[str, Any]) -> Reward:
    accepts, waits = _accepts(function), is_async(function)

    def call(completions: list[Any], kwargs: dict[str, Any]) -> Any:
        arguments = {**defaults, **kwargs, **section.kwargs}
        if accepts is not None:
            arguments = {key: value for key, value in arguments.items() if key in accepts}
        return function(completions=completions, **arguments)

    @functools.wraps(function)
    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        try:
            scores = call(completions, kwargs)
            if waits:
                scores = wait_for(scores)
        except RewardError:
            raise
        except RowsFailed as error:
            raise UnscoredRows(error, section.function, where, len(completions)) from error
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # the last two are no Exception
            raise RewardError(f"{where}: {section.function} raised {type(error).__name__}: {error}.") from error
        return _checked(scores, len(completions), section.function, where)

    def begin(completions: list[Any], head_start: HeadStart, **kwargs: Any) -> None:
        start(_begun(call(completions, {**kwargs, "head_start": head_start}), head_start))

    vars(reward)["waits"] = waits
    if waits and "head_start" in _parameters(function):
        vars(reward)["begin"] = begin
    reward.__name__ = getattr(function, "__name__", section.function.replace(":", ".").rpartition(".")[2])
    return reward


async def _begun(scores: Awaitable[Any], head_start: HeadStart) -> None:
    """Wait for scores, which the head start keeps; what fails here is passed on by the call for the batch.

    After a fault, or a spent budget, nothing more is asked before that call.
    """
    try:
        await scores
    except RowsFailed as error:
        head_start.is_off |= isinstance(error.__cause__, BudgetSpent)
    except Exception:
        head_start.is_off = True


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _accepts(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of a function's arguments; None where it takes any, or where they cannot be read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


def _checked(scores: Any, expected: int, function: str, where: str) -> list[float | None]:
    if not isinstance(scores, list | tuple) and not hasattr(scores, "tolist"):
        raise RewardError(
            f"{where}: {function} returned a {type(scores).__name__}; a list of {expected} floats (or None) is needed."
        )
    values = list(scores.tolist() if hasattr(scores, "tolist") else scores)
    if len(values) != expected:
        raise RewardError(
            f"{where}: {function} returned {len(values)} rewards for {expected} completions; return one per completion."
        )
    out: list[float | None] = []
    for i, value in enumerate(values):
        if value is None:
            out.append(None)
            continue
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError):
            raise RewardError(f"{where}: {function} returned {value!r} at position {i}; floats or None.") from None
        if not math.isfinite(number) or abs(number) >= _LARGEST:
            raise RewardError(
                f"{where}: {function} returned {number} at position {i}; rewards are finite and below 1e18, "
                "and None where there is none."
            )
        out.append(number)
    return out
