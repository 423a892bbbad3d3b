"""`PackedGRPOTrainer`: TRL's GRPOTrainer with our compute under it.

TRL keeps the algorithm: sampling, rewards, advantages, every loss type, metrics. Each method below replaces one of
TRL's or transformers' and delegates to a part; they stand in the order of a step. Read in trl 1.14.0 and 1.16.0;
`tests/trainer/test_contract.py` fails when these methods change, or what the parts use of the trainer (`INTERNALS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState
from trl import GRPOTrainer

from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.router_loss import has_router_loss
from grpo_lite.engine.score import base_model
from grpo_lite.models.reference import load_trained
from grpo_lite.task.tool_guard import ToolGuard
from grpo_lite.trainer.early import Early
from grpo_lite.trainer.episodes import Episodes
from grpo_lite.trainer.finite import Faults, LossScale
from grpo_lite.trainer.gradients import Gradients, Scores
from grpo_lite.trainer.journal import Journal
from grpo_lite.trainer.parallel import Peers
from grpo_lite.trainer.recovery import Recovery
from grpo_lite.trainer.refill import PromptOrder
from grpo_lite.trainer.replay import Replay
from grpo_lite.trainer.rollouts import Rollouts
from grpo_lite.trainer.state import Checkpoints, ExactState
from grpo_lite.trainer.support import Support


class PackedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose compute is group-packed.

    Args:
        options: the switches of the engine.
        show: gets lines for people.
        advice: see `Recovery`, as for the next two.
        recover: whether a step that runs out of memory is repeated with a smaller budget.
        rehearsal: the longest prompt's ids.
        guard: calls the tools and environments, where there are any.
    """

    def __init__(
        self,
        *args: Any,
        options: EngineOptions | None = None,
        show: Callable[[str], None] | None = None,
        advice: str | None = None,
        recover: bool = True,
        rehearsal: list[int] | None = None,
        guard: ToolGuard | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            self.aux_loss_enabled &= has_router_loss(base_model(self.model))
        self.options = options or EngineOptions()
        self.journal = Journal(self)
        self.peers = Peers(self)
        self.faults = Faults(self, self.options.max_skipped_steps, self.peers.all_agree)
        self.support = Support(self)
        self.order = PromptOrder(self)
        self.replay = Replay(self)
        self.early = Early(self)
        self.rollouts = Rollouts(self)
        self.episodes = Episodes(self, guard)
        self.gradients = Gradients(self)
        self.recovery = Recovery(self, show, advice, recover, rehearsal)
        self.loss_scale = LossScale(self, self.recovery.show)
        self.exact = ExactState(self)
        self.checkpoints = Checkpoints(
            self, self.peers, (self.exact.save, self.order.save, self.replay.save), self.recovery.facts
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.journal.start()
        if isinstance(resume_from_checkpoint, str) and self._was_the_last(Path(resume_from_checkpoint)):
            return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _was_the_last(self, checkpoint: Path) -> bool:
        """Load a checkpoint of the last step; transformers 5.23 would train a step beyond the end from it."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps  # a longer run continues from there
        if state.global_step < last:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        self.checkpoints.load(checkpoint)
        return True

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Set up to sample outside of a step as training samples: by our decoder, if it serves the model."""
        if self.options.rollout == "shared" and not self.use_vllm:
            self.support.is_supported(self.model)
        with self.accelerator.autocast():
            yield

    # The order over the dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return super()._get_train_sampler(dataset) if self.options.is_plain else self.order.sampler(dataset)

    # A round of generation

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.episodes.replace_hung()
        plain = super()._generate_and_score_completions
        score = partial(self.early.round, partial(self.rollouts.score, plain))
        return self.replay.fill(self.order.refill(score, inputs, score(inputs)))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.journal.spending("rollout"):
            return self.episodes.note(self.rollouts.play(partial(super()._generate, *args, **kwargs)))

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        return self.episodes.play(partial(super()._tool_call_loop, *args, **kwargs))

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, multimodal = super()._tokenize_prompts(prompts)
        if images is None and not multimodal:
            self.rollouts.reread_special_tokens(prompts, ids)
        return ids, images, multimodal

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        generate = partial(self.rollouts.generate, super()._generate_single_turn, prompt_ids, *args, **kwargs)
        return self.recovery.rollout(
            prompt_ids, generate, partial(self.support.can_share_rollout, prompt_ids, *args, **kwargs)
        )

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        return self.rollouts.tool_suffix(super()._get_tool_suffix_ids, tool_messages)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        with self.journal.spending("reward"):
            rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.faults.exclude(rewards, self.episodes.failed_rows())  # before anyone reads them
        self.journal.note_completions(inputs, completions, completion_ids, self.episodes.tool_mask)
        return rewards

    # A micro-step: inputs, loss, gradient

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step = partial(super().training_step, model, inputs, num_items_in_batch)
        return self.recovery.training(lambda: self.peers.average(self.faults.note_loss(step())))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        plain = super()._prepare_inputs
        if not self.model.training:
            return plain(generation_batch)
        prepare = self.order.inputs if self.support.is_packable(self.model) else plain
        return self.recovery.inputs(lambda: prepare(generation_batch))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        with self.peers.asked_once():
            model = self.peers.unwrapped(model)
            batch = None if return_outputs else self.gradients.read(model, inputs)
            if batch is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return self.gradients.loss(model, inputs, batch)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Scores:
        plain = super()._get_per_token_logps_and_entropies
        score = partial(self.gradients.logps, plain, model, input_ids, *args, **kwargs)
        return self.recovery.scoring(score)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.journal.write_figures()
        super().log({**logs, **(self.loss_scale.metrics() if "loss" in logs else {})}, start_time)
        self.journal.note_reward()

    # A checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save(partial(super()._save_checkpoint, model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.folder or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        card = Path(output_dir or self.args.output_dir) / "README.md"
        was_there = card.exists()
        super()._save(output_dir, state_dict)
        if not was_there:
            card.unlink(missing_ok=True)  # PEFT's, an empty form with a path of this machine

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: TRL's has placeholders for licence and base; `push` writes one from what was measured."""

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)
        load_trained(self.model, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Let each part restore its state from the checkpoint that `train` resumes from."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for part in (self.order, self.replay, self.checkpoints, self.exact, self.recovery):
                part.load(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the rest too: transformers calls this just before the first step."""
        self.support.is_supported(self.model)  # its self-check must not come between the random states and that step
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.exact.load_last(Path(checkpoint))
