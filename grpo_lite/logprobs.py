"""Log-probabilities and entropies of chosen tokens without ever holding the `(N, V)` logits.

Place in the line: `trainer.py` hands over the hidden states that predict a completion token, and only those. The
logits exist a chunk at a time. TRL 1.16 has the same idea (`trl/kernels/chunked_logprob.py`); on CPU it scores every
position, prompt and padding included, in tiles of up to half a GiB, and projects twice again in backward. Here
forward keeps the Jacobian row `d logp / d hidden` of each token, `(N, H)`, and backward is one multiplication.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits alive at once: 32 MiB in fp32 on CPU, about its cache; twice that on a GPU. A chunk takes up to 16 bytes an
# element, so 1 << 26 would be 1 GiB, more than a 1.5B base in 4 bit; 110 rows × 151,936 already fill a GPU.
CHUNK_ELEMENTS_CPU = 1 << 23
CHUNK_ELEMENTS_GPU = 1 << 24


def selected_logprobs(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    temperature: float,
    entropy: bool = False,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Score `targets` under `softmax(head(hidden) / temperature)`.

    Args:
        hidden: `(N, H)`, already in the dtype to multiply in.
        head: The model's output embedding: `weight` `(V, H)`, `bias` `(V,)` or None.
        targets: `(N,)`.
        temperature: Of the sampling distribution.
        entropy: Whether to return entropies.
        entropy_grad: Whether the entropies must be differentiable.

    Returns:
        Log-probabilities `(N,)` and entropies `(N,)` (or None), both fp32 (fp64 for fp64 inputs).
    """
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    needs_head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    inverse = 1.0 / temperature
    if torch.is_grad_enabled() and needs_head_grad:
        return _recomputed(hidden, weight, bias, targets, inverse, entropy)
    logps, entropies = _SelectedLogProbs.apply(hidden, weight, bias, targets, inverse, entropy, entropy_grad)
    if entropies is not None and not entropy_grad:
        entropies = entropies.detach()
    return logps, entropies


def chunk_rows(weight: Tensor) -> int:
    """Return how many tokens to project at once with a head of weight `(V, H)`."""
    elements = CHUNK_ELEMENTS_CPU if weight.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    return max(16, elements // weight.size(0))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, inverse_temperature: float) -> Tensor:
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if inverse_temperature == 1.0 else logits * inverse_temperature


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse_temperature: float,
        entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count, rows = hidden.size(0), chunk_rows(weight)
        logps = hidden.new_empty(count, dtype=wide)
        entropies = hidden.new_empty(count, dtype=wide) if entropy else None
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        entropy_jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] and entropy_grad else None
        head = weight.to(hidden.dtype)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            log_p = torch.log_softmax(_logits(hidden[part], head, bias, inverse_temperature), dim=-1)  # (n, V)
            target = targets[part].unsqueeze(1)
            logps[part] = log_p.gather(1, target).squeeze(1)
            if not entropy and jacobian is None:
                continue
            p = log_p.exp()
            if entropies is not None:
                weighted = log_p * p if entropy_jacobian is not None else log_p.mul_(p)
                entropies[part] = -weighted.sum(-1)
            if entropy_jacobian is not None and entropies is not None:
                # dH/dz_j = -p_j (log p_j + H)
                slope = p * (log_p + entropies[part].unsqueeze(1))
                entropy_jacobian[part] = torch.mm(slope.to(hidden.dtype), head).mul_(-inverse_temperature)
            if jacobian is not None:
                # d log p_y / dz_j = 1[j = y] - p_j; taken together before rounding, else p_y -> 1 cancels
                slope = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                jacobian[part] = torch.mm(slope.to(hidden.dtype), head).mul_(-inverse_temperature)
        ctx.save_for_backward(jacobian, entropy_jacobian)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        jacobian, entropy_jacobian = ctx.saved_tensors
        grad_logps, grad_entropies = grads
        grad: Tensor | None = None
        if jacobian is not None and grad_logps is not None:
            grad = grad_logps.unsqueeze(1) * jacobian
        if entropy_jacobian is not None and grad_entropies is not None:
            extra = grad_entropies.unsqueeze(1) * entropy_jacobian
            grad = extra if grad is None else grad + extra
        if grad is not None:
            grad = grad.to(jacobian.dtype)
        return grad, None, None, None, None, None, None


def _recomputed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, inverse_temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Score chunk by chunk under activation checkpointing: for a head that is trained itself."""

    def score(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(_logits(part, weight, bias, inverse_temperature), dim=-1)
        entropies = -(log_p.exp() * log_p).sum(-1) if entropy else log_p.new_zeros(log_p.size(0))
        return log_p.gather(1, target.unsqueeze(1)).squeeze(1), entropies

    rows = chunk_rows(weight)
    parts = [
        checkpoint(score, part, target, use_reentrant=False)
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logps = torch.cat([part[0] for part in parts])
    return logps, torch.cat([part[1] for part in parts]) if entropy else None
