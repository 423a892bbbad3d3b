"""Random models of the families in docs/models.md, small but not trivial: four layers of width 256."""

from __future__ import annotations

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
WINDOW = 64  # shorter than the bench's prompts, so that it matters
TWO_KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
SLIDES: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": TWO_KINDS}
GEMMA: dict[str, Any] = SLIDES | {"query_pre_attn_scalar": 32}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 2048,
}
HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
DELTA: dict[str, Any] = {
    "layer_types": HYBRID,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MAMBA: dict[str, Any] = {
    "layer_types": HYBRID,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "num_local_experts": 0,
    "shared_intermediate_size": 768,
    "logits_scaling": 4.0,
}
# name on the command line -> name of the configuration class and of the model's without their endings, settings
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "Llama", {}),
    "mistral": ("Mistral", "Mistral", {"sliding_window": WINDOW}),
    "ministral": ("Ministral", "Ministral", SLIDES),
    "olmo3": ("Olmo3", "Olmo3", SLIDES),
    "smollm3": ("SmolLM3", "SmolLM3", {}),
    "gemma3": ("Gemma3Text", "Gemma3", GEMMA),
    "gemma4": (
        "Gemma4Text",
        "Gemma4",
        SLIDES | {"global_head_dim": 64, "vocab_size_per_layer_input": 4096, "hidden_size_per_layer_input": 32},
    ),
    "gemma2": ("Gemma2", "Gemma2", GEMMA | {"attn_implementation": "eager"}),
    "cohere2": ("Cohere2", "Cohere2", SLIDES),
    "granite": ("Granite", "Granite", {"logits_scaling": 4.0}),
    "phi3": ("Phi3", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2048}),
    "gpt-oss": ("GptOss", "GptOss", SLIDES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
    "lfm2": ("Lfm2", "Lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "qwen3.5": ("Qwen3_5Text", "Qwen3_5", DELTA),
    "granite4": ("GraniteMoeHybrid", "GraniteMoeHybrid", MAMBA),
}


def family(name: str) -> Any:
    """Return a random bfloat16 model of a family with LoRA r16 on all linear layers, on the GPU where there is one."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config_class, model_class, settings = FAMILIES[name]
    config = getattr(transformers, f"{config_class}Config")(**(SIZES | settings))
    torch.manual_seed(0)
    model = getattr(transformers, f"{model_class}ForCausalLM")(config).to(torch.bfloat16)
    if torch.cuda.is_available():
        model = model.cuda()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
