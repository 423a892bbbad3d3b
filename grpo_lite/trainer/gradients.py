"""`Gradients`: log-probabilities and gradients of a batch, packed by group and cut into micro-batches.

TRL keeps the algorithm. Its loss function asks for log-probabilities; here they are computed packed, each prompt once
per group, and handed to it. Several micro-batches are taken through backward one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lite.engine.packing import PaddedBatch, pack, plan_microbatches, read_padded_batch, token_weights, unpack
from grpo_lite.engine.router_loss import RouterLogits, RouterLoss
from grpo_lite.engine.score import Scoring, base_model, score

Scores = tuple[Tensor, Tensor | None, Tensor | None]  # log-probabilities, entropies, the router's loss
NoteRouter = Callable[[RouterLogits], None]


class Gradients:
    """Packed scoring and packed loss."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.ready: Scores | None = None  # answers TRL's next request for log-probabilities
        # What went through the model last, or goes through it now; None where TRL's own compute does it.
        self.at_once: tuple[PaddedBatch, Sequence[Sequence[int]]] | None = None

    # Scoring

    def logps(
        self,
        plain: Callable[..., Scores],
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> Scores:
        """Return what `plain`, TRL's `_get_per_token_logps_and_entropies`, does: `(B, C)` twice, and a router's loss.

        TRL asks for three kinds (trl 1.14-1.16). Its loss wants the policy's, which `loss` has computed and keeps in
        `ready`. A round wants those of the policy that sampled it, which the rollout has noted. With `beta` above 0 the
        round also wants the reference's, for the KL term: TRL switches the adapter off, or the adapter "ref" on where
        there is one (`models.reference`), and they are computed here.
        """
        if self.ready is not None:
            return self.ready
        self.at_once = None
        if not torch.is_grad_enabled() and not compute_entropy:
            sampled = self.trainer.rollouts.sampled_logps(logits_to_keep, input_ids.device)
            if sampled is not None:
                return sampled, None, None
        batch = None
        is_text = all(value is None for value in multimodal.values())
        if is_text and self.trainer.support.is_packable(model):
            batch = self._read(model, input_ids, attention_mask, logits_to_keep)
        if batch is None:
            options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss, **multimodal}
            return plain(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **options)
        budget = None
        if not torch.is_grad_enabled():
            # Scoring a whole generation batch: no more at once than TRL would take.
            rows = min(batch_size or input_ids.size(0), input_ids.size(0))
            budget = self.trainer.options.tokens_per_microbatch or rows * input_ids.size(1)
        logps, entropies = self._blank(batch)
        microbatches = plan_microbatches(batch, range(input_ids.size(0)), budget, every_prompt=compute_aux_loss)
        router = self._router_loss(batch, microbatches) if compute_aux_loss else None
        with nullcontext() if torch.is_grad_enabled() else self.trainer.support.no_checkpointing(model):
            for index, pieces in enumerate(microbatches):
                note = None if router is None else partial(router.note, index)
                logps, entropies = self.score_into(model, batch, pieces, logps, entropies, compute_entropy, note)
        return logps, entropies if compute_entropy else None, None if router is None else router.value()

    def score_into(
        self,
        model: nn.Module,
        batch: PaddedBatch,
        pieces: Sequence[Sequence[int]],
        logps: Tensor,
        entropies: Tensor,
        compute_entropy: bool = True,
        note_router: NoteRouter | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `logps` and `entropies` `(B, C)` with the rows in `pieces` replaced by computed values."""
        self.at_once = batch, pieces
        trainer, packed = self.trainer, pack(batch, pieces)
        entropy_grad = trainer._entropy_bonus_enabled
        scoring = Scoring(trainer.temperature, trainer.args.cast_lm_head_to_fp32, compute_entropy, entropy_grad)
        unwrapped = trainer.accelerator.unwrap_model(model)
        values, entropy = score(unwrapped, packed, scoring, self._forward_context, note_router=note_router)
        logps = unpack(values.to(logps.dtype), packed, logps)
        return logps, entropies if entropy is None else unpack(entropy.to(entropies.dtype), packed, entropies)

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        offloaded = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        trainer = self.trainer
        with trainer.accelerator.autocast(), offloaded if trainer.options.offload_activations else nullcontext():
            yield

    def _blank(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if base_model(self.trainer.model).dtype == torch.float64 else torch.float32
        shape = (batch.input_ids.size(0), batch.completion_width)
        zeros = torch.zeros(shape, dtype=dtype, device=batch.input_ids.device)
        return zeros, zeros

    def _read(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, width: int) -> PaddedBatch | None:
        batch = read_padded_batch(input_ids, attention_mask, width)
        if batch is None:
            return None
        return batch if self.trainer.support.has_fixed_rope(model, input_ids.size(1)) else None

    def _router_loss(self, batch: PaddedBatch, microbatches: list[list[list[int]]]) -> RouterLoss:
        config = base_model(self.trainer.accelerator.unwrap_model(self.trainer.model)).config
        return RouterLoss(config.get_text_config(), token_weights(batch, microbatches))

    # Loss and backward

    def read(self, model: nn.Module, inputs: dict[str, Any]) -> PaddedBatch | None:
        """Return a micro-step's batch, or None where TRL's own loss must be taken."""
        trainer, self.at_once = self.trainer, None
        if not torch.is_grad_enabled() or not trainer.support.is_packable(model):
            return None
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return None if "pixel_values" in inputs else self._read(model, ids, mask, inputs["completion_ids"].size(1))

    def loss(self, model: nn.Module, inputs: dict[str, Any], batch: PaddedBatch) -> Tensor:
        """Compute TRL's loss, KL term included; all but the last of several micro-batches go through backward here."""
        budget = self.trainer.options.tokens_per_microbatch
        rows = range(batch.input_ids.size(0))
        live = [row for row, counts in enumerate(self._has_gradient(inputs)) if counts]
        has_router_loss = self.trainer.aux_loss_enabled
        microbatches = plan_microbatches(batch, live, budget, every_prompt=has_router_loss)
        rest = plan_microbatches(batch, sorted(set(rows) - set(live)), budget)
        logps, entropies = self._blank(batch)
        if self._sampled_by_this_policy(inputs):
            entropies = inputs["rollout_entropies"]  # all that TRL still asks of rows without a gradient
        else:
            logps, entropies = self._score_without_gradient(model, batch, rest, logps, entropies)
        router = self._router_loss(batch, microbatches) if has_router_loss else None
        if len(microbatches) == 1:
            note = None if router is None else partial(router.note, 0)
            scored = self.score_into(model, batch, microbatches[0], logps, entropies, note_router=note)
            return self._trl_loss(model, inputs, *scored, router)
        if not microbatches:
            return self._trl_loss(model, inputs, logps, entropies) + _connected_zero(model)
        return self._accumulated_loss(model, inputs, batch, microbatches, logps, entropies, router)

    def _accumulated_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        batch: PaddedBatch,
        microbatches: list[list[list[int]]],
        logps: Tensor,
        entropies: Tensor,
        router: RouterLoss | None,
    ) -> Tensor:
        """Take one backward per micro-batch; together they are the gradient of the loss over the whole batch.

        TRL's loss is evaluated on the whole batch each time, with only one micro-batch's rows differentiable, so its
        divisors are right whatever the loss type. The other rows are constants, whose values do not reach these rows'
        gradients, except through the entropy threshold and the experts' shares over the batch; then they are computed
        beforehand.
        """
        known = self.trainer.top_entropy_quantile < 1.0 or router is not None
        if known:
            logps, entropies = self._score_without_gradient(model, batch, microbatches, logps, entropies, router)
        constants = logps if known else inputs.get("old_per_token_logps", logps)
        loss = logps.new_zeros(())
        for index, pieces in enumerate(microbatches):
            note = None if router is None else partial(router.note, index)
            scored = self.score_into(model, batch, pieces, constants, entropies, note_router=note)
            with self.unrecorded():
                loss = self._trl_loss(model, inputs, *scored, router)
            rows = [row for piece in pieces for row in piece]
            logps, entropies = logps.clone(), entropies.clone()
            logps[rows], entropies[rows] = scored[0][rows].detach(), scored[1][rows].detach()
            if index < len(microbatches) - 1:
                with torch.autocast(loss.device.type, enabled=False):
                    self.trainer.accelerator.backward(loss)
        with torch.no_grad():
            total = self._trl_loss(model, inputs, logps, entropies, router)
        return loss + (total - loss).detach()

    def _score_without_gradient(
        self,
        model: nn.Module,
        batch: PaddedBatch,
        microbatches: list[list[list[int]]],
        logps: Tensor,
        entropies: Tensor,
        router: RouterLoss | None = None,
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self.trainer.support.no_checkpointing(model):
            for index, pieces in enumerate(microbatches):
                note = None if router is None else partial(router.note, index)
                logps, entropies = self.score_into(model, batch, pieces, logps, entropies, note_router=note)
        return logps, entropies

    def _trl_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        logps: Tensor,
        entropies: Tensor,
        router: RouterLoss | None = None,
    ) -> Tensor:
        self.ready = (logps, entropies, None if router is None else router.value())
        try:
            loss: Tensor = self.trainer._compute_loss(model, inputs)
            return loss
        finally:
            self.ready = None

    def _has_gradient(self, inputs: dict[str, Any]) -> list[bool]:
        """Return for each row whether it can contribute to the gradient.

        Every row can with a KL term (`beta`), an entropy bonus or a router's loss.
        """
        trainer, advantages = self.trainer, inputs["advantages"]
        if trainer.beta != 0.0 or trainer._entropy_bonus_enabled or trainer.aux_loss_enabled:
            return [True] * advantages.size(0)
        return (advantages.view(advantages.size(0), -1) != 0).any(1).tolist()

    def _sampled_by_this_policy(self, inputs: dict[str, Any]) -> bool:
        """Return whether the entropies noted during the rollout are the policy's, so that they need no forward."""
        is_first_use = "rollout_entropies" in inputs and "old_per_token_logps" not in inputs
        return is_first_use and self.trainer.top_entropy_quantile == 1.0

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Evaluate TRL's loss without leaving metrics, moving the adaptive entropy controller, or asking the peers."""
        trainer = self.trainer
        metrics = trainer._metrics
        entropy = trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            with trainer.peers.silent():
                yield
        finally:
            trainer._metrics = metrics
            trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats = entropy


def _connected_zero(model: nn.Module) -> Tensor:
    """Return a zero that gives every trained parameter a zero gradient, as TRL's loss would: optimizers then step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.stack([parameter.reshape(-1)[0].float() * 0.0 for parameter in trained]).sum()
