"""Score a packed batch: log-probabilities and entropies of its completion tokens, without the `(N, V)` logits.

`score` runs the model and keeps the hidden states that predict a completion token, and only those; `self_check`
compares the result with padded compute once. In `selected_logprobs` the logits exist a chunk at a time. TRL 1.16 has
the same idea (`trl/kernels/chunked_logprob.py`); on CPU it scores every position, prompt and padding included, in
tiles of up to half a GiB, and projects twice again in backward. Here forward keeps the Jacobian row
`d logp / d hidden` of each token, `(N, H)`, and backward is one multiplication.
"""

import logging
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo_lite.engine import attention, states
from grpo_lite.engine.first_order import first_order
from grpo_lite.engine.logits import UNCHANGED, LogitTransform
from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.engine.packing import PackedBatch, pack, plan_microbatches, read_padded_batch, unpack
from grpo_lite.errors import first_line

logger = logging.getLogger(__name__)

SELF_CHECK_TOKENS = 12  # of its longest sequence; prompts and completions are longer than attention.CHECK_WINDOW
# Logits alive at once: 32 MiB in fp32 on CPU, about its cache; twice that on a GPU. A chunk takes up to 16 bytes an
# element, so 1 << 26 would be 1 GiB, more than a 1.5B base in 4 bit; 110 rows × 151,936 already fill a GPU.
CHUNK_ELEMENTS_CPU = 1 << 23
CHUNK_ELEMENTS_GPU = 1 << 24

PlainScores = Callable[[Tensor, Tensor, int], Tensor]  # ids, mask, C -> padded log-probabilities (B, C)


class Scoring(NamedTuple):
    """How the trainer wants tokens scored."""

    temperature: float
    head_in_fp32: bool = False
    entropy: bool = True
    entropy_grad: bool = False


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def score(
    model: nn.Module,
    packed: PackedBatch,
    scoring: Scoring,
    autocast: Callable[[], AbstractContextManager[Any]],
    top1: Tensor | None = None,
    note_router: Callable[[tuple[Tensor, ...]], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities `(N,)` and entropies `(N,)` (or None) of a packed batch's completion tokens.

    Args:
        model: A causal language model or PEFT model that `attention.install` has prepared.
        packed: The batch.
        scoring: Temperature and what to return.
        autocast: Makes the context to run the model in.
        top1: As for `selected_logprobs`.
        note_router: Gets the router logits `(T, experts)` of each layer of a mixture of experts.
    """
    inner = base_model(model)
    device = packed.input_ids.device
    layout = attention.PackedLayout(packed.segments, device)
    # A 4D mask passes through transformers' mask creation untouched, which would otherwise read the restarting
    # positions as packed sequences and build a (T, T) mask; the packed attention ignores it.
    no_mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
    with autocast():
        outputs = inner.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids + attention.longrope_shift(inner, layout.longest, packed.padded_width),
            attention_mask=no_mask,
            use_cache=False,
            **states.arguments(inner, layout),
            **({} if note_router is None else {"output_router_logits": True}),
        )
    hidden = outputs.last_hidden_state
    if note_router is not None:
        note_router(outputs.router_logits)
    if layout.calls < states.calls_per_pass(inner):
        raise NotImplementedError("some layers did not attend through transformers' attention interface")
    head = cast(nn.Linear, inner.get_output_embeddings())
    chosen = hidden[0].index_select(0, packed.predictors)
    context: AbstractContextManager[Any] = autocast()
    if scoring.head_in_fp32:
        chosen, context = chosen.float(), torch.autocast(device.type, enabled=False)
    elif torch.is_autocast_enabled(device.type):
        chosen = chosen.to(torch.get_autocast_dtype(device.type))
    with context:
        return selected_logprobs(
            chosen,
            head,
            packed.targets,
            scoring.temperature,
            scoring.entropy,
            scoring.entropy_grad,
            top1,
            LogitTransform.read(inner.config),
        )


def self_check(
    model: nn.Module, scoring: Scoring, autocast: Callable[[], AbstractContextManager[Any]], plain: PlainScores
) -> str | None:
    """Compare packed with padded log-probabilities once, on the real weights and random tokens.

    The configuration can only exclude what it names; this catches the rest (patched attention, unknown architectures).
    Attention windows are narrowed meanwhile, in both ways of computing, so that these few tokens meet them.

    Args:
        model: As for `score`.
        scoring: As for `score`.
        autocast: As for `score`.
        plain: Computes padded log-probabilities `(B, C)` from ids, mask and C.

    Returns:
        Why packed compute must not be used, or None.
    """
    inner = base_model(model)
    device = next(model.parameters()).device
    ids, mask, longest = _random_groups(inner.config.vocab_size, device)
    valid = mask[:, -longest:].bool()
    batch = read_padded_batch(ids, mask, longest)
    assert batch is not None

    def padded(scores: PlainScores) -> tuple[Tensor, Tensor]:  # and the same rows with three more columns of padding
        wider = nn.functional.pad(ids, (3, 0)), nn.functional.pad(mask, (3, 0))
        return scores(ids, mask, longest)[valid].double(), scores(*wider, longest)[valid].double()

    with torch.no_grad(), _without_dropout(model), attention.narrowed(inner):
        try:
            expected, shifted = padded(plain)
        except Exception as error:
            unbuilt = _unbuilt_kernel(error)
            if unbuilt is None:
                raise
            logger.warning(f"Packed compute is on and needs no Triton, but plain TRL compute would fail: {unbuilt}")
            expected, shifted = padded(partial(scores_from_logits, model, autocast, scoring.temperature))
        try:
            packed = pack(batch, plan_microbatches(batch, range(6), None)[0])
            values, _ = score(model, packed, scoring._replace(entropy=False), autocast)
        except Exception as error:
            if is_out_of_memory(error):  # which is nothing that the model does
                raise
            if unbuilt := _unbuilt_kernel(error):
                return f"packed attention cannot run here: {unbuilt}"
            if not isinstance(error, NotImplementedError | TypeError | ValueError | AttributeError | RuntimeError):
                raise
            return f"packed attention failed on this model ({type(error).__name__}: {error})"
        found = unpack(values.double(), packed, values.new_zeros(valid.shape, dtype=torch.float64))[valid]
    exact = inner.dtype in (torch.float32, torch.float64) and not _in_autocast(autocast, device.type)
    # Rounding differs with the kernels chosen; the same rows padded differently show how much.
    allowed = (2e-4 if exact else 0.1) + 4 * float((shifted - expected).abs().max())
    difference = float((found - expected).abs().max())
    logger.debug("packed self-check: difference %.2e, allowed %.2e", difference, allowed)
    if difference <= allowed:
        return None
    return f"its log-probabilities differ from padded ones by {difference:.2g} (allowed {allowed:.2g})"


def selected_logprobs(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    temperature: float,
    entropy: bool = False,
    entropy_grad: bool = False,
    top1: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
) -> tuple[Tensor, Tensor | None]:
    """Score `targets` under `softmax(transform(head(hidden)) / temperature)`.

    Args:
        hidden: `(N, H)`, already in the dtype to multiply in.
        head: The model's output embedding: `weight` `(V, H)`, `bias` `(V,)` or None.
        targets: `(N,)`.
        temperature: Of the sampling distribution.
        entropy: Whether to return entropies.
        entropy_grad: Whether the entropies must be differentiable.
        top1: `(N,)` of truth values, gets whether each target is the most probable token; None: nobody asks.
        transform: What the model does to the head's logits.

    Returns:
        Log-probabilities `(N,)` and entropies `(N,)` (or None), both fp32 (fp64 for fp64 inputs).
    """
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    needs_head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    project = _Projection(transform, 1.0 / temperature)
    if torch.is_grad_enabled() and needs_head_grad:
        return _recomputed(hidden, weight, bias, targets, project, entropy, top1)
    logps, entropies = _SelectedLogProbs.apply(hidden, weight, bias, targets, project, entropy, entropy_grad, top1)
    if entropies is not None and not entropy_grad:
        entropies = entropies.detach()
    return logps, entropies


def chunk_rows(weight: Tensor) -> int:
    """Return how many tokens to project at once with a head of weight `(V, H)`."""
    elements = CHUNK_ELEMENTS_CPU if weight.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    return max(16, elements // weight.size(0))


class _Projection(NamedTuple):
    """From hidden states to the logits that are sampled from."""

    transform: LogitTransform
    inverse_temperature: float

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits `(n, V)`, in fp32 (fp64 for fp64 inputs)."""
        bias = None if bias is None else bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
        logits = self.transform.apply(logits if logits.dtype == torch.float64 else logits.float())
        return logits if self.inverse_temperature == 1.0 else logits * self.inverse_temperature

    def cap_slope(self, logits: Tensor) -> Tensor | None:
        """Return the soft cap's derivative at these logits; None without a cap, where it is 1."""
        if self.transform.softcap is None:
            return None
        return 1.0 - (logits / (self.transform.softcap * self.inverse_temperature)).square_()

    def through(self, slope: Tensor, cap_slope: Tensor | None, hidden: Tensor, weight: Tensor) -> Tensor:
        """Carry a derivative by the logits, `(n, V)`, back to the hidden states; its sign is turned."""
        slope = slope if cap_slope is None else slope * cap_slope
        return torch.mm(slope.to(hidden.dtype), weight).mul_(-self.inverse_temperature * self.transform.scale)


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        project: _Projection,
        entropy: bool,
        entropy_grad: bool,
        top1: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count, rows = hidden.size(0), chunk_rows(weight)
        logps = hidden.new_empty(count, dtype=wide)
        entropies = hidden.new_empty(count, dtype=wide) if entropy else None
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        entropy_jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] and entropy_grad else None
        head = weight.to(hidden.dtype)
        # One place for all chunks: a fresh one each time costs a CPU a third of the pass, in page faults.
        room = hidden.new_empty((min(rows, count), weight.size(0)), dtype=wide)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits = project(hidden[part], head, bias)  # (n, V)
            cap_slope = None if jacobian is None else project.cap_slope(logits)
            log_p = torch.log_softmax(logits, dim=-1, out=room[: logits.size(0)])
            target = targets[part].unsqueeze(1)
            logps[part] = log_p.gather(1, target).squeeze(1)
            if top1 is not None:
                top1[part] = logps[part] >= log_p.amax(dim=-1)
            if not entropy and jacobian is None:
                continue
            p = torch.softmax(log_p, dim=-1, out=logits)  # half the time of exp, as exact
            if entropies is not None:
                weighted = log_p * p if entropy_jacobian is not None else log_p.mul_(p)
                entropies[part] = -weighted.sum(-1)
            if entropy_jacobian is not None and entropies is not None:
                # dH/dz_j = -p_j (log p_j + H)
                entropy_jacobian[part] = project.through(
                    (log_p + entropies[part].unsqueeze(1)).mul_(p), cap_slope, hidden, head
                )
            if jacobian is not None:
                # d log p_y / dz_j = 1[j = y] - p_j; taken together before rounding, else p_y -> 1 cancels
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                jacobian[part] = project.through(p, cap_slope, hidden, head)
            del logits, p  # or they would lie beside the next chunk's
        ctx.save_for_backward(jacobian, entropy_jacobian)
        return logps, entropies

    @staticmethod
    @first_order
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
        return grad, None, None, None, None, None, None, None


def _recomputed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    project: _Projection,
    entropy: bool,
    top1: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Score chunk by chunk under activation checkpointing: for a head that is trained itself."""

    def score(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = torch.log_softmax(project(part, weight, bias), dim=-1)
        entropies = -(log_p.exp() * log_p).sum(-1) if entropy else log_p.new_zeros(log_p.size(0))
        logps = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        return logps, entropies, (logps >= log_p.amax(dim=-1)).detach()

    rows = chunk_rows(weight)
    parts = [
        checkpoint(score, part, target, use_reentrant=False)
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logps = torch.cat([part[0] for part in parts])
    if top1 is not None:
        top1.copy_(torch.cat([part[2] for part in parts]))
    return logps, torch.cat([part[1] for part in parts]) if entropy else None


def _in_autocast(autocast: Callable[[], AbstractContextManager[Any]], device_type: str) -> bool:
    with autocast():
        return torch.is_autocast_enabled(device_type)


def _random_groups(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return ids and mask `(6, SELF_CHECK_TOKENS)` of two prompts with three completions each, and `C`."""
    width, longest = SELF_CHECK_TOKENS - 5, 5
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (2, width), generator=generator).repeat_interleave(3, dim=0)
    completions = torch.randint(vocabulary, (6, longest), generator=generator)
    lengths = torch.tensor([5, 1, 3, 4, 5, 2])
    mask = torch.ones((6, width + longest), dtype=torch.long)
    mask[3:, :2] = 0  # the second prompt is two tokens shorter
    mask[:, width:] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    return torch.cat([prompts, completions], dim=1).to(device), mask.to(device), longest


def scores_from_logits(
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[Any]],
    temperature: float,
    ids: Tensor,
    mask: Tensor,
    width: int,
) -> Tensor:
    """Return padded log-probabilities `(B, width)` from whole logits, which the self-check can afford."""
    with autocast():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -width - 1 : -1]
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logps.gather(-1, ids[:, -width:, None]).squeeze(-1)


def _unbuilt_kernel(error: Exception) -> str | None:
    """Return a line for people where Triton or torch.compile could not build a kernel; None for any other error.

    Source: triton/runtime/build.py (RuntimeError without a compiler, CalledProcessError from a compiler that fails,
    FileNotFoundError where CC names none, PermissionError on the cache), triton/backends/nvidia/driver.py
    (AssertionError without libcuda), triton/compiler/errors.py and torch/_inductor/exc.py (their own classes).
    """
    of_compiler = type(error).__module__.startswith(("triton", "torch._inductor", "torch._dynamo"))
    of_system = isinstance(error, OSError | subprocess.SubprocessError)
    if is_out_of_memory(error) or not (of_compiler or of_system or re.search(r"C compiler|libcuda\.so", str(error))):
        return None
    return (
        f"Triton cannot build a kernel here ({type(error).__name__}: {first_line(error)}). If a C compiler "
        "(gcc) or Python's headers are missing: apt install build-essential python3-dev."
    )


@contextmanager
def _without_dropout(model: nn.Module) -> Any:
    """Turn dropout off without `model.eval()`, which makes bitsandbytes repack 4-bit weights on some CPUs."""
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in dropouts:
            module.p = p
