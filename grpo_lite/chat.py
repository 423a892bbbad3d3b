"""chat: ask a trained run a question, or talk with it; base and trained side by side on request.

Questions are put as the recipe put them in training (template, system prompt, examples), and answered by the same
weights that were evaluated: the base, quantised as the recipe says, with the adapter on it or switched off.
"""

from __future__ import annotations

import contextlib
import shutil
import string
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lite.errors import DataError
from grpo_lite.recipe.recipe import DataSection, Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.task.tokens import prompt_ids

HELP = "/new forgets the conversation, /exit ends it"
_NARROW = 80  # columns below which answers go one under the other

Turn = tuple[str, str]  # question as asked, answer


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 0.0  # 0: greedy, as the scores were measured
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None  # None: the recipe's own cap
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (not 0 <= self.temperature < float("inf"), f"--temperature {self.temperature}: 0 (greedy) or more"),
                (not 0 < self.top_p <= 1, f"--top-p {self.top_p}: above 0, at most 1"),
                (self.top_k < 0, f"--top-k {self.top_k}: 0 (off) or more"),
                (self.max_new_tokens is not None and self.max_new_tokens < 1, "--max-new-tokens: 1 or more"),
            )
            if bad
        ]
        if wrong:
            raise DataError("chat: allowed are " + "; ".join(wrong) + ".")


class Chat:
    """A loaded run that answers questions."""

    def __init__(self, run: RunDir, sampling: Sampling, compare: bool = False) -> None:
        from grpo_lite.models.device import detect_device
        from grpo_lite.models.load import load_tokenizer, load_trained

        self.recipe = run.load_recipe()
        self.tokenizer = load_tokenizer(self.recipe)
        self.model = load_trained(self.recipe, detect_device(), run.adapter)
        self.sampling = sampling
        self.sides = ("base", "trained") if compare else ("trained",)
        self.histories: dict[str, list[Turn]] = {side: [] for side in self.sides}
        if sampling.seed is not None:
            import torch

            torch.manual_seed(sampling.seed)

    def ask(self, question: str, remember: bool = False, stream: Show | None = None) -> dict[str, str]:
        """Answer one question, by side ("trained", and "base" when comparing).

        Args:
            remember: carry question and answer into the next one (chat format only).
            stream: called with pieces of the answer as they come; one side only.
        """
        answers = {}
        for side in self.sides:
            with self.model.disable_adapter() if side == "base" else contextlib.nullcontext():
                answers[side] = self._answer(question, self.histories[side], stream)
            if remember and self.recipe.data.format == "chat":
                self.histories[side].append((question, answers[side]))
        return answers

    def forget(self) -> None:
        """Start a new conversation."""
        for history in self.histories.values():
            history.clear()

    def _answer(self, question: str, history: Sequence[Turn], stream: Show | None) -> str:
        import torch

        prompt = build_prompt(self.recipe, question, history)
        kwargs = self.recipe.grpo.get("chat_template_kwargs")
        ids = torch.tensor([prompt_ids(prompt, self.tokenizer, kwargs)], device=self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._generation_config(),
                streamer=_streamer(self.tokenizer, stream) if stream else None,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        from grpo_lite.engine.generate import stop_ids

        sampling = self.sampling
        cap = sampling.max_new_tokens or self.recipe.eval.max_new_tokens or self.recipe.max_completion_length
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature}
            drawn |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        stops = stop_ids(self.model, self.tokenizer) or None
        return GenerationConfig(
            max_new_tokens=cap, eos_token_id=stops, pad_token_id=self.tokenizer.pad_token_id, **drawn
        )


def build_prompt(recipe: Recipe, question: str, history: Sequence[Turn] = ()) -> Any:
    """Return a question as the recipe's rows were put: chat messages, or text."""
    data = recipe.data
    asked = fill_template(data, question)
    if data.format == "text":
        shots = "".join(f"{example.prompt}{example.answer}\n" for example in data.examples)
        return (f"{data.system}\n" if data.system else "") + shots + asked
    messages = [{"role": "system", "content": data.system}] if data.system else []
    turns = [(example.prompt, example.answer) for example in data.examples]
    turns += [(fill_template(data, said), answer) for said, answer in history]
    for said, answer in turns:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": asked}]


def fill_template(data: DataSection, question: str) -> str:
    """Put a question into the recipe's template where that has one column; otherwise leave it as typed."""
    pieces = list(string.Formatter().parse(data.prompt))
    columns = [field for _, field, _, _ in pieces if field is not None]
    if len(set(columns)) != 1:
        return question
    filled = "".join(literal + (question if field is not None else "") for literal, field, _, _ in pieces)
    ending = pieces[-1][0] if pieces[-1][1] is None else ""
    # "2+3=" was typed where the template is "{question}=": do not add what is there already.
    return filled[: -len(ending)] if ending and question.endswith(ending) else filled


def answer_lines(answers: dict[str, str], width: int | None = None) -> list[str]:
    """Return answers as lines for people: one plain, two side by side, or one under the other where it is narrow."""
    if len(answers) == 1:
        return [next(iter(answers.values()))]
    width = width or shutil.get_terminal_size((_NARROW - 1, 24)).columns
    if width < _NARROW:
        return [line for side, text in answers.items() for line in (f"{side}:", text, "")][:-1]
    column = (width - 3) // 2
    left, right = (
        [side, "-" * column, *(row for line in text.splitlines() for row in textwrap.wrap(line, column) or [""])]
        for side, text in answers.items()
    )
    height = max(len(left), len(right))
    left, right = ([*rows, *[""] * (height - len(rows))] for rows in (left, right))
    return [f"{a.ljust(column)} | {b}".rstrip() for a, b in zip(left, right, strict=True)]


def talk(chat: Chat, lines: Iterable[str], show: Show, interactive: bool, stream: Show | None = None) -> int:
    """Answer questions line by line until they end; return how many were answered.

    Args:
        lines: what is typed, or piped: then every line is a question of its own.
        interactive: keep the conversation, and know /new and /exit.
        stream: called with pieces of a single answer as they come; needs `interactive` and one side.
    """
    count = 0
    for line in lines:
        question = line.strip()
        if not question:
            continue
        if interactive and question in ("/exit", "/quit"):
            break
        if interactive and question == "/new":
            chat.forget()
            continue
        if interactive and question == "/help":
            show(HELP)
            continue
        single = stream if len(chat.sides) == 1 else None
        answers = chat.ask(question, remember=interactive, stream=single)
        show("" if single else "\n".join(answer_lines(answers)))
        count += 1
    return count


def _streamer(tokenizer: Any, stream: Show) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
