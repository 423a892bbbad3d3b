"""Models of random weights in real shapes, made on the device layer by layer: no Hub, and 1.5B in seconds on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_lite.models.device import detect_device
from grpo_lite.models.load import leave_out_cudnn_attention


def random_model(
    config: dict[str, Any],
    load_in: str,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
) -> nn.Module:
    """Return a causal language model with random weights on the device, its linear layers in NF4 where asked for.

    Args:
        config: as in config.json (`grpo_lite.models.config.KNOWN`).
        load_in: "4bit" or "16bit".
        device: "cuda" or "cpu".
        dtype: of what is not quantized, and of the computation.
        layers: fewer than the config's, for a try on a CPU.
    """
    from transformers import AutoModelForCausalLM

    leave_out_cudnn_attention(detect_device())
    with torch.device(device), _linear_layers_on_meta():
        model = AutoModelForCausalLM.from_config(_config(config, layers), dtype=dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        model.tie_weights()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.weight.is_meta:
            weight = torch.randn(layer.weight.shape, dtype=dtype, device=device).mul_(0.02)
            bias = (
                None if layer.bias is None else nn.Parameter(torch.zeros(layer.bias.shape, dtype=dtype, device=device))
            )
            if load_in == "4bit" and layer is not head:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, four_bit(weight, bias, dtype).to(device))
            else:
                layer.weight, layer.bias = nn.Parameter(weight), bias
    if load_in == "4bit":
        declare_quantized(model, dtype, device)
    return model


def write_random_model(config: dict[str, Any], folder: Path, device: str, layers: int | None = None) -> Path:
    """Write a random bfloat16 model with a byte tokenizer, for what loads a model by its folder; return the folder."""
    from tests.tiny import tiny_tokenizer

    if not (folder / "config.json").exists():
        random_model(config, "16bit", device, torch.bfloat16, layers).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def write_config(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> Path:
    """Write config.json alone, for engines that make weights up themselves; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _config(config, None)
    made.architectures = [type(random_head(made)).__name__]
    made.dtype = dtype
    (folder / "config.json").write_text(json.dumps(made.to_dict(), default=str) + "\n")
    return folder


def random_head(config: Any) -> nn.Module:
    """Return the model of a config without any weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _config(config: dict[str, Any], layers: int | None) -> Any:
    from transformers import AutoConfig

    sizes = {key: value for key, value in config.items() if key != "model_type"}
    if layers:
        sizes["num_hidden_layers"] = layers
    return AutoConfig.for_model(config["model_type"], **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)


@contextmanager
def _linear_layers_on_meta() -> Iterator[None]:
    """Make linear layers without weights, so that a model never exists in 16 bit as a whole."""
    plain = nn.Linear.__init__
    nn.Linear.__init__ = lambda self, *args, **kwargs: plain(self, *args, **(kwargs | {"device": "meta"}))  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.__init__ = plain  # type: ignore[method-assign]


def four_bit(weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    """Return the layer in NF4; it is quantized when it is moved to its device."""
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    with torch.device("meta"):  # no weights of its own, which would be drawn on the CPU
        layer = bnb.nn.Linear4bit(in_features, out_features, bias is not None, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = bias
    return layer


def declare_quantized(model: Any, dtype: torch.dtype, device: str) -> None:
    """Say what `from_pretrained` says of a quantized model; transformers asks whether it can be trained."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = settings.quant_method
    if device == "cuda":
        model.hf_device_map = {"": 0}
