"""The tensors of a GGUF: metadata keys, names and the order of rotary rows, then streamed a block of rows at a time.

Dense Llama, Qwen2 and Qwen3 models and LFM2, as llama.cpp reads them. Everything else is refused by name, or left to
llama.cpp's own converter (`convert`): a file that loads and answers nonsense is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_lite.errors import ExportError
from grpo_lite.export.safetensors import FLOATS, Shard, TensorSpec, open_checkpoint
from grpo_lite.models.shape import is_tied, layer_mixers, read_shape

# transformers' class -> llama.cpp's architecture (gguf.MODEL_ARCH_NAMES)
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Lfm2ForCausalLM": "lfm2",
}

_BLOCK_BYTES = 64 << 20  # of float32 rows in memory at once
_Q8_BLOCK = 32  # values that share a scale
_ROPE_TYPES = ("default", "llama3", "linear", "yarn")
OTHER_WAY = (
    "Let llama.cpp's own converter write it: LLAMA_CPP_CONVERT=/path/to/llama.cpp/convert_hf_to_gguf.py. "
    "Or serve the merged folder, which is complete, with vLLM or transformers."
)


class NotWrittenHereError(ExportError):
    """This writer does not know a model or its tokenizer; llama.cpp's own converter may."""


def architecture(config: Mapping[str, Any], where: str) -> str:
    """Return llama.cpp's name of a config's architecture.

    Raises:
        NotWrittenHereError: an architecture, or a variant of it, that this converter does not write.
    """
    given = (config.get("architectures") or ["none"])[0]
    if given not in ARCHITECTURES:
        raise NotWrittenHereError(
            f"{where}: architecture {given} cannot be exported to GGUF here. Allowed: {', '.join(ARCHITECTURES)}. "
            f"{OTHER_WAY}"
        )
    wrong = _unsupported(config)
    if wrong:
        raise NotWrittenHereError(f"{where}: {given} with {wrong} cannot be exported to GGUF here. {OTHER_WAY}")
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
    if config.get("conv_bias"):
        return "biases in its convolutions"
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

    shape = read_shape(config, "config.json")
    writer.add_block_count(shape.layers)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    heads = int(config["num_attention_heads"])
    key_heads = int(config.get("num_key_value_heads") or heads)
    writer.add_head_count(heads)
    if config.get("model_type") == "lfm2":  # a layer without key/value heads is a convolution
        mixers = layer_mixers(config)
        writer.add_head_count_kv([key_heads if mixer == "attention" else 0 for mixer in mixers])
        writer.add_shortconv_l_cache(int(config["conv_L_cache"]))
    else:
        writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or config.get("norm_eps") or 1e-6))
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


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the GGUF: where it comes from and how it is stored."""

    name: str
    shard: Shard
    spec: TensorSpec
    kind: Any  # gguf.GGMLQuantizationType
    heads: int | None  # whose rotary rows are reordered
    size_bytes: int


def plan_tensors(folder: Path, config: Mapping[str, Any], arch: str, kind: str) -> list[TensorPlan]:
    """Return every tensor with its llama.cpp name and storage, in file order.

    Args:
        kind: f16, bf16 or q8_0, for the matrices.

    Raises:
        ExportError: a tensor that the architecture has no place for, or embeddings at odds with the config.
    """
    names = tensor_names(arch, int(config["num_hidden_layers"]))
    plans: dict[str, TensorPlan] = {}
    for shard in open_checkpoint(folder):
        for spec in shard.tensors.values():
            if spec.name.endswith("rotary_emb.inv_freq"):  # old checkpoints carry it; it is computed
                continue
            name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
            if name == "output.weight" and is_tied(config):
                continue
            if name is None or spec.dtype not in FLOATS or not (len(spec.shape) in (1, 2) or is_convolution(spec)):
                raise ExportError(
                    f"{shard.path}: tensor {spec.name} ({spec.dtype}, {list(spec.shape)}) has no place in a GGUF of "
                    f"architecture {arch}. Merge again, or convert with llama.cpp's own converter."
                )
            stored = _storage(spec, kind)
            heads = rotary_heads(arch, spec.name, config)
            plans[name] = TensorPlan(name, shard, spec, stored, heads, _stored_bytes(spec, stored))
    rows = plans["token_embd.weight"].spec.shape[0] if "token_embd.weight" in plans else None
    if rows != config["vocab_size"]:
        raise ExportError(
            f"{folder}: the embedding has {rows} rows, config.json says vocab_size {config['vocab_size']}. Merge again."
        )
    if not is_tied(config) and "output.weight" not in plans:
        raise ExportError(f"{folder}: there is no lm_head.weight, and config.json does not tie it. Merge again.")
    return list(plans.values())


def is_convolution(spec: TensorSpec) -> bool:
    """Return whether a tensor is the kernel of a short convolution, (channels, 1, length)."""
    return len(spec.shape) == 3 and spec.shape[1] == 1 and spec.name.endswith(".conv.conv.weight")


def stored_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return a tensor's shape in a GGUF: a short convolution's is (channels, length)."""
    return (spec.shape[0], spec.shape[2]) if is_convolution(spec) else tuple(spec.shape)


def _storage(spec: TensorSpec, kind: str) -> Any:
    from gguf import GGMLQuantizationType as Type

    if len(spec.shape) == 1 or is_convolution(spec):
        return Type.F32  # llama.cpp computes norms, biases and short convolutions in it
    if kind == "q8_0":
        return Type.Q8_0 if spec.shape[1] % _Q8_BLOCK == 0 else Type.F16  # as llama.cpp does for odd widths
    return {"f16": Type.F16, "bf16": Type.BF16}[kind]


def _stored_bytes(spec: TensorSpec, stored: Any) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[stored]
    return math.prod(spec.shape) // block * size


def write_tensors(writer: Any, plans: Sequence[TensorPlan], config: Mapping[str, Any]) -> int:
    """Write header, metadata, tensor list and tensors through a `gguf.GGUFWriter`, close it, return their number.

    Raises:
        ExportError: a weight is not finite, or beyond float16 where that was asked for.
    """
    factors = rope_frequency_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", list(factors.shape), np.dtype(np.float32), factors.nbytes)
    for plan in plans:
        writer.add_tensor_info(
            plan.name, list(stored_shape(plan.spec)), np.dtype(np.float32), plan.size_bytes, plan.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    expected = file.tell() + sum(
        writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values()
    )
    try:
        if factors is not None:
            file.write(factors.numpy().tobytes())
            writer.write_padding(file, factors.nbytes)
        for plan in plans:
            for block in _blocks(plan):
                file.write(block)
            writer.write_padding(file, plan.size_bytes)
        if file.tell() != expected:
            raise ExportError(f"{file.name}: {file.tell()} bytes were written, {expected} announced. Report this.")
    finally:
        writer.close()
    return len(plans) + (factors is not None)


def _blocks(plan: TensorPlan) -> Iterator[bytes]:
    """Read a tensor a block of rows at a time, reorder and encode it."""
    spec = plan.spec
    rows = spec.shape[0]
    per_row = 4 * math.prod(spec.shape[1:])
    step = rows if plan.heads else max(1, _BLOCK_BYTES // per_row)
    for start in range(0, rows, step):
        block = plan.shard.read(spec, start, start + step)
        if plan.heads:
            block = interleave_halves(block, plan.heads)
        yield _encode(block, plan)


def _encode(block: torch.Tensor, plan: TensorPlan) -> bytes:
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    where = f"{plan.shard.path}: tensor {plan.spec.name}"
    if not bool(torch.isfinite(block).all()):
        raise ExportError(f"{where} holds NaN or infinity. Train or merge it again.")
    if plan.kind == Type.BF16 and block.dtype == torch.bfloat16:
        return block.view(torch.int16).numpy().tobytes()
    if plan.kind == Type.BF16:
        return block.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    if plan.kind == Type.F32:
        return block.to(torch.float32).numpy().tobytes()
    if plan.kind == Type.F16:
        half = block.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ExportError(
                f"{where} has values beyond float16's 65504. Allowed for it: --gguf bf16, q8_0 and the K-quants."
            )
        return half.numpy().tobytes()
    return quants.quantize(block.to(torch.float32).numpy(), plan.kind).tobytes()
