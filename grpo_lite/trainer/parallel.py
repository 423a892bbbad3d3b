"""`ParallelGRPOTrainer`: several processes, each on its own card, train one adapter.

DistributedDataParallel averages gradients in the backward of its own forward, once per pass. Packed compute takes the
model's layers directly, in as many passes as its token budget asks for, so here the averaging is done by hand, once a
step over the adapter's gradients (tens of MB), and DDP's forward is never called. Read in trl 1.14.0 and 1.16.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

from grpo_lite.runs.checkpoints import PREFIX
from grpo_lite.trainer.trainer import PackedGRPOTrainer


class ParallelGRPOTrainer(PackedGRPOTrainer):
    """PackedGRPOTrainer for one or more processes; with one it adds nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._answers: list[Any] = []  # what this micro-step's collectives have brought
        super().__init__(*args, **kwargs)
        self._is_parallel = self.accelerator.num_processes > 1
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("FSDP shards what this trainer reads whole: take launch/fsdp_qlora.py (docs/scaling.md)")
        if self._is_parallel and (self.options.refill or self.options.difficulty):
            raise ValueError("sampling.refill and sampling.difficulty look at one process's rewards: set GPUS=1")

    def _averages_gradients(self) -> bool:
        """Plain data parallelism with whole groups on each process; an entropy quantile spans all of them."""
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        data_parallel = self.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        return data_parallel and rows % self.num_generations == 0 and self.top_entropy_quantile == 1.0

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self._is_parallel:
            return super().compute_loss(model, *args, **kwargs)
        with self._asked_once():
            return super().compute_loss(self.accelerator.unwrap_model(model), *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._is_parallel and self.accelerator.sync_gradients:
            average_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        self._answers.clear()
        return loss

    def drop_step_unless_finite(self) -> None:
        """Drop a step in all processes or in none: one process's loss says it for all."""
        if self._is_parallel:
            finite = torch.as_tensor(self._loss_is_finite, device=self.accelerator.device).float()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
            self._loss_is_finite = bool(finite)
        super().drop_step_unless_finite()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self._is_parallel or self.accelerator.is_main_process:
            super()._save_checkpoint(model, trial)
            return
        self.require_finite_weights()
        self._save_into(Path(), model, trial)

    def _save_into(self, scratch: Path, model: Any, trial: Any) -> None:
        """Write each process's random state and buffered round into the first one's folder, before that is sealed."""
        if self._is_parallel:
            told = [str(scratch.resolve())]
            broadcast_object_list(told, from_process=0)
            scratch = Path(told[0])
            (scratch / f"{PREFIX}{self.state.global_step}").mkdir(exist_ok=True)
        super()._save_into(scratch, model, trial)
        if self._is_parallel:
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Evaluate TRL's loss without its collectives too: processes differ in how many micro-batches they have."""
        if not self._is_parallel:
            with super()._unrecorded():
                yield
            return
        with self._collectives(lambda real: lambda tensor, *_, **__: tensor), super()._unrecorded():
            yield

    @contextmanager
    def _asked_once(self) -> Iterator[None]:
        """Let a micro-step that is done again (out of memory) find the other processes' answers of the first time.

        They entered each collective once and would wait in the next one. The answers come in the same order: what is
        divided otherwise the second time asks for nothing (`_unrecorded`).
        """
        known, asking = iter(list(self._answers)), False

        def remembering(real: Callable[..., Any]) -> Callable[..., Any]:
            def ask(*args: Any, **kwargs: Any) -> Any:
                nonlocal asking
                if asking:  # gather_for_metrics gathers
                    return real(*args, **kwargs)
                if (answer := next(known, None)) is not None:
                    return answer
                asking = True
                try:
                    answer = real(*args, **kwargs)
                finally:
                    asking = False
                self._answers.append(answer)
                return answer

            return ask

        with self._collectives(remembering):
            yield

    @contextmanager
    def _collectives(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        names = ("gather", "gather_for_metrics", "reduce")
        before = {name: self.accelerator.__dict__.get(name) for name in names}
        self.accelerator.__dict__.update({name: change(getattr(self.accelerator, name)) for name in names})
        try:
            yield
        finally:
            for name, real in before.items():
                if real is None:
                    del self.accelerator.__dict__[name]
                else:
                    self.accelerator.__dict__[name] = real


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message; nothing is allocated after it."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
