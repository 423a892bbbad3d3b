"""Measure a step whose judge is asked while a round is still being generated, against one whose judge is asked after.

    python -m bench.judge_overlap --model DIR [--prompts 2] [--group 8] [--longest 128] [--concurrency 16] [--repeats 3]

Both steps sample with the same weights and seed, so they generate and ask the same. The judge is a server on this
machine that answers after 0.5 to 2 seconds, the same time for the same completion. Completions get lengths drawn from
a log-normal distribution; the model is in bfloat16, with LoRA r16 on all linear layers.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LogitsProcessorList

from bench.compare_trl import EndAt, arguments_of, versions
from grpo_lite.engine.attention import uninstall
from grpo_lite.engine.score import base_model
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.guard import GuardedReward, awaited
from grpo_lite.task.rewards import load_rewards
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from rewards.ledger import digest
from tests.rewards.judge_server import Reply, judging, verdict

QUESTIONS = ("Name a fruit and say why you like it.", "How does a bicycle stay up?", "Write a line about rain.")


@dataclass(frozen=True)
class Shape:
    """One step."""

    prompts: int
    group: int
    longest: int
    rows_per_micro_step: int

    def lengths(self, seed: int) -> list[int]:
        """Return the tokens of each completion: a median of two fifths of the longest."""
        rng = random.Random(seed)
        draws = [0.4 * self.longest * 2.718281828 ** rng.gauss(0, 0.5) for _ in range(self.prompts * self.group)]
        return [min(self.longest, max(2, round(draw))) for draw in draws]


def slow_judge(request: dict[str, Any], number: int) -> Reply:
    """Answer after 0.5 to 2 seconds, by what is asked."""
    drawn = random.Random(digest(request))
    return verdict(drawn.randrange(11), delay_s=drawn.uniform(0.5, 2.0))


def one_step(
    model: Any, tokenizer: Any, shape: Shape, is_early: bool, concurrency: int, seed: int
) -> tuple[dict[str, float], float]:
    """Train one step; return its seconds by phase, and the mean reward."""
    inner = base_model(model)
    inner.__dict__.pop("forward", None)  # TRL's head of the previous trainer
    uninstall(inner)
    lengths = shape.lengths(seed)
    seconds: dict[str, float] = {}

    class Forced(PackedGRPOTrainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            torch.manual_seed(seed)
            generate = inner.generate
            forced = LogitsProcessorList([EndAt(lengths, tokenizer.eos_token_id)])
            inner.generate = lambda *a, **k: generate(*a, logits_processor=forced, **k)
            try:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            finally:
                del inner.__dict__["generate"]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            seconds["step"] = seconds.get("step", 0.0) + time.perf_counter() - begun
            return loss

    with judging(slow_judge) as server, tempfile.TemporaryDirectory() as folder:
        kwargs = {"rubric": "Friendly.", "model": "m", "base_url": server.base_url, "concurrency": concurrency}
        section = {"function": "rewards.judge_reward", "kwargs": {**kwargs, "cache": f"{folder}/judge.sqlite"}}
        recipe = load_recipe("smoke", [f"rewards={json.dumps([section])}"])
        (reward,), _ = load_rewards(recipe, [])
        trainer = Forced(
            model=model,
            args=arguments_of(shape),
            reward_funcs=[awaited(GuardedReward(reward, shape.group, recipe.limits, print))],
            train_dataset=Dataset.from_dict(
                {"prompt": [QUESTIONS[i % 3] + " " * (i // 3) for i in range(shape.prompts)]}
            ),
            processing_class=tokenizer,
        )
        if not is_early:
            trainer.early.listener = lambda prompt_ids: None  # type: ignore[method-assign]
        assert trainer.support.is_supported(trainer.model)
        trainer.train()
        requests = len(server.requests)
    seconds |= {phase: trainer.journal.spent_s[phase] for phase in ("rollout", "reward")}
    return {**seconds, "requests": requests}, trainer.state.log_history[0]["reward"]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model with a tokenizer")
    for name, default in (("prompts", 2), ("group", 8), ("longest", 128), ("concurrency", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(args.model), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    shape = Shape(args.prompts, args.group, args.longest, args.group)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for seed in range(args.repeats + 1):  # the first turn warms up, and is not counted
        rewards = set()
        for is_early in (False, True):
            with torch.no_grad():
                for name, weight in start.items():
                    model.get_parameter(name).copy_(weight)
            result, reward = one_step(model, tokenizer, shape, is_early, args.concurrency, seed)
            rewards.add(round(reward, 6))
            if seed:
                runs[is_early].append(result)
            print(f"seed {seed}, asked {'while generating' if is_early else 'after'}: {result}", flush=True)
        assert len(rewards) == 1, rewards  # the same completions and scores
    print(versions())
    print("| judge asked | rollout s | reward s | step s | requests |\n|---|---|---|---|---|")
    for is_early, results in runs.items():
        cells = [f"{statistics.median(run[key] for run in results):.2f}" for key in ("rollout", "reward", "step")]
        requests = round(statistics.median(run["requests"] for run in results))
        print(f"| {'while generating' if is_early else 'after'} | {' | '.join(cells)} | {requests} |")


if __name__ == "__main__":
    main()
