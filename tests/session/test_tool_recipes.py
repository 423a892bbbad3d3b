"""The shipped recipes with tools, one step by a tiny model that writes their calls: training, scores, merge, report."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.task.prompts import load_prompts
from grpo_lite.train import train_run
from tests.tool_model import call, write_tool_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
    pytest.mark.filterwarnings("ignore:(?s).*environment_factory"),
]
SMALL = [
    "lora.r=2", "data.holdout=2", "data.train.kwargs.size=6", "eval.limit=2", "eval.samples=1", "grpo.max_steps=2",
    "grpo.learning_rate=0.01", "grpo.lr_scheduler_type=constant", "grpo.warmup_steps=0",
    "grpo.num_generations=4", "grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=2",
    "grpo.max_completion_length=160", "grpo.max_tool_calling_iterations=3",
]  # fmt: skip


@pytest.mark.parametrize("name", ["python-tool", "search", "sudoku", "wordle"])
def test_a_recipe_with_tools_is_trained_scored_merged_and_reported(name: str, root: Path, tmp_path: Path) -> None:
    if name == "search":
        pytest.importorskip("bm25s")
    overrides = [f"model={{id: '{tmp_path}/model', load_in: 32bit}}", *SMALL]
    overrides += ["data.train.kwargs.empty=1"] if name == "sudoku" else []
    recipe = load_recipe(name, overrides)
    environment = import_module(str(recipe.environment).partition(":")[0])
    right = [turn[0] for row in load_prompts(recipe).train for turn in environment.gold(row)[:-1]]
    tool = right[0]["name"]
    write_tool_model(tmp_path / "model", tuple(call(part["name"], **part["arguments"]) for part in right))
    lines: list[str] = []
    run = train_run(recipe, RunDir(tmp_path / "run"), show=lines.append).run
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step["tools/calls"] > 0 for step in steps] == [True, True]
    assert any(step["reward_std"] > 0 for step in steps), "what the model calls is right for some row"
    played = run.read_scores()["episodes"]
    assert set(played) == {"base", "trained"}
    assert played["base"]["calls"] > 0
    assert (run.merged / "config.json").is_file()
    rows = [json.loads(line) for file in run.path.glob("completions/*") for line in file.read_text().splitlines()]
    results = [turn for row in rows for turn in row.get("turns", []) if turn["role"] == "tool"]
    assert {result["name"] for result in results} == {tool}
    assert not any("not found" in result["content"] for result in results)
    records = [json.loads(line) for line in (run.path / "evaluation" / "records.jsonl").read_text().splitlines()]
    if name == "sudoku":  # what `reset` shows
        assert [record["prompt"][-1]["content"].count("\n") for record in records] == [5, 5]
    assert tool in run.report_file.read_text()
    (tmp_path / "shown.txt").write_text("\n".join(lines))
