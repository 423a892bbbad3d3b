"""generate_completions: greedy or sampled answers of a Hugging Face model to many prompts, for evaluation and chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from grpo_lite import attention
from grpo_lite.rollout import GroupDecoder, decoding_obstacle
from grpo_lite.scoring import base_model
from grpo_lite.shadow import dequantized


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    samples: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """Generate for each prompt and return token ids, ended before the first end-of-sequence token.

    Args:
        model: a causal LM, with or without an adapter; left in the mode (train/eval) it was in.
        tokenizer: pads on the left.
        prompt_ids: token ids of each prompt.
        max_new_tokens: cap per completion.
        samples: completions per prompt at `temperature`; None: one greedy completion.
        temperature: of the samples; top-p and top-k are off, as in training.
        batch_size: sequences generated at once.
        seed: of the samples; the caller's random state is left untouched.
        progress: called with (prompts done, prompts in all).

    Returns:
        For each prompt, in the order given, its `samples or 1` completions.
    """
    import torch

    count = samples or 1
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # near-equal lengths: little padding
    results: list[list[list[int]]] = [[] for _ in prompt_ids]
    stops = stop_ids(model, tokenizer)
    config = _generation_config(max_new_tokens, samples, temperature, stops, tokenizer.pad_token_id)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    per_batch = max(1, batch_size // count)
    decoder = _group_decoder(model, config, max(map(len, prompt_ids), default=0) + max_new_tokens)
    engine = dequantized(base_model(model)) if decoder else nullcontext()
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), engine:
            torch.manual_seed(seed)
            for start in range(0, len(order), per_batch):
                chosen = order[start : start + per_batch]
                rows = [prompt_ids[i] for i in chosen for _ in range(count)]
                ids, mask = _left_padded(rows, tokenizer.pad_token_id, model.device)
                out = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=decoder
                )
                for j, row in enumerate(out[:, ids.shape[1] :].tolist()):
                    results[chosen[j // count]].append(_until_stop(row, stops))
                if progress:
                    progress(min(start + per_batch, len(order)), len(order))
    finally:
        model.train(was_training)
    return results


def _group_decoder(model: Any, config: Any, longest: int) -> Any:
    """Return the decoder that prefills a repeated prompt once, for a model the trainer has made ready for it."""
    inner = base_model(model)
    window = attention.sliding_window(inner)
    ready = inner.config._attn_implementation == attention.IMPLEMENTATION
    if not ready or decoding_obstacle(config) or (window is not None and longest > window):
        return None
    return GroupDecoder(nullcontext)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token id that ends a completion: the tokenizer's and those the model declares."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({*declared, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def _generation_config(cap: int, samples: int | None, temperature: float, stops: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if samples:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(max_new_tokens=cap, eos_token_id=stops or None, pad_token_id=pad, **sampling)


def _left_padded(rows: list[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)  # (B, P)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _until_stop(row: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in stops:
            return row[:i]
    return row
