"""Compare plain TRL's loop over tools with grpo_lite's, side by side in one process: seconds, tokens and peak memory.

    python -m bench.episodes --model DIR [--prompts 2] [--group 8] [--turns 4] [--result-words 50] [--repeats 3]

Both engines play the same episodes: both samplers draw as always, and the turns of a script take the place of what they
drew, with calls of a tool whose results have about as many tokens as words are asked for. Both then train on them, so
the gradient norms can be compared; `--rollout-only` leaves that out, and with it most of the memory. The model is
loaded as in `compare_trl.py`, and speaks ChatML; a chat template of the kit's gives it tools. The rollout is the time
in `_generate_single_turn`, without the tools.
"""

import argparse
import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset

from bench.compare_trl import Clock, arguments_of, in_turns, load, measured, train_once, varied_reward, versions
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.options import EngineOptions
from grpo_lite.models.chat_template import set_chat_template
from grpo_lite.task.environments import tool_template
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tool_model import Scripted

WORDS = [
    "river",
    "stone",
    "light",
    "house",
    "paper",
    "green",
    "music",
    "table",
    "window",
    "garden",
    "water",
    "bread",
    "winter",
    "summer",
    "letter",
]


@dataclass(frozen=True)
class Shape:
    """One step of episodes."""

    prompts: int = 2
    group: int = 8
    turns: int = 4  # of the model; all but the last one call the tool
    turn_words: tuple[int, int] = (10, 50)  # before the call, or of the answer
    result_words: int = 50  # each about a token
    longest: int = 640
    question_words: int = 60
    rows_per_micro_step: int = 16

    def script(self, seed: int) -> list[list[str]]:
        """Return the turns of every row."""
        rng = random.Random(seed)

        def words() -> str:
            return " ".join(rng.choice(WORDS) for _ in range(rng.randint(*self.turn_words)))

        def call() -> str:
            return f'<tool_call>{{"name": "look_up", "arguments": {{"page": {rng.randrange(1000)}}}}}</tool_call>'

        end = "<|im_end|>"
        return [
            [*(words() + call() + end for _ in range(self.turns - 1)), words() + end]
            for _ in range(self.prompts * self.group)
        ]


class Replaced(Scripted):
    """The script in place of what the samplers have drawn, so that they compute nothing else than they always do."""

    @contextmanager
    def forced(self, inner: Any) -> Iterator[None]:
        """Replace what is drawn inside the context."""
        multinomial, choose = torch.multinomial, GroupDecoder._choose
        places = iter(range(10**9))

        def draw(p: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            multinomial(p, *args, **kwargs)
            return self.tokens(next(places)).unsqueeze(1)

        def choose_and_draw(decoder: Any, ids: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            notes = choose(decoder, ids, *args)[1]
            rows = args[-1]
            return self.tokens(ids.size(1) - self.width)[rows], notes

        with mock.patch("torch.multinomial", draw), mock.patch.object(GroupDecoder, "_choose", choose_and_draw):
            yield


def environment(result_words: int) -> type:
    """Return an environment with one tool, whose results have so many words."""

    class Library:
        """Pages to look up."""

        def reset(self, **row: Any) -> None:
            pass

        def look_up(self, page: int) -> str:
            """Return what a page says.

            Args:
                page: its number.
            """
            rng = random.Random(page)
            return " ".join(rng.choice(WORDS) for _ in range(result_words))

    return Library


def first_weight(model: Any) -> torch.Tensor:
    """Return a weight that is trained."""
    return next(weight for weight in model.parameters() if weight.requires_grad)


def one_step(
    engine: str, model: Any, tokenizer: Any, template: str | None, shape: Shape, seed: int, trains: bool
) -> dict[str, Any]:
    """Play and, where it trains, train one step with one engine, and return what it cost."""
    clock = Clock()
    tokens = {"prefilled": 0, "decoded": 0, "training": 0}
    script = Replaced(tokenizer, shape.script(seed))
    rng = random.Random(seed)
    questions = [" ".join(rng.choice(WORDS) for _ in range(shape.question_words)) for _ in range(shape.prompts)]

    class Played(measured(engine, model, clock, tokens)):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            def plain(trainer: Any, *a: Any, **k: Any) -> Any:
                return clock.run("rollout", super()._generate_single_turn, *a, **k)

            ids, logps = script.generate(plain, self, prompt_ids, *args, **kwargs)
            if engine == "plain":
                tokens["prefilled"] += len(prompt_ids) * max(map(len, prompt_ids))
                tokens["decoded"] += len(ids) * (max(map(len, ids)) - 1)
            return ids, logps

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            generated = super()._generate(*args, **kwargs)
            if isinstance(self, PackedGRPOTrainer):
                assert self.rollouts.last is not None
                tokens["prefilled"], tokens["decoded"] = (
                    self.rollouts.last.prefill_tokens,
                    self.rollouts.last.decode_tokens,
                )
            return generated

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs) if trains else first_weight(model).sum() * 0.0

    extra = {} if engine == "plain" else {"options": EngineOptions()}
    trainer = Played(
        model=model,
        args=arguments_of(shape),
        reward_funcs=varied_reward,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions]),
        processing_class=tokenizer,
        environment_factory=environment(shape.result_words),
        **extra,
    )
    if template is not None:
        trainer.chat_template = template
    phases = train_once(trainer, clock)
    log = trainer.state.log_history[0]
    return {
        "phases": phases,
        "tokens": tokens,
        "grad_norm": log["grad_norm"],
        "calls": log["tools/call_frequency"],
        "length": log["completions/mean_length"],
    }


def compare(
    model: Any, tokenizer: Any, template: str | None, shape: Shape, repeats: int, trains: bool
) -> dict[str, Any]:
    """Let the engines take turns; return the medians."""
    medians, first = in_turns(
        lambda engine, turn: one_step(engine, model, tokenizer, template, shape, turn, trains), repeats
    )
    first = {engine: {key: result[key] for key in result if key != "phases"} for engine, result in first.items()}
    return {"shape": asdict(shape), "median": medians, "first": first, "repeats": max(repeats, 1)}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    plain, ours = result["median"]["plain"], result["median"]["grpo_lite"]
    tokens = [result["first"][engine]["tokens"] for engine in ("plain", "grpo_lite")]
    lines = [
        "| phase | plain TRL s | grpo_lite s | faster (wall) | (CPU time) | tokens | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for phase in ("rollout", "training", "step") if tokens[0]["training"] else ("rollout",):
        names = {"rollout": ("prefilled", "decoded"), "training": ("training",), "step": ()}[phase]
        counted = ", ".join(f"{name} {tokens[0][name]} → {tokens[1][name]}" for name in names)
        one, other = plain[phase], ours[phase]
        lines.append(
            f"| {phase} | {one['wall_s']:.2f} | {other['wall_s']:.2f} | {one['wall_s'] / other['wall_s']:.1f}× "
            f"| {one['cpu_s'] / other['cpu_s']:.1f}× | {counted} | {one['peak_gib']:.2f} → {other['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model with a tokenizer")
    parser.add_argument("--prompts", type=int, default=Shape.prompts)
    parser.add_argument("--group", type=int, default=Shape.group)
    parser.add_argument("--turns", type=int, default=Shape.turns)
    parser.add_argument("--result-words", type=int, default=Shape.result_words)
    parser.add_argument("--question-words", type=int, default=Shape.question_words, help="of each prompt")
    parser.add_argument("--longest", type=int, default=Shape.longest)
    parser.add_argument("--rollout-only", action="store_true", help="play the episodes, and train on nothing")
    parser.add_argument("--repeats", type=int, default=3, help="counted turns; 0 for one turn without warming up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    set_chat_template(tokenizer, "smollm2-tools")
    template = tool_template(tokenizer, arguments.model)
    rows = arguments.prompts * arguments.group
    shape = Shape(
        arguments.prompts,
        arguments.group,
        arguments.turns,
        Shape.turn_words,
        arguments.result_words,
        arguments.longest,
        arguments.question_words,
        rows,
    )
    model, trains = load(arguments.model), not arguments.rollout_only
    result = compare(model, tokenizer, template, shape, arguments.repeats, trains)
    record = {"versions": versions(), **result}
    print(table(result) + "\n\n" + json.dumps(result["first"]) + "\n" + json.dumps(record["versions"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
