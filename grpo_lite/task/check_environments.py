"""Play a recipe's environments without a model: what the gold policy, a random one and each cheat earn.

The policies stand beside the environment's class, as functions of a row: `gold(row)` and `cheats(row)` (policies.py).
Three more fit every environment: random calls with values of the right types, no call at all, and calls that fail. An
episode is also repeated, in a fresh instance and in one that has been used: training uses an instance for many
episodes, and a killed run resumes exactly only where an episode depends on nothing but its row and its turns.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lite.environments.methods import tools_of
from grpo_lite.errors import RewardError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.environments import Toolkit, make_environment
from grpo_lite.task.episodes import Message
from grpo_lite.task.generators import Row
from grpo_lite.task.policies import Turn, cheat_turns, gold_turns, play_turns
from grpo_lite.task.prompts import load_prompts

ROWS = 32  # of each environment
REPEATED = 4  # rows whose episodes are repeated
RANDOM_CALLS = 8
GOLD, RANDOM, SILENT, BROKEN = "gold", "random calls", "no call at all", "calls that fail"
_WORDS = ("apple", "crane", "1", "42", "2+2", "print(1)", "")


@dataclass(frozen=True)
class Played:
    """What the policies earned in one environment.

    Attributes:
        name: of the class.
        rows: how many were played.
        rewards: by policy, of the rows (by number) that it played and that were judged.
        keeps_state: whether an instance that has been used plays another episode than a fresh one.
        is_repeatable: whether fresh instances play equal episodes.
    """

    name: str
    rows: int
    rewards: dict[str, dict[int, float]]
    keeps_state: bool = False
    is_repeatable: bool = True

    @property
    def passes(self) -> bool:
        """Whether the environment may be trained on."""
        return not self.beaten_by and not self.keeps_state

    @property
    def beaten_by(self) -> list[str]:
        """Return the policies that earned on some row at least what the gold one did."""
        gold = self.rewards.get(GOLD)
        if gold is None:
            return []
        others = ((name, rewards) for name, rewards in self.rewards.items() if name != GOLD)
        return [name for name, rewards in others if any(r >= gold[row] for row, r in rewards.items() if row in gold)]

    def lines(self) -> Iterator[str]:
        """Yield a table, and what is wrong."""
        yield f"environment {self.name}: {self.rows} row{'s' if self.rows != 1 else ''} played"
        width = max(map(len, self.rewards), default=0)
        for name, by_row in self.rewards.items():
            rewards = list(by_row.values())
            mean = sum(rewards) / len(rewards)
            yield f"  {name:<{width}}  mean {mean:.2f}  least {min(rewards):.2f}  most {max(rewards):.2f}"
        if GOLD not in self.rewards:
            yield "  no gold policy: add `def gold(row)` beside the class, to show that a reward can be had"
        for name in self.beaten_by:
            yield f"  {name} earns as much as gold on some rows: the environment pays for something else than its task"
        if self.keeps_state:
            yield "  an instance keeps state of the episode before: set everything in reset"
        if not self.is_repeatable:
            yield (
                "  the same turns gave another episode: a resumed run will differ from one that nobody stopped. Let "
                "chance come from the row, or from Python's `random`, whose state a checkpoint keeps"
            )


def check_environments(recipe: Recipe) -> list[Played]:
    """Play the policies on the recipe's first training rows.

    Raises:
        RewardError: the recipe has no environment, one has no `get_reward` or no rows, a policy is at fault, or an
            episode does not end or raises.
    """
    if not recipe.environment:
        raise RewardError(f"{recipe.name}: there is no `environment` to check. Name one: environment=my_env.py:Env")
    prompts = load_prompts(recipe)
    toolkit = prompts.toolkit
    assert toolkit is not None
    return [_played(recipe, toolkit, name, prompts.train) for name in toolkit.factories]


def _played(recipe: Recipe, toolkit: Toolkit, name: str | None, train: Sequence[Row]) -> Played:
    factory = toolkit.factories[name]
    title = getattr(factory, "__name__", str(factory))
    if name not in toolkit.rewarding:
        raise RewardError(f"environment: {title} has no get_reward, so playing it shows nothing. Add the method.")
    rows = [row for row in train if toolkit.name_of(row) == name][:ROWS]
    if not rows:
        raise RewardError(f"environment.{name}: no row of data.train names it. Add rows with it, or remove it.")
    tools, chance = tools_of(toolkit.instances[name]), random.Random(recipe.seed)
    make = functools.partial(make_environment, factory, f"environment: {title}")

    def play(instance: Any, row: Row, turns: Sequence[Turn]) -> tuple[float | None, list[Message]]:
        return play_turns(instance, toolkit.columns_of(row), turns, recipe.limits, toolkit.tools)

    rewards: dict[str, dict[int, float]] = {}
    first: list[tuple[Row, Sequence[Turn]]] = []  # the first policy's turns
    for number, row in enumerate(rows):
        policies = _policies(row, factory, tools, chance)
        first.append((row, next(iter(policies.values()))))
        for policy, turns in policies.items():
            reward, _ = play(make(), row, turns)
            if reward is not None:
                rewards.setdefault(policy, {})[number] = reward
    return Played(title, len(rows), rewards, *_repeated(make, play, recipe.seed, first[:REPEATED]))


def _repeated(
    make: Callable[[], Any], play: Callable[..., Any], seed: int, episodes: Sequence[tuple[Row, Sequence[Turn]]]
) -> tuple[bool, bool]:
    """Return whether an instance keeps state from one episode to the next, and whether episodes can be repeated."""
    keeps_state, is_repeatable = False, True
    state = random.getstate()
    used = make()
    try:
        for row, turns in episodes:
            outcomes = []
            for instance in (make(), make(), used):
                random.seed(seed)
                outcomes.append(play(instance, row, turns))
            if outcomes[0] != outcomes[1]:
                is_repeatable = False
            elif outcomes[0] != outcomes[2]:
                keeps_state = True
    finally:
        random.setstate(state)
    return keeps_state, is_repeatable


def _policies(
    row: Row, factory: Callable[[], Any], tools: Mapping[str, Callable[..., Any]], chance: random.Random
) -> dict[str, Sequence[Turn]]:
    gold = gold_turns(factory, row)
    policies = {**({} if gold is None else {GOLD: gold}), **cheat_turns(factory, row)}
    names = [*tools, "reset", "get_reward", "no_such_tool"]
    broken: list[Turn] = [[{"name": name, "arguments": {"no_such_argument": 1}} for name in names]]
    return policies | {RANDOM: _random_turns(tools, chance), SILENT: ["I am done."], BROKEN: broken}


def _random_turns(tools: Mapping[str, Callable[..., Any]], chance: random.Random) -> list[Turn]:
    from transformers.utils import get_json_schema

    turns: list[Turn] = []
    for _ in range(RANDOM_CALLS if tools else 0):
        tool = chance.choice(list(tools.values()))
        properties = get_json_schema(tool)["function"]["parameters"].get("properties", {})
        arguments = {name: _random_value(schema, chance) for name, schema in properties.items()}
        turns.append([{"name": tool.__name__, "arguments": arguments}])
    return turns


def _random_value(schema: Mapping[str, Any], chance: random.Random) -> Any:
    if schema.get("enum"):
        return chance.choice(schema["enum"])
    values = {"integer": chance.randint(0, 9), "number": chance.uniform(0, 9), "boolean": chance.random() < 0.5}
    return values.get(str(schema.get("type")), chance.choice(_WORDS))
