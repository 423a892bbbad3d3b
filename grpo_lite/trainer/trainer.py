"""`PackedGRPOTrainer`: TRL's GRPOTrainer with our compute under it; the seam to TRL's internals.

Layers, each a subclass: which prompts (`trainer_sampling.py`), how completions are generated (`trainer_rollout.py`),
what is skipped as not finite (`trainer_faults.py`), what checkpoints hold (`trainer_checkpoint.py`), and here how
log-probabilities and gradients are computed.

TRL keeps the algorithm: sampling, rewards, advantages, every loss type, metrics. Replaced are how log-probabilities
are computed (`_get_per_token_logps_and_entropies`), how a batch is cut into forward and backward passes
(`compute_loss`) and how completions are shuffled (`_prepare_inputs`). Read in trl 1.14.0 and 1.16.0;
`tests/trainer/test_contract.py` fails when these methods change.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import split_tensor_dict

from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.packing import PaddedBatch, pack, plan_microbatches, read_padded_batch, unpack
from grpo_lite.engine.score import Scoring, base_model, score
from grpo_lite.trainer.prompts import shuffle_groups
from grpo_lite.trainer.state import ResumableGRPOTrainer

logger = logging.getLogger(__name__)


class PackedGRPOTrainer(ResumableGRPOTrainer):
    """GRPOTrainer whose compute is group-packed; see `EngineOptions` for the switches."""

    # TRL's own attributes that we also write
    _metrics: dict[str, dict[str, list[float]]]
    _buffered_inputs: list[dict[str, Any]] | None
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None

    def __init__(self, *args: Any, options: EngineOptions | None = None, **kwargs: Any) -> None:
        self._scores: tuple[Tensor, Tensor] | None = None  # answers TRL's next request for log-probabilities
        super().__init__(*args, options=options, **kwargs)
        if self.options.compute == "packed" and self.aux_loss_enabled:
            logger.warning(
                "Packed training is off, TRL's own is used: the experts' router has an auxiliary loss over the batch "
                "(grpo.router_aux_loss_coef: 0 leaves it out). Rollouts stay shared."
            )

    # Scoring

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._scores is not None:
            return *self._scores, None
        if not torch.is_grad_enabled() and not compute_entropy:
            sampled = self._sampled_logps(logits_to_keep, input_ids.device)
            if sampled is not None:
                return sampled, None, None
        given = {name: value for name, value in multimodal.items() if value is not None}
        batch = None
        if not given and not compute_aux_loss and self._is_packable(model):
            batch = self._read(model, input_ids, attention_mask, logits_to_keep)
        if batch is None:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **multimodal,
            )
        budget = None
        if not torch.is_grad_enabled():
            # Scoring a whole generation batch: no more at once than TRL would take.
            rows = min(batch_size or input_ids.size(0), input_ids.size(0))
            budget = self.options.tokens_per_microbatch or rows * input_ids.size(1)
        rows_all = range(input_ids.size(0))
        logps, entropies = self._blank(batch)
        with nullcontext() if torch.is_grad_enabled() else self._no_checkpointing(model):
            for pieces in plan_microbatches(batch, rows_all, budget):
                logps, entropies = self._score_into(model, batch, pieces, logps, entropies, compute_entropy)
        return logps, entropies if compute_entropy else None, None

    def _score_into(
        self,
        model: nn.Module,
        batch: PaddedBatch,
        pieces: Sequence[Sequence[int]],
        logps: Tensor,
        entropies: Tensor,
        compute_entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return `logps` and `entropies` `(B, C)` with the rows in `pieces` replaced by computed values."""
        packed = pack(batch, pieces)
        scoring = Scoring(
            self.temperature, self.args.cast_lm_head_to_fp32, compute_entropy, self._entropy_bonus_enabled
        )
        values, entropy = score(self.accelerator.unwrap_model(model), packed, scoring, self._forward_context)
        logps = unpack(values.to(logps.dtype), packed, logps)
        return logps, entropies if entropy is None else unpack(entropy.to(entropies.dtype), packed, entropies)

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        offloaded = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        with self.accelerator.autocast(), offloaded if self.options.offload_activations else nullcontext():
            yield

    def _blank(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if base_model(self.model).dtype == torch.float64 else torch.float32
        shape = (batch.input_ids.size(0), batch.completion_width)
        zeros = torch.zeros(shape, dtype=dtype, device=batch.input_ids.device)
        return zeros, zeros

    def _read(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, width: int) -> PaddedBatch | None:
        batch = read_padded_batch(input_ids, attention_mask, width)
        if batch is None:
            return None
        longest = max(map(sum, zip(batch.prompt_lengths, batch.completion_lengths, strict=True)))
        return batch if self._is_inside_window(model, longest) else None

    def _is_packable(self, model: nn.Module) -> bool:
        return self.options.compute == "packed" and self._is_supported(model)

    # One step of forward and backward

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if return_outputs or not torch.is_grad_enabled() or self.aux_loss_enabled or not self._is_packable(model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        batch = None if "pixel_values" in inputs else self._read(model, ids, mask, inputs["completion_ids"].size(1))
        if batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._packed_loss(model, inputs, batch)

    def _packed_loss(self, model: nn.Module, inputs: dict[str, Any], batch: PaddedBatch) -> Tensor:
        """Compute TRL's loss; all but the last of several micro-batches are taken through backward here."""
        budget = self.options.tokens_per_microbatch
        rows = range(batch.input_ids.size(0))
        live = [row for row, counts in enumerate(self._has_gradient(inputs)) if counts]
        microbatches = plan_microbatches(batch, live, budget)
        rest = plan_microbatches(batch, sorted(set(rows) - set(live)), budget)
        logps, entropies = self._blank(batch)
        if self._sampled_by_this_policy(inputs):
            entropies = inputs["rollout_entropies"]  # all that TRL still asks of rows without a gradient
        else:
            with torch.no_grad(), self._no_checkpointing(model):
                for pieces in rest:
                    logps, entropies = self._score_into(model, batch, pieces, logps, entropies)
        if len(microbatches) == 1:
            return self._trl_loss(model, inputs, *self._score_into(model, batch, microbatches[0], logps, entropies))
        if not microbatches:
            return self._trl_loss(model, inputs, logps, entropies) + self._connected_zero(model)
        return self._accumulated_loss(model, inputs, batch, microbatches, logps, entropies)

    def _accumulated_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        batch: PaddedBatch,
        microbatches: list[list[list[int]]],
        logps: Tensor,
        entropies: Tensor,
    ) -> Tensor:
        """Take one backward per micro-batch; together they are the gradient of the loss over the whole batch.

        TRL's loss is evaluated on the whole batch each time, with only one micro-batch's rows differentiable, so its
        divisors are right whatever the loss type. The other rows are constants, whose values do not reach these rows'
        gradients, except through the entropy threshold over the batch; then they are computed beforehand.
        """
        if self.top_entropy_quantile < 1.0:
            with torch.no_grad(), self._no_checkpointing(model):
                for pieces in microbatches:
                    logps, entropies = self._score_into(model, batch, pieces, logps, entropies)
        constants = inputs.get("old_per_token_logps", logps) if self.top_entropy_quantile == 1.0 else logps
        loss = logps.new_zeros(())
        for index, pieces in enumerate(microbatches):
            scored = self._score_into(model, batch, pieces, constants, entropies)
            with self._unrecorded():
                loss = self._trl_loss(model, inputs, *scored)
            rows = [row for piece in pieces for row in piece]
            logps, entropies = logps.clone(), entropies.clone()
            logps[rows], entropies[rows] = scored[0][rows].detach(), scored[1][rows].detach()
            if index < len(microbatches) - 1:
                with torch.autocast(loss.device.type, enabled=False):
                    self.accelerator.backward(loss)
        with torch.no_grad():
            total = self._trl_loss(model, inputs, logps, entropies)
        return loss + (total - loss).detach()

    def _trl_loss(self, model: nn.Module, inputs: dict[str, Any], logps: Tensor, entropies: Tensor) -> Tensor:
        self._scores = (logps, entropies)
        try:
            return self._compute_loss(model, inputs)
        finally:
            self._scores = None

    def _has_gradient(self, inputs: dict[str, Any]) -> list[bool]:
        """Say for each row whether it can contribute to the gradient."""
        advantages = inputs["advantages"]
        if self.beta != 0.0 or self._entropy_bonus_enabled:
            return [True] * advantages.size(0)
        return (advantages.view(advantages.size(0), -1) != 0).any(1).tolist()

    def _sampled_by_this_policy(self, inputs: dict[str, Any]) -> bool:
        """Say whether the entropies noted during the rollout are the policy's, so that they need no forward."""
        return (
            "rollout_entropies" in inputs and "old_per_token_logps" not in inputs and self.top_entropy_quantile == 1.0
        )

    def _connected_zero(self, model: nn.Module) -> Tensor:
        """A zero that gives every trained parameter a zero gradient, as TRL's loss would, so that optimizers step."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.stack([parameter.reshape(-1)[0].float() * 0.0 for parameter in trained]).sum()

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Let TRL's loss be evaluated without leaving metrics or moving the adaptive entropy controller."""
        kept = self._metrics, self.entropy_coef, self._last_world_entropy, self._entropy_window_stats
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics, self.entropy_coef, self._last_world_entropy, self._entropy_window_stats = kept

    # Micro-steps keep groups together

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training or not self._is_packable(self.model):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(shuffle_groups(scored, self.num_generations), steps)
        return self._buffered_inputs[self._step % steps]
