"""Ask a trained run a question, or chat with it; base and trained model side by side on request.

Questions are asked as in training (the recipe's template, system prompt and examples) and answered by the weights that
were evaluated: the base, quantised as the recipe says, with the adapter switched on or off.
"""

from __future__ import annotations

import contextlib
import shutil
import string
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo_lite.errors import DataError
from grpo_lite.recipe.recipe import DataSection, Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.task.tokens import prompt_ids

HELP = "/new starts a new conversation, /exit ends it"
_NARROW = 80  # columns; on narrower terminals one answer is shown below the other

Turn = tuple[str, str]  # question as asked, answer


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    temperature: float = 0.0  # 0: greedy, as the scores were measured
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None  # None: the recipe's own cap
    seed: int | None = None

    def __post_init__(self) -> None:
        faults = [
            text
            for wrong, text in (
                (not 0 <= self.temperature < float("inf"), f"--temperature {self.temperature}: 0 (greedy) or more"),
                (not 0 < self.top_p <= 1, f"--top-p {self.top_p}: above 0, at most 1"),
                (self.top_k < 0, f"--top-k {self.top_k}: 0 (off) or more"),
                (self.max_new_tokens is not None and self.max_new_tokens < 1, "--max-new-tokens: 1 or more"),
            )
            if wrong
        ]
        if faults:
            raise DataError("chat: allowed are " + "; ".join(faults) + ".")


class Chat:
    """A loaded run that answers questions."""

    def __init__(self, run: RunDir, sampling: Sampling, compare: bool = False) -> None:
        from grpo_lite.models.base import Base
        from grpo_lite.models.load import load_tokenizer, load_trained

        self.recipe = run.load_recipe()
        base = Base.resolve(self.recipe.model)
        self.tokenizer = load_tokenizer(base)
        self.model = load_trained(base, self.recipe.rollout, run.adapter)
        self.sampling = sampling
        self.sides = ("base", "trained") if compare else ("trained",)
        self.tools = None
        if self.recipe.has_tools:
            from grpo_lite.ui.tool_chat import ToolChat

            self.tools = ToolChat(self.recipe, self.tokenizer)
        self.histories: dict[str, list[Turn]] = {side: [] for side in self.sides}
        if sampling.seed is not None:
            import torch

            torch.manual_seed(sampling.seed)

    def ask(self, question: str, remember: bool = False, stream: Show | None = None) -> dict[str, str]:
        """Return the answers to one question by side: "trained", and "base" when comparing.

        With tools an answer also shows each call and its result.

        Args:
            remember: keep question and answer for the next question (chat format only).
            stream: called with pieces of the answer as they are generated; one side only.
        """
        answers = {}
        if self.tools is not None:
            self.tools.begin()
        for side in self.sides:
            with self.model.disable_adapter() if side == "base" else contextlib.nullcontext():
                answers[side], said = self._answer(question, self.histories[side], stream)
            if remember and self.recipe.data.format == "chat":
                self.histories[side].append((question, said))
        return answers

    def forget(self) -> None:
        """Start a new conversation."""
        for history in self.histories.values():
            history.clear()

    def _answer(self, question: str, history: Sequence[Turn], stream: Show | None) -> tuple[str, str]:
        """Return what is shown, and what the model said last; they differ by the calls of tools."""
        from grpo_lite.engine.generate import positions_of

        build = partial(build_prompt, self.recipe, history=history)
        cap = self.sampling.max_new_tokens or self.recipe.eval_completion_length
        if self.tools is not None:
            return self.tools.answer(question, build, self._write_turns, cap, positions_of(self.model), stream)
        ids = prompt_ids(build(question), self.tokenizer, self.recipe.template_kwargs)
        answer = self.tokenizer.decode(self._write(ids, cap, stream), skip_special_tokens=True).strip()
        return answer, answer

    def _write_turns(self, prompts: list[list[int]], room: int) -> list[list[int]]:
        return [self._write(ids, room, None) for ids in prompts]

    def _write(self, prompt: list[int], cap: int, stream: Show | None) -> list[int]:
        """Return the tokens that the model writes, without the one that ends them."""
        import torch

        from grpo_lite.engine.generate import shared_decoder, stop_ids, until_stop
        from grpo_lite.engine.static_decode import StaticDecoder

        ids = torch.tensor([prompt], device=self.model.device)
        config = self._generation_config(cap)
        streamer = _streamer(self.tokenizer, stream) if stream else None
        options: dict[str, Any] = {"streamer": streamer}
        decoder = None
        if ids.device.type == "cuda":  # on a CPU a single row has nothing to share
            decoder = shared_decoder(self.model, config, ids.shape[1], ids.shape[1] + config.max_new_tokens)
        if isinstance(decoder, StaticDecoder):  # it streams by itself
            options = {"custom_generate": decoder}
            if streamer is not None:
                streamer.put(ids.cpu())
                decoder.stream = lambda tokens: streamer.put(torch.tensor(tokens))
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **options
            )
        if streamer is not None and isinstance(decoder, StaticDecoder):
            streamer.end()
        return until_stop(out[0, ids.shape[1] :].tolist(), stop_ids(self.model, self.tokenizer))

    def _generation_config(self, cap: int) -> Any:
        from transformers import GenerationConfig

        from grpo_lite.engine.generate import stop_ids

        sampling = self.sampling
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature}
            drawn |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        stops = stop_ids(self.model, self.tokenizer) or None
        return GenerationConfig(
            max_new_tokens=cap, eos_token_id=stops, pad_token_id=self.tokenizer.pad_token_id, **drawn
        )


def build_prompt(recipe: Recipe, question: str, history: Sequence[Turn] = ()) -> Any:
    """Return a question in the form of the recipe's prompts: chat messages, or text."""
    data = recipe.data
    filled = fill_template(data, question)
    if data.format == "text":
        shots = "".join(f"{example.prompt}{example.answer}\n" for example in data.examples)
        return (f"{data.system}\n" if data.system else "") + shots + filled
    messages = [{"role": "system", "content": data.system}] if data.system else []
    turns = [(example.prompt, example.answer) for example in data.examples]
    turns += [(fill_template(data, earlier), answer) for earlier, answer in history]
    for earlier, answer in turns:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": filled}]


def fill_template(data: DataSection, question: str) -> str:
    """Put a question into the recipe's template if that has one column; otherwise return it as typed."""
    pieces = list(string.Formatter().parse(data.prompt))
    columns = [field for _, field, _, _ in pieces if field is not None]
    if len(set(columns)) != 1:
        return question
    filled = "".join(literal + (question if field is not None else "") for literal, field, _, _ in pieces)
    ending = pieces[-1][0] if pieces[-1][1] is None else ""
    # "2+3=" was typed and the template is "{question}=": do not add the ending twice.
    return filled[: -len(ending)] if ending and question.endswith(ending) else filled


def answer_lines(answers: dict[str, str]) -> list[str]:
    """Return answers as lines for people: one as it is, two side by side, or below each other where it is narrow."""
    if len(answers) == 1:
        return [next(iter(answers.values()))]
    width = shutil.get_terminal_size((_NARROW - 1, 24)).columns
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
    """Answer questions line by line; return how many were answered.

    Args:
        lines: typed or piped; of a pipe every line is a question of its own.
        interactive: keep the conversation, and accept /new and /exit.
        stream: called with pieces of an answer as they are generated; only where there is one side.
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
