"""An OpenEnv server as an environment: `environment: openenv:http://127.0.0.1:8000`. Needs the extra `openenv`.

The server says what can be called. Tools that it lists (OpenEnv's `MCPEnvironment`) become tools of the model; any
other server has one tool, `step`, whose arguments are the fields of its action. Read in openenv 0.10.
"""

from __future__ import annotations

import inspect
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from grpo_lite.environments.methods import is_tool_name, make_method
from grpo_lite.errors import RewardError

SCHEME = "openenv:"
_LISTING = ("Action", "CallToolAction", "ListToolsAction")  # titles of the actions of servers that list their tools
_TYPES = {"integer": int, "number": float, "boolean": bool, "string": str, "array": list, "object": dict}
_SECONDS = 10.0  # for what is asked of a server before training
_CLOSING_S = 1.0  # for the end of a session, whose place the next one may need


class OpenEnv:
    """One session with a server; each episode begins with the server's `reset`.

    Columns: what the server's `reset` takes, such as `seed`. Reward: the sum of what the server gave for the calls.
    """

    _url = ""

    def __init__(self) -> None:
        self._client: Any = None
        self._connection: Any = None  # of this episode
        self._reward = 0.0
        self._done = False
        self._lost: Exception | None = None

    def reset(self, prompt: Any = None, **row: Any) -> str | None:
        """Begin an episode; what the server shows is appended to the prompt."""
        self._reward, self._done, self._lost = 0.0, False, None
        if self._client is None:
            self._client = client = _client(self._url)
            # A server has a limited number of sessions, so the session ends with its instance.
            self._end = weakref.finalize(self, _end_session, client)
            self._end.atexit = False
        columns = {name: value for name, value in row.items() if value is not None}
        shown = self._shown(self._ask(self._client.reset, **columns))
        self._reward = 0.0  # what comes with the first observation is not the player's
        self._connection = self._client.async_client._ws
        return f"\n\n{shown}" if shown else None

    def get_reward(self) -> float:
        """Return the sum of the server's rewards.

        Raises:
            ConnectionError: the connection was lost in this episode, so it cannot be judged.
        """
        if self._lost is not None:
            raise ConnectionError(f"{self._url}: {self._lost}")
        return self._reward

    def _act(self, action: dict[str, Any]) -> str:
        if self._done or self._lost is not None:
            raise ValueError("the episode is over")
        return self._shown(self._ask(self._step, action)) or "done"

    def _step(self, action: dict[str, Any]) -> Any:
        # The client would connect again by itself: to a new session, which nobody has reset (openenv 0.10).
        if self._connection.state.name != "OPEN":
            raise ConnectionError("the connection was closed")
        return self._client.step(action)

    def _ask(self, request: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return request(*args, **kwargs)
        except RuntimeError:  # the server's own refusal, of wrong arguments for instance; the session goes on
            raise
        except BaseException as error:  # the time limit too
            self._client = None
            self._end()
            self._lost = ConnectionError(str(error) or type(error).__name__)
            raise

    def _shown(self, result: Any) -> str:
        """Count a result's reward, and return its observation as text."""
        self._reward += float(result.reward or 0.0)
        self._done = bool(result.done)
        observation = result.observation if isinstance(result.observation, dict) else {"result": result.observation}
        if observation.get("error"):
            error = observation["error"]
            raise ValueError(error.get("message", error) if isinstance(error, dict) else error)
        if "tool_name" in observation:
            return _result(observation.get("result"))
        fields = {key: value for key, value in observation.items() if key != "metadata" and value not in (None, "")}
        if len(fields) == 1 and isinstance(only := next(iter(fields.values())), str):
            return only
        return json.dumps(fields, ensure_ascii=False) if fields else ""


def environment_at(url: str, name: str | None = None) -> type[OpenEnv]:
    """Return the class of a server's environment, a method for each thing that can be called.

    Args:
        url: of the server.
        name: which of several environments it is.

    Raises:
        RewardError: the library is not installed, no server answers, or it offers nothing that can be called.
    """
    where = f"environment: {SCHEME}{url}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(f"{where}: allowed is an address such as {SCHEME}http://127.0.0.1:8000.")
    action = _action_schema(url.rstrip("/"), where)
    methods: dict[str, Callable[..., Any]] = {}
    if action.get("title") in _LISTING:
        for tool in _listed(url, where):
            called = str(tool.get("name", "")).replace("-", "_")
            if not is_tool_name(called):
                raise RewardError(f"{where}: a tool is called {tool.get('name')!r}. Give it a name of letters and _.")
            schema = tool.get("input_schema") or tool.get("inputSchema") or {}
            methods[called] = _method(called, tool.get("description") or "", schema, tool["name"])
    else:
        fields = {key: value for key, value in action.get("properties", {}).items() if key != "metadata"}
        methods["step"] = _method("step", action.get("description", ""), {**action, "properties": fields}, None)
    if not methods:
        raise RewardError(f"{where}: the server lists no tools, so the model has nothing to call.")
    return type("OpenEnv" if name is None else f"OpenEnv_{name}", (OpenEnv,), {"_url": url.rstrip("/"), **methods})


def _client(url: str) -> Any:
    try:
        from openenv import GenericEnvClient
    except ImportError:
        raise RewardError(
            f"environment: {SCHEME}{url}: the library is not installed: pip install 'grpo-lite[openenv]'."
        ) from None
    return GenericEnvClient(base_url=url).sync()


def _end_session(client: Any) -> None:
    """Close a session, in a thread of its own: a server that hangs must not hang the run for long."""
    closing = threading.Thread(target=_close, args=(client,), daemon=True)
    closing.start()
    closing.join(_CLOSING_S)


def _close(client: Any) -> None:
    with suppress(Exception):
        client.close()


def _action_schema(url: str, where: str) -> dict[str, Any]:
    """Return the JSON Schema of a server's action."""
    opener = urllib.request.build_opener()
    if urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1"):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/schema", timeout=_SECONDS) as answer:
            schema: dict[str, Any] = json.load(answer)["action"]
    except urllib.error.HTTPError as error:
        raise RewardError(f"{where}: {url}/schema answers {error.code}; is this an OpenEnv server?") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise RewardError(f"{where}: no server answers ({reason}). Start it, then give the command again.") from None
    except (ValueError, KeyError, TypeError):
        raise RewardError(f"{where}: {url}/schema is no OpenEnv server's; is the address right?") from None
    return schema


def _listed(url: str, where: str) -> list[dict[str, Any]]:
    client = _client(url)
    try:
        listed: list[dict[str, Any]] = client.step({"type": "list_tools"}).observation["tools"]
        return listed
    except Exception as error:
        raise RewardError(f"{where}: its tools cannot be listed: {type(error).__name__}: {error}.") from None
    finally:
        _close(client)


def _method(name: str, description: str, schema: Mapping[str, Any], tool: str | None) -> Callable[..., str]:
    """Return the method that calls a tool, or that sends an action where `tool` is None."""
    required = schema.get("required", ())
    parameters = {
        key: (
            _annotation(value, schema.get("$defs", {})),
            inspect.Parameter.empty if key in required else value.get("default"),
            str(value.get("description") or ""),
        )
        for key, value in schema.get("properties", {}).items()
    }

    def call(environment: OpenEnv, arguments: dict[str, Any]) -> str:
        asked = arguments if tool is None else {"type": "call_tool", "tool_name": tool, "arguments": arguments}
        return environment._act(asked)

    return make_method(name, description, parameters, call)


def _annotation(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """Return the type hint that a property's JSON Schema stands for."""
    if "$ref" in schema:
        schema = definitions.get(schema["$ref"].rpartition("/")[2], {"type": "object"})
    if schema.get("enum"):
        return Literal[tuple(schema["enum"])]
    parts = schema.get("anyOf") or schema.get("oneOf") or ()
    if parts:
        hints = [type(None) if part.get("type") == "null" else _annotation(part, definitions) for part in parts]
        hint = hints[0]
        for other in hints[1:]:
            hint = hint | other
        return hint
    return _TYPES.get(str(schema.get("type")), str)


def _result(result: Any) -> str:
    """Return the text of a listed tool's result, in the shape of MCP or as it is."""
    if isinstance(result, dict) and ("data" in result or "content" in result):
        if result.get("data") is not None:
            result = result["data"]
        else:
            return "\n".join(str(part.get("text", "")) for part in result.get("content", ()))
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
