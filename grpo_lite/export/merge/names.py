"""Names of tensors: those of the model that was trained, and those of the checkpoint that is merged onto.

transformers renames and joins tensors while it loads: the text tower of a multimodal checkpoint loses its prefix
(`models/text_tower.py`), Nemotron-H's `backbone` becomes `model`, a mixture's experts become one tensor. The same rules
are asked here for every tensor of the checkpoint, so that an adapter's module finds its weight by name.
Source: transformers 5.23, `conversion_mapping.py` and `core_model_loading.rename_source_key`; PEFT uses both too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpo_lite.models.text_tower import causal_name, other_towers, text_tower


@dataclass(frozen=True)
class TensorNames:
    """A checkpoint's tensors by the name that the trained model gives them."""

    of_model: Mapping[str, str]  # checkpoint → model; tensors that are joined with others are not in it
    joined: Mapping[str, str] = field(default_factory=dict)  # checkpoint → the model's tensor that it is a part of
    other_towers: Mapping[str, int] = field(default_factory=dict)  # tensors by part beside the text tower


def tensor_names(folder: Path, tensors: Iterable[str]) -> TensorNames:
    """Return how the tensors of a checkpoint are called in the causal model that is trained.

    Args:
        folder: with the checkpoint's config.json.
        tensors: their names in the checkpoint.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    tensors = list(tensors)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError):  # code that comes with the model: its names are the checkpoint's
        return TensorNames({name: name for name in tensors})
    tower = text_tower(config)
    config = tower or config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if known else ""
    rules = get_checkpoint_conversion_mapping(class_name) or get_checkpoint_conversion_mapping(config.model_type) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_model: dict[str, str] = {}
    joined: dict[str, str] = {}
    for name in tensors:
        renamed, part = rename_source_key(causal_name(name) if tower else name, renamings, converters)
        (of_model if part is None else joined)[name] = renamed
    return TensorNames(of_model, joined, other_towers(tensors) if tower else {})
