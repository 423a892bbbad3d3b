"""load_toolkit: the recipe's `tools` and `environment` -> what TRL's GRPOTrainer gets, and the schemas in a prompt.

The contract is TRL's (`tools=`, `environment_factory=`, trl 1.14-1.16): a tool is a function with type hints and a
docstring; an environment is a class with `reset(**row)`, whose other public methods are tools, and perhaps
`get_reward()`. A class for plain TRL runs unchanged. Whatever TRL or transformers would refuse later, with the model
loaded, is refused here from the tokenizer alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lite.environments import openenv, verifiers
from grpo_lite.environments.methods import tools_of
from grpo_lite.errors import GRPOLiteError, ModelError, RewardError
from grpo_lite.recipe.recipe import ENVIRONMENT_REWARD, Recipe
from grpo_lite.task.generators import Row
from grpo_lite.task.rewards import import_function

_DEEPEST = 50  # levels of a call's arguments
_KNOWN = "the original templates of Qwen2.5, Qwen3, Qwen3.5 and Llama 3.1/3.2 Instruct are known to TRL"
_OWN = "or set model.chat_template=smollm2-tools where the model speaks ChatML"


@dataclass(frozen=True)
class Toolkit:
    """What the model may call.

    Attributes:
        tools: functions that every prompt offers.
        factories: environments by the name that a row's column `environment` gives; None for a single one.
        methods: the tools of each environment, bound to an instance that no episode uses.
        rewarding: the names of the environments that have `get_reward`.
        instances: those that the methods are bound to.
    """

    tools: tuple[Callable[..., Any], ...]
    factories: dict[str | None, Callable[[], Any]]
    methods: dict[str | None, tuple[Callable[..., Any], ...]]
    rewarding: frozenset[str | None]
    instances: dict[str | None, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What TRL's GRPOTrainer gets."""
        several = None not in self.factories
        made = {name: functools.partial(make_environment, one, "environment") for name, one in self.factories.items()}
        factory: Any = made if several else made[None]
        return {
            **({"tools": list(self.tools)} if self.tools else {}),
            **({"environment_factory": factory} if self.factories else {}),
        }

    def name_of(self, row: Row) -> str | None:
        """Return the name of a row's environment; None for a single one, or none."""
        return None if None in self.factories or not self.factories else row.get("environment")

    def columns_of(self, row: Row) -> Row:
        """Return what `reset` gets of a row: copies, without the name of one of several environments, as in TRL."""
        several = None not in self.factories
        return {key: copy.deepcopy(row[key]) for key in row if not (several and key == "environment")}

    def offered(self, row: Row) -> list[Callable[..., Any]]:
        """Return the tools that a row's prompt offers."""
        return [*self.tools, *self.methods.get(self.name_of(row), ())]


def load_toolkit(recipe: Recipe) -> Toolkit | None:
    """Import and check the recipe's tools and environments; None where it has neither.

    Raises:
        RewardError: not importable, not in TRL's contract, or nothing pays a reward.
    """
    if not recipe.has_tools:
        return None
    tools = tuple(_import(reference, f"tools[{i}]") for i, reference in enumerate(recipe.tools))
    for i, tool in enumerate(tools):
        _require_schema(tool, f"tools[{i}]: {recipe.tools[i]}")
    named: dict[str | None, str] = {}
    if isinstance(recipe.environment, str):
        named = {None: recipe.environment}
    elif recipe.environment is not None:
        named.update(iter(recipe.environment.items()))
    factories: dict[str | None, Callable[[], Any]] = {}
    methods: dict[str | None, tuple[Callable[..., Any], ...]] = {}
    rewarding = set()
    instances: dict[str | None, Any] = {}
    for name, reference in named.items():
        where = "environment" if name is None else f"environment.{name}"
        # One class for one reference: a file that is read twice makes two of one name.
        same = next((factories[other] for other in factories if named[other] == reference), None)
        factories[name] = same or _environment(reference, where, name)
        instances[name] = instance = make_environment(factories[name], f"{where}: {reference}")
        methods[name] = _methods(instance, f"{where}: {reference}", bool(tools))
        if "get_reward" in _functions(instance):
            rewarding.add(name)
        _require_distinct([*tools, *methods[name]], f"{where}: {reference}")
    _require_distinct(tools, "tools")
    unpaid = [name for name in factories if name not in rewarding]
    if not recipe.rewards and unpaid:
        which = ", ".join(named[name] for name in unpaid)
        raise RewardError(f"rewards: [] is given, and {which} has no get_reward. Add the method, or a reward function.")
    scored = [recipe.primary_score, *recipe.eval.strict] if recipe.eval.enabled else []
    if unpaid and any(section.function == ENVIRONMENT_REWARD for section in scored):
        which = ", ".join(named[name] for name in unpaid)
        raise RewardError(f"eval: a score is {ENVIRONMENT_REWARD}, and {which} has none. Add the method.")
    _require_distinct_classes([type(instances[name]) for name in rewarding])
    return Toolkit(tools, factories, methods, frozenset(rewarding), instances)


def require_environment_columns(toolkit: Toolkit, rows: list[Row], where: str) -> None:
    """Refuse rows that do not say which of several environments they use, or that its `reset` does not take.

    Raises:
        RewardError: a row's column `environment` is missing or names none of them, or `reset` needs another column or
            does not take one.
    """
    if not toolkit.factories:
        return
    several, allowed = None not in toolkit.factories, ", ".join(map(str, toolkit.factories))
    resets = {name: inspect.signature(made.reset) for name, made in toolkit.instances.items()}
    for index, row in enumerate(rows):
        if several and row.get("environment") not in toolkit.factories:
            given = repr(row["environment"]) if "environment" in row else "no such column"
            raise RewardError(
                f"{where}: row {index}: environment: {given} is given; allowed: {allowed}. Give each row the name of "
                "its environment, or name a single class under `environment`."
            )
        name = toolkit.name_of(row)
        try:
            resets[name].bind(**{key: value for key, value in row.items() if not (several and key == "environment")})
        except TypeError as error:
            kind = type(toolkit.instances[name]).__name__
            raise RewardError(
                f"{where}: row {index}: {kind}.reset: {error}; the row has the columns {', '.join(row)}. Add the "
                "column, or let reset take all others by **row."
            ) from None


def make_environment(factory: Callable[[], Any], where: str) -> Any:
    """Return an instance of an environment.

    Raises:
        RewardError: making it raises.
        GRPOLiteError: its library is not installed.
    """
    try:
        return factory()
    except GRPOLiteError:  # an environment of the kit says itself what it lacks
        raise
    except Exception as error:
        raise RewardError(
            f"{where}: cannot be made without arguments: {type(error).__name__}: {error}. TRL calls it with none; a "
            "row's values arrive in reset(**row)."
        ) from error


def tool_template_kwargs(template_kwargs: dict[str, Any] | None, tokenizer: Any, model_id: str) -> dict[str, Any]:
    """Return what renders episodes: the recipe's `template_kwargs`, with the template of `tool_template`, if any."""
    template = tool_template(tokenizer, model_id)
    return {**(template_kwargs or {}), **({"chat_template": template} if template else {})}


def tool_template(tokenizer: Any, model_id: str) -> str | None:
    """Return the chat template that TRL takes for episodes, None for the tokenizer's own; adds the parser of calls.

    Raises:
        ModelError: the chat template has no tools, or TRL cannot parse its calls or keep its prefix.
    """
    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        supports_tool_calling,
    )

    advice = f"Choose a model whose template has tools: {_KNOWN}; {_OWN}."
    if not supports_tool_calling(tokenizer):
        raise ModelError(f"model.id: the chat template of {model_id} cannot show calls of tools and results. {advice}")
    if not any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
        try:
            add_response_schema(tokenizer)
        except ValueError:
            if not _reads_calls_as_qwen3(tokenizer):
                raise ModelError(
                    f"model.id: TRL does not know the chat template of {model_id}, so it cannot read the calls that "
                    f"the model writes. {advice}"
                ) from None
    tokenizer.parse_response = functools.partial(_parsed, tokenizer)
    if is_chat_template_prefix_preserving(tokenizer):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:
        raise ModelError(
            f"model.id: the chat template of {model_id} rewrites earlier turns when a result follows, and TRL has no "
            f"corrected one for it. {advice}"
        ) from None
    return template


def _reads_calls_as_qwen3(tokenizer: Any) -> bool:
    """Give a tokenizer Qwen3's parser of calls if that reads what its own template writes; say whether it does."""
    from trl.chat_template_utils import add_response_schema, parse_response, qwen3_chat_template

    own = tokenizer.chat_template
    tokenizer.chat_template = qwen3_chat_template
    add_response_schema(tokenizer)
    tokenizer.chat_template = own
    call = {"type": "function", "function": {"name": "tool_name", "arguments": {"text": 'a "b"\n', "number": 3}}}
    question = [{"role": "user", "content": "question"}]
    before = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False
    )
    if whole.startswith(before):
        prefix, written = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole[len(before) :])
        )
        if parse_response(tokenizer, written, prefix=prefix).get("tool_calls") == [call]:
            return True
    for name in ("response_template", "response_schema"):
        if getattr(tokenizer, name, None) is not None:
            delattr(tokenizer, name)
    return False


def _parsed(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what transformers' `parse_response` reads, without what JSON may hold and no tokenizer or file can.

    Raises:
        ValueError: a call nests too deep, so TRL takes the turn as plain text.
    """
    try:
        return _writable(type(tokenizer).parse_response(tokenizer, *args, **kwargs))
    except RecursionError:
        raise ValueError("a call nests too deep") from None


def _writable(value: Any, depth: int = 0) -> Any:
    """Return a value with `?` for half of a surrogate pair, which the escapes of JSON can write."""
    if depth > _DEEPEST:
        raise ValueError("a call nests too deep")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_writable(key): _writable(part, depth + 1) for key, part in value.items()}
    return [_writable(part, depth + 1) for part in value] if isinstance(value, list) else value


def _environment(reference: str, where: str, name: str | None) -> Callable[[], Any]:
    """Import an environment's class, or make that of a server or a taskset."""
    if reference.startswith(openenv.SCHEME):
        return openenv.environment_at(reference.removeprefix(openenv.SCHEME), name)
    if reference.startswith(verifiers.SCHEME):
        return verifiers.environment_of(reference.removeprefix(verifiers.SCHEME))
    return _import(reference, where)


def _import(reference: str, where: str) -> Callable[..., Any]:
    """Import `module.name`, `module:name` or `file.py:name`."""
    module, colon, name = reference.rpartition(":")
    if colon and not module.endswith(".py") and not Path(module).exists() and "/" not in module:
        reference = f"{module}.{name}"
    try:
        return import_function(reference, where)
    except RewardError as error:
        raise RewardError(str(error).replace(f"{where}.function:", f"{where}:", 1)) from None


def _functions(instance: Any) -> list[str]:
    return [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]


def _methods(instance: Any, where: str, has_tools: bool) -> tuple[Callable[..., Any], ...]:
    if "reset" not in _functions(instance):
        raise RewardError(f"{where}: has no method `reset`. Add `def reset(self, **row)`; it begins an episode.")
    if inspect.iscoroutinefunction(instance.reset):
        raise RewardError(f"{where}: `reset` is async; TRL calls it without awaiting it. Make it a plain method.")
    if not hasattr(instance, "__dict__"):
        raise RewardError(f"{where}: has __slots__ and no __dict__, so `reset` cannot be guarded. Remove __slots__.")
    methods = tuple(tools_of(instance).values())
    if not methods and not has_tools:
        raise RewardError(
            f"{where}: has no public method beside reset and get_reward, so the model has nothing to call. Add a "
            "method with type hints and a docstring."
        )
    for method in methods:
        _require_schema(method, f"{where}.{method.__name__}")
    return methods


def _require_schema(tool: Callable[..., Any], where: str) -> None:
    """Refuse a function of which transformers makes no schema: without a docstring, or an argument without a type."""
    from transformers.utils import get_json_schema

    if not inspect.isroutine(tool):
        raise RewardError(f"{where}: is a {type(tool).__name__}; a tool is a function. Put it in one.")
    try:
        get_json_schema(tool)
    except Exception as error:  # DocstringParsingException, TypeHintParsingException, and what signatures may raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise RewardError(
            f"{where}: transformers makes no schema of it: {reason}. A tool has a type hint for each argument, and a "
            "docstring with a line for the tool and an `Args:` line for each argument."
        ) from None


def _require_distinct_classes(rewarding: list[type]) -> None:
    """Refuse two classes of one name that pay: their rewards would be logged, and added up, under it."""
    names = [kind.__name__ for kind in set(rewarding)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RewardError(
            f"environment: two classes are called {', '.join(twice)}; their rewards are told apart by it. Rename one."
        )


def _require_distinct(tools: Any, where: str) -> None:
    names = [tool.__name__ for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RewardError(f"{where}: two tools are called {', '.join(twice)}; the model calls by name. Rename one.")
