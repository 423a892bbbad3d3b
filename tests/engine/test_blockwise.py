"""Attention by blocks on a CPU: SDPA's numbers and gradients, and only queries, keys and values are saved."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grpo_lite.engine import blockwise
from grpo_lite.engine.attention import PackedLayout, Rule, _segmented, packed_attention

SEGMENTS = [(50, (70, 1, 33)), (5, (90,))]  # 249 tokens
TOKENS, HEADS, SHARED, SIZE, VALUES = 249, 6, 2, 16, 24  # two heads of keys and values, three queries to each


def states(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, HEADS, TOKENS, SIZE), (1, SHARED, TOKENS, SIZE), (1, SHARED, TOKENS, VALUES)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def both(drawn: list[Tensor], dtype: torch.dtype, blocks: bool, rule: Rule) -> list[Tensor]:
    """Return the output and the gradients of query, key and value, in float64."""
    made = [each.to(dtype).requires_grad_() for each in drawn]
    if blocks:
        out = blockwise.attend(made[0], made[1], made[2], SEGMENTS, rule.scaling, rule.window)
    else:
        out = _segmented(made[0], made[1], made[2], PackedLayout(SEGMENTS, torch.device("cpu")), rule)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [each.double() for each in (out.detach(), *torch.autograd.grad(out, made, above))]


def error(mine: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((one - other).norm() / other.norm()) for one, other in zip(mine, exact, strict=True)]


@pytest.mark.parametrize("window", [None, 4, 20, 40, 100])
@pytest.mark.parametrize("queries", [16, 32, 1000], ids=lambda count: f"blocks of {count}")
def test_output_and_gradients_are_those_of_sdpa(window: int | None, queries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blockwise, "LEAST_QUERIES", queries)
    monkeypatch.setattr(blockwise, "BLOCK_SCORES", 1)
    rule, drawn = Rule(0.3, window), states(torch.float64)
    assert max(error(*(both(drawn, torch.float64, blocks, rule) for blocks in (True, False)))) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_no_further_from_float64_than_sdpa(dtype: torch.dtype):
    drawn = states(dtype)
    exact = both(drawn, torch.float64, False, Rule())
    mine, theirs = (error(both(drawn, dtype, blocks, Rule()), exact) for blocks in (True, False))
    rounding = 4 * torch.finfo(torch.float32).eps  # of sums in another order
    # A CPU with AMX rounds the weights to bfloat16 before they are multiplied; SDPA does so on longer rows only.
    more = 1.5 if dtype == torch.bfloat16 else 1.1
    assert all(one < more * other + rounding for one, other in zip(mine, theirs, strict=True))
    assert max(theirs) > torch.finfo(dtype).eps / 10


def test_a_packed_layer_saves_what_it_was_given_and_no_copy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo_lite.engine.attention.DENSE_TOKENS", 0)
    saved: list[Tensor] = []
    drawn = [each.requires_grad_() for each in states(torch.bfloat16)]
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        packed_attention(drawn[0], drawn[1], drawn[2], PackedLayout(SEGMENTS, torch.device("cpu")), Rule())
    assert [each.data_ptr() for each in saved] == [each.data_ptr() for each in drawn]


def test_the_precision_of_other_products_is_left_as_it_was():
    assert blockwise.serves(torch.zeros(1))
    before = torch.get_float32_matmul_precision()
    both(states(torch.bfloat16), torch.bfloat16, True, Rule())
    assert torch.get_float32_matmul_precision() == before
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = wide.double() @ wide.double()
    assert float(((wide @ wide).double() - exact).abs().max()) < 1e-4  # bfloat16 would be off by 0.1


def test_autocast_casts_for_it_as_for_sdpa():
    drawn = [each.requires_grad_() for each in states(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = blockwise.attend(drawn[0], drawn[1], drawn[2], SEGMENTS, None, None)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert drawn[0].grad is not None
    assert drawn[0].grad.dtype == torch.float32
