"""Which architectures become GGUF, and how: metadata keys, tensor names, and the order of rotary rows.

Llama, Qwen2 and Qwen3 dense models, as llama.cpp reads them. Everything else is refused by name: a file that loads and
answers nonsense is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from grpo_lite.errors import ExportError

# transformers' class -> llama.cpp's architecture (gguf.MODEL_ARCH_NAMES)
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

_ROPE_TYPES = ("default", "llama3", "linear", "yarn")
OTHER_WAY = (
    "Convert the merged folder, which is complete, with llama.cpp's own convert_hf_to_gguf.py instead, or serve it "
    "with vLLM or transformers."
)


def architecture(config: Mapping[str, Any], where: str) -> str:
    """Return llama.cpp's name of a config's architecture.

    Raises:
        ExportError: an architecture, or a variant of it, that this converter does not write.
    """
    given = (config.get("architectures") or ["none"])[0]
    if given not in ARCHITECTURES:
        raise ExportError(
            f"{where}: architecture {given} cannot be exported to GGUF here. Allowed: {', '.join(ARCHITECTURES)}. "
            f"{OTHER_WAY}"
        )
    wrong = _unsupported(config)
    if wrong:
        raise ExportError(f"{where}: {given} with {wrong} cannot be exported to GGUF here. {OTHER_WAY}")
    return ARCHITECTURES[given]


def _unsupported(config: Mapping[str, Any]) -> str | None:
    rope = rope_parameters(config)
    if config.get("quantization_config"):
        return "quantised weights (quantization_config)"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act={config['hidden_act']}"
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        return "sliding-window attention"
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        return f"rope_type={rope.get('rope_type')}"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        return "partial rotary embeddings"
    if config.get("pretraining_tp", 1) not in (None, 1):
        return "pretraining_tp"
    return None


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters, from transformers 5's `rope_parameters` or the older `rope_scaling`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_architecture_keys(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the model's dimensions into a `gguf.GGUFWriter`."""
    import gguf

    heads = int(config["num_attention_heads"])
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    rope = rope_parameters(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(
            int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
        )


def tensor_names(arch: str, layers: int) -> Any:
    """Return gguf's map from transformers' tensor names to llama.cpp's."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(number, layers)


def rotary_heads(arch: str, name: str, config: Mapping[str, Any]) -> int | None:
    """Return the number of heads whose rows must be reordered in this tensor; None where they stay.

    transformers keeps the two halves of each rotary pair apart, llama.cpp's `llama` architecture next to each other.
    Qwen2 and Qwen3 have transformers' order in llama.cpp too.
    """
    if arch != "llama":
        return None
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    if ".k_proj." in name:
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


def interleave_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows head by head from [first half | second half] to alternating, (rows, …)."""
    rows, rest = weight.shape[0], weight.shape[1:]
    return weight.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(rows, *rest).contiguous()


def rope_frequency_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the divisors of Llama 3's rotary frequencies, (head_dim / 2,), or None without that scaling.

    Source: `_compute_llama3_parameters`, transformers 5.23.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_dim(config)
    frequency = float(rope["rope_theta"]) ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    wavelength = 2 * math.pi / frequency
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    trained = float(rope["original_max_position_embeddings"])
    smooth = (trained / wavelength - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelength > trained / low, factor, factors)
    return torch.where(wavelength < trained / high, 1.0, factors).to(torch.float32)
