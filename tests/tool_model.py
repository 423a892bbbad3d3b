"""A random Qwen3 that calls a tool in most turns, and an environment for it: episodes of several turns in seconds."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.chat_template_utils import qwen3_chat_template

from grpo_lite.engine.score import base_model

ROOT = Path(__file__).resolve().parent.parent
END = "<|im_end|>"
MARKED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def tool_tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 400 tokens with Qwen3's markup and chat template, and some tokens more."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", END]
    plain.train_from_iterator(
        [qwen3_chat_template] * 2,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    plain.add_tokens([*MARKED, *more])
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<|endoftext|>", eos_token=END)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = qwen3_chat_template
    return fast


def call(name: str, **arguments: Any) -> str:
    """Return a call as Qwen3 writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Ledger:
    """Adds up numbers, from a random start of Python's own generator; one below 0 is an error."""

    def reset(self, start: int = 0, **row: Any) -> str:
        self.total = start + random.randrange(3)
        return f" Begin at {self.total}."

    def add(self, number: int) -> str:
        """Add a number to the total.

        Args:
            number: what is added.
        """
        if number < 0:
            raise ValueError(f"{number} is below 0")
        self.total += number
        return f"total {self.total}"

    def get_reward(self) -> float:
        return float(self.total % 5) / 4


ADDING = tuple(call("add", number=number) for number in (-1, 1, 2, 3, 5))


def write_tool_model(folder: Path, calls: tuple[str, ...] = ADDING) -> Path:
    """Write a model whose likely tokens are calls, each one token, the end of a turn, and two letters."""
    words = tool_tokenizer(calls)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, initializer_range=0.1, pad_token_id=0,
            eos_token_id=2, bos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    likely = [words.convert_tokens_to_ids(token) for token in (*calls, END, "a", "b")]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0  # every hidden state has a large first entry …
        model.lm_head.weight[:, 0] = -2.0
        model.lm_head.weight[likely, 0] = 2.0  # … which makes these tokens likely
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    rows = [{"question": f"Count {n}.", "start": n % 3} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which finds what this one has installed."""
    command = [sys.executable, "-W", "ignore", "-m", "grpo_lite.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


class Scripted(LogitsProcessor):
    """Makes `generate` write the turns of a script; in place of a ~ the model writes what it likes best."""

    def __init__(self, words: Any, script: list[list[str]]) -> None:
        def ids(text: str) -> list[int]:  # -1 where the model is free
            parts = [part for part in re.split("(~+)", text) if part]
            return [
                token
                for part in parts
                for token in (
                    [-1] * len(part) if part[0] == "~" else words(part, add_special_tokens=False)["input_ids"]
                )
            ]

        self.turns = [[ids(turn) for turn in row] for row in script]
        self.filler = ids("n")[0]
        marked = words.all_special_tokens + MARKED
        self.forbidden = words.convert_tokens_to_ids(marked)
        self.next: list[tuple[list[int], int]] = []  # by row: what its next prompt begins with, and its turn

    def generate(self, plain: Any, trainer: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Return what `plain`, TRL's `_generate_single_turn`, does with the script's turns forced."""
        self.rows, self.width = self._rows(prompt_ids), max(map(len, prompt_ids))
        with self.forced(base_model(trainer.model)):
            completions, logps = plain(trainer, prompt_ids, *args, **kwargs)
        for row, prompt, completion in zip(self.rows, prompt_ids, completions, strict=True):
            self.next[row] = ([*prompt, *completion], self.next[row][1] + 1)
        return completions, logps

    @contextmanager
    def forced(self, inner: Any) -> Iterator[None]:
        """Force the script on what `generate` writes inside the context."""
        before, generate = inner.__dict__.get("generate"), inner.generate
        inner.generate = lambda *a, **k: generate(*a, logits_processor=LogitsProcessorList([self]), **k)
        try:
            yield
        finally:
            del inner.__dict__["generate"]
            if before is not None:
                inner.generate = before

    def tokens(self, place: int) -> torch.Tensor:
        """Return what each row of the batch writes at a place of its turn."""
        turns = [self.turns[row][self.next[row][1]] for row in self.rows]
        return torch.tensor([turn[place] if place < len(turn) else self.filler for turn in turns])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave one token, or let the model choose among ordinary ones."""
        tokens = self.tokens(input_ids.size(1) - self.width).unsqueeze(1)
        free = scores.index_fill(1, torch.tensor(self.forbidden), float("-inf"))
        forced = torch.full_like(scores, float("-inf")).scatter_(1, tokens.clamp(min=0), 0.0)
        return torch.where(tokens < 0, free, forced)

    def _rows(self, prompt_ids: list[list[int]]) -> list[int]:
        if not self.next:
            self.next = [(list(prompt), 0) for prompt in prompt_ids]
            return list(range(len(prompt_ids)))
        rows: list[int] = []
        for prompt in prompt_ids:
            known = enumerate(self.next)
            rows.append(
                next(r for r, (start, turn) in known if r not in rows and turn and prompt[: len(start)] == start)
            )
        return rows
