"""A `get_reward` at fault in training: its group is left out of the step, counted and named, as with any reward."""

import json
from pathlib import Path

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run
from tests.tool_model import write_tool_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
    pytest.mark.filterwarnings("ignore:(?s).*environment_factory"),
]

FAULTY = """
import sys
import time

from tests.tool_model import Ledger


class Faulty(Ledger):
    def reset(self, start: int = 0, **row) -> str:
        self.start = start
        return super().reset(start, **row)

    def get_reward(self):
        return {fault} if self.start == 1 else super().get_reward()
"""
RECIPE = """
name: faulty
description: a get_reward that fails on some rows
least_gpu: none
model: {{id: {folder}, load_in: 32bit}}
data: {{train: {{path: {folder}/rows.jsonl}}, prompt: "{{question}}", answer: null, holdout: 0}}
environment: {folder}/faulty.py:Faulty
rewards: []
limits: {{reward_timeout_s: 1}}
eval: {{enabled: false}}
merge: false
grpo:
  {{max_tool_calling_iterations: 1, max_completion_length: 16, num_generations: 2, per_device_train_batch_size: 24,
    gradient_accumulation_steps: 1, max_steps: 1, gradient_checkpointing: false}}
"""


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("'good'", "Faulty.get_reward returned 'good'"),
        ("[1.0]", "Faulty.get_reward returned [1.0]"),
        ("float('nan')", "Faulty.get_reward returned nan"),
        ("10**400", "Faulty.get_reward returned inf"),
        ("sys.exit(1)", "Faulty.get_reward raised SystemExit: 1"),
        ("time.sleep(60)", "Faulty.get_reward took longer than limits.reward_timeout_s = 1 s"),
    ],
)
def test_a_get_reward_that_fails_costs_its_groups(fault: str, says: str, tmp_path: Path) -> None:
    write_tool_model(tmp_path)  # of its 12 rows, 4 start at 1
    (tmp_path / "faulty.py").write_text(FAULTY.format(fault=fault))
    (tmp_path / "faulty.yaml").write_text(RECIPE.format(folder=tmp_path))
    lines: list[str] = []
    recipe = load_recipe(str(tmp_path / "faulty.yaml"), [])
    run = train_run(recipe, RunDir(tmp_path / "run"), show=lines.append).run
    (step,) = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    (failed,) = (line for line in lines if line.startswith("reward failed"))
    assert says in failed
    if "sleep" not in fault:  # the time limit is for the batch: what comes after a group that hangs has no time left
        assert step["faults/excluded_groups"] == 4
        assert "4 of 12 groups are left out" in failed
