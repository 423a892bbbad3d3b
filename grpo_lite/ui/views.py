"""What the page shows, as plain data: runs as cards, one run, a comparison, the plan of a recipe on a GPU. Torch-free.

Everything comes from the report's own parts (`report/facts.py`, `report/curves.py`) and from `grpo-lite plan`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_lite.errors import GRPOLiteError, RunDirError
from grpo_lite.memory.phases import PhaseBytes
from grpo_lite.memory.plan import advice, most_completion
from grpo_lite.memory.report import plan_recipe
from grpo_lite.memory.times import time_line
from grpo_lite.models.device import CARDS, find_card
from grpo_lite.recipe.load import load_recipe, recipe_names
from grpo_lite.recipe.overrides import yaml_text
from grpo_lite.report.board import Board, WarmupBoard
from grpo_lite.report.curves import charts, drawable
from grpo_lite.report.doctor import findings_file, nothing_found
from grpo_lite.report.expected import standing_line
from grpo_lite.report.facts import RunPage, headline, latest_rows, read_page, tiles
from grpo_lite.report.page import comparison_table, distinct_names, overlaid_charts, recipe_differences
from grpo_lite.report.watch import read_board, state_of
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.units import duration

_DEPTH = 2  # folders below the page's own in which a run is looked for
_SPARK = 60  # points of the small curve on a card
_LONGEST = 8192  # tokens: the end of the slider for completions, where the model allows more


def runs_in(folder: Path) -> dict[str, RunDir]:
    """Return the runs below a folder by their path in it, the one that changed last first."""
    runs = {
        file.parent.relative_to(folder).as_posix(): RunDir(file.parent)
        for depth in range(1, _DEPTH + 1)
        for file in folder.glob("*/" * depth + "recipe.yaml")
    }
    return dict(sorted(runs.items(), key=lambda item: -_changed(item[1])))


def find_run(folder: Path, name: str) -> RunDir:
    """Return a run by its path in the folder; only those that `runs_in` lists can be read.

    Raises:
        RunDirError: there is none.
    """
    try:
        return runs_in(folder)[name]
    except KeyError:
        raise RunDirError(f"run {name!r}: there is none in {folder}.") from None


def version(run: RunDir) -> str:
    """Return a text that changes when a run's files or its state change."""
    steps = sorted((run.path / "completions").glob("step_*.jsonl"))[-1:]
    stamps = [f"{s.st_mtime_ns}.{s.st_size}" for file in (*_files(run), *steps) if (s := _stat(file))]
    return "-".join([state_of(run), *stamps])


def run_card(name: str, run: RunDir) -> dict[str, Any]:
    """Return a run in short: state, progress, verdict, the curve of its reward; or why it cannot be read."""
    try:
        return {"name": name, **_card(run.path, version(run))}
    except GRPOLiteError as error:
        return {"name": name, "state": "unreadable", "error": str(error)}
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:  # files of another program
        return {
            "name": name,
            "state": "unreadable",
            "error": f"its files are damaged ({type(error).__name__}: {error})",
        }


@lru_cache(maxsize=256)
def _card(path: Path, _version: str) -> dict[str, Any]:
    run = RunDir(path)
    page, board = read_page(run), read_board(run)
    losses, rewards = page.evidence.warmup_series("loss"), page.evidence.series("reward")
    values = losses if isinstance(board, WarmupBoard) else rewards
    return {
        **_progress(run, page, board),
        "curve": values[:: -(-len(values) // _SPARK) or 1],
        "findings": len(page.findings),
    }


def run_view(name: str, run: RunDir) -> dict[str, Any]:
    """Return everything that the page of one run shows.

    Raises:
        RunDirError: the folder is not a run.
    """
    page, board = read_page(run), read_board(run)
    return {
        "name": name,
        **_progress(run, page, board),
        "tiles": tiles(page),
        "findings": [{"sentence": f.sentence, "override": f.override} for f in page.findings],
        "clean": nothing_found(page.evidence),
        "expected": standing_line(page.evidence),
        "charts": [drawable(chart) for chart in charts(page.evidence)],
        "completions": latest_rows(run),
    }


def _progress(run: RunDir, page: RunPage, board: Board | WarmupBoard) -> dict[str, Any]:
    state = state_of(run)
    left = board.seconds_left if state == "running" else None
    values = board.series(board.logged)
    return {
        "state": state,
        "description": page.recipe.description,
        "model": page.recipe.model.id,
        "count": board.count(),
        "share": min(1.0, board.step / board.total) if board.total else 0.0,
        "left": duration(left),
        "value": f"{board.logged} {values[-1]:.2f}" if values else None,
        "headline": headline(page),
        "trained": run.is_trained,
    }


def comparison(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return runs side by side: verdicts, curves in one chart each, figures, differences between the recipes.

    Raises:
        RunDirError: fewer than two runs are named, or one is not there.
    """
    if len(names) < 2:
        raise RunDirError("compare: choose two or more runs.")
    runs = [find_run(folder, name) for name in names]
    pages, short = [read_page(run) for run in runs], distinct_names([run.path for run in runs])
    return {
        "names": short,
        "headlines": [headline(page) for page in pages],
        "charts": [drawable(chart) for chart in overlaid_charts(pages, short)],
        "table": comparison_table(pages),
        "differences": recipe_differences([page.recipe for page in pages]),
    }


def plan_choices() -> dict[str, Any]:
    """Return the recipes and the GPUs that can be planned."""
    cards = [{"key": key, "name": card.name, "bytes": card.memory_bytes} for key, card in CARDS.items()]
    return {"recipes": recipe_names(), "cards": cards}


def plan_view(recipe: str, card: str, group: int | None, completion: int | None) -> dict[str, Any]:
    """Return the plan of a shipped recipe on a GPU, and the values that the sliders may take.

    Args:
        recipe: its name.
        card: a key of `CARDS`, or a size such as `11GiB`.
        group: completions of one prompt; None: the recipe's.
        completion: longest completion in tokens; None: the recipe's.

    Raises:
        RecipeError, ModelError: the recipe or the GPU is not known, or the values do not fit each other.
    """
    if recipe not in recipe_names():
        raise GRPOLiteError(f"plan: {recipe!r} is no shipped recipe.")
    changes = {"grpo.num_generations": group, "grpo.max_completion_length": completion}
    overrides = [f"{key}={value}" for key, value in changes.items() if value is not None]
    loaded, gpu = load_recipe(recipe, overrides), find_card(card)
    plan = plan_recipe(loaded, gpu)
    job = plan.job
    phases = {"warm-up": plan.warmup, "rollout": plan.rollout, "training": plan.training, "evaluation": plan.evaluation}
    most = most_completion(job)
    return {
        "fits": plan.fits, "needed": plan.needed, "memory": plan.memory_bytes, "card": gpu.name,
        "model": loaded.model.id, "group": job.group, "completion": job.completion, "prompt": job.prompt,
        "groups": [n for n in range(2, min(job.batch, 64) + 1) if job.batch % n == 0],
        "longest": min(most, _LONGEST) if most else _LONGEST,
        "phases": [_phase(name, phase) for name, phase in phases.items() if phase],
        "chosen": [f"{key}={yaml_text(value)}" for key, value in plan.chosen.items()],
        "notes": [*plan.assumed, time_line(loaded)], "advice": "" if plan.fits else advice(plan),
        "command": " ".join(["grpo-lite train", recipe, *overrides]),
    }  # fmt: skip


def _phase(name: str, phase: PhaseBytes) -> dict[str, Any]:
    # what takes no more than there is, and so does not count in what the card must have
    divisible = name in ("warm-up", "evaluation")
    return {
        "name": name,
        "total": phase.total,
        "divisible": divisible,
        "items": [(what, size) for what, size in phase.items if size],
    }


def _files(run: RunDir) -> list[Path]:
    return [run.recipe_file, run.run_file, run.metrics_file, run.scores_file, findings_file(run), run.adapter]


def _stat(file: Path) -> Any:
    try:
        return file.stat()
    except OSError:
        return None


def _changed(run: RunDir) -> float:
    return max((s.st_mtime for file in _files(run) if (s := _stat(file))), default=0.0)
