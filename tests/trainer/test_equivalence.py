"""Packed and plain trainers from the same seed and completions: the same loss, metrics, gradients and weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.packing import pack
from grpo_lite.recipe.algorithms import ALGORITHMS, Word
from grpo_lite.trainer.gradients import Gradients
from grpo_lite.trainer.prompts import shuffle_groups
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import (
    OUR_METRICS,
    relative_difference,
    tiny_args,
    tiny_lora,
    tiny_model,
    tiny_prompts,
    train_fixed,
)

# TRL reads its metrics off tensors that still carry a gradient; torch warns once per process.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

# The whole matrix takes minutes; each of its rows is among the default tests once.
SLOW = pytest.mark.slow

# Ratios, clipping and gates as TRL sets them by default.
PLAIN = {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": None, "delta": None}
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def assert_same_training(
    tmp_path: Path, kind: str = "llama", options: EngineOptions | None = None, lora: bool = True, **settings: Any
) -> None:
    """Train twice, plain and packed, and compare everything a user could see."""
    data = {key: settings.pop(key) for key in ("lengths", "reward", "prompts", "alike") if key in settings}
    runs = []
    for trainer_class, extra in ((GRPOTrainer, {}), (PackedGRPOTrainer, {"options": options or EngineOptions()})):
        model = tiny_model(kind)
        trainer, gradients = train_fixed(
            trainer_class, tiny_lora(model) if lora else model, tiny_args(tmp_path, **settings), **data, **extra
        )
        runs.append((trainer, gradients))
    (plain, expected), (packed, found) = runs
    assert set(packed.support.decided.values()) == {True}, "the packed trainer fell back to plain compute"
    assert len(found.steps) == len(expected.steps) > 0
    for mine, theirs in zip(found.steps, expected.steps, strict=True):
        assert relative_difference(mine, theirs) < 1e-4
    weights = [dict(trainer.model.named_parameters()) for trainer in (packed, plain)]
    assert relative_difference(*weights) < 1e-4
    for mine, theirs in zip(packed.state.log_history, plain.state.log_history, strict=True):
        assert mine.keys() - OUR_METRICS == theirs.keys()
        for key in theirs.keys() - TIMES:
            assert (mine[key] is None and theirs[key] is None) or mine[key] == pytest.approx(
                theirs[key], rel=1e-4, abs=2e-6
            ), key


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen2", "qwen3", "gemma", "mistral", *(pytest.param(kind, marks=SLOW) for kind in ("lfm2", "qwen3_5"))],
)
def test_architecture(kind: str, tmp_path: Path):
    assert_same_training(tmp_path, kind)


@SLOW
@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5"])
def test_hybrid_with_kl_checkpointing_and_a_token_budget(kind: str, tmp_path: Path):
    options = EngineOptions(tokens_per_microbatch=40)
    assert_same_training(tmp_path, kind, options, beta=0.05, gradient_checkpointing=True, num_iterations=2, max_steps=2)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="one micro-batch", marks=SLOW),
        pytest.param({"options": EngineOptions(tokens_per_microbatch=40)}, id="several"),
        pytest.param(
            {"gradient_checkpointing": True, "beta": 0.05, "num_iterations": 2, "max_steps": 2},
            id="kl",
            marks=pytest.mark.filterwarnings("ignore:The following .*_pattern keys"),  # peft's own, for experts
        ),
        pytest.param({"mask_truncated_completions": True, "lengths": [12] * 4 + [12, 1, 5, 3]}, id="a group masked"),
        pytest.param({"mask_truncated_completions": True, "lengths": [12] * 8}, id="all masked", marks=SLOW),
    ],
)
def test_the_routers_loss_of_a_mixture_of_experts(settings: dict[str, Any], tmp_path: Path):
    """Large enough to matter; `aux_loss` is among the metrics compared."""
    lora = "beta" in settings  # else TRL would load the reference from the Hub
    assert_same_training(tmp_path, "mixtral", lora=lora, router_aux_loss_coef=0.5, learning_rate=1e-3, **settings)


@SLOW
def test_the_routers_loss_of_accumulated_micro_steps_that_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two iterations over rounds of two micro-steps; TRL's rows are shuffled by whole groups, as ours are."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda rows: shuffle_groups(rows, 4))
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 3}
    settings |= {"router_aux_loss_coef": 0.5, "learning_rate": 1e-3}
    assert_same_training(tmp_path, "mixtral", EngineOptions(tokens_per_microbatch=40), lora=False, **settings)


def test_the_routers_loss_in_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed, losses = [], []
    monkeypatch.setattr("grpo_lite.trainer.gradients.pack", lambda *args: packed.append(1) or pack(*args))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "learning_rate": 0.0}
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        args = tiny_args(tmp_path, router_aux_loss_coef=0.5, **settings)
        data = {"eval_dataset": tiny_prompts(4), "prompts": tiny_prompts(8)}
        trainer, _ = train_fixed(trainer_class, tiny_model("mixtral"), args, **data)
        losses.append([log["eval_aux_loss"] for log in trainer.state.log_history if "eval_aux_loss" in log])
    assert len(packed) >= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("experts", [0, pytest.param(4, marks=SLOW)])
def test_granite_4_trains_whether_it_has_experts_or_not(experts: int, tmp_path: Path):
    """TRL 1.16 asks its configuration for `num_experts`, which it does not have, and fails on both."""
    found = []
    for options in (EngineOptions(), EngineOptions(compute="plain")):
        model = tiny_model("granite4", num_local_experts=experts)
        trainer, gradients = train_fixed(PackedGRPOTrainer, model, tiny_args(tmp_path), options=options)
        has_logits = "router_logits" in type(model.base_model)._can_record_outputs  # not with transformers 5.17
        assert ("aux_loss" in trainer.state.log_history[0]) == (experts > 0 and has_logits)
        found.append(gradients.steps[0])
    assert relative_difference(*found) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_all_weights_trained(kind: str, tmp_path: Path):
    assert_same_training(tmp_path, kind, lora=False, learning_rate=1e-4)


def test_head_in_fp32(tmp_path: Path):
    assert_same_training(tmp_path, lora=False, cast_lm_head_to_fp32=True, learning_rate=1e-4)


@pytest.mark.parametrize("group", [2, 3, pytest.param(8, marks=SLOW), pytest.param(16, marks=SLOW)])
def test_group_size(group: int, tmp_path: Path):
    assert_same_training(tmp_path, num_generations=group, per_device_train_batch_size=2 * group)


@pytest.mark.parametrize(
    "budget", [pytest.param(1, marks=SLOW), 40, pytest.param(100, marks=[SLOW, pytest.mark.matrix])]
)
@pytest.mark.parametrize(
    "loss_type",
    ["grpo", "dapo", "luspo", "vespo", *(pytest.param(x, marks=SLOW) for x in ("bnpo", "dr_grpo", "cispo", "sapo"))],
)
def test_loss_type_with_a_token_budget(loss_type: str, budget: int, tmp_path: Path):
    options = EngineOptions(tokens_per_microbatch=budget)
    assert_same_training(tmp_path, options=options, loss_type=loss_type)


@pytest.mark.parametrize(
    "loss_type",
    ["grpo", "cispo", "vespo", *(pytest.param(x, marks=SLOW) for x in ("bnpo", "dr_grpo", "dapo", "sapo", "luspo"))],
)
def test_loss_type_with_kl_and_two_iterations(loss_type: str, tmp_path: Path):
    assert_same_training(tmp_path, loss_type=loss_type, beta=0.1, num_iterations=2, max_steps=4, learning_rate=3e-2)


OBJECTIVES = [word for word in ALGORITHMS if word != "trl"]


@pytest.mark.parametrize(
    "word", [word if word == "dapo_80_20" else pytest.param(word, marks=SLOW) for word in OBJECTIVES]
)
def test_every_algorithm_off_policy(word: Word, tmp_path: Path):
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 3e-2} | ALGORITHMS[word].grpo
    assert_same_training(tmp_path, options=EngineOptions(tokens_per_microbatch=60), **settings)


@pytest.mark.parametrize(
    "word",
    [word if word == "cispo" else pytest.param(word, marks=SLOW) for word in OBJECTIVES if ALGORITHMS[word].on_policy],
)
def test_an_objective_of_ratios_takes_the_step_of_its_plain_loss_while_on_policy(word: Word, tmp_path: Path):
    found = []
    for settings in (
        ALGORITHMS[word].grpo,
        {**ALGORITHMS[word].grpo, **PLAIN, "loss_type": ALGORITHMS[word].on_policy},
    ):
        _, gradients = train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), tiny_args(tmp_path, **settings))
        found.append(gradients.steps[0])
    assert relative_difference(*found) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"beta": 0.05}, id="kl"),
        pytest.param(
            {"beta": 0.05, "use_bias_correction_kl": True, "num_iterations": 2, "max_steps": 2},
            id="unbiased kl",
            marks=SLOW,
        ),
        pytest.param({"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2}, id="gspo"),
        pytest.param({"top_entropy_quantile": 0.3}, id="high-entropy tokens only", marks=SLOW),
        pytest.param({"entropy_coef": 0.05}, id="entropy bonus", marks=SLOW),
        pytest.param(
            {"use_adaptive_entropy": True, "entropy_target": 20.0, "entropy_coef": 0.01, "max_steps": 3},
            id="adaptive entropy bonus",
        ),
        pytest.param({"delta": 1.5, "num_iterations": 2, "max_steps": 2}, id="two-sided clipping", marks=SLOW),
        pytest.param({"off_policy_mask_threshold": 0.001, "num_iterations": 2, "max_steps": 2}, id="off-policy mask"),
        pytest.param({"mask_truncated_completions": True}, id="truncated completions masked"),
        pytest.param({"scale_rewards": "batch"}, id="rewards scaled by batch", marks=SLOW),
        pytest.param({"scale_rewards": "none"}, id="rewards not scaled"),
        pytest.param({"temperature": 0.6}, id="temperature", marks=SLOW),
        pytest.param({"pad_to_multiple_of": 8}, id="padded to multiples of 8", marks=SLOW),
        pytest.param({"gradient_checkpointing": True}, id="gradient checkpointing"),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            id="reentrant gradient checkpointing",
            marks=SLOW,
        ),
        pytest.param({"max_grad_norm": 0.1}, id="gradient clipping", marks=SLOW),
    ],
)
@pytest.mark.parametrize("budget", [pytest.param(None, marks=SLOW), 50])
def test_setting(settings: dict[str, Any], budget: int | None, tmp_path: Path):
    assert_same_training(tmp_path, options=EngineOptions(tokens_per_microbatch=budget), **settings)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1] * 8, id="one token each"),
        pytest.param([12] * 8, id="all truncated"),
        pytest.param([12, 1, 1, 1, 1, 1, 1, 1], id="one long among short"),
        pytest.param([2, 7, 4, 12, 1, 3, 12, 5], id="ragged"),
    ],
)
@pytest.mark.parametrize("masked", [pytest.param(False, marks=SLOW), True], ids=["kept", "truncated ones masked"])
def test_lengths(lengths: list[int], masked: bool, tmp_path: Path):
    assert_same_training(tmp_path, lengths=lengths, mask_truncated_completions=masked)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="one micro-batch"),
        pytest.param({"options": EngineOptions(tokens_per_microbatch=60)}, id="several", marks=SLOW),
        pytest.param({"options": EngineOptions(tokens_per_microbatch=30), "loss_type": "bnpo"}, id="cut", marks=SLOW),
        pytest.param(
            {"beta": 0.05, "num_iterations": 2, "max_steps": 4, "learning_rate": 3e-2, "gradient_checkpointing": True},
            id="kl, clipping and checkpointing",
        ),
        pytest.param({"loss_type": "vespo", "num_iterations": 2, "max_steps": 2}, id="vespo", marks=SLOW),
        pytest.param(
            {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2}, id="gspo", marks=SLOW
        ),
        pytest.param({"top_entropy_quantile": 0.3}, id="high-entropy tokens only", marks=SLOW),
        pytest.param({"entropy_coef": 0.05}, id="entropy bonus", marks=SLOW),
        pytest.param(
            {"kind": "mixtral", "lora": False, "router_aux_loss_coef": 0.5, "learning_rate": 1e-3}, id="router's loss"
        ),
        pytest.param(
            {
                "kind": "mixtral",
                "lora": False,
                "router_aux_loss_coef": 0.5,
                "learning_rate": 1e-3,
                "options": EngineOptions(tokens_per_microbatch=60),
            },
            id="router's loss, several",
            marks=SLOW,
        ),
        *(pytest.param({"kind": kind}, id=kind, marks=SLOW) for kind in ("gemma", "lfm2", "qwen3_5")),
        pytest.param({"lora": False, "learning_rate": 1e-4}, id="all weights", marks=SLOW),
    ],
)
def test_completions_that_begin_alike_are_computed_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two fork, two are equal, one ends where the others still agree; each is paid for its place, not for its text."""
    packed = []
    monkeypatch.setattr("grpo_lite.trainer.gradients.pack", lambda *args: packed.append(pack(*args)) or packed[-1])

    def by_place(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(place % 4) + 0.3 * (place // 4) * (place % 3) for place in range(len(completion_ids))]

    assert_same_training(tmp_path, alike=True, reward=by_place, **settings)
    assert any(len(batch.targets) < len(batch.scatter) for batch in packed)
    assert any(len(batch.segments[0][1]) == 2 for batch in packed) or "options" in settings


@pytest.mark.parametrize("budget", [None, pytest.param(60, marks=SLOW)])
def test_what_is_shared_changes_nothing(budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In float32 to 1e-5, against the same rows with nothing but their prompt in common."""
    found = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr("grpo_lite.engine.packing._branches", lambda _, rows: {row: [row] for row in rows})
            monkeypatch.setattr("grpo_lite.engine.packing.count_shared", lambda *_: 0)
        args = tiny_args(tmp_path, beta=0.05, num_iterations=2, max_steps=2, learning_rate=3e-3)
        options = EngineOptions(tokens_per_microbatch=budget)
        found.append(train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model("qwen3")), args, alike=True, options=options))
    (shared, gradients), (unshared, expected) = found
    for mine, theirs in zip(gradients.steps, expected.steps, strict=True):
        assert 0 < relative_difference(mine, theirs) < 1e-5
    for mine, theirs in zip(shared.state.log_history, unshared.state.log_history, strict=True):
        for key in theirs.keys() - TIMES - OUR_METRICS:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


def test_all_advantages_zero_moves_weights_only_as_plain_trl_does(tmp_path: Path):
    # With weight decay, zero gradients and absent gradients lead to different weights.
    def always_one(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0] * len(completion_ids)

    assert_same_training(tmp_path, reward=always_one, weight_decay=0.1, max_steps=2)


@pytest.mark.parametrize("budget", [None, 60])
def test_ten_steps_end_in_the_same_weights(budget: int | None, tmp_path: Path):
    options = EngineOptions(tokens_per_microbatch=budget)
    assert_same_training(tmp_path, options=options, max_steps=10, learning_rate=3e-3, lr_scheduler_type="linear")


def test_gradient_accumulation_sums_to_the_same_gradient(tmp_path: Path):
    # The two trainers shuffle differently, so per-micro-step metrics differ; dapo's divisor does not.
    found = []
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        args = tiny_args(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, loss_type="dapo")
        _, gradients = train_fixed(trainer_class, tiny_lora(tiny_model()), args)
        found.append(gradients.steps[0])
    assert relative_difference(found[1], found[0]) < 1e-4


def test_micro_steps_keep_groups_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    loss = Gradients.loss
    monkeypatch.setattr(Gradients, "loss", lambda *a: seen.append(len(a[-1].groups)) or loss(*a))
    args = tiny_args(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), args)
    assert seen == [1, 1, 1, 1]


def test_a_batch_that_cuts_groups_is_still_right(tmp_path: Path):
    found = []
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        args = tiny_args(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=2, loss_type="dapo")
        _, gradients = train_fixed(trainer_class, tiny_lora(tiny_model()), args)
        found.append(gradients.steps[0])
    assert relative_difference(found[1], found[0]) < 1e-4


def test_evaluation_loss_is_the_same(tmp_path: Path):
    losses = []
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        args = tiny_args(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
        trainer, _ = train_fixed(
            trainer_class, tiny_lora(tiny_model()), args, eval_dataset=tiny_prompts(4), prompts=tiny_prompts(8)
        )
        losses.append({k: v for log in trainer.state.log_history for k, v in log.items() if k.startswith("eval_")})
    assert losses[0].keys() == losses[1].keys() - OUR_METRICS
    for key in losses[0].keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-4, abs=2e-6), key


def exact_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Differentiate `-mean_i A_i mean_t log p(c_it)`, GRPO's gradient while on-policy, one sequence at a time."""
    loss = torch.zeros((), dtype=torch.float64)
    count = len(inputs["advantages"])
    for i in range(count):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        completion = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, -1).gather(1, completion.unsqueeze(1))
        loss = loss - inputs["advantages"][i].double() * logps.mean() / count
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bf16_gradients_are_as_near_to_float64_as_plain_ones(kind: str, tmp_path: Path):
    errors = []
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        seen: list[dict[str, torch.Tensor]] = []

        class Watched(trainer_class):  # type: ignore[misc, valid-type]
            def _compute_loss(self, model: Any, inputs: Any, seen: list[Any] = seen) -> torch.Tensor:
                seen.append(inputs)
                return super()._compute_loss(model, inputs)

        args = tiny_args(tmp_path, loss_type="grpo")
        _, gradients = train_fixed(Watched, tiny_lora(tiny_model(kind, dtype=torch.bfloat16)), args)
        exact = exact_gradients(tiny_lora(tiny_model(kind, dtype=torch.bfloat16)).double(), seen[0])
        errors.append(relative_difference(gradients.steps[0], exact))
    assert errors[0] > 1e-4, "plain TRL should show bf16 noise"
    assert errors[1] < 1.5 * errors[0]
