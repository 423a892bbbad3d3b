"""How the warm-up is watched and judged: its records, its board, `watch` and the doctor's findings; no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_lite.report.evidence import read_steps, read_warmup_steps
from tests.run_files import write_run


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
