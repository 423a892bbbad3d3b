"""generate_completions: greedy or sampled answers of a Hugging Face model to many prompts, for evaluation and chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

from grpo_lite.engine import attention
from grpo_lite.engine.decode import decoding_obstacle
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.engine.rollout_weights import rollout_weights
from grpo_lite.engine.score import base_model
from grpo_lite.engine.static_decode import StaticDecoder, choose_decoder
from grpo_lite.errors import MemoryBudgetError

logger = logging.getLogger(__name__)

_CROSSED: WeakSet[Any] = WeakSet()  # models of which that was said


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
    rows_that_fit: Callable[..., int] | None = None,
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
        batch_size: sequences generated at once; halved, and kept so, where memory runs out. It changes no greedy
            completion, but which samples are drawn.
        seed: of the samples; the caller's random state is left untouched.
        rows_that_fit: `memory.fit.rows_that_fit`, to begin with no more at once than the free memory holds by the plan.
        progress: called with (prompts done, prompts in all).

    Returns:
        For each prompt, in the order given, its `samples or 1` completions.

    Raises:
        MemoryBudgetError: memory runs out for a single sequence.
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
    at_once = max(1, batch_size // count) * count
    longest = max(map(len, prompt_ids), default=0)
    decoder = shared_decoder(model, config, min(map(len, prompt_ids), default=0), longest + max_new_tokens)
    if isinstance(decoder, StaticDecoder):
        order.reverse()  # the first buffers are then large enough for all
    rows = [i for i in order for _ in range(count)]
    if rows_that_fit:
        at_once = rows_that_fit(model, longest, max_new_tokens, at_once, shared=decoder is not None)
    engine = rollout_weights(base_model(model), nullcontext) if decoder else nullcontext()
    done = 0
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), engine:
            torch.manual_seed(seed)
            while done < len(rows):
                chosen = rows[done : done + at_once]
                answers = _answers(model, tokenizer, [prompt_ids[i] for i in chosen], config, decoder)
                if answers is None:
                    at_once = _fewer(len(chosen), max_new_tokens)
                    continue
                for i, answer in zip(chosen, answers, strict=True):
                    results[i].append(until_stop(answer, stops))
                done += len(chosen)
                if progress:
                    progress(done // count, len(order))
    finally:
        model.train(was_training)
    return results


def _answers(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], config: Any, decoder: Any
) -> list[list[int]] | None:
    """Return what follows each prompt, or None where memory ran out; the random state is then as it was."""
    import torch

    on_cuda = model.device.type == "cuda"
    before = torch.get_rng_state(), torch.cuda.get_rng_state(model.device) if on_cuda else None
    try:
        ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=decoder)
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.info("%s", error)
    # Outside the handler: the traceback holds the frames, and they hold the keys and values.
    free_memory()
    torch.set_rng_state(before[0])
    if before[1] is not None:
        torch.cuda.set_rng_state(before[1], model.device)
    return None


def _fewer(rows: int, cap: int) -> int:
    if rows == 1:
        raise MemoryBudgetError(
            f"out of memory while generating a single completion of up to {cap} tokens. Lower "
            "grpo.max_completion_length (or eval.max_new_tokens), or take model.load_in=4bit or a smaller model."
        )
    logger.warning("out of memory while generating %d completions at once: now %d (eval.batch_size)", rows, rows // 2)
    return rows // 2


def shared_decoder(model: Any, config: Any, shortest: int, longest: int) -> Any:
    """Return our decoder for a model that has been made ready for it, or None; say where the rows prevent it.

    Args:
        model: with or without an adapter.
        config: of the generation.
        shortest: tokens of the shortest prompt.
        longest: tokens of the longest prompt and completion.
    """
    inner = base_model(model)
    if not attention.is_installed(inner) or decoding_obstacle(config):
        return None
    if border := attention.rope_border(inner, shortest, longest):
        if inner not in _CROSSED:
            _CROSSED.add(inner)
            logger.warning(
                "Answers of up to %d tokens are generated without shared prompts and CUDA graphs, which is slower: %s "
                "changes its rotary frequencies at %d.",
                longest,
                type(inner).__name__,
                border,
            )
        return None
    return choose_decoder(inner, nullcontext)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token id that ends a completion: the tokenizer's and those the model declares."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({*declared, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def positions_of(model: Any) -> int | None:
    """Return how many tokens a model can read; None where its config does not say."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def _generation_config(cap: int, samples: int | None, temperature: float, stops: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if samples:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(max_new_tokens=cap, eos_token_id=stops or None, pad_token_id=pad, **sampling)


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Return token ids and attention mask, both (B, P), of rows that end together."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)  # (B, P)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def until_stop(row: list[int], stops: list[int]) -> list[int]:
    """Return the tokens before the first that ends a completion."""
    for i, token in enumerate(row):
        if token in stops:
            return row[:i]
    return row
