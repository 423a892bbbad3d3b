"""Keys gathered behind a copy of their prompt: the attention and the gradients of a call per completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_lite.engine import varlen
from grpo_lite.engine.attention import PackedLayout, Rule, _segmented
from grpo_lite.engine.varlen import VarlenIndex, attend, one_by_one

CPU = torch.device("cpu")
LAYOUTS = {
    "one group": [(7, (3, 5, 1))],
    "groups of one size": [(7, (3, 5)), (2, (4, 4))],
    "ragged groups": [(5, (2,)), (3, (1, 6, 2)), (4, ())],
    "prompts alone": [(5, ()), (2, ())],
}


def states(segments: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
    torch.manual_seed(0)
    tokens = sum(prompt + sum(lengths) for prompt, lengths in segments)
    return [torch.randn(1, heads, tokens, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("segments", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("scaling", "window"), [(None, None), (0.3, None), (None, 1), (0.3, 4)])
def test_output_and_gradients_are_those_of_a_call_per_completion(
    segments: list[tuple[int, tuple[int, ...]]], scaling: float | None, window: int | None
) -> None:
    query, key, value = states(segments)
    ours = attend(query, key, value, VarlenIndex(segments, CPU), scaling, one_by_one, window)
    theirs = _segmented(query, key, value, PackedLayout(segments, CPU), Rule(scaling, window))
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, (query, key, value), weight),
        torch.autograd.grad(theirs, (query, key, value), weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_the_gathered_keys_is_a_plain_index_select_s() -> None:
    for segments in LAYOUTS.values():
        index = VarlenIndex(segments, CPU)
        tokens = states(segments)[1][0].transpose(0, 1).detach().requires_grad_()
        gathered = index.gather(tokens)
        plain = tokens.index_select(0, index.tokens)
        assert torch.equal(gathered, plain)
        weight = torch.randn_like(plain)
        (ours,) = torch.autograd.grad(gathered, tokens, weight)
        (theirs,) = torch.autograd.grad(plain, tokens, weight)
        torch.testing.assert_close(ours, theirs)


def test_a_kernel_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def top_left(
        query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float | None, window: int | None
    ) -> Tensor:
        """Causal from the top left: a completion sees only the beginning of its prompt."""
        bounds = [((a, b), (c, c + b - a)) for (a, b), (c, _) in index.bounds]
        wrong = VarlenIndex([(1, ())], CPU)
        wrong.bounds = bounds
        return one_by_one(query, key, value, wrong, scaling, window)

    def absent(*_: object) -> Tensor:
        raise NotImplementedError("no such kernel")

    varlen._tried.cache_clear()
    monkeypatch.setattr(varlen, "flash", top_left)
    monkeypatch.setattr(varlen, "efficient", one_by_one)
    assert varlen._tried(CPU, torch.float32, 4, 2, 8, None) is one_by_one
    varlen._tried.cache_clear()
    absent.__name__ = "efficient"
    monkeypatch.setattr(varlen, "efficient", absent)
    assert varlen._tried(CPU, torch.float32, 4, 2, 8, None) is None
    varlen._tried.cache_clear()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_trial_works_in_any_mode_and_inside_a_checkpointed_layer(
    mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first packed batch that is long enough is often the first training step, whose layers are checkpointed."""
    monkeypatch.setattr(varlen, "flash", one_by_one)
    varlen._tried.cache_clear()

    def layer(x: torch.Tensor) -> torch.Tensor:
        assert varlen._tried(CPU, torch.float32, 4, 2, 8, None) is one_by_one
        return (x * x).sin()

    with mode():
        x = torch.ones(3, requires_grad=mode is nullcontext)
        y = checkpoint(layer, x, use_reentrant=False).sum()
    if mode is nullcontext:
        y.backward()
    varlen._tried.cache_clear()


def test_a_kernel_that_does_not_keep_a_window_is_not_taken_for_layers_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbounded(*arguments: Any) -> Tensor:
        return one_by_one(*arguments[:-1], None)

    unbounded.__name__ = "flash"
    monkeypatch.setattr(varlen, "flash", unbounded)
    for efficient in (one_by_one, unbounded):
        varlen._tried.cache_clear()
        monkeypatch.setattr(varlen, "efficient", efficient)
        expected = one_by_one if efficient is one_by_one else None
        assert varlen._tried(CPU, torch.float32, 4, 2, 8, None, True) is expected
        assert varlen._tried(CPU, torch.float32, 4, 2, 8, None) is unbounded
    varlen._tried.cache_clear()
