"""The warm-up stage of a run: stopped, paused, continued, damaged, on a new machine; and what it starts from."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from grpo_lite.errors import DataError, ModelError, RunDirError, TrainingError
from grpo_lite.evaluation.rejection import write_traces
from grpo_lite.processes import Ranks
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.checkpoints import LastUsable, checkpoint_folders
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session import warmup
from grpo_lite.task.traces import Trace, Traces
from grpo_lite.train import train_run
from grpo_lite.trainer.warmup import WarmupTrainer
from tests.killing import ALONE, FAST

DATA = "data: {generator: sums, kwargs: {low: 1, high: 9}}, completion: '{answer}'"
WARMUP = f"warmup={{{DATA}, steps: 5, learning_rate: 0.01, tokens_per_step: 200}}"


SAMPLED = Traces([Trace([3, 4], [5, 2])], ["1 of 1"], [{"prompt": "x", "completion": "y"}])


def recipe_of(*overrides: str, warmup: str = WARMUP) -> Recipe:
    return load_recipe("smoke", [*FAST, *ALONE, "grpo.max_steps=1", "grpo.save_steps=2", warmup, *overrides])


def train(recipe: Recipe, run: RunDir, **arguments: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    return train_run(recipe, run, lines.append, **arguments), lines


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Let something happen at the end of a step of the warm-up."""

    class Acting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()

    real = WarmupTrainer.__init__

    def init(self: WarmupTrainer, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.add_callback(Acting())

    monkeypatch.setattr(WarmupTrainer, "__init__", init)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, recipe: Recipe, run: RunDir) -> Any:
    """Train until a signal comes at the end of a step of the warm-up; return how it ended."""
    with monkeypatch.context() as patched:
        at_step(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train(recipe, run)[0]


def test_grpo_starts_from_the_adapter_of_the_warm_up(root: Path, tmp_path: Path) -> None:
    """With a learning rate that moves nothing, the trained adapter is the warm one: and that is no fresh one."""
    run = RunDir(tmp_path / "run")
    _, lines = train(recipe_of("grpo.learning_rate=1.0e-30"), run)
    warm, trained = weights(run.warm_adapter), weights(run.adapter)
    assert all(torch.equal(trained[name], tensor) for name, tensor in warm.items())
    assert any(tensor.abs().max() > 0 for name, tensor in warm.items() if "lora_B" in name)
    assert any(line.startswith("GRPO starts from the warm-up's adapter") for line in lines)
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    stages = [(record["stage"], record["step"]) for record in records]
    assert stages == [*(("warmup", i) for i in range(1, 6)), ("grpo", 1)]
    assert records[4]["loss"] < records[0]["loss"]
    record = run.read_run()["warmup"]
    assert (record["steps"], record["max_steps"], record["rows"], record["held"]) == (5, 5, 70, 3)
    assert record["heldout_loss_last"] < record["heldout_loss_first"]
    assert record["earning"]["mean"] is not None
    assert checkpoint_folders(run.warmup) == []


def test_the_warm_up_alone_and_then_the_rest_is_what_one_command_does(root: Path, tmp_path: Path) -> None:
    apart, at_once = RunDir(tmp_path / "apart"), RunDir(tmp_path / "at_once")
    train(recipe_of(), apart, warmup_only=True)
    assert not apart.adapter.exists()
    _, again = train(recipe_of(), apart, warmup_only=True)  # complete: nothing to do
    assert not any(line.startswith("warm-up 1/") for line in again)
    train(recipe_of(), apart)
    train(recipe_of(), at_once)
    for folder in ("warmup/adapter", "adapter"):
        one, other = weights(apart.path / folder), weights(at_once.path / folder)
        assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert len(apart.read_run()["resumed_at"]) == 1


def test_a_signal_in_the_warm_up_saves_a_checkpoint_and_the_next_train_continues_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    result = stop_at(monkeypatch, 3, recipe_of(), run)
    assert (result.stopped_by, result.steps) == ("SIGTERM", 3)
    assert run.last_of_warmup() == run.warmup / "checkpoint-3"
    assert not run.warm_adapter.exists()
    assert run.prepare(recipe_of()) == "resume"
    _, lines = train(recipe_of(), run)
    assert f"resuming from step 3 ({run.warmup / 'checkpoint-3'})" in lines
    assert run.warm_adapter.is_dir()


def test_a_time_limit_in_the_warm_up_leaves_an_adapter_and_the_next_train_continues_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    limited = recipe_of("limits.max_minutes=0.0001", "eval.enabled=true")
    result, lines = train(limited, run)
    assert result.paused
    assert any("the warm-up pauses after step 1 of 5" in line for line in lines)
    record = run.read_run()
    assert record["warmup"]["paused_at"]
    assert "trained_at" not in record
    assert "paused_at" in record
    assert run.read_scores()["n"] == 2
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert not run.warm_adapter.exists()
    result, lines = train(recipe_of("eval.enabled=true"), run)
    assert any(line.startswith("resuming from step 1 ") for line in lines)
    assert not result.paused
    assert run.read_run()["warmup"]["paused_at"] is None
    assert "finished_at" in run.read_run()


def test_a_damaged_adapter_of_the_warm_up_is_named_with_what_to_do(root: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_of(), run, warmup_only=True)
    file = run.warm_adapter / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(RunDirError, match=r"the adapter of the warm-up is damaged: .*(truncated|corrupted).*rm -r "):
        train(recipe_of(), run)
    shutil.rmtree(run.warmup)
    train(recipe_of(), run)
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_the_warm_up_starts_from_the_adapter_that_the_recipe_names(root: Path, tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    train(recipe_of(), first, warmup_only=True)
    still = recipe_of("warmup.learning_rate=1.0e-30", f"lora.init_from={first.warm_adapter}")
    _, lines = train(still, second, warmup_only=True)
    one, other = weights(first.warm_adapter), weights(second.warm_adapter)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert any(line.startswith("starts from the adapter ") for line in lines)
    assert second.read_run()["init_from"]["address"] == str(first.warm_adapter)


def test_an_adapter_of_another_rank_is_refused_before_the_warm_up(root: Path, tmp_path: Path) -> None:
    first = RunDir(tmp_path / "first")
    train(recipe_of(), first, warmup_only=True)
    with pytest.raises(ModelError, match=r"lora.r: the adapter has 4, the recipe 8"):
        train(recipe_of("lora.r=8", f"lora.init_from={first.warm_adapter}"), RunDir(tmp_path / "second"))


def test_rows_without_a_completion_end_the_run_before_anything_is_loaded(root: Path, tmp_path: Path) -> None:
    warmup = f"warmup={{{DATA.replace('{answer}', '{trace}')}, steps: 2}}"
    with pytest.raises(DataError, match=r"warmup.data: row 0 has no column 'trace'"):
        train(recipe_of(warmup=warmup), RunDir(tmp_path / "run"))


@pytest.mark.slow
def test_a_new_machine_continues_the_warm_up_from_the_copies(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine is lost in the warm-up, the second one after it: no step is trained twice."""
    recipe = recipe_of(f"push_checkpoints={tmp_path / 'drive'}", "grpo.max_steps=2", "grpo.save_steps=1")
    machines = [RunDir(tmp_path / str(i) / "run") for i in range(4)]
    stop_at(monkeypatch, 3, recipe, machines[0])
    _, lines = train(recipe, machines[1], warmup_only=True)
    assert f"push_checkpoints: fetched warmup/checkpoint-3 from {tmp_path / 'drive' / 'run'}" in lines
    _, lines = train(recipe, machines[2])
    assert not any(line.startswith("warm-up 1/") for line in lines), "the warm-up was trained again"
    undisturbed = RunDir(tmp_path / "undisturbed")
    train(recipe_of("grpo.max_steps=2", "grpo.save_steps=1"), undisturbed)
    _, lines = train(recipe, machines[3])  # after GRPO's last step: its checkpoint, and the adapter to compare it with
    assert any("fetched checkpoint-2" in line for line in lines)
    for machine in machines[2:]:
        for folder in ("warmup/adapter", "adapter"):
            one, other = weights(undisturbed.path / folder), weights(machine.path / folder)
            assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_running_out_of_memory_in_the_warm_up_lowers_what_goes_through_at_once_for_good(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = WarmupTrainer.compute_loss, list[int]()

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 120:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return real(self, model, inputs, *args, **kwargs)

    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(WarmupTrainer, "compute_loss", compute_loss)
        at_step(patched, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        _, lines = train(recipe_of(), run)
    assert sum(line.startswith("out of memory in step 1 of the warm-up") for line in lines) == 1
    assert max(sizes[1:]) <= 120
    facts = json.loads((run.warmup / "checkpoint-4" / "grpo_lite.json").read_text())
    assert facts["budget"]["warmup_tokens"] <= 120
    train(recipe_of(), run)
    assert run.read_run()["warmup"]["tokens_per_microbatch"] == facts["budget"]["warmup_tokens"]


def test_a_process_that_waits_for_the_first_one_s_samples_ends_when_that_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = load_recipe("smoke", [*FAST, *ALONE, "warmup={source: self, steps: 1}"]), RunDir(tmp_path / "run")
    monkeypatch.setattr(warmup, "this_process", lambda: Ranks(rank=1, local=1, world=2, here=2))
    with run.locked():
        pass  # and the first one ends, without the file
    nothing: Any = None
    with pytest.raises(TrainingError, match=r"another of the .* processes has ended, so this one stops"):
        warmup._own_traces(recipe, run, nothing, nothing, print)
    naps = iter([lambda: None, lambda: write_traces(run.warmup / "traces.jsonl", SAMPLED)])
    run.warmup.mkdir()
    monkeypatch.setattr(warmup.time, "sleep", lambda seconds: next(naps)())
    with run.locked():
        assert warmup._own_traces(recipe, run, nothing, nothing, print).rows == SAMPLED.rows


def test_activations_that_would_wait_in_main_memory_are_there_already_on_a_cpu(root: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_of("memory.offload_activations=true"), run, warmup_only=True)
    assert run.warm_adapter.is_dir()


SELF = "warmup={source: self, samples: 8, steps: 2, tokens_per_step: 100}"


def test_completions_that_were_sampled_for_another_recipe_are_sampled_again(root: Path, tmp_path: Path) -> None:
    """A recipe that was refused after sampling may be changed; its completions are of the old one."""
    run, same = RunDir(tmp_path / "run"), RunDir(tmp_path / "same")
    for place in (run, same):
        train(recipe_of(warmup=SELF), place, warmup_only=True)
    kept = (same.warmup / "traces.jsonl").read_text()
    assert (run.warmup / "traces.jsonl").read_text() == kept
    other = RunDir(tmp_path / "other")
    other.prepare(recipe_of(warmup=SELF))
    other.warmup.mkdir()
    (other.warmup / "traces.jsonl").write_text("of another recipe\n")
    train(recipe_of(warmup=SELF), other, warmup_only=True)
    assert (other.warmup / "traces.jsonl").read_text() == kept


def test_rows_that_have_changed_under_a_checkpoint_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) for i in range(30)]
    file, run = tmp_path / "rows.jsonl", RunDir(tmp_path / "run")
    file.write_text("\n".join(rows))
    recipe = recipe_of(warmup=f"warmup={{data: {{path: {file}}}, completion: '{{answer}}', tokens_per_step: 40}}")
    stop_at(monkeypatch, 3, recipe, run)
    file.write_text("\n".join(rows[:4]))
    with pytest.raises(RunDirError, match=r"was at step 3, and its rows make \d steps now: they have changed"):
        train(recipe, run)


def test_a_checkpoint_before_the_last_step_is_not_taken_for_what_grpo_began_with(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    stop_at(monkeypatch, 3, recipe_of(), run)
    (run.path / "checkpoint-1").mkdir()
    monkeypatch.setattr(warmup, "last_usable", lambda folder: LastUsable(next(folder.glob("checkpoint-*")), ()))
    assert warmup.is_warm(run)
    assert not run.warm_adapter.exists()


def test_a_run_that_has_ended_has_no_warm_up_left_to_run(root: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_of("eval.enabled=true"), run)
    run.report_file.unlink()
    _, lines = train(recipe_of("eval.enabled=true"), run, warmup_only=True)
    assert lines == ["the run's training has ended: there is no warm-up left to run"]
    assert not run.report_file.exists()


def test_few_rows_are_all_trained_on(root: Path) -> None:
    recipe = recipe_of()
    rows = [Trace([3, 4], [5, 2]) for _ in range(warmup.LEAST_ROWS - 1)]
    assert warmup._stage(recipe, rows).held == []
