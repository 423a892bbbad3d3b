"""An environment's tools: which of its methods they are, and methods made at run time.

Those have the signature and the docstring from which transformers makes a tool's schema.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NOT_TOOLS = ("reset", "get_reward")  # in TRL's contract


def is_tool_name(name: str) -> bool:
    """Return whether a method of this name is a tool in TRL's contract."""
    return name.isidentifier() and not name.startswith("_") and name not in NOT_TOOLS


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """Return the tools of an environment by name: its public methods but `reset` and `get_reward`, as in TRL."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return {name: getattr(environment, name) for name in names if not name.startswith("_") and name not in NOT_TOOLS}


def make_method(
    name: str,
    description: str,
    parameters: Mapping[str, tuple[Any, Any, str]],
    call: Callable[[Any, dict[str, Any]], str],
) -> Callable[..., str]:
    """Return a method that checks the names of its arguments and hands them to `call` with its instance.

    Args:
        name: of the method.
        description: what it does.
        parameters: type hint, default (`inspect.Parameter.empty`: required) and description of each argument.
        call: gets the instance and the arguments.
    """
    arguments = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for key, (hint, default, _) in parameters.items()
    ]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([itself, *arguments], return_annotation=str)

    def method(self: Any, **arguments: Any) -> str:
        signature.bind(self, **arguments)
        return call(self, arguments)

    lines = [" ".join(description.split()) or f"Call {name}."]
    if parameters:
        lines += ["", "Args:"]
        lines += [f"    {key}: {' '.join(text.split()) or key}" for key, (_, _, text) in parameters.items()]
    method.__name__ = method.__qualname__ = name
    method.__doc__ = "\n".join(lines)
    method.__signature__ = signature  # type: ignore[attr-defined]
    method.__annotations__ = {key: hint for key, (hint, _, _) in parameters.items()} | {"return": str}
    return method
