"""The plan of a merge: which of the base's tensors change, and how. Names and shapes are matched before any writing.

The unmerged model (base + adapter, as PEFT computes it) is the truth. Where it uses one stored tensor in two ways (tied
embeddings of which the adapter changes one side), the plan unties them: the output head becomes a tensor of its own.
Adapter and base are matched by the trained model's names; what is written keeps the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from grpo_lite.errors import ExportError
from grpo_lite.export.merge.adapter import Adapter, LoraFactors
from grpo_lite.export.merge.names import TensorNames
from grpo_lite.export.merge.trained_base import TrainedBase
from grpo_lite.export.safetensors import FLOATS, Shard, TensorSpec, row_blocks
from grpo_lite.models.text_tower import causal_name

# transformers 5.23's users of Conv1D, which stores (in, out) where nn.Linear stores (out, in), and its layers' names.
_CONV1D_MODELS = frozenset(["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"])
_CONV1D_LAYERS = frozenset(["c_attn", "c_proj", "c_fc", "q_attn"])
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")  # names of output heads that are stored
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tokens_embed")

# A checkpoint's tensors by the trained model's names.
Base = Mapping[str, tuple[TensorSpec, Shard]]


@dataclass(frozen=True)
class Change:
    """How one output tensor is made from the base tensor `source`."""

    source: TensorSpec
    shard: Shard  # where the source lies
    lora: LoraFactors | None = None
    transposed: bool = False  # the weight is stored (in, out), as in Conv1D and embeddings
    replacement: TensorSpec | None = None  # modules_to_save: the adapter's own tensor, in full
    weight: Callable[[], torch.Tensor] | None = None  # (out, in), in place of the stored one: as training read it


@dataclass(frozen=True)
class MergePlan:
    """Changes by the checkpoint's tensor names; `added` are tensors that it does not store under their own names."""

    changes: Mapping[str, Change]
    added: Mapping[str, Change]
    untied: bool


def make_plan(
    config: Mapping[str, Any],
    shards: list[Shard],
    adapter: Adapter,
    names: TensorNames,
    trained: TrainedBase | None = None,
) -> MergePlan:
    """Match every tensor of the adapter to the base.

    Args:
        config: the base's config.json.
        shards: its checkpoint.
        adapter: what is merged.
        names: how the trained model calls the checkpoint's tensors.
        trained: the base as 4-bit training read it, to merge onto; None: the weights in the checkpoint.

    Raises:
        ExportError: names or shapes that do not match, base tensors that are not floats, layers the adapter lacks,
            4-bit layers that the checkpoint stores in another way.
    """
    stored = {name: (spec, shard) for shard in shards for name, spec in shard.tensors.items()}
    base = {names.of_model.get(name, name): place for name, place in stored.items()}
    pair = _tied_pair(config, base)
    changes: dict[str, Change] = {}  # by the trained model's names
    added: dict[str, Change] = {}
    faults: list[str] = []
    for name, update in _updates(adapter):
        target = _resolve(name, base)
        if target is not None:
            (spec, shard), book = base[target], changes
        elif pair and name == pair[0]:
            (spec, shard), book, target = base[pair[1]], added, name
        else:
            faults.append(f"{name}: {_absence(name, names)}")
            continue
        change = _check_fit(update, spec, shard, config, faults, name)
        if change is not None:
            book[target] = change
    faults += _copies_that_differ(adapter, base, pair)
    faults += _missing_layers(config, base, changes, adapter)
    if faults:
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ExportError(
            f"{adapter.shard.path}: does not fit the base ({len(faults)} faults):\n"
            + "\n".join(f"  {fault}" for fault in faults[:8])
            + more
            + f"\nExpected: the base it was trained on (recorded: {adapter.config.get('base_model_name_or_path')!r}). "
            "Give that base, at the same revision."
        )
    if trained and (faults := _read_as_trained(changes, base, config, names, trained)):
        raise ExportError(
            f"{len(faults)} of {len(trained.shapes)} layers that training read in 4 bits have no tensor of their own "
            f"in the base, for example {faults[0]}. Merge onto the original weights instead."
        )
    if pair:
        return _tie(adapter, changes, added, pair)
    # Head and embedding stored apart: they no longer are equal once either changes, whatever the config says.
    touched = any(name in _HEADS or name.split(".")[-2] in _EMBEDDINGS for name in changes)
    return _plan(changes, added, untied=touched and config.get("tie_word_embeddings") is not False)


def _read_as_trained(
    changes: dict[str, Change], base: Base, config: Mapping[str, Any], names: TensorNames, trained: TrainedBase
) -> list[str]:
    """Let every 4-bit layer have the weight that training read, adapted or not; return what does not fit."""
    faults = []
    for layer, shape in trained.shapes.items():
        name = f"{layer}.weight"
        target = _resolve(name, base)
        if target is None:
            faults.append(f"{name}: {_absence(name, names)}")
            continue
        spec, shard = base[target]
        transposed = _is_conv1d(config, name, (shape[0], shape[1]), spec)
        if spec.shape != (shape[::-1] if transposed else shape):
            faults.append(f"{name}: {list(shape)} in training, {list(spec.shape)} in the base")
            continue
        change = changes.get(target) or Change(spec, shard, transposed=transposed)
        changes[target] = replace(change, weight=partial(trained.weight, layer))
    return faults


def _plan(changes: Mapping[str, Change], added: Mapping[str, Change], untied: bool) -> MergePlan:
    return MergePlan({change.source.name: change for change in changes.values()}, added, untied)


def _updates(adapter: Adapter) -> list[tuple[str, LoraFactors | TensorSpec]]:
    return [
        *((f"{module}.weight", factors) for module, factors in adapter.lora.items()),
        *adapter.full.items(),
    ]


def _resolve(name: str, base: Base) -> str | None:
    """Return the base's name of a model's tensor.

    Checkpoints such as gpt2's omit the prefix (`transformer.`). An adapter that was trained on the whole multimodal
    class has the prefix of the text tower.
    """
    candidates = (name, name.partition(".")[2], causal_name(name))
    return next((candidate for candidate in candidates if candidate in base), None)


def _absence(name: str, names: TensorNames) -> str:
    """Return why a tensor of the trained model cannot be written."""
    module = name.rpartition(".")[0]
    parts = [stored for stored, whole in names.joined.items() if whole in (name, module)]
    if parts:
        return f"the base stores it in {len(parts)} tensors ({parts[0]}, …), which a merge cannot write"
    return "the base has no such tensor"


def _check_fit(
    update: LoraFactors | TensorSpec,
    spec: TensorSpec,
    shard: Shard,
    config: Mapping[str, Any],
    faults: list[str],
    name: str,
) -> Change | None:
    """Check dtype and shapes of one change, appending to `faults` what is wrong."""
    if spec.dtype not in FLOATS:
        faults.append(f"{name}: the base stores it as {spec.dtype} (quantised); a merge needs F32, F16 or BF16")
        return None
    if isinstance(update, TensorSpec):
        if update.shape != spec.shape:
            hint = " (was the vocabulary resized?)" if update.shape[1:] == spec.shape[1:] else ""
            faults.append(f"{name}: {list(update.shape)} in the adapter, {list(spec.shape)} in the base{hint}")
            return None
        return Change(spec, shard, replacement=update)
    shape = (update.b.shape[0], update.a.shape[1])  # (out, in)
    transposed = update.embedding or _is_conv1d(config, name, shape, spec)
    expected = shape[::-1] if transposed else shape
    if spec.shape != expected:
        faults.append(f"{name}: the adapter changes {list(expected)}, the base has {list(spec.shape)}")
        return None
    if update.magnitude is not None and update.magnitude.shape not in ((shape[0],), (1, shape[0])):
        faults.append(f"{name}: lora_magnitude_vector has shape {list(update.magnitude.shape)}, not [{shape[0]}]")
        return None
    return Change(spec, shard, lora=update, transposed=transposed)


def _is_conv1d(config: Mapping[str, Any], name: str, shape: tuple[int, int], spec: TensorSpec) -> bool:
    if shape[0] != shape[1]:
        return spec.shape == shape[::-1]
    # A square weight does not show its orientation; PEFT goes by the layer's class and so does this table.
    return config.get("model_type") in _CONV1D_MODELS and name.split(".")[-2] in _CONV1D_LAYERS


def _copies_that_differ(adapter: Adapter, base: Base, pair: tuple[str, str] | None) -> list[str]:
    """PEFT saves a targeted embedding's base weight along; it must be the base's, else the base is another one."""
    faults = []
    for name, copy in adapter.copies.items():
        target = _resolve(name, base) or (pair[1] if pair and name == pair[0] else None)
        if target is None or base[target][0].shape != copy.shape:
            faults.append(
                f"{name}: the adapter was trained on an embedding of shape {list(copy.shape)}, not in the base"
            )
        elif not _equal(base[target][1], base[target][0], adapter.shard, copy):
            faults.append(f"{name}: the adapter was trained on another embedding than the base's")
    return faults


def _missing_layers(
    config: Mapping[str, Any], base: Base, changes: Mapping[str, Change], adapter: Adapter
) -> list[str]:
    """Name modules that the adapter changes in other layers but not in this one: a sign of a cut-off adapter."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    chosen = adapter.config.get("layers_to_transform") is not None or adapter.config.get("exclude_modules")
    if chosen or not isinstance(layers, int) or not isinstance(adapter.config["target_modules"], list):
        return []
    patterns = {_without_layer(name)[0] for name, change in changes.items() if change.lora is not None}
    # Gemma 3n's and 4's last layers take the keys and values of earlier ones, and the model drops their own.
    first_sharing = layers - (config.get("num_kv_shared_layers") or 0)
    faults = []
    for name in base:
        pattern, layer = _without_layer(name)
        named = any(f".{name}".endswith(f".{target}.weight") for target in adapter.config["target_modules"])
        dropped = layer is not None and layer >= first_sharing and re.search(r"\.[kv]_proj\.", name)
        expected = pattern in patterns and layer is not None and layer < layers and not dropped
        if named and expected and name not in changes:
            faults.append(f"{name}: the adapter lacks its lora_A and lora_B, though it has those of other layers")
    return faults


def _without_layer(name: str) -> tuple[str, int | None]:
    match = re.search(r"\.(\d+)\.|^(\d+)\.", f".{name}")
    if not match:
        return name, None
    return f".{name}"[: match.start()] + ".*." + f".{name}"[match.end() :], int(match[1] or match[2])


def _tied_pair(config: Mapping[str, Any], base: Base) -> tuple[str, str] | None:
    """Return (head, stored embedding) where the checkpoint stores the output head only as the embedding.

    Every decoder of transformers 5.23 that ties its head calls it lm_head (their `_tied_weights_keys`).
    """
    if config.get("tie_word_embeddings") is False or any(name in base for name in _HEADS):
        return None
    embeddings = [name for name in base if name.split(".")[-2:] in [[layer, "weight"] for layer in _EMBEDDINGS]]
    return (_HEADS[0], embeddings[0]) if len(embeddings) == 1 else None


def _tie(adapter: Adapter, changes: dict[str, Change], added: dict[str, Change], pair: tuple[str, str]) -> MergePlan:
    """Decide whether the head still is the embedding after the merge; if not, give it a tensor of its own."""
    head, embedding = pair
    head_change, embedding_change = added.get(head), changes.get(embedding)
    if head_change is None and embedding_change is None:
        return _plan(changes, added, untied=False)
    loaded_in_place = [
        change
        for name, change in ((head, head_change), (embedding, embedding_change))
        if change is not None and change.replacement is not None and not adapter.is_module_to_save(name)
    ]
    if loaded_in_place:  # PEFT loads such a tensor into the shared parameter, so both sides change
        return _plan({**changes, embedding: loaded_in_place[-1]}, {}, untied=False)
    if head_change and embedding_change and _same_change(adapter, head_change, embedding_change):
        return _plan(changes, {}, untied=False)
    if head_change is None and embedding_change is not None:
        head_change = Change(embedding_change.source, embedding_change.shard)  # the head stays the base's
    return _plan(changes, {head: head_change} if head_change else {}, untied=True)


def _same_change(adapter: Adapter, head: Change, embedding: Change) -> bool:
    """Whether PEFT trained both sides as one (`ensure_weight_tying`): one's A and B are the other's B and A."""
    read = adapter.shard.read
    if head.replacement and embedding.replacement:
        return _equal(adapter.shard, head.replacement, adapter.shard, embedding.replacement)
    if head.lora is None or embedding.lora is None or head.lora.magnitude or embedding.lora.magnitude:
        return False
    return (
        head.lora.scaling == embedding.lora.scaling
        and torch.equal(read(head.lora.a), read(embedding.lora.b).T)
        and torch.equal(read(head.lora.b), read(embedding.lora.a).T)
    )


def _equal(ours: Shard, our_spec: TensorSpec, theirs: Shard, their_spec: TensorSpec) -> bool:
    """Whether two tensors hold the same values once rounded to the coarser of their dtypes, read block by block."""
    for start, end in row_blocks(our_spec.shape):
        one, other = ours.read(our_spec, start, end), theirs.read(their_spec, start, end)
        if not (torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)):
            return False
    return True
