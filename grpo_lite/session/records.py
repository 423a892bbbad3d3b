"""What a training writes while it runs: metrics.jsonl, completions, the doctor's findings, copies of checkpoints.

Each is a callback of the trainer. Copies are pushed here and fetched by `runs.remote`, which imports no transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from grpo_lite.files.atomic import sync, write_atomic
from grpo_lite.files.hub import hub_message
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import describe_sample
from grpo_lite.report.doctor import (
    OnceUntilItChanges,
    diagnose_grpo,
    diagnose_warmup,
    forget_findings_after,
    state_end,
    state_finding,
    stated_findings,
)
from grpo_lite.report.evidence import GRPO, LATEST_FILES, WARMUP, Evidence, Finding, read_evidence, read_warmup_steps
from grpo_lite.runs.checkpoints import checkpoint_folders, step_of
from grpo_lite.runs.remote import Remote
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.session.views import View

logger = logging.getLogger(__name__)


class PushCheckpoints(TrainerCallback):
    """Copy each checkpoint elsewhere once it is whole."""

    def __init__(self, run: RunDir, remote: Remote, show: Show) -> None:
        self.run, self.remote, self.show = run, remote, show

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folders = checkpoint_folders(self.run.path / self.remote.stage)
        if not folders or step_of(folders[-1]) != state.global_step:
            return
        try:
            self.remote.push(self.run, folders[-1], [step_of(path) for path in folders])
        except Exception as error:  # whatever a drive or a network does, training continues
            reason = hub_message(error, self.remote.name) or f"{type(error).__name__}: {error}"
            self.show(f"push_checkpoints: {folders[-1].name} was not copied to {self.remote.name}: {reason}")


class MetricsFile(TrainerCallback, ExportableState):
    """Append every log record, with TRL's keys, to metrics.jsonl; a resume cuts it to its length at the checkpoint.

    Args:
        run: the run.
        stage: written into every record: "warmup" or "grpo".
    """

    def __init__(self, run: RunDir, stage: str = "grpo") -> None:
        self.run, self.path, self.stage = run, run.metrics_file, stage

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the file: its length, once it is on disk."""
        if not self.path.is_file():
            return {"args": {}, "attributes": {"length_bytes": 0}}
        sync(self.path)
        return {"args": {}, "attributes": {"length_bytes": self.path.stat().st_size}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage == "grpo":
            self.run.update_run(max_steps=state.max_steps, first_step=state.global_step)  # for `watch`
        if not self.path.is_file():
            return
        attributes = state.stateful_callbacks.get("MetricsFile", {}).get("attributes", {}) if state.global_step else {}
        length = int(attributes.get("length_bytes", self._before()))
        with self.path.open("r+b") as file:
            present = file.read(length)
            if len(present) < length:  # lost with the machine's power: at least no half line is left
                length = present.rfind(b"\n") + 1
            file.truncate(length)
        for path in (self.path.parent / "completions").glob("step_*.jsonl"):
            if path.stem.removeprefix("step_").isdecimal() and int(path.stem.removeprefix("step_")) > state.global_step:
                path.unlink()

    def _before(self) -> int:
        """Return how many bytes the stage before this one wrote."""
        return int(self.run.read_warmup().get("metrics_bytes", 0)) if self.stage == "grpo" else 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "train_runtime" not in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "stage": self.stage, **logs}) + "\n")


class Completions(TrainerCallback):
    """Keep every completion with its rewards under completions/, and show one prompt's best and worst now and then.

    Args:
        latest: returns the last generation batch as rows (see trainer.journal.latest_completions).
    """

    def __init__(self, run: RunDir, show: Show, every: int, latest: Callable[[], list[dict[str, Any]]]) -> None:
        self.folder, self.show, self.every, self.latest = run.path / "completions", show, every, latest

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        rows = self.latest()
        if not rows or not logs or "reward" not in logs:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step_{state.global_step:06d}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
        if self.every and (state.global_step % self.every == 0 or state.global_step == 1):
            self.show(describe_sample(rows))


class RunDoctor(TrainerCallback):
    """Examine the run at every log, and state what is wrong, each finding at most once until it changes.

    Comes after MetricsFile and Completions, whose files it starts from when a run is resumed.
    """

    def __init__(self, run: RunDir, recipe: Recipe, view: View, latest: Callable[[], list[dict[str, Any]]]) -> None:
        self.run, self.view, self.latest = run, view, latest
        self._evidence = Evidence(recipe, [])
        self._once = OnceUntilItChanges()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_findings_after(self.run, state.global_step)
        evidence = read_evidence(self.run)
        completions = [row for row in evidence.completions if row["step"] <= state.global_step]
        self._evidence = replace(evidence, completions=completions)
        self._once.news(diagnose_grpo(self._evidence), state.global_step)  # said before the interruption

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:
            return
        old = self._evidence
        first = state.global_step - LATEST_FILES * max(1, args.logging_steps)
        rows = [row for row in old.completions if row["step"] > first]
        steps = [*old.steps, {"step": state.global_step, **logs}]
        self._evidence = replace(old, steps=steps, completions=[*rows, *self.latest()])
        try:
            findings = diagnose_grpo(self._evidence)
        except Exception:  # an onlooker's fault must not end hours of training
            logger.exception("The run doctor failed and is silent for this step; training continues.")
            return
        _state(self.run, self.view, self._once, findings, state.global_step, GRPO)


class WarmupDoctor(TrainerCallback):
    """Examine the warm-up: what its completions earn before its first step, its losses at every log.

    Comes after MetricsFile, whose records it starts from when a run is resumed.
    """

    def __init__(self, run: RunDir, recipe: Recipe, view: View) -> None:
        self.run, self.view = run, view
        self._evidence = Evidence(recipe, [])
        self._once = OnceUntilItChanges()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_findings_after(self.run, state.global_step, WARMUP)
        steps, warmup = read_warmup_steps(self.run), self.run.read_warmup()
        self._evidence = replace(self._evidence, warmup_steps=steps, warmup=warmup)
        self._once.news(map(Finding.from_record, self._stated()))
        self._state_news(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            steps = [*self._evidence.warmup_steps, {"step": state.global_step, **logs}]
            self._evidence = replace(self._evidence, warmup_steps=steps)
            self._state_news(state.global_step)

    def _stated(self) -> list[dict[str, Any]]:
        return [record for record in stated_findings(self.run) if record.get("stage") == WARMUP]

    def _state_news(self, step: int) -> None:
        try:
            findings = diagnose_warmup(self._evidence)
        except Exception:  # an onlooker's fault must not end the training
            logger.exception("The run doctor failed and is silent for this step; training continues.")
            return
        _state(self.run, self.view, self._once, findings, step, WARMUP)


def _state(run: RunDir, view: View, once: OnceUntilItChanges, findings: list[Finding], step: int, stage: str) -> None:
    """State what is new and what has ended, and put what is the case now on the board."""
    for finding in once.news(findings, step):
        state_finding(run, finding, step, view.show, stage)
    for finding, last in once.ended():
        state_end(run, finding, last, step, view.show, stage)
    view.show_findings(findings)
