"""Gradients of gradients: right, or refused. Ours that compute their gradient outside of autograd refuse."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grpo_lite.engine import blockwise, lora, recompute, score, varlen

ROOT = Path(blockwise.__file__).parent.parent
SEGMENTS = [(3, (2, 2)), (2, (1, 3))]  # 13 tokens


def attended(x: Tensor) -> Tensor:
    return blockwise.attend(x, x[:, :1], x[:, :1], SEGMENTS, None, None)


def updated(x: Tensor) -> Tensor:
    down, up = torch.ones(2, x.size(-1), dtype=x.dtype), torch.ones(x.size(-1), 2, dtype=x.dtype)
    return lora._Update.apply(x, recompute.recomputed(torch.sin, x), down, up, 0.5)


def scored(x: Tensor) -> Tensor:
    head = nn.Linear(x.size(-1), 7).to(x.dtype).requires_grad_(False)
    return score.selected_logprobs(x.flatten(0, -2), head, torch.zeros(26, dtype=torch.long), 1.0)[0]


def gathered(x: Tensor) -> Tensor:
    return varlen.VarlenIndex(SEGMENTS, torch.device("cpu")).gather(x[0].transpose(0, 1))


# By the name of each autograd function of ours: what calls it, of (1, 2, 13, 4) numbers; and whether its gradient is
# differentiable.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "grpo_lite.engine.blockwise._Blockwise": (attended, False),
    "grpo_lite.engine.lora._Update": (updated, False),
    "grpo_lite.engine.recompute._Recomputed": (lambda x: recompute.recomputed(torch.sin, x), False),
    "grpo_lite.engine.score._SelectedLogProbs": (scored, False),
    "grpo_lite.engine.varlen._Gather": (gathered, True),
}


def test_every_autograd_function_of_the_package_is_tried_here() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                found.add(f"{module}.{node.name}")
    assert found == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_second_gradient_is_right_or_refused(name: str) -> None:
    torch.manual_seed(0)
    call, is_differentiable = CASES[name]
    x = torch.randn(1, 2, 13, 4, dtype=torch.float64, requires_grad=True)
    if is_differentiable:
        assert torch.autograd.gradgradcheck(call, x)
        return
    y = call(x).square().sum() + x.square().sum()  # x reaches the sum another way, too
    with pytest.raises(RuntimeError, match=r"create_graph=True: gradients of gradients are not computed"):
        torch.autograd.grad(torch.autograd.grad(y, x, create_graph=True)[0].square().sum(), x)
    assert torch.autograd.grad(call(x).square().sum() + x.square().sum(), x)[0].abs().max() > 0
