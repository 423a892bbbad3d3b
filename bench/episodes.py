"""Compare plain TRL's loop over tools with grpo_lite's, side by side in one process: seconds, tokens and peak memory.

    python -m bench.episodes --model DIR [--prompts 2] [--group 8] [--turns 4] [--result-words 50] [--repeats 3]

Both engines play the same episodes: the turns of a script are forced on both samplers, with calls of a tool whose
results have about as many tokens as words are asked for. Both then train on them, so the gradient norms can be
compared. The model is loaded as in `compare_trl.py`, and speaks ChatML; a chat template of the kit's gives it tools.
The rollout is the time in `_generate_single_turn`, without the tools.
"""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from bench.compare_trl import Clock, load, versions
from grpo_lite.engine.attention import uninstall
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.engine.score import base_model
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


def one_step(engine: str, model: Any, tokenizer: Any, template: str | None, shape: Shape, seed: int) -> dict[str, Any]:
    """Play and train one step with one engine, and return what it cost."""
    clock = Clock()
    tokens = {"prefilled": 0, "decoded": 0, "training": 0}
    script = Scripted(tokenizer, shape.script(seed))
    inner = base_model(model)
    inner.__dict__.pop("forward", None)  # TRL's head of the previous trainer
    uninstall(inner)
    base = GRPOTrainer if engine == "plain" else PackedGRPOTrainer
    rng = random.Random(seed)
    questions = [" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(shape.prompts)]

    class Measured(base):  # type: ignore[misc, valid-type]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            def plain(trainer: Any, *a: Any, **k: Any) -> Any:
                return clock.run("rollout", base._generate_single_turn, trainer, *a, **k)

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
            batch = self.gradients.read(model, inputs) if isinstance(self, PackedGRPOTrainer) else None
            if batch is None:
                width = inputs["prompt_ids"].size(1) + inputs["completion_ids"].size(1)
                tokens["training"] += inputs["prompt_ids"].size(0) * width
            else:
                prompts = sum(batch.prompt_lengths[group[0]] for group in batch.groups)
                tokens["training"] += prompts + sum(batch.completion_lengths)
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _prepare_inputs(self, batch: Any) -> Any:
            return clock.run("generation and scoring", super()._prepare_inputs, batch)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return clock.run("step", super().training_step, *args, **kwargs)

    rows = shape.prompts * shape.group
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape.rows_per_micro_step,
        gradient_accumulation_steps=rows // shape.rows_per_micro_step,
        num_generations=shape.group,
        max_completion_length=shape.longest,
        max_steps=1,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=1,
    )
    extra = {} if engine == "plain" else {"options": EngineOptions()}
    trainer = Measured(
        model=model,
        args=args,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions]),
        processing_class=tokenizer,
        environment_factory=environment(shape.result_words),
        **extra,
    )
    if template is not None:
        trainer.chat_template = template
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer, PackedGRPOTrainer):
        assert trainer.support.is_supported(trainer.model)  # its self-check is paid once per run, not per step
    trainer.train()
    phases = clock.phases
    step, prepared = phases["step"], phases.pop("generation and scoring")
    phases["training"] = {key: step[key] - prepared[key] for key in ("wall_s", "cpu_s")}
    phases["training"]["peak_gib"] = step["peak_gib"]
    log = trainer.state.log_history[0]
    return {
        "phases": phases,
        "tokens": tokens,
        "grad_norm": log["grad_norm"],
        "calls": log["tools/call_frequency"],
        "length": log["completions/mean_length"],
    }


def compare(model: Any, tokenizer: Any, template: str | None, shape: Shape, repeats: int) -> dict[str, Any]:
    """Let the engines take turns; return the medians."""
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "grpo_lite": []}
    for turn in range(repeats + 1):  # the first turn warms up kernels and is not counted
        for engine in runs:
            free_memory()
            result = one_step(engine, model, tokenizer, template, shape, seed=turn)
            if turn > 0 or repeats == 0:
                runs[engine].append(result)
    medians = {
        engine: {
            phase: {key: statistics.median(run["phases"][phase][key] for run in results) for key in measures}
            for phase, measures in results[0]["phases"].items()
        }
        for engine, results in runs.items()
    }
    first = {
        engine: {key: results[0][key] for key in results[0] if key != "phases"} for engine, results in runs.items()
    }
    return {"shape": asdict(shape), "median": medians, "first": first, "repeats": max(repeats, 1)}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    plain, ours = result["median"]["plain"], result["median"]["grpo_lite"]
    tokens = [result["first"][engine]["tokens"] for engine in ("plain", "grpo_lite")]
    lines = [
        "| phase | plain TRL s | grpo_lite s | faster (wall) | (CPU time) | tokens | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for phase in ("rollout", "training", "step"):
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
    parser.add_argument("--longest", type=int, default=Shape.longest)
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
        rows,
    )
    result = compare(load(arguments.model), tokenizer, template, shape, arguments.repeats)
    record = {"versions": versions(), **result}
    print(table(result) + "\n\n" + json.dumps(result["first"]) + "\n" + json.dumps(record["versions"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
