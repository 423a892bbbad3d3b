"""Player: episodes outside of training. Any generator writes the turns; tools and environments answer, guarded.

Place in the line: evaluation, the probe and the chat play by it. Training plays by TRL's own loop
(`trainer/episodes.py`), and the rules here are that loop's (`GRPOTrainer._tool_call_loop`, trl 1.14-1.16): the same
turns give the same tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from grpo_lite.commands import hint
from grpo_lite.environments.methods import tools_of
from grpo_lite.errors import ModelError, RewardError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.screen import Show
from grpo_lite.task.environments import make_environment
from grpo_lite.task.generators import Row
from grpo_lite.task.prompts import Prompts
from grpo_lite.task.rewards import checked_reward
from grpo_lite.task.time_limit import TimeLimitExceeded, call_within, is_async, wait_for
from grpo_lite.task.tokens import tool_result_ids, without_markup
from grpo_lite.task.tool_guard import STILL_RUNNING, Budget, ToolFailure, ToolGuard

Message = dict[str, Any]
# Gets prompts as token ids and the most tokens to write; returns what was written, without the token that ended it.
Generate = Callable[[list[list[int]], int], list[list[int]]]
Watch = Callable[[Message], None]


@dataclass
class Episode:
    """One prompt played to its end.

    Attributes:
        row: the row it is of.
        prompt: its messages, with what `reset` returned.
        prompt_ids: the same as the model reads them.
        environment: the instance, in its last state; None without one.
        ids: tokens of the completion, results of tools included.
        mask: 1 where the model wrote the token.
        messages: the turns: the model's, and the results of tools.
        ended: by an answer without a call, at the limit of turns, at the length, by a call that could not be ended, or
            by a `reset` that failed, after which nothing was played.
        calls: how many, of which `failed_calls` gave the model an error.
        asked: whether `get_reward` was called, which is done once; `paid` is what it returned, 0 where it failed.
        fault: why it could not be scored; "" where it could.
    """

    row: Row
    prompt: list[Message]
    prompt_ids: list[int] = field(default_factory=list)
    environment: Any = None
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    ended: Literal["answer", "turns", "length", "hung", "reset"] | None = None
    calls: int = 0
    failed_calls: int = 0
    asked: bool = False
    paid: float | None = None
    fault: str = ""
    budgets: tuple[Budget, ...] = ()  # for the time of its tools

    @property
    def answer(self) -> str:
        """What the model said last."""
        said = [message for message in self.messages if message.get("role") != "tool"]
        return str(said[-1].get("content") or "") if said else ""

    @property
    def turns(self) -> int:
        """How often the model spoke."""
        return turns_of(self.messages)

    @property
    def read(self) -> list[int]:
        """All tokens so far."""
        return [*self.prompt_ids, *self.ids]


class Player:
    """Plays episodes of a recipe's prompts with its tools and environments.

    Args:
        prompts: of the recipe, with its tokenizer and toolkit.
        recipe: says the limits.
        show: gets a line for the first failures of each tool.
    """

    def __init__(self, prompts: Prompts, recipe: Recipe, show: Show) -> None:
        if prompts.toolkit is None:
            raise ValueError("the recipe has no tools")
        self.prompts, self.toolkit, self.limits = prompts, prompts.toolkit, recipe.limits
        self.most_turns: int | None = recipe.grpo.get("max_tool_calling_iterations")
        self.guard = ToolGuard(recipe.limits, show)
        self._pool: dict[str | None, list[Any]] = {}

    def play(
        self,
        rows: Sequence[Row],
        generate: Generate,
        max_tokens: int,
        context: int | None = None,
        watch: Watch = lambda message: None,
    ) -> list[Episode]:
        """Play an episode for each row, all at once, turn by turn.

        Their environments stay as they ended until the next call, which uses them again.

        Args:
            rows: of the prompts; the same one may come several times.
            generate: writes the turns.
            max_tokens: of an episode, results of tools included.
            context: tokens that the model can read; None: not limited.
            watch: called with the last message of each prompt, then with each message as it comes.
        """
        episodes = [self._begun(row, instance) for row, instance in zip(rows, self._instances(rows), strict=True)]
        for episode, budgets in zip(episodes, self.guard.budgets(len(episodes)), strict=True):
            episode.budgets = budgets
            if episode.ended is None:
                watch(episode.prompt[-1])
        active = [episode for episode in episodes if episode.ended is None]
        turn = 0
        while active:
            room = max(max_tokens - len(episode.ids) for episode in active)
            written = generate([episode.read for episode in active], max(1, room))
            for episode, ids in zip(active, written, strict=True):
                self._hear(episode, ids, max_tokens, watch)
            active = [episode for episode in active if episode.ended is None]
            for episode in active:
                if self.most_turns is not None and turn >= self.most_turns:
                    episode.ended = "turns"
                else:
                    self._call(episode, max_tokens, context, watch)
            active = [episode for episode in active if episode.ended is None]
            turn += 1
        return episodes

    def rewards(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Return what each episode's environment pays (`get_reward`); None where it cannot be judged or has none.

        Where `get_reward` raises, hangs or returns something else, the episode gets 0, so that it is not right, and
        says why (`fault`).
        """
        for episode in episodes:
            if not episode.asked:
                episode.asked = True
                try:
                    episode.paid = self._reward(episode)
                except RewardError as error:
                    episode.paid, episode.fault = 0.0, str(error)
                    self.guard.say(f"get_reward failed: {type(episode.environment).__name__}", str(error))
        return [episode.paid for episode in episodes]

    def release(self) -> None:
        """Let go of the environments of earlier episodes; what they hold, such as a server's session, is free again."""
        self._pool.clear()

    def _instances(self, rows: Sequence[Row]) -> list[Any]:
        """Return an environment for each row, those of earlier episodes first; one in which a call hung is left."""
        for pool in self._pool.values():
            pool[:] = [instance for instance in pool if id(instance) not in self.guard.hung]
        self.guard.forget()
        if not self.toolkit.factories:
            return [None] * len(rows)
        taken: Counter[str | None] = Counter()
        instances = []
        for row in rows:
            name = self.toolkit.name_of(row)
            pool = self._pool.setdefault(name, [])
            if taken[name] == len(pool):
                pool.append(make_environment(self.toolkit.factories[name], "environment"))
            instances.append(pool[taken[name]])
            taken[name] += 1
        return instances

    def _begun(self, row: Row, environment: Any) -> Episode:
        episode = Episode(row, [dict(message) for message in row["prompt"]], environment=environment)
        if environment is not None:
            try:
                observation = self.guard.reset(environment, self.toolkit.columns_of(row), environment.reset)
            except ToolFailure:
                episode.ended = "reset"
                return episode
            if observation is not None:
                episode.prompt[-1] = observed(episode.prompt[-1], observation)
        episode.prompt_ids = self.prompts.ids({**row, "prompt": episode.prompt})
        return episode

    def _hear(self, episode: Episode, written: list[int], max_tokens: int, watch: Watch) -> None:
        """Add what the model wrote, cut at the length; without a call the episode has ended."""
        tokenizer, left = self.prompts.tokenizer, max_tokens - len(episode.ids)
        has_ended = len(written) < left
        ids = [*written, tokenizer.eos_token_id] if has_ended else written[:left]
        message: Message = {}
        if ids:
            message = read_turn(tokenizer, ids, episode.read, self.toolkit.offered(episode.row))
            episode.messages.append(message)
            watch(message)
        episode.ids += ids
        episode.mask += [1] * len(ids)
        if not message.get("tool_calls"):
            episode.ended = "answer" if has_ended else "length"

    def _call(self, episode: Episode, max_tokens: int, context: int | None, watch: Watch) -> None:
        """Call what the last message asks for, and add the results; those that do not fit end the episode."""
        results, failed = answer_calls(self._tools(episode), episode.messages[-1]["tool_calls"])
        episode.calls += len(results)
        episode.failed_calls += failed
        added = self._result_ids(results)
        length = len(episode.ids) + len(added)
        if id(episode.environment) in self.guard.lost:
            episode.ended, episode.asked, episode.paid = "hung", True, 0.0
            episode.fault = f"environment: {type(episode.environment).__name__}.get_reward {STILL_RUNNING}."
        if length > max_tokens or (context is not None and len(episode.prompt_ids) + length >= context):
            episode.ended = episode.ended or "length"
            return
        episode.messages += results
        for message in results:
            watch(message)
        episode.ids += added
        episode.mask += [0] * len(added)

    def _tools(self, episode: Episode) -> dict[str, Callable[..., Any]]:
        tools = {tool.__name__: tool for tool in self.toolkit.tools}
        if episode.environment is not None:
            tools |= tools_of(episode.environment)
        return {name: self.guard.wrap(tool, episode.budgets) for name, tool in tools.items()}

    def _result_ids(self, results: list[Message]) -> list[int]:
        tokenizer, template = self.prompts.tokenizer, self.prompts.template_kwargs or {}
        ids = tool_result_ids(results, tokenizer, template)
        if ids is None:
            ids = tool_result_ids(without_markup(results, tokenizer), tokenizer, template)
        if ids is None:
            raise ModelError(
                "model.id: the chat template changes what comes before a result of a tool, so no turn can follow it. "
                "Choose a model of docs/tools-and-environments.md."
            )
        return ids

    def _reward(self, episode: Episode) -> float | None:
        if episode.ended == "reset" or not hasattr(episode.environment, "get_reward"):
            return None
        return reward_of(episode.environment, episode.messages, self.limits.reward_timeout_s)


def reward_of(environment: Any, messages: list[Message], seconds: float | None) -> float | None:
    """Return what an environment's `get_reward` pays for an episode, None where it cannot be judged.

    Args:
        environment: the instance that played it.
        messages: of the episode.
        seconds: that it may take.

    Raises:
        RewardError: it raises, takes longer or returns no number.
    """
    name, pay = f"{type(environment).__name__}.get_reward", environment.get_reward

    def paid(completions: Any) -> list[Any]:
        return [wait_for(pay()) if is_async(pay) else pay()]

    try:
        (score,) = call_within(seconds, lambda: checked_reward(paid, name)(completions=[messages]))
    except TimeLimitExceeded:
        raise RewardError(
            f"environment: {name} took longer than limits.reward_timeout_s = {seconds:g} s. Fix it, or raise the limit."
        ) from None
    return score


def answer_calls(
    tools: Mapping[str, Callable[..., Any]], calls: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], int]:
    """Call what the model asks for; return the results as messages, and how many of them are errors."""
    results: list[Message] = []
    failed = 0
    for call in calls:
        function = call.get("function") or {}
        name = function.get("name", call.get("name", "unknown"))
        try:
            if call.get("type") != "function":
                raise ValueError(f"Unsupported tool call type: {call.get('type')}")
            if name not in tools:
                raise ValueError(f"Tool {name} not found.")
            result = tools[name](**function["arguments"])
        except Exception as error:  # what a tool raises is for the model to read
            failed += 1
            result = {"error": str(error)}
        results.append({"role": "tool", "name": name, "content": result if isinstance(result, list) else str(result)})
    return results, failed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the global generators of `random` and NumPy begin at a seed, and put them back afterwards."""
    before, of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)


def turns_of(messages: Sequence[Message]) -> int:
    """Return how often the model spoke in an episode."""
    return sum(message.get("role") != "tool" for message in messages)


def require_scored(episodes: Sequence[Episode], where: str) -> None:
    """Refuse episodes of which `get_reward` failed in every one that it was asked about.

    Raises:
        RewardError: it did.
    """
    faults = [episode.fault for episode in episodes if episode.asked and episode.ended != "reset"]
    if faults and all(faults):
        raise RewardError(
            f"{where}: get_reward failed in all {len(faults)} episodes; the first time: {faults[0].rstrip('.')}. Fix "
            f"it; {hint('check-env')} plays the environment without a model."
        )


def make_player(prompts: Prompts, recipe: Recipe, show: Show) -> Player | None:
    """Return the player of a recipe's episodes; None where completions are single answers."""
    return None if prompts.toolkit is None else Player(prompts, recipe, show)


def read_turn(tokenizer: Any, ids: list[int], before: list[int], tools: list[Callable[..., Any]] | None) -> Message:
    """Return what the model wrote as a message, read as the installed TRL reads it in training.

    Args:
        tokenizer: knows how its template writes calls.
        ids: of the turn, its end token included.
        before: the tokens that it follows.
        tools: offered to the model. TRL 1.14 does not take the types of arguments from them.
    """
    from trl.chat_template_utils import parse_response

    typed = {"tools": tools} if "tools" in inspect.signature(parse_response).parameters else {}
    message: Message = parse_response(tokenizer, ids, prefix=before, **typed)
    return message


def observed(message: Message, observation: Any) -> Message:
    """Return the last message of the prompt with what `reset` returned behind its content, as TRL appends it."""
    content = message["content"]
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    return {**message, "content": content + observation}
