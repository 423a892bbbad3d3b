"""A taskset of the library verifiers as data, tools and reward. Needs the extra `verifiers`.

    data: {train: {generator: verifiers, kwargs: {taskset: my-taskset, size: 100}}, prompt: "{question}", answer: null}
    environment: verifiers:my-taskset        # where its tasks have tools
    rewards: [{function: grpo_lite.environments.verifiers.task_reward}]

The library plays a task by a harness against a served model. Here TRL plays it: tools run in this process, and rewards
read a trace of the episode. What needs more than that (an environment that plays the user, a runtime, a container, a
judge model) is refused. Read in verifiers 0.4.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Any, get_type_hints

from grpo_lite.environments.methods import is_tool_name, make_method
from grpo_lite.errors import RewardError

SCHEME = "verifiers:"


class VerifiersTask:
    """One task at a time, with tool servers of its own.

    Columns: `taskset` and `task`, as the generator `verifiers` writes them. Reward: `task_reward`.
    """

    def __init__(self) -> None:
        self._toolsets: list[Any] = []
        self._state: Any = None

    def reset(self, taskset: str, task: int, **row: Any) -> None:
        """Begin an episode with fresh tool servers; the prompt says everything, so nothing is added to it."""
        library, chosen = _library(), _task(taskset, task)
        self._toolsets = _toolsets(type(chosen), chosen.config, *_open(taskset))
        states = {type(server.state) for server in self._toolsets} - {library.State}
        self._state = next(iter(states))() if states else library.State()
        for server in self._toolsets:
            if type(server.state) is type(self._state):
                server._inert_state = self._state  # as the library's state channel: shared by a task's servers
            _wait_for(server.setup())
            _wait_for(server.setup_task(chosen.data))

    def _call(self, server: int, tool: str, arguments: dict[str, Any]) -> str:
        result = getattr(self._toolsets[server], tool)(**arguments)
        result = _wait_for(result) if inspect.isawaitable(result) else result
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def environment_of(taskset: str) -> type[VerifiersTask]:
    """Return the class of a taskset's tasks, a method for each of their tools.

    Raises:
        RewardError: the library or the taskset is not installed, it needs what is not here, or it has no tools.
    """
    settings = json.dumps({"id": taskset})
    kind, opened = _open(settings)
    methods: dict[str, Callable[..., str]] = {}
    task_type = kind.task_type()
    for index, server in enumerate(_toolsets(task_type, opened.config.task, kind, opened)):
        for tool in _tools(server):
            own = getattr(tool, "tool_name", None) or tool.__name__
            name = f"{server.server_name}_{own}" if server.server_name else own
            if not is_tool_name(name) or name in methods:
                raise RewardError(
                    f"environment: {SCHEME}{taskset}: the tool {name!r} is named twice, or not as a tool."
                )
            methods[name] = _method(name, tool, index)
    if not methods:
        raise RewardError(
            f"environment: {SCHEME}{taskset}: its tasks have no tools. Remove `environment`; the generator "
            "`verifiers` and the reward grpo_lite.environments.verifiers.task_reward serve it without."
        )
    return type("VerifiersTask", (VerifiersTask,), methods)


def task_reward(
    completions: list[Any], taskset: list[str], task: list[int], environments: Any = None, **_: Any
) -> list[float]:
    """Return what the tasks' own rewards, weighted as they say, add up to.

    Args:
        completions: messages of the episodes, or texts.
        taskset: column of the generator `verifiers`.
        task: column of the generator `verifiers`.
        environments: the instances that played them, where there are tools.
    """
    rewards = []
    for i, completion in enumerate(completions):
        state = environments[i]._state if environments else None
        rewards.append(_score(_task(taskset[i], task[i]), completion, state))
    return rewards


def rows(taskset: str, size: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows `{question, taskset, task}` of the first tasks.

    Raises:
        RewardError: the library or the taskset is not installed, or it needs what is not here.
        ValueError: a task has no prompt.
    """
    column = json.dumps({"id": taskset, **settings})
    _open(column)
    made = []
    for index, task in enumerate(islice(_tasks(column), size)):
        question = "\n\n".join(text for text in (task.data.system_prompt, task.data.prompt_text) if text)
        if not question:
            raise ValueError(f"task {index} of {taskset} has no prompt: its user opens the conversation")
        made.append({"question": question, "taskset": column, "task": index})
    return made


def _library() -> Any:
    try:
        import verifiers.v1 as library
    except ImportError:
        raise RewardError("verifiers: the library is not installed: pip install 'grpo-lite[verifiers]'.") from None
    return library


@functools.lru_cache(maxsize=8)
def _open(settings: str) -> tuple[Any, Any]:
    """Return the class of a taskset and the taskset, if episodes here can play it."""
    library, keys = _library(), json.loads(settings)
    name = keys["id"]
    try:
        config = library.taskset_config_type(name)(**keys)
        taskset = library.load_taskset(config)
        plays_itself = library.environment_class(name) is not library.SingleAgentEnv
        kind = type(taskset).task_type()
        judges = kind(kind.data_type().model_construct(), config.task).plugged_judges()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RewardError(f"verifiers: taskset {name!r} cannot be loaded: {reason} Install its package.") from None
    waits = [fn.__name__ for fn in _rewards(kind, config.task) if _needs_runtime(fn)]
    lacks = [
        *(["an environment that plays the user"] if plays_itself else []),
        *(["a container"] if kind.NEEDS_CONTAINER else []),
        *(["a runtime (setup)"] if kind.setup is not library.Task.setup else []),
        *(["a runtime (finalize)"] if kind.finalize is not library.Task.finalize else []),
        *([f"a runtime (reward {', '.join(waits)})"] if waits else []),
        *(["a judge model"] if judges else []),
    ]
    if lacks:
        raise RewardError(
            f"verifiers: taskset {name!r} needs {' and '.join(lacks)}, which episodes here do not have. Allowed are "
            "tasks whose tools are toolsets and whose rewards read the trace."
        )
    return type(taskset), taskset


def _rewards(kind: Any, config: Any) -> list[Callable[..., Any]]:
    found: list[Callable[..., Any]] = kind(kind.data_type().model_construct(), config).hooks("reward")
    return found


def _needs_runtime(function: Callable[..., Any]) -> bool:
    parameter = inspect.signature(function).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


_SEEN: dict[str, tuple[Iterator[Any], list[Any]]] = {}  # by settings: the tasks to come, and those that came


def _tasks(settings: str) -> Iterator[Any]:
    """Yield a taskset's tasks; each is loaded once."""
    if settings not in _SEEN:
        _SEEN[settings] = iter(_open(settings)[1]), []
    coming, seen = _SEEN[settings]
    index = 0
    while True:
        if index == len(seen):
            if (task := next(coming, None)) is None:
                return
            seen.append(task)
        yield seen[index]
        index += 1


def _task(settings: str, number: int) -> Any:
    task = next(islice(_tasks(settings), number, None), None)
    if task is None:
        raise ValueError(f"there is no task {number} in {settings}")
    return task


def _toolsets(task_type: Any, config: Any, taskset_type: Any, taskset: Any) -> list[Any]:
    return [*task_type.toolsets(config), *taskset_type.toolsets(taskset.config)]


def _tools(server: Any) -> list[Callable[..., Any]]:
    from verifiers.v1.utils.decorators import discover_decorated

    tools: list[Callable[..., Any]] = discover_decorated(server, "tool")
    return tools


def _method(name: str, tool: Callable[..., Any], server: int) -> Callable[..., str]:
    from transformers.utils import get_json_schema

    try:
        schema = get_json_schema(tool)["function"]
        texts = {key: value.get("description", "") for key, value in schema["parameters"]["properties"].items()}
        description = schema["description"]
    except Exception:  # no line for each argument in its docstring, which the library does not ask for
        texts, description = {}, inspect.getdoc(tool) or ""
    hints = get_type_hints(tool)
    parameters = {
        key: (hints.get(key, str), parameter.default, texts.get(key, ""))
        for key, parameter in inspect.signature(tool).parameters.items()
    }
    return make_method(
        name,
        description,
        parameters,
        lambda environment, arguments: environment._call(server, tool.__name__, arguments),
    )


def _score(task: Any, completion: Any, state: Any) -> float:
    library = _library()
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    nodes = [library.MessageNode(message=library.UserMessage(content=task.data.prompt_text))]
    for message in _typed(messages):
        sampled = message.role == "assistant"
        nodes.append(library.MessageNode(parent=len(nodes) - 1, message=message, sampled=sampled))
    trace = library.Trace(
        task=library.TraceTask(type=type(task).__name__, data=task.data),
        agent=library.AgentInfo(config=library.AgentConfig()),
        nodes=nodes,
    )
    if state is not None:
        trace.state = state
    _wait_for(task.score(trace))
    return float(trace.reward)


def _typed(messages: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield the library's messages; a result belongs to the first call before it that has none."""
    library = _library()
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "tool":
            call = open_calls.pop(0) if open_calls else f"{number}"
            yield library.ToolMessage(tool_call_id=call, content=str(content), name=message.get("name"))
            continue
        calls = []
        for position, call in enumerate(message.get("tool_calls") or ()):
            function = call["function"]
            arguments = function.get("arguments")
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, default=str)
            calls.append(library.ToolCall(id=f"{number}.{position}", name=str(function.get("name")), arguments=text))
        open_calls = [call.id for call in calls]
        yield library.AssistantMessage(
            content=str(content),
            reasoning_content=message.get("reasoning_content"),
            tool_calls=calls or None,
        )


_LOOP: list[asyncio.AbstractEventLoop] = []


def _wait_for(awaitable: Awaitable[Any]) -> Any:
    """Return what a coroutine returns; all run on one event loop, so that a client's connection stays usable."""
    if not _LOOP:
        _LOOP.append(asyncio.new_event_loop())
        threading.Thread(target=_LOOP[0].run_forever, name="verifiers", daemon=True).start()

    async def awaited() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(awaited(), _LOOP[0]).result()
