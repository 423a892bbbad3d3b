"""Measure the band of a recipe over several seeds, and print the section `expected:` for it.

    python bench/bands.py sums --seeds 1 2 3 4 5 --out runs/bands

Each seed is a run of its own, without evaluation and merge; one that is there already is only read. The band at a step
is the mean over the seeds, give or take twice their standard deviation or the whole range, whichever is wider, of the
mean over three steps (grpo_lite/report/expected.py compares a run's own such mean).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import processor
from grpo_lite.recipe.load import load_recipe
from grpo_lite.report.evidence import Evidence, read_steps
from grpo_lite.report.expected import smoothed
from grpo_lite.runs.run_dir import RunDir

MOST_POINTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--metric", default="reward")
    parser.add_argument("--out", type=Path, default=Path("runs/bands"))
    arguments = parser.parse_args()
    if len(set(arguments.seeds)) < 5:
        parser.error("--seeds: a band comes from at least 5 seeds")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    series = []
    for seed in arguments.seeds:
        run = RunDir(arguments.out / f"{recipe.name}-{seed}")
        if not run.read_run().get("trained_at"):
            command = [sys.executable, "-m", "grpo_lite.cli", "train", arguments.recipe, "--run", str(run.path)]
            command += [*arguments.overrides, f"seed={seed}", "eval.enabled=false", "merge=false", "log.sample_every=0"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        values = smoothed(Evidence(recipe, read_steps(run)), arguments.metric)
        print(f"# seed {seed}: " + " ".join(f"{step}:{value:.3f}" for step, value in values), file=sys.stderr)
        series.append(dict(values))
    source = f"measured here: seeds {', '.join(map(str, arguments.seeds))}, bench/bands.py"
    section = {
        "source": source,
        "model": recipe.model.id,
        "hardware": f"CPU, {processor()}",
        "metric": arguments.metric,
        "points": points(series),
    }
    print(yaml.safe_dump({"expected": section}, sort_keys=False, width=120, default_flow_style=None), end="")


def points(series: list[dict[int, float]]) -> list[list[Any]]:
    """Return [step, low, high] at up to eight steps that every seed has, the first and the last among them."""
    steps = sorted(set.intersection(*(set(values) for values in series)))
    count = min(MOST_POINTS, len(steps))
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)})
    return [[step, *band([values[step] for values in series])] for step in chosen]


def band(values: list[float]) -> tuple[float, float]:
    """Return mean ± 2 standard deviations, or the whole range where that is wider."""
    mean, spread = statistics.mean(values), 2 * statistics.stdev(values)
    return round(min(mean - spread, *values), 3), round(max(mean + spread, *values), 3)


if __name__ == "__main__":
    main()
