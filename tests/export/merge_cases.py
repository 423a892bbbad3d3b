"""Tiny random models and adapters for the merge tests, made with transformers and PEFT themselves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

VOCAB = 40
_SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, **_HEADS),
    "llama-tied": LlamaConfig(**_SIZES, **_HEADS, tie_word_embeddings=True),
    "wide": LlamaConfig(**(_SIZES | {"hidden_size": 128, "intermediate_size": 256}), **_HEADS),
    "qwen2": Qwen2Config(**_SIZES, **_HEADS),  # with biases on q, k, v
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, n_inner=24),  # Conv1D, tied
}


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard_bytes: int = 10**9) -> Path:
    """Save a random model; small `shard_bytes` shard it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def make_adapter(folder: Path, base: Path, scale: float = 0.1, **lora: Any) -> Path:
    """Save an adapter whose every trainable tensor was moved by random numbers, as PEFT saves it."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings and fan_in_fan_out
        model = get_peft_model(load(base, torch.float32), LoraConfig(**lora))
        torch.manual_seed(1)
        seen: set[int] = set()
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                size = 0.2 if "magnitude" in name else 1.0
                parameter.data.add_(torch.randn_like(parameter) * scale * size)
        model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder in a dtype, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_with_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Load base + adapter as PEFT does, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base, dtype), adapter).eval()


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights of PEFT's own merge onto the base in `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_with_adapter(base, adapter, dtype).merge_and_unload().state_dict()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of a fixed batch, (2, 12, V)."""
    with torch.no_grad():
        ids = torch.arange(24).reshape(2, 12) * 7 % VOCAB
        return model(input_ids=ids).logits


def edit_config(folder: Path, name: str = "adapter_config.json", **changes: Any) -> None:
    """Change keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Any, name: str = "adapter_model.safetensors") -> None:
    """Pass a file's tensors through a function and save what it returns."""
    save_file(change(load_file(folder / name)), folder / name)
