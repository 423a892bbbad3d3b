"""Run a packed batch through a model: log-probabilities of the completion tokens, and the check that this is right."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lite import attention
from grpo_lite.logprobs import selected_logprobs
from grpo_lite.out_of_memory import is_out_of_memory
from grpo_lite.packing import PackedBatch, pack, plan_microbatches, read_padded_batch, unpack

logger = logging.getLogger(__name__)

# The self-check's longest sequence; an attention window must hold it.
SELF_CHECK_TOKENS = 12


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
    model: nn.Module, packed: PackedBatch, scoring: Scoring, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities `(N,)` and entropies `(N,)` (or None) of a packed batch's completion tokens.

    Args:
        model: A causal language model or PEFT model that `attention.install` has prepared.
        packed: The batch.
        scoring: Temperature and what to return.
        autocast: Makes the context to run the model in.
    """
    inner = base_model(model)
    device = packed.input_ids.device
    layout = attention.PackedLayout(packed.segments, device)
    # A 4D mask passes through transformers' mask creation untouched, which would otherwise read the restarting
    # positions as packed sequences and build a (T, T) mask; the packed attention ignores it.
    no_mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
    with autocast():
        hidden = inner.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=no_mask,
            use_cache=False,
            packed_layout=layout,
        ).last_hidden_state
    if layout.calls < inner.config.num_hidden_layers:
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
            chosen, head, packed.targets, scoring.temperature, scoring.entropy, scoring.entropy_grad
        )


PlainScores = Callable[[Tensor, Tensor, int], Tensor]


def self_check(
    model: nn.Module, scoring: Scoring, autocast: Callable[[], AbstractContextManager[Any]], plain: PlainScores
) -> str | None:
    """Compare packed with padded log-probabilities once, on the real weights and made-up tokens.

    The configuration can only exclude what it names; this catches the rest (patched attention, unknown architectures).

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
    width, longest = SELF_CHECK_TOKENS - 5, 5
    generator = torch.Generator().manual_seed(0)
    vocabulary = inner.config.vocab_size
    prompts = torch.randint(vocabulary, (2, width), generator=generator).repeat_interleave(3, dim=0)
    completions = torch.randint(vocabulary, (6, longest), generator=generator)
    lengths = torch.tensor([5, 1, 3, 4, 5, 2])
    mask = torch.ones((6, width + longest), dtype=torch.long)
    mask[3:, :2] = 0  # the second prompt is two tokens shorter
    mask[:, width:] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    ids = torch.cat([prompts, completions], dim=1).to(device)
    mask = mask.to(device)
    valid = mask[:, width:].bool()
    batch = read_padded_batch(ids, mask, longest)
    assert batch is not None
    with torch.no_grad(), _without_dropout(model):
        expected = plain(ids, mask, longest)[valid].double()
        shifted = plain(nn.functional.pad(ids, (3, 0)), nn.functional.pad(mask, (3, 0)), longest)[valid].double()
        try:
            packed = pack(batch, plan_microbatches(batch, range(6), None)[0])
            values, _ = score(model, packed, scoring._replace(entropy=False), autocast)
        except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):  # which is nothing that the model does
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


def _in_autocast(autocast: Callable[[], AbstractContextManager[Any]], device_type: str) -> bool:
    with autocast():
        return torch.is_autocast_enabled(device_type)


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
