"""Measure what refilling and the difficulty-aware sampler do for quickstart: held-out accuracy by step and by second.

    python bench/sampling_effect.py [--recipe quickstart] [--seeds 42 43 44] [--every 2] [--json FILE] [KEY=VALUE ...]

Each setting trains from the same base with the same seeds; every few steps the clock stops and the held-out prompts are
answered greedily. Refilled groups cost extra rollouts, which the seconds include.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_lite.data import load_prompts
from grpo_lite.evaluate import score_model
from grpo_lite.hardware import detect_device
from grpo_lite.model import load_model, load_tokenizer
from grpo_lite.recipe_load import load_recipe
from grpo_lite.reward_loader import load_rewards
from grpo_lite.run_dir import RunDir
from grpo_lite.train import build_trainer, grpo_config

SETTINGS = {
    "neither": [],
    "refill 8": ["sampling.refill=8"],
    "difficulty": ["sampling.difficulty=true"],
    "both": ["sampling.refill=8", "sampling.difficulty=true"],
}


def accuracy_curve(recipe_name: str, overrides: list[str], seed: int, every: int) -> list[dict[str, float]]:
    """Train once and return step, training seconds so far, accuracy and completion tokens at each pause."""
    from transformers import TrainerCallback

    recipe = load_recipe(recipe_name, [f"seed={seed}", *overrides])
    run = RunDir(Path(tempfile.mkdtemp()) / "run")
    run.prepare(recipe)
    tokenizer, device = load_tokenizer(recipe), detect_device()
    prompts = load_prompts(recipe, tokenizer)
    columns = sorted({key for row in prompts.train for key in row if key != "prompt"})
    rewards, weights = load_rewards(recipe, columns)
    quiet: Any = lambda line: None  # noqa: E731
    args = grpo_config(recipe, run, device, weights)
    args.save_strategy = "no"
    base = load_model(recipe, device)
    trainer = build_trainer(recipe, run, quiet, device, base, tokenizer, prompts, rewards, args)
    greedy = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"samples": 0})})
    curve: list[dict[str, float]] = []

    class Pause(TrainerCallback):
        def __init__(self) -> None:
            self.paused, self.begun = 0.0, time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % every:
                return
            now = time.monotonic()
            was_training = model.training
            model.eval()
            records = score_model(model, tokenizer, greedy, prompts.eval[: recipe.eval.limit], quiet, "trained")
            model.train(was_training)
            curve.append(
                {
                    "step": state.global_step,
                    "seconds": now - self.begun - self.paused,
                    "accuracy": statistics.fmean(bool(record["lenient"]) for record in records),
                    "tokens": state.num_input_tokens_seen,
                }
            )
            self.paused += time.monotonic() - now

    trainer.add_callback(Pause())
    trainer.train()
    del trainer, base
    gc.collect()
    return curve


def main() -> None:
    """Train every setting with every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[42, 43, 44])
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in arguments.settings}
    for seed in arguments.seeds:  # the settings take turns, so that a slow minute of the machine hits all
        for name in arguments.settings:
            curve = accuracy_curve(arguments.recipe, [*SETTINGS[name], *arguments.overrides], seed, arguments.every)
            curves[name].append(curve)
            points = "  ".join(f"{p['step']:.0f}: {p['accuracy']:.3f} ({p['seconds']:.0f} s)" for p in curve)
            print(f"{name}, seed {seed}: {points}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(curves, indent=1) + "\n")
    steps = [int(point["step"]) for point in curves[arguments.settings[0]][0]]
    print("\n| setting | " + " | ".join(f"step {step}" for step in steps) + " | seconds in all |")
    print("|---|" + "---|" * (len(steps) + 1))
    for name, runs in curves.items():
        means = [statistics.fmean(run[i]["accuracy"] for run in runs) for i in range(len(steps))]
        seconds = statistics.fmean(run[-1]["seconds"] for run in runs)
        print(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
