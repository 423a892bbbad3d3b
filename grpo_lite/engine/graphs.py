"""Replay a decoding step as one launch: CUDA graphs, captured at first use, with a check against the step itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_lite.engine.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)


class StepGraphs:
    """The graphs of one batch's step, one per shape, in one pool of memory.

    Args:
        state: every tensor that a step writes and a later one reads; their addresses must stay.
    """

    def __init__(self, state: Sequence[Tensor]) -> None:
        self.state = state
        self.is_on = state[0].device.type == "cuda"
        self._graphs: dict[Hashable, Any] = {}
        self._warm: set[Hashable] = set()  # shapes whose kernels have been chosen, by a step outside of a capture
        self._pool: Any = None
        self._is_checked = False

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Take one step: kernel by kernel the first time, by its graph from then on."""
        if not self.is_on:
            step()
            return
        if key not in self._graphs:
            if key not in self._warm:
                self._warm.add(key)
                step()
                return
            graph = self._capture(step)
            if graph is None:
                step()
                return
            self._graphs[key] = graph
        self._graphs[key].replay()

    def _capture(self, step: Callable[[], None]) -> Any:
        """Return the step's graph, or None where there can be none; the step itself is not taken."""
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        random_state = torch.cuda.get_rng_state()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step()
            reason = None if self._is_checked else self._difference(graph, step)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        self._is_checked = True
        if reason is None:
            return graph
        self.is_on = False
        self._graphs.clear()
        _renew_generator(random_state)
        logger.warning("Decoding steps are launched kernel by kernel, CUDA graphs are off: %s.", reason)
        return None

    def _difference(self, graph: Any, step: Callable[[], None]) -> str | None:
        """Take the step twice from the same state, without and with the graph; the state is left as it was."""
        before = [tensor.clone() for tensor in self.state]
        random_state = torch.cuda.get_rng_state()
        step()
        expected = [tensor.clone() for tensor in self.state]
        self._restore(before, random_state)
        graph.replay()
        differences = [
            float((tensor.double() - wanted.double()).nan_to_num().abs().max())
            for tensor, wanted in zip(self.state, expected, strict=True)
            if tensor.numel()
        ]
        self._restore(before, random_state)
        # The same kernels in the same order; a library may still choose another one under a capture.
        return None if max(differences) <= 0.05 else f"a graph's step differs from the step by {max(differences):.2g}"

    def _restore(self, state: Sequence[Tensor], random_state: Tensor) -> None:
        for tensor, numbers in zip(self.state, state, strict=True):
            tensor.copy_(numbers)
        torch.cuda.set_rng_state(random_state)


def _renew_generator(random_state: Tensor) -> None:
    """Give CUDA's generator a state of its own again: a capture that failed leaves it believing that it is captured."""
    generators = getattr(torch.cuda, "default_generators", ())
    if not generators or not hasattr(generators[0], "graphsafe_set_state"):
        torch.cuda.set_rng_state(random_state)
        return
    device = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{device}")
    fresh.set_state(random_state)
    generators[device].graphsafe_set_state(fresh)
