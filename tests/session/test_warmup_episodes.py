"""A run that warms up on episodes, with a chat template of its own: what it leaves is served with that template."""

import json
from pathlib import Path

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run
from tests.tool_model import write_tool_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
    pytest.mark.filterwarnings("ignore:(?s).*environment_factory"),
]


def trained(tmp_path: Path, warmup: str, *overrides: str) -> tuple[RunDir, list[str]]:
    """Train the tool model of `tmp_path/model` after a warm-up; return the run and the lines that it showed."""
    (tmp_path / "t.yaml").write_text(
        f"""
name: t
description: d
least_gpu: none
model: {{id: {tmp_path}/model, load_in: 32bit}}
data: {{train: {{path: {tmp_path}/model/rows.jsonl}}, prompt: "{{question}}", answer: null, holdout: 2}}
environment: tests.tool_model:Ledger
rewards: []
warmup: {warmup}
grpo:
  {{max_tool_calling_iterations: 2, max_completion_length: 64, num_generations: 4, per_device_train_batch_size: 8,
    gradient_accumulation_steps: 1, max_steps: 1, learning_rate: 0.01, gradient_checkpointing: false}}
eval: {{limit: 2, samples: 0}}
"""
    )
    lines: list[str] = []
    recipe = load_recipe(str(tmp_path / "t.yaml"), overrides)
    return train_run(recipe, RunDir(tmp_path / "run"), show=lines.append).run, lines


def test_a_run_warms_up_on_the_base_s_own_paid_episodes(tmp_path: Path) -> None:
    write_tool_model(tmp_path / "model")
    run, lines = trained(
        tmp_path, "{source: self, samples: 4, steps: 2, learning_rate: 0.01}",
        "eval.lenient={function: get_reward, threshold: 0.5}",
    )  # fmt: skip
    kept = [json.loads(line) for line in (run.warmup / "traces.jsonl").read_text().splitlines()]
    assert any(0 in row["tool_mask"] for row in kept)
    assert f"warm-up: {len(kept)} rows" in lines
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step["stage"] for step in steps] == ["warmup", "warmup", "grpo"]
    assert all(step["grad_norm"] > 0 for step in steps[:2])
    assert run.read_scores()["episodes"].keys() == {"base", "warm", "trained"}


def test_a_run_warms_up_on_episodes_and_keeps_the_recipe_s_template(tmp_path: Path) -> None:
    write_tool_model(tmp_path / "model")
    template = (Path("grpo_lite") / "models" / "chat_templates" / "smollm2-tools.jinja").read_text()
    (tmp_path / "mine.jinja").write_text(template.replace("Tools:", "My tools:"))
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"number": 2}'}}]
    messages = [
        {"role": "user", "content": "Count on. Begin at 1."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "x", "content": "total 3"}, {"role": "assistant", "content": "3"},
    ]  # fmt: skip
    (tmp_path / "traces.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 6)
    run, _ = trained(
        tmp_path, f"{{data: {{path: {tmp_path}/traces.jsonl}}, steps: 2, learning_rate: 0.01}}",
        f"model.chat_template={tmp_path}/mine.jinja", "grpo.max_steps=2",
    )  # fmt: skip
    assert run.read_scores()["episodes"].keys() == {"base", "warm", "trained"}
    for folder in (run.adapter, run.merged):
        assert "My tools:" in (folder / "chat_template.jinja").read_text(), folder
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step["stage"] for step in steps] == ["warmup", "warmup", "grpo", "grpo"]
    assert sum(step.get("tools/calls", 0) for step in steps) > 0


def test_a_run_warms_up_on_its_environment_s_gold_policy_and_keeps_the_rows(tmp_path: Path) -> None:
    write_tool_model(tmp_path / "model")
    (tmp_path / "ledger.py").write_text(
        "from tests.tool_model import Ledger\n\n"
        "class Counted(Ledger):\n"
        "    def reset(self, start: int = 0, **row):\n"
        "        self.total = start\n\n"
        "def gold(row):\n"
        "    return [[{'name': 'add', 'arguments': {'number': 3 - row['start']}}], 'It is 3.']\n"
    )
    run, lines = trained(
        tmp_path, "{source: gold, steps: 2, learning_rate: 0.01}",
        f"environment={tmp_path}/ledger.py:Counted", "merge=false",
    )  # fmt: skip
    assert "warm-up: 10 episodes of the gold policy; the environment pays 0.75 for each." in lines
    kept = [json.loads(line) for line in (run.warmup / "traces.jsonl").read_text().splitlines()]
    assert len(kept) == 10
    assert all(row["source"]["completion"][-1]["content"] == "It is 3." for row in kept)
    assert run.read_scores()["episodes"].keys() == {"base", "warm", "trained"}
