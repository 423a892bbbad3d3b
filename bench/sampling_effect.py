"""Measure what refilling does for sums: held-out accuracy by step and by second.

    python bench/sampling_effect.py [--recipe sums] [--seeds 42 43 44] [--every 2] [--json FILE] [KEY=VALUE ...]

Each setting trains from the same base with the same seeds; every few steps the held-out prompts are answered
greedily; the seconds do not include that. They do include the extra rollouts of refilled groups.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_lite.recipe.load import load_recipe
from grpo_lite.report.evidence import read_metrics
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run

SETTINGS = {
    "neither": [],
    "refill 8": ["sampling.refill=8"],
}


def accuracy_curve(recipe_name: str, overrides: list[str], seed: int, every: int) -> list[dict[str, float]]:
    """Train once and return step, training seconds so far, held-out accuracy and tokens seen at each score."""
    cheap = [
        f"seed={seed}",
        f"eval.every={every}",
        "eval.every_limit=150",
        "eval.samples=0",
        "eval.limit=8",
        "merge=false",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        train_run(load_recipe(recipe_name, [*cheap, *overrides]), run, lambda line: None)
        curve, seconds, tokens = [], 0.0, 0.0
        for record in read_metrics(run):
            seconds += record.get("step_time", 0.0)
            tokens = record.get("num_tokens", tokens)
            if "heldout/lenient" in record:
                accuracy = record["heldout/lenient"]
                curve.append({"step": record["step"], "seconds": seconds, "accuracy": accuracy, "tokens": tokens})
    return curve


def main() -> None:
    """Train every setting with every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default="sums")
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
