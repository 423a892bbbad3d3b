"""Out of memory in any phase: the same step is done again with less at once, and nothing else changes."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_lite.engine import decode
from grpo_lite.engine import score as scoring
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.options import EngineOptions
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.runs.checkpoints import read_facts
from grpo_lite.trainer.recovery import GradientCopies
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.overflows import OTHERS, OVERFLOWS
from tests.tiny import (
    Gradients,
    parity_reward,
    relative_difference,
    tiny_args,
    tiny_lora,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
    train_fixed,
)

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
LENGTHS = [5, 9, 3, 12, 7, 7, 1, 4]


def overflow(kind: str = "allocator") -> BaseException:
    error = {**OVERFLOWS, **OTHERS}[kind]
    return type(error)(*error.args)


def card_of(tokens: int, monkeypatch: pytest.MonkeyPatch, kind: str = "allocator") -> list[int]:
    """Pretend a card that holds no more than so many tokens at once; returns the sizes that were tried."""
    tried: list[int] = []
    real = scoring.score

    def score(model: Any, packed: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(packed.num_tokens)
        if packed.num_tokens > tokens:
            raise overflow(kind)
        return real(model, packed, *args, **kwargs)

    monkeypatch.setattr("grpo_lite.trainer.gradients.score", score)
    return tried


def largest_microbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **extra: Any) -> int:
    """Return the most tokens that an undisturbed run puts through the model at once."""
    with monkeypatch.context() as patched:
        tried = card_of(10**9, patched)
        train(PackedGRPOTrainer, tmp_path, **extra)
    return max(tried)


def train(kind: type, tmp_path: Path, steps: int = 1, lora: Any = None, **extra: Any) -> tuple[Any, Gradients]:
    settings = extra.pop("settings", {})
    args = tiny_args(tmp_path, loss_type="dapo", max_steps=steps, **settings)
    lengths = LENGTHS * settings.get("gradient_accumulation_steps", 1)
    return train_fixed(kind, lora or tiny_lora(tiny_model()), args, lengths=lengths, same_completions=True, **extra)


def test_a_forward_that_overflows_is_redone_in_halves_with_the_same_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, expected = train(PackedGRPOTrainer, tmp_path)
    whole = largest_microbatch(tmp_path, monkeypatch)
    tried = card_of(whole - 1, monkeypatch)
    said: list[str] = []
    trainer, found = train(PackedGRPOTrainer, tmp_path, show=said.append)
    assert tried[0] == whole
    assert len(tried) >= 3
    assert max(tried[1:]) <= trainer.options.tokens_per_microbatch < whole
    assert relative_difference(found.steps[0], expected.steps[0]) < 1e-5
    assert len(said) == 1
    assert "out of memory in training at step 1" in said[0]
    for key in ("loss", "entropy", "completions/mean_length", "reward"):
        assert trainer.state.log_history[0][key] == pytest.approx(undisturbed.state.log_history[0][key], abs=1e-6)


@pytest.mark.parametrize("at", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_backward_that_overflows_halfway_leaves_nothing_behind(at: int, tmp_path: Path) -> None:
    """The overflow comes after gradients have been added: a retry that kept them would count them twice."""
    _, expected = train(PackedGRPOTrainer, tmp_path, settings={"gradient_accumulation_steps": 2})
    calls = [0]

    class Overflowing(PackedGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            real = self.accelerator.backward

            def backward(loss: torch.Tensor, **kwargs: Any) -> None:
                real(loss, **kwargs)
                calls[0] += 1
                if calls[0] == at:
                    raise overflow()

            self.accelerator.backward = backward

    said: list[str] = []
    settings = {"gradient_accumulation_steps": 2}
    options = EngineOptions(tokens_per_microbatch=60)
    trainer, found = train(Overflowing, tmp_path, settings=settings, options=options, show=said.append)
    assert len(said) == 1
    assert calls[0] > at
    assert trainer.state.global_step == 1
    assert relative_difference(found.steps[0], expected.steps[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_restored_to_the_bit(dtype: torch.dtype) -> None:
    gradients = [torch.randn(3, 5).to(dtype), None, torch.randn(7).to(torch.float32), torch.randn(5, 3).to(dtype).t()]
    gradients[0][0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
    originals = [None if gradient is None else gradient.clone() for gradient in gradients]
    copies = GradientCopies().take(gradients)
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    for copy, original in zip(copies, originals, strict=True):
        if copy is None or original is None:
            assert copy is original is None
        else:
            assert copy.dtype == original.dtype
            torch.testing.assert_close(copy, original, rtol=0.0, atol=0.0, equal_nan=True)
            assert torch.equal(copy.signbit(), original.signbit())


def test_the_copies_of_gradients_lie_in_one_buffer_that_is_used_again() -> None:
    copies = GradientCopies()
    gradients: list[torch.Tensor | None] = [torch.randn(3, 5), torch.randn(7)]
    assert copies.take([None, None]) == [None, None]
    first = [copy.data_ptr() for copy in copies.take(gradients) if copy is not None]
    assert [copy.data_ptr() for copy in copies.take(gradients) if copy is not None] == first
    assert first[1] - first[0] == 64  # 15 numbers of 4 bytes, up to the next multiple of 16
    one, larger = copies.take([gradients[0], torch.arange(30.0)])
    assert torch.equal(one, gradients[0])
    assert torch.equal(larger, torch.arange(30.0))


def test_the_smaller_budget_goes_into_the_checkpoint_and_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = largest_microbatch(tmp_path, monkeypatch)
    with monkeypatch.context() as patched:
        card_of(whole - 1, patched)
        first, _ = train(PackedGRPOTrainer, tmp_path, settings=settings)
    budget = first.options.tokens_per_microbatch
    saved = read_facts(tmp_path / "checkpoint-1")["budget"]
    assert budget < whole
    assert saved == {"tokens_per_microbatch": budget, "rollout_kv_tokens": None}
    tried = card_of(10**9, monkeypatch)
    resume = str(tmp_path / "checkpoint-1")
    again, _ = train(PackedGRPOTrainer, tmp_path, steps=2, settings=settings, resume=resume)
    assert again.options.tokens_per_microbatch == budget
    assert len(tried) >= 3


def test_one_completion_too_many_tells_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card_of(3, monkeypatch)
    with pytest.raises(MemoryBudgetError, match=r"(?s)training at step 1, with nothing left to divide.*take a smaller"):
        train(PackedGRPOTrainer, tmp_path, advice="take a smaller model")


def by_place(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(place % 4) for place in range(len(completion_ids))]


def equal_completions(rows: int, longest: int, *_: Any) -> list[list[int]]:
    """Return completions of which the four of a prompt are equal, and laid out once."""
    return [[7 + row // 4] * longest for row in range(rows)]


@pytest.mark.parametrize("phase", ["training", "scoring"])
def test_each_redo_is_smaller_where_completions_are_equal(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt has one completion laid out. Half of what all four would take divides nothing."""
    monkeypatch.setattr("tests.tiny.fixed_completions", equal_completions)
    settings = {"beta": 0.1} if phase == "scoring" else {}
    with monkeypatch.context() as patched:
        undisturbed = card_of(10**9, patched)
        _, expected = train(PackedGRPOTrainer, tmp_path, settings=settings, reward=by_place)
    whole = undisturbed[0]
    tried = card_of(whole - 1, monkeypatch)
    said: list[str] = []
    _, found = train(PackedGRPOTrainer, tmp_path, settings=settings, reward=by_place, show=said.append)
    assert len(said) == 1
    assert f"out of memory in {phase} at step 1" in said[0]
    assert tried[0] == sum(tried[1:3]) == whole  # a prompt with its completion by itself
    assert relative_difference(found.steps[0], expected.steps[0]) < 1e-5


def test_a_group_of_equal_completions_that_does_not_fit_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt and 12 tokens are more than the card holds."""
    monkeypatch.setattr("tests.tiny.fixed_completions", equal_completions)
    tried = card_of(12, monkeypatch)
    settings = {"per_device_train_batch_size": 4}
    with pytest.raises(MemoryBudgetError, match="with nothing left to divide"):
        train(PackedGRPOTrainer, tmp_path, settings=settings, reward=by_place)
    assert len(tried) == 1


def test_recovery_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = card_of(20, monkeypatch)
    with pytest.raises(MemoryBudgetError, match="out of memory in training at step 1:"):
        train(PackedGRPOTrainer, tmp_path, recover=False)
    assert len(tried) == 1


def sampled(
    tmp_path: Path, steps: int = 2, options: EngineOptions | None = None, **settings: Any
) -> tuple[list[list[list[int]]], Any]:
    """Train with real rollouts; return the completions of every round."""
    rounds: list[list[list[int]]] = []
    said: list[str] = settings.pop("said", [])

    class Noting(PackedGRPOTrainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            rounds.append(out[0])
            return out

    trainer = Noting(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, max_steps=steps, **settings),
        reward_funcs=parity_reward,
        train_dataset=tiny_prompts(8),
        processing_class=tiny_tokenizer(),
        options=options or EngineOptions(),
        show=said.append,
    )
    trainer.train()
    return rounds, trainer


def small_cache(rows: int, monkeypatch: pytest.MonkeyPatch, kind: str = "allocator") -> list[int]:
    """Pretend a card that holds the keys and values of no more than so many completions, and notices late."""
    tried: list[int] = []
    real = GroupDecoder._choose

    def choose(self: GroupDecoder, ids: torch.Tensor, *args: Any) -> Any:
        out = real(self, ids, *args)  # random numbers are drawn before the overflow
        tried.append(len(ids))
        if len(ids) > rows:
            raise overflow(kind)
        return out

    monkeypatch.setattr(GroupDecoder, "_choose", choose)
    return tried


def test_a_rollout_that_overflows_is_redone_in_smaller_waves_from_the_same_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        tried = small_cache(4, patched)
        said: list[str] = []
        rounds, trainer = sampled(tmp_path, said=said)
    assert tried[0] == 8
    assert max(tried[2:]) <= 4
    assert [line for line in said if "out of memory in rollout at step 1" in line]
    budget = trainer.options.rollout_kv_tokens
    # A run that had this budget from the start draws the same completions in both steps.
    expected, _ = sampled(tmp_path, options=EngineOptions(rollout_kv_tokens=budget))
    assert rounds == expected


def test_after_a_redone_training_step_the_next_rollout_is_what_it_would_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = sampled(tmp_path)
    card_of(55, monkeypatch)
    rounds, trainer = sampled(tmp_path)
    assert trainer.options.tokens_per_microbatch is not None
    assert rounds == expected
    assert rounds[0] != rounds[1]


def test_scoring_against_the_reference_is_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = train(PackedGRPOTrainer, tmp_path, settings={"beta": 0.1})
    whole = largest_microbatch(tmp_path, monkeypatch, settings={"beta": 0.1})
    card_of(whole - 1, monkeypatch)
    said: list[str] = []
    _, found = train(PackedGRPOTrainer, tmp_path, settings={"beta": 0.1}, show=said.append)
    assert "out of memory in scoring" in said[0]
    assert relative_difference(found.steps[0], expected.steps[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["driver", pytest.param("cublas", marks=pytest.mark.slow)])
def test_memory_that_a_library_below_lacks_is_recovered_from_in_every_phase(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patched:
        card_of(20, patched, kind)
        train(PackedGRPOTrainer, tmp_path, settings={"beta": 0.1}, show=said.append)
    small_cache(4, monkeypatch, kind)
    card_of(55, monkeypatch, kind)
    sampled(tmp_path, steps=1, said=said)
    assert [line for line in said if "in scoring" in line]
    assert [line for line in said if "in training" in line]
    assert [line for line in said if "in rollout" in line]
    first = str(OVERFLOWS[kind]).splitlines()[0]
    assert all(f"({first[:200]})" in line for line in said)


@pytest.mark.parametrize("phase", ["training", "scoring", "rehearsal", "rehearsed rollout", "rollout"])
@pytest.mark.parametrize("kind", ["shapes", pytest.param("assert", marks=pytest.mark.slow)])
def test_an_error_that_is_not_about_memory_goes_on_its_way_at_once(
    phase: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    if phase in ("rollout", "rehearsed rollout"):
        tried = small_cache(0, monkeypatch, kind)
        monkeypatch.setattr(decode, "next_logits", lambda *_: tried.append(0) or fail(kind))
    else:
        tried = card_of(0, monkeypatch, kind)
    settings = {"beta": 0.1} if phase == "scoring" else {}
    rehearsal = list(range(3, 43)) if phase.startswith("rehears") else None
    fixed = partial(train, PackedGRPOTrainer, settings=settings, rehearsal=rehearsal, show=said.append)
    run = partial(sampled, steps=1, said=said) if phase == "rollout" else fixed
    with pytest.raises(RuntimeError, match=re.escape(str(OTHERS[kind]).splitlines()[0])):
        run(tmp_path)
    assert len(tried) == 1
    assert said == []


def fail(kind: str) -> Any:
    raise overflow(kind)


def test_a_rollout_by_generate_cannot_be_divided_and_says_so(tmp_path: Path) -> None:
    model = tiny_lora(tiny_model())

    def generate(*_: Any, **__: Any) -> Any:
        raise overflow()

    model.get_base_model().generate = generate
    trainer = PackedGRPOTrainer(
        model=model,
        args=tiny_args(tmp_path),
        reward_funcs=parity_reward,
        train_dataset=tiny_prompts(8),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(rollout="generate"),
    )
    with pytest.raises(MemoryBudgetError, match="out of memory in rollout at step 1, with nothing left to divide"):
        trainer.train()


def test_the_rehearsal_finds_an_overflow_before_the_first_step_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The made-up completions are short; the rehearsal's are at the cap of 12 tokens, behind the longest prompt."""
    _, expected = train(PackedGRPOTrainer, tmp_path, steps=2)
    tried = card_of(130, monkeypatch)
    said: list[str] = []
    prompt = list(range(3, 43))
    # 2 prompts of 40 tokens and 8 completions of 12 are 176 tokens; what is trained on is far below 130.
    trainer, found = train(PackedGRPOTrainer, tmp_path, steps=2, rehearsal=prompt, show=said.append)
    assert tried[0] == 176
    assert len(said) == 1
    assert trainer.options.tokens_per_microbatch == 88
    assert len(trainer.state.log_history[0]) > 5
    for ours, plain in zip(found.steps, expected.steps, strict=True):
        assert relative_difference(ours, plain) < 1e-5


def test_the_rehearsal_fills_the_largest_wave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = decode.next_logits

    def logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        if len(hidden) > 4:
            raise overflow()
        return real(model, hidden)

    monkeypatch.setattr(decode, "next_logits", logits)
    trainer, _ = train(PackedGRPOTrainer, tmp_path, rehearsal=list(range(3, 43)))
    assert rows[0] == 8
    assert rows[-1] <= 4
    assert trainer.options.rollout_kv_tokens is not None


def test_plain_compute_is_rehearsed_too_and_ends_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt with completions at the cap is 8 × 52 tokens; nothing that is trained on reaches 8 × 51."""
    from trl import GRPOTrainer

    sizes: list[int] = []
    real = GRPOTrainer._get_per_token_logps_and_entropies

    def logps(self: Any, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(input_ids.numel())
        if input_ids.numel() > 8 * 51:
            raise overflow()
        return real(self, model, input_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", logps)
    plain = EngineOptions(compute="plain", rollout="generate")
    train(PackedGRPOTrainer, tmp_path, options=plain)
    assert max(sizes) <= 8 * 51
    sizes.clear()
    with pytest.raises(MemoryBudgetError, match="out of memory in training at step 1, with nothing left to divide"):
        train(PackedGRPOTrainer, tmp_path, options=plain, rehearsal=list(range(3, 43)))
    assert sizes == [8 * 52]


def test_a_rehearsal_of_plain_compute_changes_no_gradient(tmp_path: Path) -> None:
    plain = EngineOptions(compute="plain", rollout="generate")
    _, expected = train(PackedGRPOTrainer, tmp_path, steps=2, options=plain)
    trainer, found = train(PackedGRPOTrainer, tmp_path, steps=2, options=plain, rehearsal=list(range(3, 43)))
    assert len(trainer.state.log_history[0]) > 5
    for ours, without in zip(found.steps, expected.steps, strict=True):
        assert relative_difference(ours, without) < 1e-6


def test_offloaded_activations_give_the_same_gradient(tmp_path: Path) -> None:
    _, expected = train(PackedGRPOTrainer, tmp_path, settings={"gradient_checkpointing": True})
    options = EngineOptions(offload_activations=True, tokens_per_microbatch=60)
    _, found = train(PackedGRPOTrainer, tmp_path, options=options, settings={"gradient_checkpointing": True})
    assert relative_difference(found.steps[0], expected.steps[0]) < 1e-5


def test_updates_that_the_loss_scale_costs_are_told_as_such(tmp_path: Path) -> None:
    """accelerate has no fp16 on a CPU, so the scaler is put in by hand, and an overflow into the first gradient."""

    class Scaled(PackedGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 0:
                next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
            return loss

    said: list[str] = []
    trainer, _ = train(Scaled, tmp_path, steps=2, show=said.append)
    first, second = (record for record in trainer.state.log_history if "loss_scale" in record)
    assert (first["optimizer_steps_skipped"], second["optimizer_steps_skipped"]) == (1.0, 1.0)
    assert first["loss_scale"] == 512
    assert [line for line in said if line.startswith("step 1: no update, the gradients overflowed float16")]
