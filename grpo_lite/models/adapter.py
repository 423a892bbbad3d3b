"""Saved adapters: the one that a training starts from (`lora.init_from`), and a run's own that is scored for a while.

The first is checked before the base's weights are read: what a fresh adapter of the recipe would look like is taken
from the model's config alone. All differences are named in one message.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lite.errors import ExportError, ModelError, first_line
from grpo_lite.files.atomic import read_record
from grpo_lite.files.hub import hub_unreachable
from grpo_lite.files.manifest import MANIFEST_NAME, fault_in, read_manifest, sha256_of
from grpo_lite.models.base import Base, is_folder, trusts_remote_code
from grpo_lite.models.load import lora_config
from grpo_lite.models.snapshot import fetch_snapshot
from grpo_lite.models.text_tower import causal_config
from grpo_lite.models.unsloth import ALL_LINEAR, uses_unsloth
from grpo_lite.recipe.load import read_yaml
from grpo_lite.recipe.overrides import yaml_text
from grpo_lite.recipe.recipe import Recipe

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
KEY = "lora.init_from"

# Keys of LoraConfig that decide what the adapter's tensors mean.
_MEANING = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "modules_to_save", "rank_pattern",
            "alpha_pattern", "layers_to_transform")  # fmt: skip
# Initialisations that rewrite the base while training starts: the adapter fits that rewritten base only.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_ROLE = re.compile(r"\.lora_\w+(\.weight|\.bias)?$")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's tensors by PEFT's names, in float32, and where they come from."""

    address: str
    sha256: str  # of the weights' file
    base_id: str
    base_revision: str | None  # the commit it was trained on, if that is known
    rank: int
    tensors: Mapping[str, Any]

    @property
    def line(self) -> str:
        """One line for people."""
        commit = f", commit {self.base_revision[:12]}" if self.base_revision else ""
        return (
            f"starts from the adapter {self.address} (rank {self.rank}, {len(self.tensors)} tensors, "
            f"sha256 {self.sha256[:12]}; trained on {self.base_id}{commit})"
        )

    def to_json(self) -> dict[str, str | None]:
        """What run.json keeps."""
        return {"address": self.address, "sha256": self.sha256, "base_revision": self.base_revision}


def read_adapter(recipe: Recipe, base: Base) -> SavedAdapter:
    """Read the adapter that a recipe names in `lora.init_from`, and check that training can start from it.

    Raises:
        ModelError: there is none, it is damaged, or it does not fit recipe and base (all differences at once).
    """
    address = recipe.init_from or ""
    folder = find_adapter(address)
    config = _read_config(folder)
    tensors, sha256 = _read_tensors(folder)
    base_id, commit = _trained_on(folder, config)
    differences = [
        *_base_differences(base_id, commit, base),
        *_config_differences(config, recipe),
        *_tensor_differences(tensors, config, recipe, base),
    ]
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        s = "s" if len(differences) > 1 else ""
        raise ModelError(f"{KEY}: {address} does not fit this recipe ({len(differences)} difference{s}):\n{lines}")
    return SavedAdapter(address, sha256, base_id, commit, int(config["r"]), tensors)


def read_own_adapter(folder: Path, base: Base) -> SavedAdapter:
    """Read an adapter that this run has saved itself: it fits recipe and base, but may be damaged since.

    Raises:
        ModelError: it is missing or damaged.
    """
    config = _read_config(folder)
    tensors, sha256 = _read_tensors(folder)
    return SavedAdapter(str(folder), sha256, base.section.id, base.commit, int(config["r"]), tensors)


def find_adapter(address: str) -> Path:
    """Return the folder of an adapter's files: of a run directory, a folder, or fetched from the Hub.

    Raises:
        ModelError: there is none.
    """
    folder = Path(address).expanduser()
    if folder.is_dir():
        return _in_folder(folder)
    if folder.is_file():
        raise ModelError(f"{KEY}: {address} is a file. Give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    if is_folder(address) or not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise ModelError(
            f"{KEY}: {address!r} is given, but there is no such folder. Allowed: a run directory, a folder with a "
            "saved adapter, or user/repo on the Hub. Check the path."
        )
    instead = f"or give a run directory or a folder with a saved adapter (there is no folder {address} here)"
    what = f"{address} is no folder here, and as a repository of the Hub it"
    patterns = [CONFIG_NAME, WEIGHTS_NAME]
    return _in_folder(
        fetch_snapshot(KEY, address, None, patterns, instead, lambda error: f"{hub_unreachable(KEY, what, error)}.")
    )


def weights_sha256(address: str) -> str:
    """Return the sha256 of the weights that an address leads to today.

    Raises:
        ModelError: there is no adapter.
    """
    path = find_adapter(address) / WEIGHTS_NAME
    if not path.is_file():
        raise ModelError(f"{KEY}: {path.parent}: {WEIGHTS_NAME} is missing.")
    return sha256_of(path)


def load_into(model: Any, adapter: SavedAdapter) -> None:
    """Copy the adapter's weights into the model's active adapter, which keeps its dtype (float32).

    Raises:
        ModelError: the model has other tensors than the adapter, which `read_adapter` did not expect.
    """
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, dict(adapter.tensors))
    except (RuntimeError, KeyError, ValueError) as error:
        raise ModelError(f"{KEY}: {adapter.address} cannot be loaded: {first_line(error)}") from error
    strangers = list(result.unexpected_keys)
    if strangers:
        raise ModelError(f"{KEY}: {adapter.address}: the model has no place for {strangers[0]}. Use model.backend=hf.")


def read_sealed(folder: Path) -> dict[str, Any]:
    """Return the tensors, in float32, of an adapter that this run sealed with a manifest.

    Raises:
        ModelError: a file is missing or not the one that was sealed.
    """
    fault = fault_in(folder)
    try:
        if fault is None:
            return _read_tensors(folder)[0]
    except ModelError as error:
        fault = first_line(error).removeprefix(f"{KEY}: ")
    raise ModelError(f"{folder}: the adapter is damaged: {fault}")


@contextlib.contextmanager
def other_weights(model: Any, tensors: Mapping[str, Any]) -> Iterator[None]:
    """Put other weights into the model's adapter for the time of the block, then its own ones back, bit for bit.

    Args:
        model: a PeftModel whose adapter `default` is active; further adapters are not touched.
        tensors: as PEFT names them in a saved adapter of the same layout.

    Raises:
        ModelError: the adapter has other tensors, or other shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # Embedding layers belong to the base: the adapter's file may hold a copy of them, which is the same.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    other = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name or name in state}
    odd = [name for name in sorted(state.keys() | other.keys()) if _shape(state, name) != _shape(other, name)]
    if odd:
        raise ModelError(
            f"the adapter in memory and the saved one differ in {len(odd)} tensors, for example {odd[0]}: "
            f"{_shape(state, odd[0]) or 'none'} in memory, {_shape(other, odd[0]) or 'none'} saved"
        )
    own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    try:
        set_peft_model_state_dict(model, other)
        yield
    finally:
        set_peft_model_state_dict(model, own)


def _shape(tensors: Mapping[str, Any], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def _in_folder(folder: Path) -> Path:
    """Return the adapter's folder in a folder: itself, or a run's `adapter/`."""
    if (folder / CONFIG_NAME).is_file():
        return folder
    if not (folder / "recipe.yaml").is_file():
        raise ModelError(
            f"{KEY}: {folder}: no adapter there ({CONFIG_NAME} is missing). Give a run directory, or the folder that "
            f"holds {CONFIG_NAME} and {WEIGHTS_NAME}."
        )
    if (folder / "adapter" / CONFIG_NAME).is_file():
        return folder / "adapter"
    saved = sorted(folder.glob(f"checkpoint-*/{CONFIG_NAME}"), key=lambda path: path.stat().st_mtime)
    hint = f", or give a checkpoint of it: {saved[-1].parent}" if saved else ""
    raise ModelError(f"{KEY}: {folder}: this run is not trained yet (no adapter/). Finish it first{hint}.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{KEY}: {path}: is not valid JSON: {error}. Save or fetch the adapter again.") from None
    kind = str(config.get("peft_type", "")).rpartition(".")[2]
    if kind != "LORA":
        raise ModelError(f"{KEY}: {path}: peft_type is {kind or 'missing'}; only LORA can be trained on.")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{KEY}: {path}: {key} is {value!r}; it must be a positive number. Fetch the file again.")
    return config


def _read_tensors(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the tensors in float32, and the sha256 of their file."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = " Only the pickle adapter_model.bin is there, which is never loaded: save it as safetensors."
        there = pickled if (folder / "adapter_model.bin").is_file() else " Save or fetch the adapter again."
        raise ModelError(f"{KEY}: {folder}: {WEIGHTS_NAME} is missing.{there}")
    try:
        sha256 = sha256_of(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{KEY}: {path}: is not a whole safetensors file: {first_line(error)}. It is truncated or corrupt: "
            "save or fetch it again."
        ) from None
    _check_manifest(folder, sha256)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{KEY}: {path}: tensor {name} holds NaN or infinity, or no numbers. Its training diverged or the file "
                "is corrupt: take an earlier checkpoint of it."
            )
    if not tensors:
        raise ModelError(f"{KEY}: {path}: holds no tensors. Save or fetch the adapter again.")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}, sha256


def _check_manifest(folder: Path, sha256: str) -> None:
    if not (folder / MANIFEST_NAME).is_file():
        return
    try:
        entry = read_manifest(folder).get(WEIGHTS_NAME)
    except ExportError as error:
        raise ModelError(f"{KEY}: {first_line(error)}") from None
    if entry is not None and entry.sha256 != sha256:
        raise ModelError(
            f"{KEY}: {folder / WEIGHTS_NAME}: is not the file that was saved (its sha256 is not the one in "
            f"{MANIFEST_NAME}). Fetch it again, or remove {MANIFEST_NAME} if you changed it on purpose."
        )


def _trained_on(folder: Path, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the base's id and commit; a run knows both, PEFT's config often only a folder."""
    run = folder.parent
    if (run / "recipe.yaml").is_file():
        model = read_yaml(run / "recipe.yaml").get("model")
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            commit = read_record(run / "run.json").get("base_revision")
            return model["id"], commit if isinstance(commit, str) else None
    name, revision = str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")
    if cached := _CACHED.search(name):
        return f"{cached['owner']}/{cached['name']}", cached["commit"]
    return name, revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


def _base_differences(base_id: str, commit: str | None, base: Base) -> Iterator[str]:
    wanted = base.section.id
    names = {_model_name(wanted), _model_name(str(base.folder))}
    if base_id and _model_name(base_id) not in names:
        yield (
            f"model.id: the adapter was trained on {base_id}, the recipe's base is {wanted}. Set model.id={base_id}. "
            f"If it is the same model, write {wanted} as base_model_name_or_path into a copy's {CONFIG_NAME}."
        )
    elif commit and base.commit and commit != base.commit:
        yield (
            f"model.revision: the adapter was trained on commit {commit[:12]}, the recipe's base is at "
            f"{base.commit[:12]}. Set model.revision={commit}."
        )


def _model_name(model_id: str) -> str:
    """Return a model's name without owner, folder and the suffixes of re-uploads in 4 bits."""
    name = model_id.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    if cached := _CACHED.search(model_id):
        name = cached["name"].lower()
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", name)


def _config_differences(config: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    from peft import LoraConfig

    wanted, defaults = lora_config(recipe).to_dict(), LoraConfig().to_dict()
    for key in _MEANING:
        there, here = _plain(config.get(key, defaults.get(key))), _plain(wanted.get(key))
        if there != here:
            saved, ours = (yaml_text(defaults.get(key) if value is None else value) for value in (there, here))
            yield f"lora.{key}: the adapter has {saved}, the recipe {ours}. Set lora.{key}={saved}."
    for whose, value in (("adapter", config.get("init_lora_weights")), ("recipe", wanted.get("init_lora_weights"))):
        if isinstance(value, str) and value.lower().startswith(BASE_CHANGING):
            yield (
                f"lora.init_lora_weights: the {whose} has {value}, which rewrites the base when training starts, and "
                "an adapter fits the base that it was trained on only. "
                + ("Remove the key." if whose == "recipe" else "Merge that adapter, and train on the merged model.")
            )


def _plain(value: Any) -> Any:
    """Return a config's value in one form: empty ones as None, sets and lists sorted, whole numbers as int."""
    if isinstance(value, list | set | tuple):
        value = sorted(value, key=str)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value in (False, "none") or value == [] or value == {} else value


def _tensor_differences(
    tensors: Mapping[str, Any], config: Mapping[str, Any], recipe: Recipe, base: Base
) -> Iterator[str]:
    """Compare names and shapes with those of a fresh adapter; what rank alone explains is named by `lora.r`."""
    wanted = _fresh_shapes(recipe, base)
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".base_layer." not in name}
    if there.keys() != wanted.keys():
        yield _names_difference(set(there), set(wanted), recipe)
    same_rank = config["r"] == recipe.lora.get("r", 8)
    odd = [
        name
        for name in sorted(there.keys() & wanted.keys())
        if (there[name] != wanted[name] if same_rank else not set(there[name]) & set(wanted[name]))
    ]
    if odd:
        yield (
            f"model.id: {len(odd)} tensors have another shape than this base and recipe need, for example {odd[0]}: "
            f"{list(there[odd[0]])}, needed {list(wanted[odd[0]])}. It was trained on another base, or config and "
            "weights are of different adapters."
        )


def _names_difference(there: set[str], wanted: set[str], recipe: Recipe) -> str:
    kinds_there, kinds_wanted = (
        {_module(name).rpartition(".")[2] for name in names if ".lora_" in name} for names in (there, wanted)
    )
    asked = recipe.lora.get("target_modules")
    if kinds_there != kinds_wanted:
        return (
            f"lora.target_modules: the adapter trains {', '.join(sorted(kinds_there))}; the recipe "
            f"({asked if isinstance(asked, str) else 'its list'}) trains {', '.join(sorted(kinds_wanted))}. "
            f"Set lora.target_modules=[{','.join(sorted(kinds_there))}]."
        )
    extra, missing = sorted(there - wanted), sorted(wanted - there)
    example = f"it has {extra[0]}" if extra else f"it lacks {missing[0]}"
    return (
        f"lora.target_modules: the adapter has {len(there)} tensors, the recipe needs {len(wanted)}; for example "
        f"{example}. It is of another base, of other layers, or incomplete."
    )


def _module(tensor: str) -> str:
    return _ROLE.sub("", tensor)


def _fresh_shapes(recipe: Recipe, base: Base) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors that PEFT would save for a fresh adapter; no weight is read or made."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    code = trusts_remote_code(base.section)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(causal_config(base.folder, code), trust_remote_code=code)
            config = lora_config(recipe, model)
            if uses_unsloth(recipe.model) and recipe.lora.get("target_modules") == "all-linear":
                config.target_modules = set(ALL_LINEAR)
            config.init_lora_weights = False  # PiSSA and its like compute with the base's weights, which are not there
            model = get_peft_model(model, config)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"lora: does not fit {base.section.id}: {first_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
