"""What counts as memory running out, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo_lite.cli import _explain
from grpo_lite.engine import score as scoring
from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.evaluation import evaluate
from grpo_lite.evaluation import step_time as timing
from grpo_lite.export import stages as merge_run
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.overflows import OTHERS, OVERFLOWS
from tests.tiny import tiny_args, tiny_lora, tiny_model, tiny_tokenizer, train_fixed


@pytest.mark.parametrize("kind", OVERFLOWS)
def test_memory_running_out_is_recognised_whoever_says_it(kind: str) -> None:
    assert is_out_of_memory(OVERFLOWS[kind])


@pytest.mark.parametrize("kind", OTHERS)
def test_another_error_is_not_taken_for_it(kind: str) -> None:
    assert not is_out_of_memory(OTHERS[kind])


def test_what_this_pytorch_raises_itself_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)


def test_the_command_line_says_what_to_lower() -> None:
    text = _explain(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert text.startswith("out of memory: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    assert "grpo.max_completion_length" in text
    assert "unexpected RuntimeError" in _explain(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize("kind, tried", [("cublas", [8, 4, 2, 2]), ("shapes", [8])])
def test_the_probe_s_forward_is_measured_on_fewer_rows(
    kind: str, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def padded(model: object, rows: list[object]) -> None:
        seen.append(len(rows))
        if len(rows) > 2:
            error = {**OVERFLOWS, **OTHERS}[kind]
            raise type(error)(*error.args)

    monkeypatch.setattr(timing, "_padded", padded)
    recipe = load_recipe("smoke", ["grpo.per_device_train_batch_size=8", "compute=plain"])
    given = recipe, tiny_model(), tiny_tokenizer(), [[5, 6]] * 2, [[[7]] * 4] * 2
    if kind == "cublas":
        assert timing.forward_seconds(*given) >= 0
    else:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            timing.forward_seconds(*given)
    assert seen == tried


def raising(kind: str) -> object:
    def fail(*_: object, **__: object) -> None:
        error = {**OVERFLOWS, **OTHERS}[kind]
        raise type(error)(*error.args)

    return fail


def test_a_self_check_without_memory_does_not_switch_packing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = tiny_lora(tiny_model()), tiny_args(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score", raising("cublas"))
        with pytest.raises(MemoryBudgetError, match="CUBLAS_STATUS_ALLOC_FAILED"):
            train_fixed(PackedGRPOTrainer, *arguments)
    assert "Packed compute and shared rollouts are off" not in caplog.text
    monkeypatch.setattr(scoring, "score", raising("shapes"))
    train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), tiny_args(tmp_path))
    assert "Packed compute and shared rollouts are off" in caplog.text


def test_a_merged_model_too_large_for_the_card_costs_its_score_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in 4 bits on a card that does not hold the 16-bit weights."""
    run = RunDir(tmp_path / "run")
    run.prepare(load_recipe("smoke", ["merge_onto=original"]))  # `auto` then merges onto what was trained on
    run.write_scores({"lenient": {}, "merged": {"of": "an earlier merge"}})
    monkeypatch.setattr(merge_run, "merge_run", lambda *_: {"passed": True})
    monkeypatch.setattr(evaluate, "load_merged", raising("driver"))
    said: list[str] = []
    inputs = merge_run.RunInputs(run.load_recipe())
    assert merge_run.merge_and_score(run, said.append, inputs) == {"passed": True}
    assert [line for line in said if "verified but not scored" in line and "larger GPU" in line]
    assert run.read_scores() == {"lenient": {}}
    monkeypatch.setattr(evaluate, "load_merged", raising("shapes"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        merge_run.merge_and_score(run, said.append, inputs)
