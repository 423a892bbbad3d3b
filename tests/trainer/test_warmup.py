"""The warm-up's trainer: which rows a step takes, loss and gradient of plain arithmetic, running out of memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from grpo_lite.engine.options import EngineOptions
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.task.traces import Trace
from grpo_lite.trainer.warmup import StepRows, WarmupTrainer, as_dataset, divide, order_rows
from tests.tiny import Gradients, relative_difference, tiny_lora, tiny_model, tiny_tokenizer, traces

END = 2


# Which rows a step takes


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    tokens=st.integers(1, 120),
    steps=st.integers(1, 12),
    world=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_a_step_holds_at_most_its_tokens_and_at_least_a_row_for_each_process(
    lengths: list[int], tokens: int, steps: int, world: int, seed: int
) -> None:
    order = order_rows(lengths, tokens, steps, None, seed, world)
    assert len(order.steps) == steps
    for step in order.steps:
        assert len(step) >= world
        assert sum(lengths[i] for i in step) <= tokens or len(step) == world
        assert len(set(step)) == len(step) or len(step) == world
    flat = [i for step in order.steps for i in step]
    assert order.epochs == pytest.approx(len(flat) / len(lengths))
    for start in range(0, len(flat), len(lengths)):  # a pass takes every row once before any comes again
        assert max(Counter(flat[start : start + len(lengths)]).values()) == 1


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    tokens=st.integers(1, 120),
    epochs=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_epochs_are_passes_over_all_rows(lengths: list[int], tokens: int, epochs: float) -> None:
    order = order_rows(lengths, tokens, None, epochs, seed=3)
    assert sum(map(len, order.steps)) == -(-int(epochs * 2) * len(lengths) // 2)


def test_each_pass_has_an_order_of_its_own_and_the_seed_decides_it() -> None:
    flat = [i for step in order_rows([5] * 20, 25, None, 2, seed=1).steps for i in step]
    assert flat[:20] != flat[20:]
    assert flat == [i for step in order_rows([5] * 20, 25, None, 2, seed=1).steps for i in step]
    assert flat != [i for step in order_rows([5] * 20, 25, None, 2, seed=2).steps for i in step]


def test_the_loss_is_on_the_completion_and_its_end_token_only() -> None:
    batch = StepRows([Trace([5, 6, 7], [8, END]), Trace([9], [10, 11, 12, END])], pad=0)([{"rows": [0, 1]}])
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, END], [-100, 10, 11, 12, END]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, END], [9, 10, 11, 12, END]]
    short = StepRows([Trace([5, 6], [END]), Trace([9], [10, 11, 12, END])], pad=0)([{"rows": [0, 1]}])
    assert short["labels"].tolist() == [[-100, 10, 11, 12, END], [-100, -100, END, -100, -100]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@given(count=st.integers(1, 9), tokens=st.one_of(st.none(), st.integers(1, 90)), seed=st.integers(0, 5))
@settings(deadline=None)
def test_the_parts_of_a_step_are_its_rows_without_their_padding(count: int, tokens: int | None, seed: int) -> None:
    rows = traces(count, seed)
    whole = StepRows(rows, pad=0).padded(rows)
    parts = list(divide(whole, tokens))
    read = [
        ids[mask.bool()].tolist()
        for part in parts
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]
    assert read == [[*row.prompt_ids, *row.completion_ids] for row in sorted(rows, key=len, reverse=True)]
    for part in parts:
        assert part["attention_mask"].any(dim=0).all(), "an empty column"
        assert tokens is None or part["input_ids"].numel() <= max(tokens, part["input_ids"].shape[1])


def test_each_process_gets_its_share_of_every_step() -> None:
    rows = traces(11)
    order = order_rows([len(row) for row in rows], 60, 4, None, 0, least=2)
    parts = as_dataset(order, rows, 2)["rows"]
    for i, step in enumerate(order.steps):
        assert sorted(parts[2 * i] + parts[2 * i + 1]) == sorted(step)
        assert abs(len(parts[2 * i]) - len(parts[2 * i + 1])) <= 1


# Loss and gradient


def trainer_of(
    folder: Path, rows: list[Trace], budget: int | None = None, compute: Any = "packed", **arguments: Any
) -> WarmupTrainer:
    order = order_rows([len(row) for row in rows], 10**6, 1, None, 0)
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, learning_rate=1e-3, per_device_train_batch_size=1, report_to="none",
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False, logging_steps=1,
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
        gradient_checkpointing=arguments.pop("checkpointing", False),
    )  # fmt: skip
    return WarmupTrainer(
        args=args, processing_class=tiny_tokenizer(), train_dataset=as_dataset(order, rows, 1),
        data_collator=StepRows(rows, 0), options=EngineOptions(compute, warmup_tokens=budget),
        **{"show": lambda line: None, "model": tiny_lora(tiny_model()), **arguments},
    )  # fmt: skip


def trained(trainer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradients of the one step, and its log."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0], trainer.state.log_history[0]


def in_float64(rows: list[Trace]) -> tuple[dict[str, Tensor], float]:
    """Return gradients and the mean loss of a completion token, row by row without padding."""
    model = tiny_lora(tiny_model()).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0]
        logs = torch.log_softmax(logits[len(row.prompt_ids) - 1 : -1], dim=-1)
        mask = torch.tensor(row.tool_mask or [1] * len(row.completion_ids))
        total = total - (logs[range(len(row.completion_ids)), row.completion_ids] * mask).sum()
        count += int(mask.sum())
    loss = total / count
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return gradients, loss.item()


@pytest.mark.parametrize("compute", ["packed", "plain"])
@pytest.mark.parametrize(
    "budget, checkpointing", [pytest.param(None, False, marks=pytest.mark.slow), (60, True), (1, False)]
)
def test_the_gradient_is_that_of_the_mean_loss_of_a_completion_token(
    tmp_path: Path, budget: int | None, checkpointing: bool, compute: str
) -> None:
    rows = traces(7)
    trainer = trainer_of(tmp_path, rows, budget, compute, checkpointing=checkpointing)
    gradients, log = trained(trainer)
    assert trainer._packable == (compute == "packed")
    expected, loss = in_float64(rows)
    assert log["loss"] == pytest.approx(loss, abs=2e-4)  # transformers rounds it to four digits
    assert log["num_tokens"] == sum(map(len, rows))
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compute", ["packed", "plain"])
def test_results_of_tools_are_read_and_not_trained_on(tmp_path: Path, compute: str) -> None:
    rows = [*traces(4), Trace([5, 6], [7, END, 8, 9, 10, 11, END], [1, 1, 0, 0, 0, 1, 1])]
    gradients, log = trained(trainer_of(tmp_path, rows, 40, compute))
    expected, loss = in_float64(rows)
    assert log["loss"] == pytest.approx(loss, abs=2e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient.float(), rtol=1e-4, atol=1e-6)


def test_plain_trl_has_the_same_gradient_and_figures(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = traces(7)
    whole = [{"input_ids": [*r.prompt_ids, *r.completion_ids], "labels": [-100] * len(r.prompt_ids) + r.completion_ids}
             for r in rows]  # fmt: skip
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=7, report_to="none", use_cpu=True,
        bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, max_grad_norm=0.0, logging_steps=1,
    )  # fmt: skip
    theirs, log = trained(
        SFTTrainer(
            tiny_lora(tiny_model()), args, train_dataset=Dataset.from_list(whole), processing_class=tiny_tokenizer()
        )
    )
    ours, our_log = trained(trainer_of(tmp_path, rows, 40))
    assert our_log["loss"] == pytest.approx(log["loss"], abs=2e-4)
    for key in ("mean_token_accuracy", "entropy", "num_tokens"):  # of the step, however it is divided
        assert our_log[key] == pytest.approx(log[key], rel=1e-5), key
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_check_before_the_first_step_does_not_cut_the_gradient_of_a_4_bit_base(tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 a forward in eval mode repacks 4-bit weights for a kernel without a backward."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(
        tmp_path / "base"
    )
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    rows, found = traces(7), []
    for compute in ("plain", "packed"):  # TRL's own loss needs no check
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.bfloat16)
        found.append(trained(trainer_of(tmp_path, rows, compute=compute, model=tiny_lora(base)))[0])
    assert relative_difference(found[1], found[0]) < 0.05


def test_rows_beyond_the_attention_window_are_packed(tmp_path: Path) -> None:
    found = []
    for compute in ("plain", "packed"):
        model = tiny_lora(tiny_model("mistral", sliding_window=6))
        trainer = trainer_of(tmp_path, traces(6), compute=compute, model=model)
        found.append(trained(trainer)[0])
    assert trainer._packable
    assert relative_difference(found[1], found[0]) < 1e-4


def test_rows_on_both_sides_of_a_rotary_border_take_trl_s_own_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_lora(tiny_model("llama", max_position_embeddings=12, rope_parameters=rope))
    trainer = trainer_of(tmp_path, traces(6), model=model)
    trainer.train()
    assert not trainer._packable
    assert "LlamaForCausalLM changes its rotary frequencies at 12 tokens, and rows cross that" in caplog.text


def test_the_loss_of_held_rows_is_logged_and_changes_nothing(tmp_path: Path) -> None:
    rows, held = traces(6), traces(4, seed=9)
    gradients, log = trained(trainer_of(tmp_path, rows, 50, held=held))
    plain, plain_log = trained(trainer_of(tmp_path, rows, 50))
    model = trainer_of(tmp_path, rows, 50, held=held)
    model.train()
    assert "heldout_loss" in log
    assert "heldout_loss" not in plain_log
    for key in ("loss", "num_tokens", "mean_token_accuracy", "entropy"):
        assert log[key] == plain_log[key], key
    for name, gradient in plain.items():
        assert torch.equal(gradients[name], gradient)


def test_the_loss_of_held_rows_is_their_mean_loss_of_a_completion_token(tmp_path: Path) -> None:
    held = traces(5, seed=9)
    trainer = trainer_of(tmp_path, traces(3), 30, held=held)
    assert trainer.held_out_loss() == pytest.approx(in_float64(held)[1], rel=1e-5)


# Running out of memory


class OutOfMemory:
    """Stands in for the model's forward: raises while more than so many tokens go through at once."""

    def __init__(self, trainer: WarmupTrainer, tokens: int) -> None:
        self.real, self.tokens, self.sizes = trainer.compute_loss, tokens, list[int]()

    def __call__(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.sizes.append(inputs["input_ids"].numel())
        loss: Tensor = self.real(model, inputs, *args, **kwargs)
        if len(self.sizes) > 1 and inputs["input_ids"].numel() > self.tokens:  # after some of the step has been done
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return loss


def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_parts_with_the_same_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, lines = traces(12, seed=3), list[str]()
    longest = max(map(len, rows))
    trainer = trainer_of(tmp_path, rows, 4 * longest, show=lines.append)
    monkeypatch.setattr(trainer, "compute_loss", OutOfMemory(trainer, longest))
    gradients, log = trained(trainer)
    expected, loss = in_float64(rows)
    assert any(line.startswith("out of memory in step 1 of the warm-up: at most ") for line in lines)
    assert trainer.options.warmup_tokens is not None
    assert trainer.options.warmup_tokens < 2 * longest
    assert log["loss"] == pytest.approx(loss, abs=2e-4)
    assert log["num_tokens"] == sum(map(len, rows))  # the failed attempts count nothing
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recover, expected", [(True, "with nothing left to divide"), (False, "warm-up: CUDA")])
def test_a_row_that_alone_does_not_fit_ends_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recover: bool, expected: str
) -> None:
    trainer = trainer_of(tmp_path, traces(4), None, recover=recover, advice="Lower this.")

    def never(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(trainer, "compute_loss", never)
    with pytest.raises(MemoryBudgetError, match=f"{expected}.*\nLower this."):
        trainer.train()
