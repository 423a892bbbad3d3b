"""Other engines for `bench/decode.py`, each only where it is installed: continuous batching, vLLM, Unsloth."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.random_model import write_config, write_random_model


class Unavailable(Exception):
    """A variant that cannot run here; the message says why."""


def continuous_batching(model: Any, settings: Any) -> Callable[[list[list[int]], int], None]:
    """Transformers' continuous batching: paged keys and values, PEFT's LoRA in 16 bit (it takes no autocast)."""
    base = model.get_base_model()
    if not hasattr(base, "generate_batch"):
        raise Unavailable("this transformers has no generate_batch")
    if settings.device != "cuda":
        raise Unavailable("continuous batching is measured on CUDA only")
    from transformers import GenerationConfig

    from bench.decode import peft_as_it_is

    def generate(prompts: list[list[int]], tokens: int) -> None:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, pad_token_id=2)
        base.generation_config.eos_token_id = None
        config.eos_token_id = -1
        adapter = [p for p in model.parameters() if p.dtype == torch.float32 and p.requires_grad]
        kept = [p.data for p in adapter]
        with peft_as_it_is(model), torch.no_grad():
            for parameter in adapter:
                parameter.data = parameter.data.to(settings.torch_dtype)
            try:
                results = base.generate_batch([list(row) for row in prompts], generation_config=config)
            finally:
                for parameter, data in zip(adapter, kept, strict=True):
                    parameter.data = data
        lengths = {len(result.generated_tokens) for result in results.values()}
        if lengths != {tokens} or len(results) != len(prompts):
            raise RuntimeError(f"{len(results)} rows of {sorted(lengths)} tokens instead of {len(prompts)} of {tokens}")

    return generate


def vllm(model: Any, settings: Any) -> Callable[[list[list[int]], int], None]:
    """vLLM with a 16-bit base of weights that it makes up, and the adapter as a LoRA request."""
    if importlib.util.find_spec("vllm") is None:
        raise Unavailable("vLLM is not installed")
    if settings.device != "cuda":
        raise Unavailable("vLLM is measured on CUDA only")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a CUDA context cannot be forked
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder = Path(tempfile.mkdtemp())
    write_config(settings.config, folder / "base", settings.torch_dtype)
    model.save_pretrained(folder / "adapter")
    engine = LLM(
        model=str(folder / "base"),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        enable_lora=True,
        max_lora_rank=16,
        max_model_len=2 * settings.prompt + settings.completion + 64,
        gpu_memory_utilization=0.4,
    )

    def generate(prompts: list[list[int]], tokens: int) -> None:
        sampling = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=1.0, detokenize=False
        )
        engine.generate(
            [{"prompt_token_ids": row} for row in prompts],
            sampling,
            lora_request=LoRARequest("policy", 1, str(folder / "adapter")),
            use_tqdm=False,
        )

    return generate


def unsloth(model: Any, settings: Any) -> Callable[[list[list[int]], int], None]:
    """Unsloth's `generate` of an NF4 base with a LoRA; alone in its process, as it patches transformers and PEFT."""
    if importlib.util.find_spec("unsloth") is None:
        raise Unavailable("Unsloth is not installed")
    if settings.device != "cuda" or set(settings.variants) != {"unsloth"}:
        raise Unavailable("Unsloth patches the others' code: measure it alone, on CUDA (--variants unsloth)")
    from unsloth import FastLanguageModel

    from bench.decode import run_generate

    folder = write_random_model(settings.config, Path(tempfile.mkdtemp()), settings.device)
    length = 2 * settings.prompt + settings.completion
    policy, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=length, dtype=settings.torch_dtype, load_in_4bit=settings.load_in == "4bit"
    )
    policy = FastLanguageModel.get_peft_model(policy, r=16, lora_alpha=32)
    FastLanguageModel.for_inference(policy)
    return lambda prompts, tokens: run_generate(policy, prompts, tokens)


PEERS: dict[str, Callable[[Any, Any], Callable[[list[list[int]], int], None]]] = {
    "batching": continuous_batching,
    "vllm": vllm,
    "unsloth": unsloth,
}
