"""Count the bytes of TRL's own compute and of transformers' own `generate`, as `memory_trace` counts ours.

TRL 1.16's `_get_per_token_logps_and_entropies` and its fused output head run on fake tensors, made to take the way of a
GPU with Triton: only scored positions go through the head, and its kernels, which work in place, do nothing here.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from trl import GRPOTrainer

from grpo_lite.engine import attention
from tests.memory.memory_trace import (
    LiveBytes,
    Traced,
    build_model,
    materialise,
    pretend_cuda,
    static_bytes,
    trace_passes,
)


class _ScoredOnly(TorchFunctionMode):
    """Gives `hidden[mask]` its size, which a fake mask does not tell."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].dim() - 1)[torch.zeros(self.count, dtype=torch.long)]
        return func(*args, **(kwargs or {}))


class _Kernel:
    """A Triton kernel that works in place."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def pretend_triton() -> Iterator[None]:
    """Let TRL's head believe in Triton, and its products accumulate without a copy, as they do on CUDA."""
    from trl.kernels import chunked_logprob as head
    from trl.trainer import utils

    replaced: dict[tuple[Any, str], Any] = {
        (head, "_use_triton"): lambda device: True,
        (utils, "_use_triton"): lambda device: True,
        (head, "_forward_kernel"): _Kernel(),
        (head, "_backward_kernel"): _Kernel(),
        (head, "_addmm_fp32"): lambda acc, a, b: None,
    }
    if not hasattr(head, "triton"):
        head.triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))  # type: ignore[attr-defined]
    kept = {key: getattr(*key) for key in replaced}
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in kept.items():
            setattr(module, name, value)


@contextlib.contextmanager
def plain_model(
    config: dict[str, Any], load_in: str, rank: int, checkpointing: bool, outputs: tuple[str, ...], scored: int
) -> Iterator[tuple[Any, LiveBytes, int]]:
    """Yield a model as TRL trains it, of whose tokens `scored` go through the head, what counts, and its own bytes."""
    from trl.trainer.utils import add_fused_lm_head

    model = build_model(config, load_in, rank, torch.bfloat16, checkpointing)
    attention.uninstall(model.get_base_model())
    add_fused_lm_head(model.get_base_model(), outputs=outputs)
    with contextlib.ExitStack() as stack:
        for context in (FakeTensorMode(allow_non_fake_inputs=True), live := LiveBytes(), pretend_cuda()):
            stack.enter_context(context)
        stack.enter_context(pretend_triton())
        stack.enter_context(_ScoredOnly(scored))
        yield model, live, static_bytes(model, live)


def trace_plain_training(
    config: dict[str, Any],
    prompt: int,
    completion: int,
    rows: int,
    *,
    load_in: str = "4bit",
    rank: int = 16,
    checkpointing: bool = True,
) -> Traced:
    """Count one of TRL's micro-batches: `rows` padded rows, forward and backward, in bfloat16 autocast."""
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    )
    score = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__  # without its timer
    outputs = ("log_probs", "entropy")
    with plain_model(config, load_in, rank, checkpointing, outputs, rows * completion) as (model, live, static):
        ids = torch.zeros((rows, prompt + completion), dtype=torch.long)
        return trace_passes(
            live,
            static,
            lambda: score(trainer, model, ids, torch.ones_like(ids), completion, compute_entropy=True)[:1],
        )


def trace_warmup(
    config: dict[str, Any],
    prompt: int,
    completion: int,
    rows: int,
    *,
    load_in: str = "4bit",
    rank: int = 16,
    checkpointing: bool = True,
) -> Traced:
    """Count a part of a warm-up's step, as SFTTrainer computes it: `rows` rows of one length, in bfloat16 autocast."""
    outputs = ("log_probs", "entropy", "is_top1")
    with plain_model(config, load_in, rank, checkpointing, outputs, rows * completion) as (model, live, static):
        ids = torch.zeros((rows, prompt + completion), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}

        def forward() -> tuple[Any, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                return (model(**inputs, use_cache=False, fused_lm_head=True).log_probs,)

        return trace_passes(live, static, forward)


def trace_generate(
    config: dict[str, Any], prompt: int, completion: int, rows: int, *, sampling: bool = True, rank: int = 16
) -> int:
    """Count `generate`'s prefill and its last step in float16: sampled under autocast, greedy without."""
    model = build_model(config, "4bit", rank, torch.float16, checkpointing=False)
    attention.uninstall(model.get_base_model())
    autocast = torch.autocast("cpu", torch.float16) if sampling else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, pretend_cuda(), torch.no_grad(), autocast:
        materialise(model)
        cache = DynamicCache()
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        ids = torch.zeros((rows, prompt), dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
        for layer in cache.layers:
            shape = (*layer.keys.shape[:2], prompt + completion - 2, layer.keys.size(3))
            layer.keys, layer.values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
        mask = torch.ones((rows, prompt + completion - 1), dtype=torch.long)
        out = model(input_ids=torch.zeros((rows, 1), dtype=torch.long), attention_mask=mask, **given)
        logits = out.logits[:, -1].to(torch.float32, copy=True)
        if sampling:
            torch.empty_like(torch.softmax(logits / 0.9, dim=-1)).argmax(-1)
        else:
            logits.argmax(-1)
    return live.peak
