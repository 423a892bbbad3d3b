"""ToolGuard: a tool that raises, hangs, or returns something huge or no text costs the model a message, not the run.

TRL turns what a tool raises into `{'error': …}` for the model, and the guard leaves it at that: it only sees to it that
an ordinary exception arrives there in time, and that a result is text of bounded length. `reset` has the same limit;
a `reset` that fails costs its group (`failed`), as a reward that fails does (`guard.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_lite.recipe.recipe import LimitsSection
from grpo_lite.screen import Show
from grpo_lite.task.time_limit import TimeLimitExceeded, call_within, is_async, wait_for

_LONGEST_ERROR = 500  # characters of an error that the model gets
_LONGEST_LINE = 300  # characters of a failure on the screen
_LINES_PER_TOOL = 3  # reasons why one tool, `reset` or `get_reward` fails that are shown; all are counted

STILL_RUNNING = "was not called: an earlier call is still running, and could not be ended"


class ToolFailure(Exception):
    """What the model gets as the tool's error."""


@dataclass
class Budget:
    """Seconds that several calls may take together."""

    limit: str  # the recipe's key
    left_s: float


@dataclass
class ToolGuard:
    """Calls tools within limits.

    Attributes:
        timeouts: calls that were over their time, of the whole run.
        hung: ids of the environments in which a call was over its time; they are not used in another episode.
        lost: ids of those in which the call could not be ended; they are not used at all.
        last_failure: what failed last, and why, shown or not.
    """

    limits: LimitsSection
    show: Show
    timeouts: int = 0
    hung: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    last_failure: str = ""
    _shown: dict[str, set[str]] = field(default_factory=dict)

    def budgets(self, episodes: int) -> list[tuple[Budget, ...]]:
        """Return what the tools of each episode of a round may take: their own time, and the time of the round."""
        whole = Budget("limits.tool_round_timeout_s", self.limits.tool_round_timeout_s)
        seconds = self.limits.tool_episode_timeout_s
        return [(Budget("limits.tool_episode_timeout_s", seconds), whole) for _ in range(episodes)]

    def wrap(self, tool: Callable[..., Any], budgets: Sequence[Budget]) -> Callable[..., str]:
        """Return the tool with its limits: text, or a ToolFailure. An async tool becomes a plain one."""

        @functools.wraps(tool)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            seconds, limit = self.limits.tool_timeout_s, ""
            for budget in budgets:
                if budget.left_s < seconds:
                    seconds, limit = budget.left_s, budget.limit
            start = time.monotonic()
            owner = getattr(tool, "__self__", None)
            try:
                if id(owner) in self.lost:
                    raise ToolFailure(STILL_RUNNING)
                if seconds <= 0:
                    raise ToolFailure(f"was not called: no time is left ({limit})")
                return self._within(functools.partial(tool, *args, **kwargs), seconds, self._text)
            except TimeLimitExceeded as over:
                self.timeouts += 1
                self._leave(owner, over)
                reason = f"took longer than {seconds:.3g} s" + (f", what {limit} had left" if limit else "")
            except KeyboardInterrupt:
                raise
            except SystemExit:
                reason = "called exit"
            except BaseException as error:  # such as the CancelledError of a tool's own event loop
                reason = _said(error) or type(error).__name__
            finally:
                for budget in budgets:
                    budget.left_s -= time.monotonic() - start
            self.say(f"tool failed: {tool.__name__}", reason)
            raise ToolFailure(self._shortened(reason, _LONGEST_ERROR))

        return guarded

    def reset(self, environment: Any, row: dict[str, Any], reset: Callable[..., Any]) -> Any:
        """Return the first observation as text; None where it adds nothing.

        Raises:
            ToolFailure: `reset` raised, hung or returned something else.
        """
        try:
            return self._within(functools.partial(reset, **row), self.limits.tool_timeout_s, self._observation)
        except TimeLimitExceeded as over:
            self._leave(environment, over)
            reason = f"took longer than limits.tool_timeout_s = {self.limits.tool_timeout_s:g} s"
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = (
                _said(error) if isinstance(error, ToolFailure) else f"raised {type(error).__name__}: {_said(error)}"
            )
        columns = {key: value for key, value in row.items() if key != "prompt"}
        self.say(f"tool failed: {type(environment).__name__}.reset", f"{reason.rstrip('.')}, with the row {columns}")
        raise ToolFailure(f"{type(environment).__name__}.reset {reason}")

    def forget(self) -> None:
        """Forget the environments in which a call was over its time, when all of them have been replaced."""
        self.hung.clear()
        self.lost.clear()

    def _leave(self, environment: Any, over: TimeLimitExceeded) -> None:
        if environment is not None:
            self.hung.add(id(environment))
            if over.still_running:
                self.lost.add(id(environment))

    def _within(self, call: functools.partial[Any], seconds: float, convert: Callable[[Any], str | None]) -> Any:
        return call_within(seconds, lambda: convert(wait_for(call()) if is_async(call) else call()))

    def say(self, what: str, reason: str) -> None:
        """Show why something failed, each reason once, the first ones only."""
        line, shown = " ".join(_writable(reason).split()), self._shown.setdefault(what, set())
        line = line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE].rstrip()}…"
        self.last_failure = f"{what.removeprefix('tool failed: ')}: {line}"
        if len(shown) == _LINES_PER_TOOL or line in shown:
            return
        shown.add(line)
        last = "; further ones are only counted" if len(shown) == _LINES_PER_TOOL else ""
        self.show(f"{what}: {line}{last}")

    def _text(self, result: Any) -> str:
        """Return a result as text of bounded length: parts of a message joined, all else by `str`, as TRL does it.

        Raises:
            ToolFailure: it holds an image, or cannot be written as text.
        """
        if isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result):
            if other := [part["type"] for part in result if part["type"] != "text"]:
                raise ToolFailure(f"returned a part of type {str(other[0])[:50]!r}; the model reads text only")
            result = "".join(str(part.get("text", "")) for part in result)
        try:
            text = str(result)
        except Exception as error:
            raise ToolFailure(f"returned a {type(result).__name__} that is no text: {type(error).__name__}") from None
        return _writable(self._shortened(text, self.limits.tool_result_chars))

    def _observation(self, value: Any) -> str | None:
        """Return what `reset` returned as text.

        Raises:
            ToolFailure: it is neither text, nor parts with text, nor None.
        """
        parts = isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)
        if value is not None and not isinstance(value, str) and not parts:
            raise ToolFailure(f"returned a {type(value).__name__}; allowed are text, content parts and None")
        if value is None or value == []:
            return None
        text, longest = self._text(value), self.limits.tool_result_chars
        if len(text) > longest:
            self.say("reset returned a long text", f"it is cut off after limits.tool_result_chars = {longest}")
        return text

    @staticmethod
    def _shortened(text: str, limit: int) -> str:
        return text if len(text) <= limit else f"{text[:limit]}\n[cut: {len(text)} characters, the first {limit} shown]"


def _said(error: BaseException) -> str:
    try:
        return _writable(str(error))
    except Exception:
        return ""


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # no tokenizer reads half a surrogate pair
