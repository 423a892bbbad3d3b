"""ToolChat: a question to a model with tools. They are really called, and each call and result is shown.

A question is an episode of its own, as in training: the environment begins anew, and of earlier questions the model
gets the answers, not the calls. What an environment needs beside the question, such as a hidden word or a file to
search, comes from a row of the recipe.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from grpo_lite.errors import DataError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.turns import message_text
from grpo_lite.screen import Show
from grpo_lite.task.environments import load_toolkit, tool_template_kwargs
from grpo_lite.task.episodes import Episode, Generate, Message, Player
from grpo_lite.task.generators import Row
from grpo_lite.task.prompts import Prompts, fields_of, read_rows, render_row

Build = Callable[[str], Any]  # a typed question -> chat messages


class ToolChat:
    """Answers questions by episodes.

    Args:
        recipe: with tools or an environment.
        tokenizer: of its model.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        kwargs = tool_template_kwargs(recipe.template_kwargs, tokenizer, recipe.model.id)
        prompts = Prompts([], [], tokenizer=tokenizer, template_kwargs=kwargs, toolkit=load_toolkit(recipe))
        self.recipe = recipe
        self.player = Player(prompts, recipe, lambda line: None)
        self._rows = _own_rows(recipe) if self.player.toolkit.factories else []
        self._chance, self._number = random.Random(recipe.seed), 0.0

    def begin(self) -> None:
        """Choose the recipe's row for the next question; base and trained model get the same one."""
        self._number = self._chance.random()

    def answer(
        self, question: str, build: Build, generate: Generate, max_tokens: int, context: int | None, stream: Show | None
    ) -> tuple[str, str]:
        """Return what is shown, with calls and results, and the answer alone.

        Args:
            question: as typed; with an environment also columns of a row as a JSON object, which may be empty.
            build: makes the messages of a question.
            generate: writes a turn.
            max_tokens: of the episode.
            context: tokens that the model can read.
            stream: called with each message as it comes.
        """
        try:
            row = self._row(question, build)
        except DataError as error:
            return f"({error})", ""
        shown: list[str] = []

        def add(text: str) -> None:
            if text:
                shown.append(text)
                if stream is not None:
                    stream(text if text == shown[0] else f"\n{text}")

        def watch(message: Message) -> None:
            if message["role"] != "user":
                add(message_text(message))
            elif message != build(question)[-1]:  # a row's question, or what `reset` added to it
                add(f"? {message_text(message)}")

        (episode,) = self.player.play([row], generate, max_tokens, context, watch)
        add(self._end(episode, max_tokens))
        return "\n".join(shown), episode.answer

    def _row(self, question: str, build: Build) -> Row:
        data, names = self.recipe.data, self.player.toolkit.factories
        columns = _json_object(question) if names else None
        base = self._base((columns or {}).get("environment"))
        if columns is None:
            fields = set(fields_of(data.prompt, "data.prompt"))
            asked = dict.fromkeys(fields, question) if len(fields) == 1 else {}
            row = {**(render_row(data, base, "chat", 0) if base else {}), **asked, "prompt": build(question)}
        elif unknown := [name for name in columns if base and name not in base]:
            raise DataError(f"chat: the recipe's rows have no column {unknown[0]!r}. They have: {', '.join(base)}.")
        else:
            row = render_row(data, {**({data.answer: None} if data.answer else {}), **base, **columns}, "chat", 0)
        if names and self.player.toolkit.name_of(row) not in names:
            raise DataError(
                "chat: the recipe has several environments. Type the columns of a row as JSON, with `environment` as "
                f"one of {', '.join(map(str, names))}."
            )
        return row

    def _base(self, environment: Any) -> Row:
        """Return the recipe's row for this question: of one of several environments, if that is given."""
        rows = [row for row in self._rows if environment is None or row.get("environment") == environment]
        return rows[int(self._number * len(rows))] if rows else {}

    def _end(self, episode: Episode, max_tokens: int) -> str:
        if episode.ended == "reset":
            return (
                f"(not begun: {self.player.guard.last_failure}. Type the columns of a row as JSON, "
                'such as {"number": 37})'
            )
        if episode.ended == "hung":
            return f"(stopped: {self.player.guard.last_failure}, and could not be ended)"
        if episode.ended == "turns":
            return f"(stopped after {episode.turns} turns: grpo.max_tool_calling_iterations={self.player.most_turns})"
        return f"(cut off: an episode has at most {max_tokens} tokens)" if episode.ended == "length" else ""


def _own_rows(recipe: Recipe) -> list[Row]:
    """Return the recipe's rows where they are generated or in a file here; none of the Hub's, which take a download."""
    if recipe.data.train.hub:
        return []
    try:
        return read_rows(recipe.data.train, recipe.seed, "data.train")
    except DataError:  # trained elsewhere: a question brings its columns itself
        return []


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
