"""load_model: the quantised base and its tokenizer; the sole home of bitsandbytes.

Backend `hf`: transformers + peft + bitsandbytes, on CPU and CUDA. The adapter is added by the trainer (training) or by
`load_trained` (evaluation), so that KL against the base is the same weights with the adapter disabled.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from grpo_lite.commands import hint, hint_setup
from grpo_lite.engine import attention
from grpo_lite.engine.quantised import keep_odd_widths_unpacked, keep_weights_unpacked
from grpo_lite.errors import ModelError, first_line
from grpo_lite.models.base import Base, trusts_remote_code
from grpo_lite.models.chat_template import set_chat_template
from grpo_lite.models.device import Device
from grpo_lite.models.lora_targets import choose_targets
from grpo_lite.models.text_tower import load_causal
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import ModelSection, Recipe

logger = logging.getLogger(__name__)
CUDNN_ATTENTION_VARIABLES = ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_PREFERRED")  # read by PyTorch


def load_tokenizer(base: Base) -> Any:
    """Return the base model's tokenizer, padding on the left, with the recipe's chat template if it has one.

    Raises:
        ModelError: the folder holds no tokenizer, or the chat template is at fault.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, padding_side="left", trust_remote_code=trusts_remote_code(base.section)
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.id: {base.section.id} has no usable tokenizer: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if base.section.chat_template:
        set_chat_template(tokenizer, base.section.chat_template)
    return tokenizer


def load_model(base: Base) -> Any:
    """Return the base model, quantised as the recipe says, without an adapter; of a multimodal one the text tower.

    Raises:
        ModelError: not found, not loadable, or not quantisable here.
    """
    import torch

    section, device = base.section, base.device
    weights, dtype = base.weights, getattr(torch, base.dtype)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusts_remote_code(section)}
    if section.attn_implementation:
        kwargs["attn_implementation"] = section.attn_implementation
    if section.load_in in ("4bit", "8bit"):
        kwargs["quantization_config"] = _quantization(section, dtype, device)
    if device.kind == "cuda":
        kwargs["device_map"] = {"": this_process().local}  # one card, also where two are visible (Kaggle T4 x 2)
    leave_out_cudnn_attention(device)
    try:
        model = load_causal(weights, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"model: {section.id} cannot be loaded ({section.load_in}, {dtype}) on {device.name}: {first_line(error)}"
        ) from error
    model.config.use_cache = True
    return model


def leave_out_cudnn_attention(device: Device) -> None:
    """Let PyTorch choose its other attention kernels on CUDA, unless the environment says which it should prefer.

    PyTorch 2.11 and later prefer cuDNN's on Hopper and Blackwell. It builds a plan (23-37 ms) for each new pair of
    query and key lengths, and nearly every micro-batch of completions has new lengths.
    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `check_prefer_cudnn_attention`.
    """
    import torch

    if device.kind == "cuda" and not any(name in os.environ for name in CUDNN_ATTENTION_VARIABLES):
        switch = getattr(torch.backends.cuda, "enable_cudnn_sdp", None)
        if switch is not None:
            switch(False)


def _quantization(section: ModelSection, dtype: Any, device: Device) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.load_in: {section.load_in} is given, but bitsandbytes is not installed here. "
            f"Run `{hint_setup()}`, or set model.load_in=16bit."
        )
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    backends = getattr(bitsandbytes, "supported_torch_devices", {"cpu", "cuda"})
    if device.kind not in backends:
        raise ModelError(
            f"model.load_in: {section.load_in} is given, but bitsandbytes {bitsandbytes.__version__} quantises on "
            f"{', '.join(sorted(backends))}, not on {device.kind}. Set model.load_in=16bit."
        )
    if section.load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def lora_config(recipe: Recipe, model: Any = None) -> Any:
    """Return peft's LoraConfig of the recipe.

    Args:
        recipe: its `lora`.
        model: the base that it is for, its weights perhaps on the meta device; None: no layers are chosen yet.

    Raises:
        ModelError: peft refuses the combination of values, or the model's layers do not allow them.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig(task_type="CAUSAL_LM", **recipe.lora_arguments)
    except Exception as error:  # peft uses some values without checking them first
        raise ModelError(f"lora: peft refuses these values: {first_line(error)}") from None
    if model is not None:
        choose_targets(config, model)
    return config


def lora_to_float32(model: Any) -> None:
    """Keep every trainable weight in float32, in place.

    TRL 1.14-1.16 cast the adapter of a quantised base to bfloat16: GradScaler then fails under fp16 (no bfloat16
    kernel), and steps of lr × 1 below 2⁻⁸ of a weight are rounded away.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def load_for_sampling(base: Base, rollout: str) -> Any:
    """Return the base without an adapter, ready for the decoding that training uses (the recipe's `rollout`)."""
    model = load_model(base)
    keep_weights_unpacked(model)
    if rollout == "shared" and attention.obstacle(model) is None:
        attention.install(model)
    return model


def load_trained(base: Base, rollout: str, adapter: Path) -> Any:
    """Return the base with a trained adapter on it, for evaluation; `model.disable_adapter()` gives the base.

    Raises:
        ModelError: the adapter is missing or does not fit the base.
    """
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(f"{adapter}: there is no trained adapter. Train first: {hint('train', run=adapter.parent)}")
    model = load_for_sampling(base, rollout)
    _require_modules(model, adapter)
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{adapter}: does not load onto {base.section.id}: {first_line(error)}") from error


def _require_modules(model: Any, adapter: Path) -> None:
    """Refuse an adapter of modules that the model lacks: PEFT would leave them out with a warning."""
    from safetensors import SafetensorError, safe_open

    modules = {name for name, _ in model.named_modules()}
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if ".lora_" in name]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return  # PEFT says what is wrong
    strangers = [name for name in names if name.removeprefix("base_model.model.").partition(".lora_")[0] not in modules]
    if strangers:
        raise ModelError(
            f"{adapter}: {len(strangers)} of its {len(names)} tensors belong to modules that "
            f"{type(model).__name__} does not have, for example {strangers[0]}. It was trained on another class: of a "
            "multimodal model the text tower is loaded alone. Merge it, and use the merged model."
        )


def load_merged(folder: Path, device: Device) -> Any:
    """Return a saved model, ready for shared decoding.

    In its own dtype, unless the device only emulates bfloat16: then in float32 on a CPU, and on a GPU in float16, or in
    float32 where the model is known to overflow in float16.
    """
    import torch

    saved = Base(ModelSection(id=str(folder)), device, folder)  # type: ignore[call-arg]
    dtype = "auto" if device.bfloat16 else getattr(torch, saved.dtype)
    place = {"device_map": {"": 0}} if device.kind == "cuda" else {}
    leave_out_cudnn_attention(device)
    model = load_causal(folder, dtype=dtype, **place).eval()
    keep_odd_widths_unpacked(model)
    if attention.obstacle(model) is None:
        attention.install(model)
    return model
