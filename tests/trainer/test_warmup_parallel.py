"""Two processes warm up to what one does with the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.killing import ALONE, FAST
from tests.trainer.test_parallel import HERE, launch, resumes_on_cpus, stop_the_second_at

DATA = "data: {generator: sums, kwargs: {low: 1, high: 9}}, completion: '{answer}'"
RUN = ["smoke", *FAST, *ALONE, "grpo.max_steps=1", "grpo.save_steps=2"]


def warmup(**settings: Any) -> str:
    values = {"steps": 5, "learning_rate": 0.01, "tokens_per_step": 200} | settings
    return f"warmup={{{DATA}, {', '.join(f'{key}: {value}' for key, value in values.items())}}}"


def steps(processes: int, out: Path, tokens: int, *overflows: str) -> list[dict[str, Any]]:
    """Return what each process ends with."""
    launch(processes, str(HERE / "parallel_warmup.py"), str(out), str(tokens), *overflows)
    return [torch.load(f"{out}.{rank}") for rank in range(processes)]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, weight in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weight, rtol=1e-4, atol=1e-6)
    assert len(other["logged"]) == len(one["logged"])
    for before, after in zip(one["logged"], other["logged"], strict=True):
        assert after == pytest.approx(before, rel=2e-3, abs=2e-4)  # transformers rounds to four digits
        assert after["num_tokens"] == before["num_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens", [pytest.param(150, id="several rows each"), pytest.param(1, id="a row each", marks=pytest.mark.matrix)]
)
def test_two_processes_warm_up_to_what_one_does(tokens: int, tmp_path: Path) -> None:
    """The weights, and the figures: loss, held-out loss, accuracy and tokens are those of both together."""
    (one,) = steps(1, tmp_path / "one", tokens)
    first, second = steps(2, tmp_path / "two", tokens)
    assert_same(one, first)
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight)
    assert {"loss", "heldout_loss", "mean_token_accuracy", "entropy", "num_tokens"} <= first["logged"][0].keys()
    moved = max(float((one["weights"][name] - start).abs().max()) for name, start in one["start"].items())
    assert moved > 1e-3, "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overflows",
    [
        pytest.param(["1:1"], id="in one", marks=pytest.mark.matrix),
        pytest.param(["0:2", "1:4"], id="at different steps", marks=pytest.mark.matrix),
    ],
)
def test_memory_that_runs_out_in_one_process_changes_nothing(overflows: list[str], tmp_path: Path) -> None:
    whole = steps(2, tmp_path / "whole", 400)
    disturbed = steps(2, tmp_path / "overflows", 400, *overflows)
    assert_same(whole[0], disturbed[0])
    for name, weight in disturbed[0]["weights"].items():
        assert torch.equal(disturbed[1]["weights"][name], weight)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def records(run: Path) -> list[dict[str, Any]]:
    changing = ("step_time", "time/", "memory/")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(changing)} for line in lines]


@pytest.mark.slow
def test_a_run_of_two_processes_warms_up_and_goes_on_with_grpo_from_there(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for processes, run in ((1, one), (2, two)):
        launch(processes, str(HERE / "parallel_run.py"), str(run), *RUN, warmup(), "grpo.learning_rate=1e-30")
    warm, expected = weights(two / "warmup" / "adapter"), weights(one / "warmup" / "adapter")
    for name, weight in expected.items():
        torch.testing.assert_close(warm[name], weight, rtol=1e-3, atol=1e-5)
    trained = weights(two / "adapter")  # by steps too small to change a weight
    assert all(torch.equal(trained[name], weight) for name, weight in warm.items())
    assert [(line["stage"], line["step"]) for line in records(two)] == [
        *(("warmup", i) for i in range(1, 6)),
        ("grpo", 1),
    ]
    for ours, theirs in zip(records(two)[:5], records(one)[:5], strict=True):
        assert ours.pop("stage") == theirs.pop("stage") == "warmup"
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-3)


@pytest.mark.slow
@pytest.mark.matrix
@resumes_on_cpus
def test_two_processes_that_pause_in_the_warm_up_end_as_undisturbed_ones(tmp_path: Path) -> None:
    """The first session stops after one step, by a clock."""
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    run = [*RUN, warmup()]
    launch(2, str(HERE / "parallel_run.py"), str(whole), *run)
    launch(2, str(HERE / "parallel_run.py"), str(paused), *run, "limits.max_minutes=0.0001")
    assert (paused / "warmup" / "checkpoint-1" / "rng_state_1.pth").is_file()
    assert "resuming from step 1" in launch(2, str(HERE / "parallel_run.py"), str(paused), *run)
    assert records(paused) == records(whole)
    for folder in ("warmup/adapter", "adapter"):
        before, after = weights(whole / folder), weights(paused / folder)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_signal_to_one_process_in_the_warm_up_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = stop_the_second_at("warm-up 3/3000", str(run), *RUN, warmup(steps=3000))
    assert "interrupted by SIGTERM after step" in out, out
    (checkpoint,) = (run / "warmup").glob("checkpoint-*")
    assert (checkpoint / "rng_state_1.pth").is_file()
    assert not (run / "warmup" / "adapter").exists()
    assert not list(run.glob("checkpoint-*"))


REWARD = """
def mine(completion_ids, **_):
    return [float({paid}) for ids in completion_ids]
mine.top = 1.0
"""


def sampling(folder: Path, paid: str) -> list[str]:
    """Return a recipe whose warm-up learns from what the base itself solves."""
    reward = folder / f"mine{len(paid)}.py"
    reward.write_text(REWARD.format(paid=paid))
    return [*RUN, f"rewards=[{{function: '{reward}:mine'}}]", "warmup={source: self, steps: 2, prompts: 8, samples: 8}"]


@pytest.mark.slow
def test_the_first_process_samples_what_both_learn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = launch(2, str(HERE / "parallel_run.py"), str(run), *sampling(tmp_path, "1 < len(ids) % 2 + 1"))
    assert text.count("completions are right") == 1
    assert (run / "warmup" / "traces.jsonl").is_file()
    assert [line["stage"] for line in records(run)] == ["warmup", "warmup", "grpo"]


@pytest.mark.slow
@pytest.mark.matrix
def test_both_processes_end_when_the_first_finds_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:  # by `launch`; a process that waits for ever would be a timeout
        launch(2, str(HERE / "parallel_run.py"), str(tmp_path / "run"), *sampling(tmp_path, "0.0 * len(ids)"))
    assert "is right, so there is nothing to learn from" in str(caught.value)
