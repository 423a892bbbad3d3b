"""Chunked log-probabilities: values and gradients against the plain formula, with the logits never held whole."""

import pytest
import torch
from torch import nn

from grpo_lite.engine import score as logprobs
from grpo_lite.engine.logits import LogitTransform
from grpo_lite.engine.score import selected_logprobs


def plain(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, temperature: float):
    log_p = torch.log_softmax(head(hidden) / temperature, dim=-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("head_is_trained", [False, True], ids=["frozen head", "trained head"])
def test_values_and_gradients_are_those_of_the_plain_formula(bias: bool, head_is_trained: bool, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", 0)  # chunks of 16 rows: three of them, the last one short
    torch.manual_seed(0)
    head = nn.Linear(8, 50, bias=bias, dtype=torch.float64).requires_grad_(head_is_trained)
    hidden = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (40,))
    weights = torch.randn(2, 40, dtype=torch.float64)
    results = []
    for compute in (plain, lambda *a: selected_logprobs(*a, entropy=True, entropy_grad=True)):
        hidden.grad, head.weight.grad = None, None
        logps, entropies = compute(hidden, head, targets, 0.7)
        ((logps * weights[0]).sum() + (entropies * weights[1]).sum()).backward()
        results.append((logps, entropies, hidden.grad, head.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)


def test_entropies_for_logging_carry_no_gradient():
    head = nn.Linear(4, 9).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    logps, entropies = selected_logprobs(hidden, head, torch.tensor([0, 1, 2]), 1.0, entropy=True)
    assert logps.requires_grad
    assert entropies is not None
    assert not entropies.requires_grad


def test_gradient_of_a_certain_token_is_not_lost_to_rounding():
    # p_y = 1 - 8e-7: the gradient (1 - p_y) w_y - ... vanishes if 1 and p_y are rounded to bf16 separately.
    weight = torch.zeros(2, 1)
    weight[1] = 14.0
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.copy_(weight)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    logps, _ = selected_logprobs(hidden, head, torch.tensor([1]), 1.0)
    logps.sum().backward()
    expected = 14 / (1 + torch.tensor(14.0).exp())  # (1 - p_y) * 14
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(expected.item(), rel=0.01)


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", 16 * 1000)
    head = nn.Linear(4, 1000).requires_grad_(False)
    hidden = torch.randn(200, 4, requires_grad=True)
    with Largest() as mode:
        selected_logprobs(hidden, head, torch.zeros(200, dtype=torch.long), 1.0, entropy=True)[0].sum().backward()
    assert mode.elements == 16 * 1000  # against 200,000


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_whether_a_target_is_the_most_probable_token_is_told_on_request(head_is_trained: bool):
    torch.manual_seed(0)
    head = nn.Linear(8, 40, bias=False).requires_grad_(head_is_trained)
    hidden, targets = torch.randn(60, 8, requires_grad=True), torch.randint(40, (60,))
    targets[::2] = head(hidden[::2]).argmax(-1)
    top1 = torch.zeros(60, dtype=torch.bool)
    selected_logprobs(hidden, head, targets, temperature=0.7, top1=top1)
    assert torch.equal(top1, head(hidden).argmax(-1) == targets)


@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize(("scale", "softcap"), [(0.3, None), (1.0, 2.0), (3.0, 1.5)])
def test_a_scale_and_a_soft_cap_of_the_logits_are_differentiated(
    scale: float, softcap: float | None, is_trained: bool
) -> None:
    transform = LogitTransform(scale, softcap)
    torch.manual_seed(0)
    head = nn.Linear(6, 40, dtype=torch.float64).requires_grad_(is_trained)
    targets, weights = torch.randint(40, (9,)), torch.randn(2, 9, dtype=torch.float64)

    def plain(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = scale * head(hidden)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = torch.log_softmax(logits / 0.7, dim=-1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def ours(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return selected_logprobs(hidden, head, targets, 0.7, entropy=True, entropy_grad=True, transform=transform)

    hidden = torch.randn(9, 6, dtype=torch.float64)
    found = []
    for compute in (plain, ours):
        given = hidden.clone().requires_grad_()
        logps, entropies = compute(given)
        assert entropies is not None
        loss = (weights[0] * logps + weights[1] * entropies).sum()
        wanted = [given, *(head.parameters() if is_trained else ())]
        found.append([logps, entropies, *torch.autograd.grad(loss, wanted)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
