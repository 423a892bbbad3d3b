"""The probe as a training's first minutes: said, kept, not repeated, and the training behind it unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_lite.evaluation import probe
from grpo_lite.evaluation.step_time import training_forwards
from grpo_lite.memory.report import plan_recipe, report_lines
from grpo_lite.memory.times import keep_times, time_line
from grpo_lite.models.base import Base
from grpo_lite.models.device import Device, find_card
from grpo_lite.models.load import load_tokenizer
from grpo_lite.processes import Ranks
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session import preflight
from grpo_lite.task.prompts import load_prompts
from grpo_lite.train import train_run

QUICK = ["eval.enabled=false", "merge=false", "check.enabled=false", "model.load_in=32bit", "grpo.save_steps=2"]
KEPT = ("loss", "reward", "entropy", "grad_norm", "completions/mean_length")


def trained(path: Path, *overrides: str) -> tuple[RunDir, list[str]]:
    said: list[str] = []
    run = RunDir(path)
    train_run(load_recipe("smoke", [*QUICK, "grpo.max_steps=2", *overrides]), run, said.append)
    return run, said


def records(run: RunDir) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{key: record[key] for key in KEPT} for record in found]


@pytest.mark.slow
def test_a_training_that_begins_with_the_probe_is_the_same_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(preflight, "keep_times", lambda recipe, device, figures: kept.append((device, figures)))
    monkeypatch.setattr(preflight, "PROMPTS", 3)
    without, silent = trained(tmp_path / "without")
    assert not [line for line in silent if "preflight" in line]  # on a CPU it is off unless asked for
    run, said = trained(tmp_path / "with", "log.preflight=true")
    lines = [line for line in said if line.startswith("preflight: ")]
    assert "log.preflight=false leaves it out" in lines[0]
    assert [line for line in lines if line.startswith("preflight: verdict: ")]
    assert "Ctrl-C" in lines[-1]  # a random model: nothing to be learnt
    figures = run.read_run()["preflight"]
    assert figures["verdict"] in "\n".join(lines)
    assert figures["eta_s"] == pytest.approx(2 * figures["step_s"])
    assert json.loads(json.dumps(kept[0][1])) == figures
    assert figures["prompts"] == 3
    assert said.index(lines[-1]) < next(i for i, line in enumerate(said) if line.startswith("step 1/2"))
    assert records(run) == records(without)
    assert run.read_run()["training_seconds"] < 60


@pytest.mark.parametrize("kind, sizes", [("cuda", [2, 2]), ("cpu", [1, 2, 2])])
@pytest.mark.parametrize("limit", [25.0, None], ids=["limited", "whole"])
def test_within_a_time_limit_a_probe_samples_the_batches_that_it_has_time_for_and_says_what_it_skipped(
    kind: str, sizes: list[int], limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 2 prompts × 8 samples takes 10 s on the GPU however many are in it, and 5 s a prompt on the CPU."""
    recipe = load_recipe("smoke", ["eval.batch_size=16"])
    tokenizer = load_tokenizer(Base.resolve(recipe.model))
    clock, calls = [50.0], list[tuple[int, int, int]]()

    def generate(model: Any, tokenizer: Any, ids: list[Any], *, samples: int, seed: int, **_: Any) -> Any:
        calls.append((len(ids), samples, seed))
        clock[0] += 10.0 if kind == "cuda" else 5.0 * len(ids) * samples / 8
        return [[[7]] * samples for _ in ids]

    monkeypatch.setattr(probe.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(probe, "generate_completions", generate)
    monkeypatch.setattr(probe, "forward_seconds", lambda *_: 0.5)
    model = SimpleNamespace(device=SimpleNamespace(type=kind))
    loaded = load_prompts(recipe, tokenizer)
    figures = probe.probe_recipe(recipe, model, loaded, count=6, limit_s=limit)
    if limit is None:
        assert [size for size, *_ in calls] == [6, recipe.schedule.batch // 4]
        assert (figures.prompts, figures.skipped) == (6, ())
        return
    # They end after 20 s and 25 s; another one would end after 30 s.
    assert [size for size, *_ in calls] == sizes
    assert len({seed for *_, seed in calls}) == len(calls)  # no batch draws what another one has drawn
    assert figures.prompts == sum(sizes)
    left = 6 - figures.prompts
    assert figures.skipped == (f"{left} of 6 prompts", "timing a training round's generation by itself")


def test_the_first_batch_is_always_sampled_and_a_preflight_says_that_it_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "keep_times", lambda *_: None)
    monkeypatch.setattr(preflight, "PROMPTS", 3)
    monkeypatch.setattr(preflight, "BUDGET_S", 0.0)
    run, said = trained(tmp_path, "log.preflight=true")
    stopped = [line for line in said if line.startswith("preflight: stopped after ")]
    assert len(stopped) == 1
    assert "skipped: 2 of 3 prompts, timing a training round's generation by itself" in stopped[0]
    assert "make probe RECIPE=smoke" in stopped[0]
    assert run.read_run()["preflight"]["prompts"] == 1
    assert [line for line in said if line.startswith("preflight: verdict: ")]


class NoTrainer:
    class callback_handler:
        callbacks: list[Any] = []  # noqa: RUF012


@pytest.mark.parametrize(
    "kind, said, world, expected",
    [
        ("cuda", None, 1, True),
        ("cpu", None, 1, False),
        ("cuda", "false", 1, False),
        ("cpu", "true", 1, True),
        ("cuda", None, 2, False),
    ],
)
def test_by_default_it_is_for_gpus_and_one_process(
    kind: Any, said: str | None, world: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("smoke", [f"log.preflight={said}"] if said else [])
    device = Device(kind, "it", 1 << 34, bfloat16=True)
    callbacks: list[Any] = ["first"]
    monkeypatch.setattr(NoTrainer.callback_handler, "callbacks", callbacks)
    monkeypatch.setattr(preflight, "this_process", lambda: Ranks(world=world))
    lines: list[str] = []
    preflight.add_preflight(recipe, RunDir("x"), device, NoTrainer, None, lines.append)  # type: ignore[arg-type]
    assert (len(callbacks) == 2) is expected
    assert callbacks[-1] == "first"  # it comes before the others, whose clocks start with the training
    assert bool(lines) is (world > 1)


def test_a_training_that_goes_on_is_not_probed_again() -> None:
    class State:
        global_step = 7

    callback = preflight.Preflight(load_recipe("smoke"), None, None, object(), None, print)  # type: ignore[arg-type]
    callback.on_train_begin(None, State, None)
    assert callback.trainer is None


def test_a_step_s_time_is_that_of_its_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0.5 s a forward pass, 8 completions a step cost 8 × 0.5 × 3 s of training, however many were probed."""
    recipe = load_recipe("smoke", ["grpo.gradient_checkpointing=false", "check.enabled=false"])
    assert training_forwards(recipe) == 3
    assert training_forwards(load_recipe("smoke", ["grpo.gradient_checkpointing=true"])) == 4
    tokenizer = load_tokenizer(Base.resolve(recipe.model))
    monkeypatch.setattr(probe, "forward_seconds", lambda *_: 0.5)
    monkeypatch.setattr(probe, "generate_completions", lambda *_, samples, **__: [[[7]] * samples] * 5)
    made = probe.probe_recipe(recipe, None, load_prompts(recipe, tokenizer), count=5)
    assert made.samples == 8  # more than the recipe's groups of 4
    assert made.step_s == pytest.approx(12, abs=1)
    assert made.equal_groups == 1.0
    # Equal groups are left out of training without KL, but a model that learns has fewer of them: they count in full.
    recipe = load_recipe("smoke", ["grpo.gradient_checkpointing=false", "grpo.beta=0"])
    made = probe.probe_recipe(recipe, None, load_prompts(recipe, tokenizer), count=5)
    assert made.step_s == pytest.approx(12, abs=1)


def test_groups_are_those_of_the_recipe_not_of_the_probe() -> None:
    totals = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.5]  # 2 prompts × 4 samples, in groups of 2: equal, equal, -, equal
    assert probe._equal(totals, 4, 2) == [True, True, False, True]
    assert probe._equal(totals, 4, 4) == [False, False]
    assert probe._equal(totals, 4, 3) == [False, False]  # a rest is no group


def test_the_plan_tells_the_time_that_the_last_probe_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    recipe, card = load_recipe("gsm8k"), find_card("t4")
    plan = plan_recipe(recipe, card)
    assert "time: not probed yet; on the machine that will train: make probe RECIPE=gsm8k" in "\n".join(
        report_lines(recipe, card, plan)
    )
    figures = {"step_s": 41.25, "steps": 250, "completion_s": 0.06, "held_out": 1319, "tokens_per_s": 900.0}
    keep_times(recipe, "Tesla T4", figures)
    line = time_line(recipe)
    assert line.startswith(
        "time: a step about 41.2 s, 290 steps about 3 h 19 min, evaluation about 2 min 38 s; probed on Tesla"
    )
    assert line in list(report_lines(recipe, card, plan))
    assert "not probed yet" in time_line(load_recipe("gsm8k", ["grpo.num_generations=16"]))
    assert time_line(load_recipe("gsm8k", ["log.sample_every=3"])) == line
    next((tmp_path / "probes").iterdir()).write_text("{broken")
    assert "not probed yet" in time_line(recipe)
