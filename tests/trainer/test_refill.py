"""The order over the dataset and refilling, and that both survive a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from grpo_lite.engine.options import EngineOptions
from grpo_lite.trainer.prompts import (
    GroupSampler,
    PromptQueue,
    groups_without_signal,
    load_state,
    refill_batch,
    shuffle_groups,
)
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import tiny_args, tiny_lora, tiny_model, tiny_prompts, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

# The order over a dataset


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_order_is_that_of_trl_in_every_epoch(size: int, group: int, per_round: int, repeats: int, shuffle: bool):
    theirs = RepeatSampler(range(size), group, per_round, repeats, shuffle, seed=7)
    mine = GroupSampler(size, group, per_round, repeats, shuffle, seed=7)
    assert len(mine) == len(theirs)
    for epoch in range(3):
        mine.set_epoch(epoch)
        assert list(mine) == list(theirs)


def test_a_later_epoch_can_be_entered_directly():
    through = GroupSampler(10, 2, 3, 1, True, seed=1)
    list(through)
    through.set_epoch(1)
    direct = GroupSampler(10, 2, 3, 1, True, seed=1)
    direct.set_epoch(1)
    assert list(direct) == list(through)


# Refilling


def test_a_queue_visits_every_row_before_any_twice_and_again_in_another_order():
    queue = PromptQueue(5, seed=3)
    first, second = ([queue.take() for _ in range(5)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != second


def scored(prompts: list[list[int]], completions: list[list[int]], advantages: list[float]) -> dict[str, Any]:
    width, longest = max(map(len, prompts)), max(map(len, completions))
    return {
        "prompt_ids": torch.tensor([[9] * (width - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([c + [9] * (longest - len(c)) for c in completions]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in completions]),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


@pytest.mark.parametrize("swap", [False, True], ids=["longer replacement", "shorter replacement"])
def test_rows_are_replaced_and_padded_to_a_common_width(swap: bool):
    short = scored([[1], [1]], [[2], [3]], [0.0, 0.0])
    long = scored([[4, 5], [4, 5]], [[6, 7, 8], [6]], [1.0, -1.0])
    batch, extra = (long, short) if swap else (short, long)
    merged = refill_batch(batch, [1], extra, [0], pad_token_id=9)
    kept, new = ([4, 5], [9, 1]) if swap else ([9, 1], [4, 5])
    assert merged["prompt_ids"].tolist() == [kept, new]
    assert merged["completion_ids"].tolist() == ([[6, 7, 8], [2, 9, 9]] if swap else [[2, 9, 9], [6, 7, 8]])
    assert merged["num_items_in_batch"] == 4 == merged["completion_mask"].sum()
    assert merged["advantages"].tolist() == ([1.0, 0.0] if swap else [0.0, 1.0])


def test_groups_without_signal_are_those_whose_advantages_are_all_zero():
    assert groups_without_signal(torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 1e-9]), 2) == [0]


def test_groups_stay_whole_when_shuffled():
    rows = torch.arange(24)
    out = shuffle_groups({"prompt_ids": rows.unsqueeze(1), "x": rows, "total": torch.tensor(5)}, 4)
    assert out["x"].view(-1, 4).sub(out["x"].view(-1, 4)[:, :1]).tolist() == [[0, 1, 2, 3]] * 6
    assert sorted(out["x"].tolist()) == rows.tolist()
    assert torch.equal(out["x"], out["prompt_ids"][:, 0])
    assert int(out["total"]) == 5


class Rewards:
    """Pays every completion of one prompt alike, unless the prompt is one of the mixed ones."""

    __name__ = "rewards"

    def __init__(self, mixed: set[str]) -> None:
        self.mixed = mixed
        self.prompts: list[list[str]] = []

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self.prompts.append(prompts[::4])
        return [float(i % 2) if prompt in self.mixed else 1.0 for i, prompt in enumerate(prompts)]


def run(tmp_path: Path, rewards: Any, options: EngineOptions, count: int = 12, **kwargs: Any) -> PackedGRPOTrainer:
    resume = kwargs.pop("resume", None)
    trainer = PackedGRPOTrainer(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, **({"max_completion_length": 6, "max_steps": 2} | kwargs)),
        reward_funcs=rewards,
        train_dataset=tiny_prompts(count),
        processing_class=tiny_tokenizer(),
        options=options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def mixed_prompts(count: int) -> set[str]:
    return set(tiny_prompts(12)["prompt"][12 - count :])


def test_groups_without_signal_are_replaced_up_to_the_bound(tmp_path: Path):
    rewards = Rewards(mixed_prompts(12))
    trained = run(tmp_path, rewards, EngineOptions(refill=4))
    assert all(log["refill/groups_generated"] == 0 for log in trained.state.log_history[:-1])
    rewards = Rewards(set())
    log = run(tmp_path, rewards, EngineOptions(refill=3)).state.log_history[0]
    assert log["refill/groups_generated"] == 3
    assert log["refill/groups_kept"] == 0
    assert log["refill/frac_without_signal"] == 1.0
    assert list(map(len, rewards.prompts))[:3] == [2, 2, 1]  # two groups a step; then two and one further ones


def test_a_step_trains_on_the_groups_that_replaced_dead_ones(tmp_path: Path):
    seen: list[torch.Tensor] = []

    class Watched(PackedGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            seen.append(inputs)
            return super()._compute_loss(model, inputs)

    rewards = Rewards(mixed_prompts(6))
    trainer = Watched(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, max_completion_length=6, max_steps=6),
        reward_funcs=rewards,
        train_dataset=tiny_prompts(12),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(refill=12),
    )
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert sum(log["refill/groups_kept"] for log in logs) > 0
    for inputs, log in zip(seen, logs, strict=True):
        alive = len(inputs["advantages"]) // 4 - len(groups_without_signal(inputs["advantages"], 4))
        assert alive == 2  # 12 extra groups reach all prompts, six of which have a signal
        assert log["refill/frac_without_signal"] == 0.0
        assert inputs["num_items_in_batch"] == inputs["completion_mask"].sum()
        for group in range(2):
            rows = inputs["prompt_ids"][group * 4 : group * 4 + 4]
            assert (rows == rows[0]).all()


def test_extra_tokens_are_counted_and_trl_metrics_describe_the_first_draw(tmp_path: Path):
    rewards = Rewards(set())
    with_refill = run(tmp_path, rewards, EngineOptions(refill=2), max_steps=1).state.log_history[0]
    without = run(tmp_path, Rewards(set()), EngineOptions(), max_steps=1).state.log_history[0]
    assert with_refill["refill/extra_tokens"] > 0
    assert with_refill["num_tokens"] == without["num_tokens"] + with_refill["refill/extra_tokens"]
    for key in ("reward", "completions/mean_length", "frac_reward_zero_std"):
        assert with_refill[key] == without[key]


def test_logged_completions_are_those_of_the_first_draw(tmp_path: Path):
    trainer = run(tmp_path, Rewards(set()), EngineOptions(refill=2), max_steps=1)
    logged = {prompt if isinstance(prompt, str) else str(prompt) for prompt in trainer._logs["prompt"]}
    assert len(trainer._logs["prompt"]) == 8
    assert len(logged) == 2


def test_a_refill_stops_when_the_dataset_has_no_further_prompt(tmp_path: Path):
    log = run(tmp_path, Rewards(set()), EngineOptions(refill=50), count=4, max_steps=1).state.log_history[0]
    assert log["refill/groups_generated"] == 2


@pytest.mark.parametrize("setting", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}])
def test_refill_is_refused_where_advantages_depend_on_the_whole_batch(setting: dict[str, str], tmp_path: Path):
    with pytest.raises(ValueError, match="one group only"):
        run(tmp_path, Rewards(set()), EngineOptions(refill=1), **setting)


def test_the_queue_of_an_older_release_s_checkpoint_continues(tmp_path: Path):
    """It also held solve rates, which are ignored; without refilling it held no count."""
    (tmp_path / "sampling_state.json").write_text('{"rates": {"rounds": 3, "total": [0.5]}, "taken": 7}')
    queue = PromptQueue(12, seed=1)
    load_state(tmp_path, queue)
    assert queue.taken == 7
    (tmp_path / "sampling_state.json").write_text('{"rates": {"rounds": 3}, "taken": null}')
    load_state(tmp_path, queue)
    assert queue.taken == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "accumulation",
    [pytest.param(1, id="loader ahead"), pytest.param(2, id="loader not ahead")],
)
def test_a_resumed_run_generates_for_the_prompts_the_whole_run_would_have(accumulation: int, tmp_path: Path):
    """Over an epoch's end, with a refill queue."""
    options = EngineOptions(refill=2)
    kwargs = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
        "loss_type": "dapo",
    }
    whole = Rewards(mixed_prompts(4))
    run(tmp_path / "whole", whole, options, **kwargs)
    for step in (3, 7):
        rest = Rewards(mixed_prompts(4))
        run(tmp_path / "rest", rest, options, resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **kwargs)
        assert rest.prompts
        assert rest.prompts == whole.prompts[len(whole.prompts) - len(rest.prompts) :]


def test_rounds_that_span_optimizer_steps_stay_in_step_after_a_resume(tmp_path: Path):
    """Two iterations over each generation: a checkpoint between them must not shift the rounds."""
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = Rewards(mixed_prompts(12))
    run(tmp_path / "whole", whole, EngineOptions(), **kwargs)
    assert len(whole.prompts) == 3
    rest = Rewards(mixed_prompts(12))
    run(tmp_path / "rest", rest, EngineOptions(), resume=str(tmp_path / "whole" / "checkpoint-3"), **kwargs)
    # Step 3 was the first of the second round, whose completions are in the checkpoint: only the third is generated.
    assert rest.prompts == whole.prompts[2:]
