"""How the warm-up is watched and judged: its records, its board, `watch` and the doctor's findings; no model."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerState

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import GRPOAhead, Progress, WarmupBoard, rendered
from grpo_lite.report.doctor import diagnose, examine, forget_findings_after, nothing_found, stated_findings
from grpo_lite.report.evidence import Evidence, Finding, read_evidence, read_steps, read_warmup_steps
from grpo_lite.report.watch import read_board, state_of, watch_lines
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session.records import WarmupDoctor
from grpo_lite.session.views import make_view
from tests.run_files import ROOT, write_run


def warmup_record(step: int, loss: float, **figures: Any) -> dict[str, Any]:
    """Return a record as the warm-up logs it."""
    return {"step": step, "stage": "warmup", "loss": loss, "mean_token_accuracy": 0.9, "step_time": 2.0, **figures}


def test_records_of_the_warmup_and_of_grpo_are_read_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    older = run.metrics_file.read_text()  # no stage field: GRPO's
    warm = [warmup_record(step, 2.0 / step) for step in (1, 2)]
    new = json.dumps({"step": 4, "stage": "grpo", "reward": 0.5, "loss": 0.0}) + "\n"
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in warm) + older + new)
    assert [record["step"] for record in read_steps(run)] == [1, 2, 3, 4]
    assert read_warmup_steps(run) == warm


def recipe(*overrides: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes" / "smoke.yaml"), overrides)


WARM = ("warmup.data.path=rows.jsonl", "warmup.learning_rate=0.001")


def test_the_warmup_s_line_says_how_far_it_is_and_what_follows() -> None:
    first = warmup_record(4, 0.9, num_tokens=1000)
    last = warmup_record(5, 0.42, num_tokens=2624, mean_token_accuracy=0.912, heldout_loss=0.55)
    board = WarmupBoard(recipe(), 20, [first, last], seconds=10.0, ahead=GRPOAhead(60, 180.0, "2026-11-02T10:20:30Z"))
    assert board.line() == (
        "warm-up 5/20 · loss 0.420 · held-out loss 0.550 · token accuracy 91% · 812 tokens/s · about 30 s left · "
        "then GRPO: 60 steps (about 3 min 00 s, measured 2026-11-02)"  # 1624 tokens in 2 s; 15 steps of 2 s
    )


def test_the_warmup_s_line_leaves_out_what_is_not_known() -> None:
    assert WarmupBoard(recipe(), 0, [{"step": 1, "loss": 2.0}]).line() == "warm-up 1/? · loss 2.000"
    assert WarmupBoard(recipe(), 20, [{"step": 1, "loss": None}], begun_at=1).line() == "warm-up 1/20"
    alone = WarmupBoard(recipe(), 20, [{"step": 1, "loss": 2.0}], seconds=2.0, ahead=GRPOAhead(60))
    assert alone.line().endswith("about 38 s left · then GRPO: 60 steps")
    assert alone.seconds_left_in_all is None


def test_the_warmup_s_board_draws_losses_and_the_time_of_both_stages() -> None:
    steps = [warmup_record(step, 1.0 / step, num_tokens=100 * step) for step in range(1, 6)]
    steps[2]["heldout_loss"] = 0.5
    text = as_text(WarmupBoard(recipe(), 20, steps, seconds=10.0, ahead=GRPOAhead(60, 180.0, "2026-11-02T10:20:30Z")))
    assert re.search(r"warm-up 5/20 +10 s elapsed, about 30 s left", text)
    assert re.search(r"loss +0\.200 +█▄▂▁▁", text)
    assert re.search(r"held-out loss +0\.500", text)  # of an earlier step: the latest that is known
    assert "about 3 min 30 s left in both stages" in text
    assert "warm-up 0/?" in as_text(WarmupBoard(recipe()))


def write_warm_run(folder: Path, warm_steps: int = 3, grpo_steps: int = 0, **facts: Any) -> RunDir:
    """Write a run with a recipe without warm-up whose files say that it had one; `facts` are of run.json's warmup."""
    run = write_run(folder, steps=max(1, grpo_steps))
    lines = [json.dumps(warmup_record(step, 2.0 / step)) for step in range(1, warm_steps + 1)]
    lines += run.metrics_file.read_text().splitlines()[:grpo_steps]
    run.metrics_file.write_text("".join(line + "\n" for line in lines))
    record = run.read_run()
    for key in ("trained_at", "finished_at", *(() if grpo_steps else ("max_steps", "first_step"))):
        del record[key]
    warmup = {"began_at": record["started_at"], "done_at": None, "max_steps": 5, **facts}
    run.run_file.write_text(json.dumps({**record, "warmup": warmup}))
    return run


def test_watch_follows_a_run_from_the_warmup_into_grpo(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", ahead={"steps": 2, "seconds": None, "measured_at": ""})
    warm = run.metrics_file.read_text()
    rest = write_run(tmp_path / "other", steps=2).metrics_file.read_text()
    board = read_board(run)
    assert board.line() == "warm-up 3/5 · loss 0.667 · token accuracy 90% · about 4 s left · then GRPO: 2 steps"

    def later(_: float) -> None:
        run.metrics_file.write_text(warm + json.dumps(warmup_record(4, 0.5)) + "\n" + rest)
        run.update_run(warmup={"done_at": "x", "max_steps": 5}, max_steps=2, first_step=0, finished_at="y")

    shown = [line.split(" · ")[0] for line in watch_lines(run, sleep=later)]
    assert shown == [*(f"warm-up {step}/5" for step in (1, 2, 3, 4)), "step 1/2", "step 2/2", f"{run.path}: finished"]
    assert read_board(run).line().startswith("step 2/2 · reward ")


def test_before_the_first_step_of_grpo_the_board_is_grpo_s(tmp_path: Path) -> None:
    assert read_board(write_warm_run(tmp_path / "run", done_at="2026-01-01T00:00:30Z")).count() == "step 0/3"


def test_a_pause_in_the_warmup_is_a_pause_until_the_run_is_resumed(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", paused_at="2026-01-01T00:00:30Z")
    assert state_of(run) == "paused"
    run.update_run(warmup={**run.read_run()["warmup"], "paused_at": None})
    assert state_of(run) == "running"


def test_watch_of_a_warmup_that_was_made_alone_says_how_grpo_follows(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", done_at="2026-01-01T00:00:30Z")
    run.warm_adapter.mkdir(parents=True)
    with run.locked():
        pass
    for file in (run.recipe_file, run.run_file, run.metrics_file):
        os.utime(file, (1e9, 1e9))
    *_, last = watch_lines(run)
    assert last == f"{run.path}: stopped, its warm-up is complete; `train` continues with GRPO"


def as_text(board: Progress) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(rendered(board, "a run"))
    return console.file.getvalue()  # type: ignore[attr-defined]


# What the doctor says

EASY_START = [0.02, 0.9, 0.6, 0.45, 0.3, 0.22, 0.16, 0.12, 0.1, 0.08]  # a first batch of easy rows
HEALTHY = [
    2.0,
    1.4,
    1.0,
    0.8,
    0.6,
    0.45,
    0.3,
    0.22,
    0.2,
    0.16,
    0.12,
    0.1,
    0.09,
    0.08,
    0.07,
    0.07,
    0.06,
    0.06,
    0.05,
    0.05,
]
FLAT = [2.31, 2.24, 2.35, 2.29, 2.33, 2.26, 2.3, 2.34, 2.27, 2.31]
PAID = {"tried": 64, "zero": 1, "mean": 1.0, "top": 1.05}
PROVEN = {"warmup_loss_flat", "warmup_memorised", "warmup_earns_little", "warmup_collapse"}  # for test_doctor.py


def warm(
    losses: list[float], held: dict[int, float] | None = None, passes: float = 1.0, *overrides: str, **facts: Any
) -> Evidence:
    """Return the evidence of a complete warm-up; `held` is the held-out loss by step."""
    steps = [
        warmup_record(i, loss, epoch=passes * i / len(losses))
        | ({"heldout_loss": held[i]} if i in (held or {}) else {})
        for i, loss in enumerate(losses, start=1)
    ]
    return Evidence(
        recipe(*WARM, *overrides), [], warmup_steps=steps, warmup={"max_steps": len(losses), "earning": PAID, **facts}
    )


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    "evidence",
    [
        warm(HEALTHY, {5: 0.6, 10: 0.2, 15: 0.09, 20: 0.08}),
        warm(HEALTHY, {5: 0.6, 10: 0.2, 15: 0.09, 20: 0.1}, 3.0),  # it wavers near 0
        warm(HEALTHY),
        warm(EASY_START),
        warm([0.62, 0.55, 0.6, 0.52, 0.58, 0.5, 0.56, 0.54, 0.49, 0.55]),  # it falls little, and batches differ
        warm(FLAT, {3: 2.3, 6: 2.2, 10: 2.1}),  # of batches that get harder: on the same rows the loss falls
        warm([0.04, 0.05, 0.03, 0.04] * 4),  # learnt before
        warm(FLAT, None, 1.0, "warmup.source=self", "warmup.data=null"),  # the entropy of the base's own samples
        warm(FLAT[:4]),
        warm(FLAT[:7]),
        replace(warm(FLAT), warmup={"max_steps": 40, "earning": PAID}),  # a quarter is done
        warm(HEALTHY, earning=None),
        warm(HEALTHY, earning={"tried": 10, "zero": 1, "mean": 0.8, "top": None}),
        Evidence(recipe(), []),
    ],
    ids=lambda e: f"{len(e.warmup_steps)} steps",
)
def test_a_healthy_warmup_has_no_finding(evidence: Evidence) -> None:
    assert diagnose(evidence) == []


@pytest.mark.parametrize(
    "losses, rate, says, override",
    [
        (
            FLAT,
            "1e-6",
            "from 2.30 to 2.31 in 10 steps: the learning rate 1e-06 is too low",
            "warmup.learning_rate=0.0002",
        ),
        (FLAT, "1e-3", "read the rows, a completion may not follow from its prompt", None),
        ([*HEALTHY[:8], *([5.0] * 8)], "0.03", "the learning rate 0.03 is too high", "warmup.learning_rate=0.01"),
    ],
    ids=["rate too low", "rows", "rate too high"],
)
def test_a_warmup_whose_loss_does_not_fall_is_named(losses: list[float], rate: str, says: str, override: str) -> None:
    finding = only(diagnose(warm(losses, None, 1.0, f"warmup.learning_rate={rate}")))
    assert finding.key == "warmup_loss_flat"
    assert says in finding.sentence
    assert finding.override == override


@pytest.mark.parametrize(
    "held, passes, length, says, override",
    [
        ({5: 0.7, 10: 0.5, 15: 0.55, 20: 0.61}, 0.9, (), "rose from 0.50 at step 10 to 0.61, while", "warmup.steps=10"),
        ({5: 0.7, 20: 0.5}, 4.0, ("warmup.steps=20",), "After 4.0 passes over the rows", "warmup.steps=5"),
        (
            {5: 0.7, 20: 0.5},
            4.0,
            ("warmup.epochs=4",),
            "training loss is 0.06 and its held-out loss 0.50",
            "warmup.epochs=1",
        ),
    ],
    ids=["held-out loss rises", "far above, steps", "far above, epochs"],
)
def test_memorised_rows_of_a_warmup_are_named(
    held: dict[int, float], passes: float, length: tuple[str, ...], says: str, override: str
) -> None:
    finding = only(diagnose(warm(HEALTHY, held, passes, *length)))
    assert finding.key == "warmup_memorised"
    assert says in finding.sentence
    assert finding.override == override
    recipe(*WARM, *length, override)  # it can be pasted


@pytest.mark.parametrize(
    "earning",
    [{"tried": 64, "zero": 40, "mean": 0.3, "top": None}, {"tried": 64, "zero": 0, "mean": 0.2, "top": 1.2}],
    ids=["many earn 0", "far below the top"],
)
def test_completions_of_a_warmup_that_do_not_earn_the_rewards_are_named(earning: dict[str, Any]) -> None:
    finding = only(diagnose(warm(HEALTHY, earning=earning)))
    assert finding.key == "warmup_earns_little"
    assert f"{earning['zero']} of 64 earn 0, the mean is {earning['mean']:.2f}" in finding.sentence
    assert "nan" not in finding.sentence


def grpo(reward: float, equal: float, entropy: float, steps: int = 6) -> list[dict[str, Any]]:
    """Return steps of GRPO with completions of 20 tokens."""
    figures = {
        "reward": reward, "rewards/accuracy_reward/mean": reward, "rewards/accuracy_reward/std": 0.3,
        "frac_reward_zero_std": equal, "entropy": entropy, "completions/mean_length": 20.0,
    }  # fmt: skip
    return [{"step": step, **figures} for step in range(1, steps + 1)]


def test_a_warmup_that_left_nothing_to_learn_is_named() -> None:
    finding = only(diagnose(replace(warm(HEALTHY), steps=grpo(0.98, 0.9, 0.01))))
    assert finding.key == "equal_groups"
    assert "the warm-up left nothing to learn" in finding.sentence
    assert finding.override == "warmup.steps=10"  # half of 20
    without = only(diagnose(Evidence(recipe(), grpo(0.98, 0.9, 0.01))))
    assert "warm" not in without.sentence
    learnt = [*grpo(0.4, 0.2, 0.1), *({**record, "step": 6 + record["step"]} for record in grpo(0.98, 0.9, 0.01))]
    assert "warm" not in only(diagnose(replace(warm(HEALTHY), steps=learnt))).sentence  # GRPO solved them


def test_a_warmup_after_which_all_samples_are_one_text_is_named() -> None:
    finding = only(diagnose(replace(warm(HEALTHY), steps=grpo(0.4, 0.95, 0.01))))
    assert finding.key == "warmup_collapse"  # and not equal_groups, whose larger groups would not help
    assert "a completion has an entropy of 0.20 nats" in finding.sentence  # 20 tokens of 0.01
    assert finding.override == "warmup.steps=10"
    varied = replace(warm(HEALTHY), steps=grpo(0.4, 0.2, 0.05))
    assert diagnose(varied) == []
    assert only(diagnose(Evidence(recipe(), grpo(0.4, 0.95, 0.01)))).key == "equal_groups"  # there was no warm-up


def test_the_doctor_speaks_in_the_warmup_and_grpo_s_start_does_not_forget_it(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", warm_steps=0, earning={"tried": 8, "zero": 8, "mean": 0.0, "top": 1.0})
    shown: list[str] = []
    warm_recipe = recipe(*WARM, "warmup.learning_rate=1e-6")
    doctor = WarmupDoctor(run, warm_recipe, make_view("plain", warm_recipe, shown.append, "warmup"))
    doctor.on_train_begin(None, TrainerState(), None)
    assert ["8 of 8 earn 0" in line for line in shown] == [True]  # before the first step
    for step, loss in enumerate(FLAT, start=1):
        with run.metrics_file.open("a") as file:
            file.write(json.dumps(warmup_record(step, loss)) + "\n")
        doctor.on_log(None, TrainerState(global_step=step), None, logs={"loss": loss})
    assert len(shown) == 2
    assert "is too low for LoRA" in shown[1]
    forget_findings_after(run, 0)  # as GRPO does before its first step
    assert [(r["stage"], r["step"], r["key"]) for r in stated_findings(run)] == [
        ("warmup", 0, "warmup_earns_little"), ("warmup", 8, "warmup_loss_flat"),
    ]  # fmt: skip
    assert [finding.key for finding in read_board(run).findings] == ["warmup_earns_little", "warmup_loss_flat"]
    again = WarmupDoctor(run, warm_recipe, make_view("plain", warm_recipe, shown.append, "warmup"))
    again.on_train_begin(None, TrainerState(global_step=5), None)  # resumed at step 5
    assert next(record["step"] for record in stated_findings(run)) == 0
    assert len([line for line in shown if "8 of 8" in line]) == 1


def test_a_fault_of_the_doctor_does_not_end_the_warmup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(evidence: Evidence) -> list[Finding]:
        raise ZeroDivisionError

    monkeypatch.setattr("grpo_lite.session.records.diagnose_warmup", broken)
    run = write_warm_run(tmp_path / "run")
    WarmupDoctor(run, recipe(*WARM), make_view("plain", recipe(), print, "warmup")).on_train_begin(
        None, TrainerState(), None
    )
    assert "training continues" in caplog.text


def test_doctor_of_a_run_knows_its_warmup(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", warm_steps=5, earning={"tried": 8, "zero": 8, "mean": 0.0, "top": 1.0})
    assert only(examine(run)).key == "warmup_earns_little"
    run.update_run(warmup={"max_steps": 5})
    assert examine(run) == []
    assert nothing_found(read_evidence(run)) == (
        "nothing found wrong in the warm-up; no steps of GRPO logged so far, and it needs at least 4"
    )
