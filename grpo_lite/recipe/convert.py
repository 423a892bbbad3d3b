"""convert_trl: a `trl grpo` YAML as a recipe, with a note for every key that is left out or means something else here.

What the file does not set gets TRL's default where that changes the training, and ours elsewhere.
Source: trl 1.16, `scripts/grpo.py`, `trainer/model_config.py`, `trainer/utils.py` (get_peft_config).
"""

from __future__ import annotations

import importlib.metadata
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.checks import nearest
from grpo_lite.recipe.load import build_recipe, read_yaml
from grpo_lite.recipe.recipe import GRPO_DEFAULTS
from grpo_lite.recipe.trl_keys import RENAMED, why_left_out
from grpo_lite.recipe.upstream import config_defaults, config_fields

_EVERY = 10  # steps between held-out scores where the file says nothing, or a share of an unknown number
_FILES = (".jsonl", ".json", ".csv", ".parquet")
_QUIET = ("logging_steps", "save_steps", "save_total_limit", "report_to")  # they change no training
_QUANTIZED_VLLM = "TRL would merge the adapter into quantized weights at each sync; rollout: shared needs no vLLM"
_ROLLOUT = "TRL casts the adapter to 16 bit at each rollout; rollout: shared is the engine for this"
_THINK = r"<think>(?!.*<think>).*?</think>.*"  # trl.rewards.think_format_reward
# The rewards that `trl grpo` knows by name -> ours, in the package `rewards`.
_REWARDS: dict[str, dict[str, Any]] = {
    "accuracy_reward": {"function": "accuracy_reward"},
    "reasoning_accuracy_reward": {"function": "accuracy_reward"},
    "think_format_reward": {"function": "format_reward", "kwargs": {"pattern": _THINK}},
    "get_soft_overlong_punishment": {
        "function": "soft_overlong_punishment",
        "kwargs": {"max_completion_length": 1280, "cache_length": 256},
    },
}


@dataclass(frozen=True)
class Conversion:
    """A recipe made from a `trl grpo` YAML."""

    recipe: dict[str, Any]  # as it is written: passes `build_recipe`
    notes: tuple[str, ...]  # `key: what became of it`, one for each key that is not simply copied
    source: str  # the file's name

    def text(self) -> str:
        """Return the recipe as YAML, the notes as comments above it."""
        lines = [f"# Converted from {self.source} (trl {importlib.metadata.version('trl')})."]
        if self.notes:
            lines.append("# What differs from it, key by key:")
        for note in self.notes:
            lines += textwrap.wrap(
                note,
                110,
                initial_indent="# - ",
                subsequent_indent="#   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=100)


class _File:
    """The values of a TRL file, taken one by one, and the notes on them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.notes: list[str] = []

    def take(self, *keys: str, default: Any = None) -> Any:
        """Return the first of these keys that is there, and take all of them out."""
        taken = [self.values.pop(key) for key in keys if key in self.values]
        return taken[0] if taken else default

    def note(self, text: str) -> None:
        """Add a note, `key: text`."""
        self.notes.append(text)


def convert_trl(path: Path) -> Conversion:
    """Read a `trl grpo` YAML and return it as a recipe.

    Raises:
        RecipeError: it cannot be read, names no model, data or reward, or has a value that TRL would refuse.
    """
    file = _File(read_yaml(path))
    missing = [
        text
        for keys, text in (
            (("model_name_or_path",), "model_name_or_path: missing, so there is no model to train"),
            (("dataset_name", "datasets"), "dataset_name: missing, so there are no prompts"),
            (("reward_funcs",), "reward_funcs: missing, so there is nothing to learn from"),
        )
        if not any(file.values.get(key) for key in keys)
    ]
    if missing:
        lines = "\n".join(f"  {path}: {text}." for text in missing)
        raise RecipeError(f"{path} is no complete file of `trl grpo`:\n{lines}")
    model = _model(file)
    rewards = _rewards(file)
    recipe: dict[str, Any] = {
        "description": f"{model['id']}, converted from {path.name}",
        "least_gpu": "not known; `grpo-lite plan` computes it",
        "seed": file.take("seed", default=42),
        "model": model,
        "lora": _lora(file),
        "data": _data(file, rewards),
        "rewards": rewards,
    }
    recipe["eval"] = _evaluation(file, recipe["data"])
    recipe["grpo"] = _grpo(file, quantized=model["load_in"] in ("4bit", "8bit"))
    recipe["eval"] = recipe.pop("eval")  # after grpo, as in the shipped recipes
    build_recipe({"name": "converted", **recipe}, str(path))
    return Conversion(recipe, tuple(file.notes), path.name)


def _model(file: _File) -> dict[str, Any]:
    init = file.take("model_init_kwargs", default={})
    if not isinstance(init, dict):
        file.note(f"model_init_kwargs: {init!r} is text, not a mapping; left out")
        init = {}
    model: dict[str, Any] = {"id": file.take("model_name_or_path")}
    revision = init.pop("revision", None) or file.take("model_revision", default="main")
    if revision != "main":
        model["revision"] = revision
    asked = file.take("dtype", "torch_dtype", default="float32")
    dtype = init.pop("dtype", init.pop("torch_dtype", None)) or asked
    in_4bit, in_8bit = file.take("load_in_4bit", default=False), file.take("load_in_8bit", default=False)
    bf16, fp16 = file.take("bf16"), file.take("fp16", default=False)
    model["load_in"] = "4bit" if in_4bit else "8bit" if in_8bit else "16bit"
    if fp16 or (dtype == "float16" and not bf16):
        model["dtype"] = "float16"
    elif bf16 or dtype == "bfloat16":
        model["dtype"] = "bfloat16"
    elif bf16 is False and dtype == "float32":
        model.update({"dtype": "float32"} if in_4bit or in_8bit else {"load_in": "32bit"})
    if model["load_in"] == "16bit" and dtype == "float32":
        file.note(
            "dtype: TRL holds the weights in float32 and computes in 16 bit; the frozen base is held in 16 bit here, "
            "in half the memory (model.load_in: 32bit computes in float32 throughout)"
        )
    for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
        if key in file.values or (key == "use_bnb_nested_quant" and in_4bit):
            value = file.take(key, default="TRL's default is false")
            file.note(f"{key}: {value}; left out: {why_left_out(key)}")
    for key in ("attn_implementation", "trust_remote_code"):
        value = init.pop(key, None) or file.take(key)
        file.values.pop(key, None)
        if value:
            model[key] = value
    for key in init:
        file.note(f"model_init_kwargs.{key}: left out: the model: section has no such key")
    return model


def _lora(file: _File) -> dict[str, Any]:
    lora = {"r": file.take("lora_r", default=16), "lora_alpha": file.take("lora_alpha", default=32)}
    targets = file.take("lora_target_modules")
    if isinstance(targets, list) and len(targets) == 1:
        targets = targets[0]  # as TRL's ModelConfig: a single one is a pattern
    dropout = file.take("lora_dropout")
    if file.take("use_peft", default=False):
        dropout = 0.05 if dropout is None else dropout  # ModelConfig's default
        lora["target_modules"] = targets or ["q_proj", "v_proj"]
        if not targets:
            file.note(
                "lora_target_modules: not given; peft's own choice for most models is set (all-linear usually learns "
                "more)"
            )
    else:
        lora["target_modules"] = targets or "all-linear"
        file.note(
            "use_peft: not set, so TRL trains all weights; a recipe always trains a LoRA, here on all linear layers. "
            "Its learning rate is usually ten times as high or more"
        )
        if "learning_rate" not in file.values:
            file.values["learning_rate"] = GRPO_DEFAULTS["learning_rate"]
            file.note(f"learning_rate: not given; {GRPO_DEFAULTS['learning_rate']}, ours for a LoRA")
    if dropout:
        file.note(
            f"lora_dropout: {dropout} in TRL; 0 here, because TRL generates in train mode: the sampled policy would "
            "be another one than the trained one"
        )
    task = file.take("lora_task_type", default="CAUSAL_LM")
    if task != "CAUSAL_LM":
        file.note(f"lora_task_type: {task}; left out: {why_left_out('lora_task_type')}")
    for ours, key in (
        ("target_parameters", "lora_target_parameters"),
        ("modules_to_save", "lora_modules_to_save"),
        ("use_rslora", "use_rslora"),
        ("use_dora", "use_dora"),
    ):
        if value := file.take(key):
            lora[ours] = value
    return lora


def _rewards(file: _File) -> list[dict[str, Any]]:
    names = file.take("reward_funcs")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"reward_funcs: {names!r} is given; allowed is a list of names.")
    unknown = [name for name in names if name not in _REWARDS and "." not in name]
    if unknown:
        raise RecipeError(
            f"reward_funcs: {unknown[0]!r} is given{nearest(unknown[0], _REWARDS)}; TRL knows {', '.join(_REWARDS)}, "
            "or a dotted path."
        )
    weights = file.take("reward_weights", default=[])
    if not isinstance(weights, list):
        raise RecipeError(f"reward_weights: {weights!r} is given; allowed is a list of numbers, one a reward.")
    if file.take("reward_model_name_or_path"):
        reason = why_left_out("reward_model_name_or_path")
        file.note(f"reward_model_name_or_path: left out: {reason}. The training is another one without it")
        weights = weights[1:]  # TRL puts it first
    sections = []
    for i, name in enumerate(names):
        ours = _REWARDS.get(name)
        section = {**ours, "function": f"rewards.{ours['function']}"} if ours else {"function": name}
        if i < len(weights) and weights[i] != 1:
            section["weight"] = weights[i]
        sections.append(section)
    if {"accuracy_reward", "reasoning_accuracy_reward"} & {*names}:
        file.note(
            "reward_funcs: accuracy_reward is ours. It asks the same question (mathematically equal to the column "
            "`solution`?), reads outside the thinking and is harder to fool; trl.rewards.accuracy_reward is TRL's"
        )
    return sections


def _data(file: _File, rewards: list[dict[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {"train": _source(file), "prompt": "{prompt}", "answer": None}
    ours = {section["function"].removeprefix("rewards.") for section in rewards}
    thinks = any(section.get("kwargs", {}).get("pattern") == _THINK for section in rewards)
    if "accuracy_reward" in ours:
        data["answer"] = "solution"
        data["gold_completion"] = "The answer is \\boxed{{{gold}}}."
    if thinks:
        data["gold_completion"] = "<think>\nworking\n</think>\n" + data.get("gold_completion", "the answer")
    file.note(
        "dataset: its column `prompt` is used, as in TRL. Where that is plain text and not chat messages, TRL adds no "
        "chat template: set data.format: text"
    )
    if prompt_tokens := file.take("max_prompt_length"):
        data["max_prompt_tokens"] = prompt_tokens
        file.note("max_prompt_length: TRL cut longer prompts; data.max_prompt_tokens drops and counts them")
    if system := file.take("system_prompt"):
        data["system"] = system
    return data


def _source(file: _File) -> dict[str, Any]:
    mixture = file.take("datasets")
    name, config = file.take("dataset_name"), file.take("dataset_config")
    split = file.take("dataset_train_split", default="train")
    if mixture:  # TRL ignores dataset_name then
        if not isinstance(mixture, list) or not isinstance(mixture[0], dict) or not mixture[0].get("path"):
            raise RecipeError("datasets: allowed is a list of mappings with a `path`.")
        first = dict(mixture[0])
        name, config, split = first.pop("path"), first.pop("name", None), first.pop("split", None) or "train"
        files = first.pop("data_files", None)
        if isinstance(files, str) and name in ("json", "csv", "parquet"):
            name, config = files, None
        elif files:
            file.note(
                f"datasets[0].data_files: left out: a recipe reads one file (data.train.path) or a split of {name}"
            )
        for key in first:
            file.note(f"datasets[0].{key}: left out: a recipe has no such key; all columns reach the rewards")
        for i, other in enumerate(mixture[1:], start=1):
            path = other.get("path") if isinstance(other, dict) else other
            file.note(f"datasets[{i}]: {path}; left out: a recipe trains on one source. The training is another one")
    if str(name).endswith(_FILES):
        return {"path": name}
    return {"hub": name, **({"config": config} if config else {}), "split": split}


def _evaluation(file: _File, data: dict[str, Any]) -> dict[str, Any]:
    """Take the evaluation's keys, and put the held-out rows into `data`."""
    strategy = file.take("eval_strategy", "evaluation_strategy") or "no"  # YAML reads `no` as false
    steps, rows = file.take("eval_steps"), file.take("per_device_eval_batch_size")
    split = file.take("dataset_test_split", default="test")
    share = file.take("test_split_size")
    if strategy == "no" and not share:
        file.note(
            "eval_strategy: no, so no rows are held out and eval is off. data.holdout: 100 instead of eval.enabled: "
            "false shows held-out scores before and after"
        )
        return {"enabled": False}
    section: dict[str, Any] = {}
    if share:
        data["holdout"] = share
    elif "hub" in data["train"]:
        data["eval"] = {**data["train"], "split": split}
    else:
        data["holdout"] = 0.1
        file.note("eval_strategy: a file has no test split; a tenth of its rows is held out, and not trained on")
    if strategy == "steps":
        section["every"] = _whole_steps(file, "eval_steps", steps or file.values.get("logging_steps", _EVERY))
    if rows:
        section["batch_size"] = rows
    file.note("eval_strategy: held-out rows are scored before and after training too (eval.limit of them)")
    return section


def _whole_steps(file: _File, key: str, steps: Any) -> Any:
    """Return steps as a whole number: below 1 TRL takes them as a share of all steps, rounded up."""
    if isinstance(steps, bool) or not isinstance(steps, int | float) or not 0 < steps < 1:
        return steps  # the recipe's own check names a wrong value
    total = file.values.get("max_steps")
    if isinstance(total, int) and total > 0:
        return math.ceil(steps * total)
    file.note(
        f"{key}: {steps:g} of all steps in TRL, and their number depends on the data; eval.every: {_EVERY} is set, in "
        "steps"
    )
    return _EVERY


def _grpo(file: _File, quantized: bool) -> dict[str, Any]:
    """Take what is left: GRPOConfig's keys. TRL's defaults are written out where they change the training."""
    fields = config_fields("grpo")
    output = file.take("output_dir")
    if output:
        file.note(f"output_dir: left out: give the run directory to the command, --run {output}")
    if ratio := file.take("warmup_ratio"):
        file.values.setdefault("warmup_steps", ratio)
    processes = file.values.get("num_processes")
    vllm = quantized and file.values.get("use_vllm")
    section: dict[str, Any] = {}
    for key, value in file.values.items():
        if vllm and (key == "use_vllm" or key.startswith("vllm_")):
            file.note(f"{key}: left out: {_QUANTIZED_VLLM}")
        elif key.startswith(("use_transformers_", "transformers_continuous_batching")):
            file.note(f"{key}: left out: {_ROLLOUT}")
        elif reason := why_left_out(key):
            file.note(f"{key}: left out: {reason}")
        elif key in fields:
            section[key] = value
        elif key in RENAMED:
            file.note(f"{key}: left out: {RENAMED[key]} is the recipe's key for it")
        else:
            file.note(f"{key}: left out: `trl grpo` has no such key and ignores it{nearest(key, fields)}")
    theirs = config_defaults("grpo")
    for key, ours in GRPO_DEFAULTS.items():
        if key in section or key not in theirs or theirs[key] == ours:
            continue
        if key in _QUIET:
            file.note(f"{key}: not given; {ours} here, {theirs[key]} in TRL (it changes no training)")
        else:
            section[key] = theirs[key]
            file.note(f"{key}: not given; TRL's default {theirs[key]} is set (ours is {ours})")
    _whole_groups(file, section, processes)
    return section


def _whole_groups(file: _File, section: dict[str, Any], processes: Any) -> None:
    """Keep the batch of several processes on one, and make it whole groups, by accumulating more."""
    if "generation_batch_size" in section or "steps_per_generation" in section:
        return
    try:
        group, rows, steps = (
            int(section.get(key, GRPO_DEFAULTS[key]))
            for key in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
        )
        wanted = steps * int(processes or 1)
    except (TypeError, ValueError):
        return  # the recipe's own check names the wrong value
    while group > 1 and rows > 0 and rows * wanted % group:
        wanted += 1
    if wanted != steps:
        section["gradient_accumulation_steps"] = wanted
        why = f"{processes} processes" if processes else "several processes"
        file.note(
            f"gradient_accumulation_steps: {steps} -> {wanted}: one process here takes the batch of {why} there "
            f"({rows * wanted} completions, whole groups of {group})"
        )
