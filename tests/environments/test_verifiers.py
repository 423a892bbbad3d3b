"""A taskset of the library verifiers: its own template with a tool, filled in as its README says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.environments.verifiers import environment_of, rows, task_reward
from grpo_lite.errors import GRPOLiteError
from tests import tool_model
from tests.killing import train
from tests.tool_model import run_cli, write_tool_model

MISSING = "the extra verifiers is not installed (pip install 'grpo-lite[verifiers]')"
LOAD = """
        return [
            AddingTask(AddingData(prompt=f"Add up to {n}.", system_prompt="Call the tool.", wanted=n), self.config.task)
            for n in range(3, 3 + self.config.num_tasks)
        ]
"""
REWARD = """
        results = [message.content for message in trace.tool_messages]
        return float(results[-1:] == [f"total {self.data.wanted}"]) + 0.5 * (trace.last_reply == str(self.data.wanted))
"""
TOOL = '''
    async def setup_task(self, task):
        self.total = 0

    @vf.tool
    async def add(self, number: int, times: int = 1) -> str:
        """Add a number."""
        if number < 0:
            raise ValueError("below 0")
        self.total += number * times
        return f"total {self.total}"
'''


@pytest.fixture
def taskset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a taskset made by the library's `init`."""
    pytest.importorskip("verifiers.v1", reason=MISSING)
    from verifiers.v1.cli.init import scaffold
    from verifiers.v1.configs.cli.init import InitConfig

    folder = scaffold(InitConfig(name="adding", path=str(tmp_path), add_tool=True))
    source = folder / "adding" / "taskset.py"
    text = source.read_text()
    head, _, tail = text.partition("        raise NotImplementedError")
    text = head + REWARD.lstrip("\n") + tail.partition("\n")[2]
    head, _, _ = text.partition("        raise NotImplementedError")
    text = head + LOAD.lstrip("\n")
    text = text.replace("class AddingData(vf.TaskData):", "class AddingData(vf.TaskData):\n    wanted: int\n")
    source.write_text(text)
    tool = folder / "adding" / "servers" / "tool.py"
    before, _, after = tool.read_text().partition("    @vf.tool")
    tool.write_text(before + TOOL + "\n\nif __name__" + after.partition("if __name__")[2])
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{sys.path[1]}")
    yield "adding"
    for module in [name for name in sys.modules if name.partition(".")[0] == "adding"]:
        del sys.modules[module]


def call(number: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "adding_add", "arguments": {"number": number}}}


def test_a_taskset_s_tools_run_and_its_rewards_read_the_episode(taskset: str) -> None:
    from transformers.utils import get_json_schema

    made = rows(taskset, 2, {"num_tasks": 4})
    assert made == [
        {"question": f"Call the tool.\n\nAdd up to {n}.", "taskset": '{"id": "adding", "num_tasks": 4}', "task": n - 3}
        for n in (3, 4)
    ]
    kind = environment_of(taskset)
    first, second = kind(), kind()
    schema = get_json_schema(first.adding_add)["function"]
    assert schema["description"] == "Add a number."
    assert schema["parameters"]["required"] == ["number"]
    assert first.reset(prompt=[], **made[0]) is None
    second.reset(**made[1])
    assert first.adding_add(number=1) == "total 1"
    assert first.adding_add(number=1, times=2) == "total 3"
    assert second.adding_add(number=4) == "total 4"
    with pytest.raises(ValueError, match="below 0"):
        second.adding_add(number=-1)
    first.reset(**made[0])
    assert first.adding_add(number=3) == "total 3"
    episode = [
        {"role": "assistant", "content": "", "tool_calls": [call(3)]},
        {"role": "tool", "name": "adding_add", "content": "total 3"},
        {"role": "assistant", "content": "3"},
    ]
    columns = {"taskset": [made[0]["taskset"]] * 3, "task": [0, 0, 1]}
    assert task_reward([episode, episode[:2], episode], **columns, environments=[first, first, second]) == [1.5, 1, 0]
    assert task_reward([[{"role": "assistant", "content": "3"}]], taskset=columns["taskset"][:1], task=[0]) == [0.5]


@pytest.mark.slow
def test_a_model_trains_on_a_taskset(taskset: str, tmp_path: Path) -> None:
    data = "data={train: {generator: verifiers, kwargs: {taskset: adding, num_tasks: 8}}, prompt: '{question}', "
    data += "answer: null, format: chat, holdout: 0}"
    reward = "rewards=[{function: grpo_lite.environments.verifiers.task_reward}]"
    run = tmp_path / "run"
    done = run_cli(*train(run, "environment"), data, reward, f"environment=verifiers:{taskset}", "grpo.max_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rewards/task_reward/mean" in json.loads((run / "metrics.jsonl").read_text())


@pytest.mark.slow
def test_a_model_is_probed_evaluated_and_asked_on_a_taskset(taskset: str, tmp_path: Path) -> None:
    calls = tuple(tool_model.call("adding_add", number=number) for number in (-1, 1, 2, 3, 5))
    model = write_tool_model(tmp_path / "model", calls)
    recipe = tmp_path / "adding.yaml"
    recipe.write_text(
        f"""
description: adds up
least_gpu: none
model: {{id: {model}, load_in: 32bit}}
data:
  train: {{generator: verifiers, kwargs: {{taskset: adding, num_tasks: 16, size: 16}}}}
  prompt: "{{question}}"
  answer: null
  holdout: 4
environment: verifiers:{taskset}
rewards: [{{function: grpo_lite.environments.verifiers.task_reward}}]
grpo:
  {{max_tool_calling_iterations: 3, max_completion_length: 60, num_generations: 4, per_device_train_batch_size: 8,
    gradient_accumulation_steps: 1, max_steps: 1, gradient_checkpointing: false}}
eval: {{samples: 2, batch_size: 4, every: 1}}
merge: false
"""
    )
    run = tmp_path / "run"
    probed = run_cli("probe", str(recipe))
    assert "calls an episode" in probed.stdout, probed.stdout + probed.stderr
    trained = run_cli("train", str(recipe), "--run", str(run))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    scores = json.loads((run / "metrics.json").read_text())
    assert (scores["n"], scores["unusable_golds"]) == (4, 0)
    assert scores["episodes"]["trained"]["calls"] > 0
    row = rows(taskset, 1, {"num_tasks": 16})[0]
    answered = run_cli("chat", str(run), json.dumps(row))
    assert answered.returncode == 0, answered.stdout + answered.stderr
    assert "→ adding_add(" in answered.stdout


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("async def setup(self, trace, runtime): ...", r"a runtime \(setup\)"),
        ("@vf.reward\n    async def files(self, trace, runtime): ...", r"a runtime \(reward files\)"),
        ("NEEDS_CONTAINER = True", "a container"),
    ],
)
def test_what_episodes_here_do_not_have_is_one_line(taskset: str, tmp_path: Path, source: str, lacks: str) -> None:
    from grpo_lite.environments.verifiers import _open

    file = tmp_path / "adding" / "adding" / "taskset.py"
    file.write_text(file.read_text().replace("    @vf.reward", f"    {source}\n\n    @vf.reward", 1))
    _open.cache_clear()
    with pytest.raises(GRPOLiteError, match=f"taskset 'adding' needs {lacks}, which episodes here do not have"):
        environment_of(taskset)
    _open.cache_clear()


def test_a_taskset_that_is_not_installed_is_one_line() -> None:
    pytest.importorskip("verifiers.v1", reason=MISSING)
    with pytest.raises(GRPOLiteError, match=r"taskset 'nowhere' cannot be loaded: .*not found.* Install its package"):
        environment_of("nowhere")


def test_the_library_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(GRPOLiteError, match=r"pip install 'grpo-lite\[verifiers\]'"):
        rows("other", 1, {})
