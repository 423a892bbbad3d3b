"""Groups of earlier steps in the place of groups without a signal: which, weighed by what, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_lite.engine.options import EngineOptions
from grpo_lite.trainer.prompts import groups_without_signal
from grpo_lite.trainer.support import Support
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import tiny_args, tiny_lora, tiny_model, tiny_prompts, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
GROUP = 4


class Pays:
    """Pays the second half of each group in the groups (two a step) that `mixed` names, others alike."""

    __name__ = "pays"

    def __init__(self, mixed: set[int]) -> None:
        self.mixed, self.groups = mixed, 0

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        count = len(completions) // GROUP
        alive = [self.groups + group in self.mixed for group in range(count)]
        self.groups += count
        return [float(i % 2) if alive[i // GROUP] else 1.0 for i in range(len(completions))]


class Watched(PackedGRPOTrainer):
    """Notes what each step's loss gets, and the log-probabilities that the policy then gives to its completions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Any]] = []
        self.policy: list[Tensor] = []

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self.seen.append(inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            plain = GRPOTrainer._get_per_token_logps_and_entropies
            logps = plain(self, model, ids, mask, inputs["completion_ids"].size(1))[0]
        self.policy.append(logps * inputs["completion_mask"])
        return super()._compute_loss(model, inputs)


def run(tmp_path: Path, mixed: set[int], replay: int, resume: Path | None = None, **kwargs: Any) -> Watched:
    rewards = Pays(mixed)
    if resume is not None:
        rewards.groups = 2 * int(resume.name.rpartition("-")[2])
    trainer = Watched(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, **({"max_completion_length": 6, "max_steps": 4} | kwargs)),
        reward_funcs=rewards,
        train_dataset=tiny_prompts(12),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(replay=replay),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def rows(inputs: dict[str, Any], group: int) -> list[list[int]]:
    part = slice(group * GROUP, (group + 1) * GROUP)
    masked = zip(inputs["completion_ids"][part], inputs["completion_mask"][part], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in masked]


def groups(inputs: dict[str, Any]) -> list[list[list[int]]]:
    return [rows(inputs, group) for group in range(len(inputs["advantages"]) // GROUP)]


def test_the_newest_kept_group_takes_the_place_once(tmp_path: Path):
    trained = run(tmp_path, mixed={0, 1, 2}, replay=3)  # steps: both alive; one dead; both dead; both dead
    first, second, third, fourth = map(groups, trained.seen)
    kept = [group for group in first if group in second]
    assert len(kept) == 1
    fresh = [group for group in second if group not in first]
    other = [group for group in first if group not in second]
    assert sorted(third) == sorted(fresh + other)
    assert [log["replay/groups"] for log in trained.state.log_history[:4]] == [0, 1, 2, 0]
    assert trained.state.log_history[2]["replay/age"] == 1.5
    assert groups_without_signal(trained.seen[3]["advantages"], GROUP) == [0, 1]
    assert fourth != third


@pytest.mark.parametrize(("within", "replayed"), [(1, 0), (2, 1)])
def test_a_group_is_too_old_after_that_many_steps(within: int, replayed: int, tmp_path: Path):
    trained = run(tmp_path, mixed={0, 2, 3}, replay=within, max_steps=3)
    # Step 0 has one dead group and none is kept yet; step 2 finds those of step 1, and of step 0 where 2 are allowed.
    assert [log["replay/groups"] for log in trained.state.log_history[:3]] == [0, 0, 2]
    trained = run(tmp_path / "again", mixed={0, 2}, replay=within, max_steps=3)
    assert [log["replay/groups"] for log in trained.state.log_history[:3]] == [0, 1, 1]
    trained = run(tmp_path / "old", mixed={0, 1}, replay=within, max_steps=4, num_iterations=2)
    assert trained.state.log_history[2]["replay/groups"] == 2 * replayed


def test_old_tokens_are_weighed_by_the_policy_that_sampled_them(tmp_path: Path):
    trained = run(tmp_path, mixed={0, 1}, replay=3, max_steps=2)
    first, second = trained.seen
    assert "old_per_token_logps" not in first  # nothing was replayed: the round is as without `replay`
    assert groups(second) in (groups(first), groups(first)[::-1])
    at_sampling = dict(zip(map(str, groups(first)), trained.policy[0].split(GROUP), strict=True))
    for group, tokens in enumerate(groups(second)):
        part = slice(group * GROUP, (group + 1) * GROUP)
        old, now = second["old_per_token_logps"][part], trained.policy[1][part]
        torch.testing.assert_close(old, at_sampling[str(tokens)], atol=1e-5, rtol=0)
        assert (old - now).abs().max() > 1e-3  # the policy moved meanwhile
    assert trained.state.log_history[1]["clip_ratio/region_mean"] > 0


def test_without_a_dead_group_a_step_is_as_without_replay(tmp_path: Path):
    mixed = set(range(8))
    without, kept = (run(tmp_path / str(replay), mixed, replay) for replay in (0, 4))
    for name, weight in without.model.state_dict().items():
        assert torch.equal(weight, kept.model.state_dict()[name]), name


def test_kept_groups_survive_a_resume(tmp_path: Path):
    mixed, kwargs = {0, 1, 5}, {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "beta": 0.01}
    whole = run(tmp_path / "whole", mixed, 4, **kwargs)
    assert [log["replay/groups"] for log in whole.state.log_history[:5]] == [0, 2, 0, 1, 0]
    rest = run(tmp_path / "rest", mixed, 4, resume=tmp_path / "whole" / "checkpoint-2", **kwargs)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, rest.model.state_dict()[name]), name
    assert list(map(groups, rest.seen)) == list(map(groups, whole.seen[2:]))


def test_a_rollout_that_notes_nothing_replays_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = PackedGRPOTrainer(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, max_completion_length=6, max_steps=2),
        reward_funcs=Pays({0, 1}),
        train_dataset=tiny_prompts(12),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(replay=2, rollout="generate"),
    )
    trainer.train()
    assert caplog.text.count("Replay is off: this rollout does not note the tokens' log-probabilities.") == 1


@pytest.mark.parametrize("options", [{"replay": 3}, {"refill": 1}], ids=["replay", "refill"])
@pytest.mark.parametrize("ours", [0, 1], ids=["ours first", "ours second"])
def test_rounds_of_our_decoder_and_of_generate_are_joined(
    options: dict[str, int], ours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where a batch crosses a border of its rotary frequencies `generate` takes it, which notes nothing."""
    rounds: list[bool] = []
    monkeypatch.setattr(
        Support, "can_share_rollout", lambda *_, **__: rounds.append(len(rounds) % 2 == ours) or rounds[-1]
    )
    trainer = Watched(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, max_completion_length=6, max_steps=3, num_iterations=2),
        reward_funcs=Pays({0, 1, 3}),
        train_dataset=tiny_prompts(12),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(**options),
    )
    trainer.train()
    assert set(rounds) == {True, False}
    (name,) = options
    assert trainer.state.log_history[2]["replay/groups" if name == "replay" else "refill/groups_generated"] == 1


def test_replay_is_refused_where_advantages_depend_on_the_whole_batch(tmp_path: Path):
    with pytest.raises(ValueError, match="one group only"):
        run(tmp_path, set(), 1, scale_rewards="batch")


# Stages of length


def test_completions_grow_by_stages_and_the_loss_is_divided_as_before(tmp_path: Path):
    shown: list[str] = []
    trainer = Watched(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, max_completion_length=8, max_steps=4, loss_type="dr_grpo"),
        reward_funcs=Pays(set(range(8))),
        train_dataset=tiny_prompts(12),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(length_stages=((1, 2), (3, 4))),
        show=shown.append,
    )
    trainer.train()
    lengths = [int(inputs["completion_mask"].sum(1).max()) for inputs in trainer.seen]
    assert lengths == [2, 4, 4, 8]
    assert [line for line in shown if "completions of" in line] == [
        "completions of up to 2 tokens from step 1 on",
        "completions of up to 4 tokens from step 2 on",
        "completions of up to 8 tokens from step 4 on",
    ]
    assert trainer.max_completion_length == 8  # dr_grpo's divisor


def test_an_evaluation_meanwhile_is_not_cut_to_a_stage(tmp_path: Path):
    shown: list[str] = []
    trainer = PackedGRPOTrainer(
        model=tiny_lora(tiny_model()),
        args=tiny_args(tmp_path, max_completion_length=8, max_steps=2, eval_strategy="steps", eval_steps=1),
        reward_funcs=Pays(set(range(100))),
        train_dataset=tiny_prompts(12),
        eval_dataset=tiny_prompts(4),
        processing_class=tiny_tokenizer(),
        options=EngineOptions(length_stages=((9, 2),)),
        show=shown.append,
    )
    trainer.train()
    assert len([line for line in shown if "completions of" in line]) == 1
    logs = trainer.state.log_history
    assert [log["completions/max_length"] for log in logs if "completions/max_length" in log] == [2, 2]
    assert [log["eval_completions/max_length"] for log in logs if "eval_reward" in log] == [8, 8]


def test_stages_are_the_same_after_a_resume(tmp_path: Path):
    def train(folder: Path, resume: Path | None) -> PackedGRPOTrainer:
        trainer = PackedGRPOTrainer(
            model=tiny_lora(tiny_model()),
            args=tiny_args(folder, max_completion_length=8, max_steps=3, save_strategy="steps", save_steps=1),
            reward_funcs=Pays(set(range(8))),
            train_dataset=tiny_prompts(12),
            processing_class=tiny_tokenizer(),
            options=EngineOptions(length_stages=((2, 3),)),
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    whole = train(tmp_path / "whole", None).model.state_dict()
    rest = train(tmp_path / "rest", tmp_path / "whole" / "checkpoint-1").model.state_dict()
    assert all(torch.equal(weight, rest[name]) for name, weight in whole.items())
