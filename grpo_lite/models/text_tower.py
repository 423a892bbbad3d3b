"""The text tower of a multimodal checkpoint, loaded alone as a causal language model.

Gemma 3 from 4B, Gemma 4, Qwen3.5 and Qwen-VL lie on disk as one class with a vision tower, its projector and the text
tower. Only the text tower is loaded here, under the names of the causal class (`model.layers.0 …`), so it trains,
decodes and merges as any other model, and the vision tower takes no memory. transformers does this by itself for
Qwen3.5 alone: for the others `AutoModelForCausalLM` gives the whole class, or none at all (Qwen-VL).
Read in transformers 5.23: `models/auto/auto_factory.py`, `conversion_mapping.py`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grpo_lite.errors import ModelError

# Text towers without a causal class of their own, and the model whose layers, names and arithmetic are the same for
# text: the three rotary positions of an image's token (mrope) are one and the same for a word.
_SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_MROPE = ("mrope_section", "mrope_interleaved", "type")  # beside `rope_type`, which holds the kind
# How checkpoints call the text tower (`language_model.model.layers …`, `model.language_model.layers …`), and the names
# in the causal class; in the form of transformers' `key_mapping`.
KEY_MAPPING = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
# Names that no text tower has: of the vision and audio towers, of projectors, and of heads for more tokens (mtp).
_BESIDE_TEXT = r"^(?!model\.(layers|embed_tokens|norm|per_layer)|lm_head\.)"
# Read from the whole model's config where it says so: the class with both towers does the same.
_SHARED = ("dtype", "eos_token_id", "tie_word_embeddings", "quantization_config")


def load_causal(folder: Path | str, **kwargs: Any) -> Any:
    """Return a checkpoint as a causal language model; of a multimodal one the text tower alone.

    Args:
        folder: config.json and safetensors.
        kwargs: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelError: weights of the text tower are missing, or under names that are not known.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=kwargs.get("trust_remote_code", False))
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # Gemma 2: transformers before 5.22 takes SDPA, which leaves out the cap.
        kwargs.setdefault("attn_implementation", "eager")
    tower = text_tower(config)
    if tower is None:
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(tower)]
    with _silent_about_other_towers(model_class):
        model, info = model_class.from_pretrained(
            folder, config=tower, key_mapping=KEY_MAPPING, output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"], key=str):
        raise ModelError(
            f"{folder}: {len(missing)} weights of the text tower ({model_class.__name__}) are not in the checkpoint "
            f"under a name that is known, for example {missing[0]}. Fetch it again, or give a text-only model."
        )
    return (model, info) if wants_info else model


def causal_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the config of what `load_causal` would load."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return text_tower(config) or config


def text_tower(config: Any) -> Any | None:
    """Return the text tower's config as a causal model's; None where it is no multimodal model, or has no such class.

    Args:
        config: transformers' config of the whole model; the returned one may share parts with it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

    text = getattr(config, "text_config", None)
    if not isinstance(text, PreTrainedConfig) or getattr(config, "is_encoder_decoder", False):
        return None
    if hasattr(config, "auto_map"):  # code that comes with the model decides by itself
        return None
    if text.model_type in _SAME_AS:
        text = _as_causal(text)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    for name in _SHARED:
        value = getattr(config, name, None)
        if value is not None:
            setattr(text, name, value)
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    return text


def causal_name(tensor: str) -> str:
    """Return the name that a checkpoint's tensor has in the causal class; other names stay."""
    for pattern, replacement in KEY_MAPPING.items():
        renamed = re.sub(pattern, replacement, tensor)
        if renamed != tensor:
            return renamed
    return tensor


def other_towers(tensors: Iterable[str]) -> dict[str, int]:
    """Return how many of a multimodal checkpoint's tensors belong to each part beside the text tower.

    Returns:
        Counts by part, such as {"vision_tower": 436, "multi_modal_projector": 2}.
    """
    names = list(tensors)
    beside = [name for name in names if causal_name(name) == name and not name.startswith("lm_head.")]
    if len(beside) == len(names) - sum(name.startswith("lm_head.") for name in names):  # Qwen2.5-VL: no prefix
        beside = [name for name in names if re.match(_BESIDE_TEXT, name)]
    return dict(Counter(name.removeprefix("model.").partition(".")[0] for name in beside))


def _as_causal(text: Any) -> Any:
    """Return a Qwen-VL text config as the one of Qwen, whose causal class computes the same for text."""
    from transformers import CONFIG_MAPPING

    kind = _SAME_AS[text.model_type]
    plain = CONFIG_MAPPING[kind]
    # PEFT reads the vocabulary's size again from the base's folder, by this class, whenever an adapter is saved, and
    # transformers knows the causal class by this class's name.
    tower_class = type(plain.__name__, (plain,), {"base_config_key": "text_config", "__module__": plain.__module__})
    values = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    rope = values.get("rope_parameters") or {}
    values["rope_parameters"] = {name: value for name, value in rope.items() if name not in _MROPE}
    return tower_class(**values)


@contextlib.contextmanager
def _silent_about_other_towers(model_class: Any) -> Iterator[None]:
    """Keep transformers from listing the vision tower's weights as unexpected; those of the text tower are listed."""
    before = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), _BESIDE_TEXT]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before
