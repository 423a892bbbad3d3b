"""`Peers`: several processes, each on its own card, train one adapter; with one process nothing changes.

DistributedDataParallel averages gradients in the backward of its own forward, once per pass. Packed compute takes the
model's layers directly, in as many passes as its token budget asks for, so here the gradients are averaged by hand,
once a step over the adapter's gradients (tens of MB), and DDP's forward is never called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

COLLECTIVES = ("gather", "gather_for_metrics", "reduce")


class Peers:
    """What the processes of a training ask of each other.

    Raises:
        ValueError: the model is sharded, or refilling or replay is asked for with several processes.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.are_there = trainer.accelerator.num_processes > 1
        self._answers: list[Any] = []  # of this micro-step's collectives
        if trainer.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("FSDP shards what this trainer reads whole: take launch/fsdp_qlora.py (docs/scaling.md)")
        if self.are_there and trainer.options.refill:
            raise ValueError("sampling.refill looks at one process's rewards: set GPUS=1")
        if self.are_there and trainer.options.replay:
            raise ValueError("sampling.replay keeps one process's groups: set GPUS=1")

    def can_average_gradients(self) -> bool:
        """Plain data parallelism with whole groups on each process; an entropy quantile spans all of them."""
        trainer = self.trainer
        rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        data_parallel = trainer.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        return data_parallel and rows % trainer.num_generations == 0 and trainer.top_entropy_quantile == 1.0

    # A step

    def all_agree(self, finite: Tensor | bool) -> bool:
        """Return whether every process found its loss finite: a step is dropped in all processes or in none."""
        if self.are_there:
            finite = torch.as_tensor(finite, device=self.trainer.accelerator.device).float()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def sums(self, numbers: list[float]) -> list[float]:
        """Return the sums over the processes of numbers that each of them has."""
        if not self.are_there:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.trainer.accelerator.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def average(self, loss: Tensor) -> Tensor:
        """Average the gradients after a step's last micro-step, and return the loss."""
        if self.are_there and self.trainer.accelerator.sync_gradients:
            average_gradients([p for p in self.trainer.model.parameters() if p.requires_grad])
        self.forget()
        return loss

    def forget(self) -> None:
        """Drop the answers of a micro-step that is done: the next one asks for itself."""
        self._answers.clear()

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """Return the model without DistributedDataParallel around it."""
        return self.trainer.accelerator.unwrap_model(model) if self.are_there else model

    @contextmanager
    def asked_once(self) -> Iterator[None]:
        """Give a micro-step that is repeated (out of memory) the other processes' answers of the first time.

        They entered each collective once and would wait in the next one. The answers come in the same order: what is
        divided differently the second time asks for nothing (`silent`).
        """
        known = iter(list(self._answers))

        def answer(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if (remembered := next(known, None)) is not None:
                return remembered
            self._answers.append(real(*args, **kwargs))
            return self._answers[-1]

        with self._answered_by(answer):
            yield

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Evaluate TRL's loss without its collectives: processes differ in how many micro-batches they have."""
        with self._answered_by(lambda real, tensor, *_, **__: tensor):
            yield

    @contextmanager
    def _answered_by(self, answer: Callable[..., Any]) -> Iterator[None]:
        if not self.are_there:
            yield
            return
        accelerator = self.trainer.accelerator
        self.trainer.accelerator = _Accelerator(accelerator, answer)
        try:
            yield
        finally:
            self.trainer.accelerator = accelerator

    # A checkpoint

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all share."""
        return not self.are_there or bool(self.trainer.accelerator.is_main_process)

    def first_ones(self, folder: Path) -> Path:
        """Return the first process's folder in all processes."""
        if not self.are_there:
            return folder
        paths = [str(folder.resolve())]
        broadcast_object_list(paths, from_process=0)
        return Path(paths[0])

    def wait(self) -> None:
        """Wait until every process has come this far."""
        if self.are_there:
            self.trainer.accelerator.wait_for_everyone()


class _Accelerator:
    """Stands in for the trainer's accelerator: `answer(real, ...)` serves its collectives, the real one all else."""

    def __init__(self, real: Any, answer: Callable[..., Any]) -> None:
        self._real, self._answer = real, answer

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._real, name)
        if name not in COLLECTIVES:
            return attribute
        return lambda *args, **kwargs: self._answer(attribute, *args, **kwargs)


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
