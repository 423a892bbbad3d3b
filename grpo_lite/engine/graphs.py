"""Replay a decoding step as one launch: CUDA graphs, captured at first use, with a check against the step itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.errors import first_line

logger = logging.getLogger(__name__)

# A graph's step may differ from the step by this share of the largest number: a library may choose another kernel.
ALLOWED = 0.02


@dataclass
class Switch:
    """Whether a model's steps are captured; off for good after the first that cannot be."""

    is_on: bool

    def turn_off(self, reason: str) -> None:
        """Launch steps kernel by kernel from now on, and say why."""
        self.is_on = False
        logger.warning("Decoding steps are launched kernel by kernel, CUDA graphs are off: %s.", reason)


class StepGraphs:
    """The graphs of one batch's step, one per shape, in one pool of memory.

    Args:
        state: returns every tensor that a step writes and a later one reads; their addresses must stay.
        scratch: those of them whose last place takes what nobody reads.
        switch: the model's.
    """

    def __init__(self, state: Callable[[], Sequence[Tensor]], scratch: Sequence[Tensor], switch: Switch) -> None:
        self._state = state
        self._scratch = scratch
        self.switch = switch
        self._graphs: dict[Hashable, Any] = {}
        self._warm: set[Hashable] = set()  # shapes whose kernels have been chosen, by a step outside of a capture
        self._pool: Any = None
        self._is_checked = False

    @property
    def state(self) -> Sequence[Tensor]:
        """What a step writes and a later one reads."""
        return self._state()

    @property
    def _compared(self) -> list[Tensor]:
        return [tensor[:-1] if any(tensor is each for each in self._scratch) else tensor for tensor in self.state]

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Take one step: kernel by kernel the first time, by its graph from then on."""
        if not self.switch.is_on:
            step()
            return
        with torch.cuda.device(self.state[0].device):
            if key in self._graphs:
                self._graphs[key].replay()
            elif key not in self._warm:
                self._warm.add(key)
                self._first_step(step)
            elif graph := self._capture(step):
                self._graphs[key] = graph
                graph.replay()
            else:
                step()

    def _first_step(self, step: Callable[[], None]) -> None:
        """Take a step that must not wait for the device; where it does, there can be no graph."""
        if self._is_checked:
            step()
            return
        before, random_state = [tensor.clone() for tensor in self.state], torch.cuda.get_rng_state()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            return
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = _reason(error)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self._restore(before, random_state)
        self.switch.turn_off(reason)
        step()

    def _capture(self, step: Callable[[], None]) -> Any:
        """Return the step's graph, or None where there can be none; the step itself is not taken."""
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        random_state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        try:
            # The stream is entered here too: torch does not leave it when a capture fails. Other threads may go on.
            with (
                torch.cuda.stream(side),
                torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"),
            ):
                step()
            reason = None if self._is_checked else self._difference(graph, step)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = _reason(error)
            _renew_generator(random_state)
        self._is_checked = True
        if reason is None:
            return graph
        self._graphs.clear()
        self.switch.turn_off(reason)
        return None

    def _difference(self, graph: Any, step: Callable[[], None]) -> str | None:
        """Take the step twice from the same state, without and with the graph; the state is left as it was."""
        random_state = torch.cuda.get_rng_state()
        try:
            before = [tensor.clone() for tensor in self.state]
            step()
            expected = [tensor.clone() for tensor in self._compared]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None  # no room for a check is no reason against the graph
        self._restore(before, random_state)
        graph.replay()
        largest = max(map(_relative_difference, self._compared, expected))
        self._restore(before, random_state)
        return None if largest <= ALLOWED else f"a graph's step differs from the step by {largest:.2g}"

    def _restore(self, state: Sequence[Tensor], random_state: Tensor) -> None:
        for tensor, numbers in zip(self.state, state, strict=True):
            tensor.copy_(numbers)
        torch.cuda.set_rng_state(random_state)


def _relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest finite number; infinite where only one is not a number."""
    if not one.numel():
        return 0.0
    if not one.is_floating_point():
        return 0.0 if bool((one == other).all()) else float("inf")
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0.0, (one - other).abs())
    scale = torch.where(other.isfinite(), other.abs(), 0.0).max().clamp_min(1.0)
    worst = float(difference.max() / scale)
    return worst if worst == worst else float("inf")


def _reason(error: RuntimeError) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def _renew_generator(random_state: Tensor) -> None:
    """Give CUDA's generator a state of its own again: before torch 2.13 a failed capture leaves it as if captured."""
    generators = getattr(torch.cuda, "default_generators", ())
    if not generators or not hasattr(generators[0], "graphsafe_set_state"):
        torch.cuda.set_rng_state(random_state)
        return
    device = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{device}")
    fresh.set_state(random_state)
    generators[device].graphsafe_set_state(fresh)
