"""`Episodes`: TRL's loop over turns and tools, with each tool and environment guarded, and what it leaves to note.

TRL generates a turn, calls the tools that it names, appends their results and generates again (`_tool_call_loop`, trl
1.14-1.16). Each turn comes to our decoder as longer prompts, of which it reads what is new (`rollouts.py`). The tools'
tokens are context: `tool_mask` is 0 there, and TRL's loss and its lengths leave them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grpo_lite.errors import RewardError
from grpo_lite.task.tool_guard import STILL_RUNNING, ToolFailure, ToolGuard


class Episodes:
    """Guards the tools and environments of a trainer.

    Args:
        trainer: a GRPOTrainer.
        guard: calls them; None: TRL calls them itself, without limits.
    """

    def __init__(self, trainer: Any, guard: ToolGuard | None) -> None:
        self.trainer, self.guard = trainer, guard
        self.tool_mask: list[list[int]] | None = None  # of the last generation: 1 where the model wrote the token
        self._failed: set[int] = set()  # ids of the environments whose last reset failed
        self._last_failure = ""
        self._in_a_row = 0  # rounds of which more than half could not be reset
        if guard is None:
            return
        if trainer.environment_factories is None:
            return
        for instances in trainer._environment_pool.values():
            for instance in instances:
                self._guard(instance)
        trainer.environment_factories = {
            name: self._guarded(factory) for name, factory in trainer.environment_factories.items()
        }

    def replace_hung(self) -> None:
        """Give the place of an environment in which a call hung to a fresh one: the call may still be running."""
        if self.guard is None or not self.guard.hung:
            return
        for name, instances in self.trainer._environment_pool.items():
            for i, instance in enumerate(instances):
                if id(instance) in self.guard.hung:
                    instances[i] = self.trainer.environment_factories[name]()
        self.guard.forget()

    def play(self, loop: Callable[[], Any]) -> Any:
        """Return what `loop`, TRL's `_tool_call_loop`, does; tools are guarded meanwhile, and calls counted."""
        trainer = self.trainer
        if self.guard is None:
            return loop()
        wrap = self.guard.wrap
        budgets = self.guard.budgets(len(trainer._sync_tool_dicts))
        together = zip(trainer._sync_tool_dicts, trainer._async_tool_dicts, budgets, strict=True)
        trainer._sync_tool_dicts = [
            {name: wrap(tool, times) for name, tool in {**plain, **awaited}.items()}
            for plain, awaited, times in together
        ]
        trainer._async_tool_dicts = [{} for _ in trainer._sync_tool_dicts]
        before = self.guard.timeouts
        played = loop()
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        counts = trainer.peers.sums([played[4], played[5], self.guard.timeouts - before])
        for name, count in zip(("calls", "failures", "timeouts"), counts, strict=True):
            metrics[f"tools/{name}"].append(float(count))
        return played

    def note(self, generated: Any) -> Any:
        """Keep what rewards and records need of TRL's `_generate`, and return it."""
        self.tool_mask = generated[2]
        return generated

    def failed_rows(self) -> list[int]:
        """Return the rows of the last round whose environment could not be reset, or has a call that still runs.

        Raises:
            RewardError: they were most of the rows, `limits.reward_failures` times in a row.
        """
        environments = self.trainer.environments or ()
        failed = [row for row, environment in enumerate(environments) if self._is_out(environment)]
        self._in_a_row = self._in_a_row + 1 if 2 * len(failed) > len(environments) else 0
        if self.guard is not None and self._in_a_row >= self.guard.limits.reward_failures:
            raise RewardError(
                f"{self._last_failure or STILL_RUNNING}. In {self._in_a_row} rounds in a row (limits.reward_failures) "
                f"most of the {len(environments)} environments that play at once could not be used, so the run stops; "
                "what was saved is kept. Fix the environment, then run the same command again."
            )
        return failed

    def _is_out(self, environment: Any) -> bool:
        """Return whether an environment is not to be asked: its `reset` failed, or a call of it could not be ended."""
        lost = self.guard.lost if self.guard is not None else ()
        return id(environment) in self._failed or id(environment) in lost

    def _guarded(self, factory: Callable[[], Any]) -> Callable[[], Any]:
        def make() -> Any:
            instance = factory()
            self._guard(instance)
            return instance

        return make

    def _guard(self, instance: Any) -> None:
        plain, guard = instance.reset, self.guard
        assert guard is not None

        def reset(**row: Any) -> Any:
            self._failed.discard(id(instance))
            try:
                return guard.reset(instance, row, plain)
            except ToolFailure as failure:
                self._failed.add(id(instance))
                self._last_failure = str(failure).rstrip(".")
                return None

        instance.reset = reset
        if hasattr(instance, "get_reward"):
            instance.get_reward = self._guarded_reward(instance, instance.get_reward)

    def _guarded_reward(self, instance: Any, plain: Callable[[], Any]) -> Callable[[], Any]:
        """Return `get_reward`, which is not asked of an instance that is out: it may hold nothing to score."""
        if inspect.iscoroutinefunction(plain):

            async def awaited() -> Any:
                return None if self._is_out(instance) else await plain()

            return awaited
        return lambda: None if self._is_out(instance) else plain()
