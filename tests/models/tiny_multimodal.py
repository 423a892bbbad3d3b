"""Tiny random multimodal checkpoints on disk, laid out as the released ones: two text layers, one vision layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY = 320
# Kinds by model_type: how the file names the text tower, and the causal class that the tower is loaded as.
KINDS = {
    "gemma3": ("language_model.model.", "Gemma3ForCausalLM"),
    "gemma4": ("model.language_model.", "Gemma4ForCausalLM"),
    "qwen3_5": ("model.language_model.", "Qwen3_5ForCausalLM"),
    "qwen2_5_vl": ("model.", "Qwen2ForCausalLM"),
    "qwen3_vl": ("model.language_model.", "Qwen3ForCausalLM"),
    "mistral3": ("language_model.model.", "MistralForCausalLM"),
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MORE_TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "qwen3_5": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": _MROPE
        | {"mrope_section": [1, 0, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    },
    "qwen2_5_vl": {"rope_parameters": dict(_MROPE)},
    "qwen3_vl": {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
    "mistral3": {"model_type": "mistral", "sliding_window": None},
}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
_VISION: dict[str, dict[str, Any]] = {
    "gemma3": _SIZES | {"image_size": 16, "patch_size": 4},
    "gemma4": _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16},
    "qwen3_5": _QWEN | {"num_position_embeddings": 16},
    "qwen2_5_vl": _QWEN | {"fullatt_block_indexes": [0], "window_size": 16},
    "qwen3_vl": _QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "mistral3": _SIZES | {"model_type": "pixtral", "image_size": 16, "patch_size": 4, "head_dim": 8},
}


def save_multimodal(
    folder: Path, kind: str = "gemma3", dtype: torch.dtype = torch.float32, **text: Any
) -> PreTrainedModel:
    """Save a random multimodal model and return it; `text` overrides the text tower's config."""
    settings: dict[str, Any] = {
        "text_config": _TEXT | _MORE_TEXT[kind] | text,
        "vision_config": _VISION[kind],
        "tie_word_embeddings": kind != "qwen3_vl",
    }
    if kind == "gemma3":
        settings["mm_tokens_per_image"] = 4
    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return model.eval()
