"""Fuzz targets: hostile recipes, rows, adapters, checkpoints, completions; each ends in a result or one clear error.

`tests/test_fuzz.py` runs each for a few dozen examples, `bench/fuzz.py` for as long as it is told.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from grpo_lite.errors import DataError, ExportError, GRPOLiteError, RecipeError

# Text that parsers trip over: surrogates excluded (they are no UTF-8), right-to-left, zero-width, NUL, markup.
TRICKY = st.sampled_from([
    "", " ", "\x00", "\ufeff", "‮אבג", "é", "👨‍👩‍👧‍👦", "<|end|>", "<|assistant|>", "</think>", "{x}", "{",
    "{0.__class__}", "%s", "..",
    "../../x", "~", "null", "1e999", "-0", "\\boxed{", "\\frac{1}{", "####", "$", "[[", "a" * 3000, "9" * 5000, "\r\n",
    "=cmd|' /C calc'!A0", "<script>", "!!python/object/apply:os.system ['true']", "&a [*a]", "- - - -", ": :", "\t",
])  # fmt: skip
TEXT = st.one_of(st.text(max_size=40), TRICKY, st.builds("".join, st.lists(TRICKY, max_size=4)))
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT, st.sampled_from([0, -1, 1e-5, math.nan])
)
VALUE = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)
ROOT = Path(__file__).resolve().parent.parent


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="grpo-lite-fuzz-")


# Recipes


@cache
def _smoke() -> str:
    return (ROOT / "recipes" / "smoke.yaml").read_text()


def paths_in(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, inner in items:
        found += paths_in(inner, (*prefix, key))
    return found


RECIPE_CHANGES = st.lists(
    st.tuples(st.sampled_from(paths_in(yaml.safe_load(_smoke()))), VALUE, st.booleans()), min_size=1, max_size=4
)


def recipe_with_changed_values(changes: list[tuple[tuple[Any, ...], Any, bool]]) -> None:
    """Load smoke.yaml with some values replaced or keys added; dump and load again what was accepted."""
    from grpo_lite.recipe.load import build_recipe
    from grpo_lite.runs.run_dir import dump_recipe

    raw = yaml.safe_load(_smoke())
    for path, value, add in changes:
        target = raw
        try:
            for step in path[:-1]:
                target = target[step]
            target[f"{path[-1]}x" if add else path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    raw.setdefault("name", "smoke")
    try:
        recipe = build_recipe(raw, "fuzz")
    except RecipeError:
        return
    again = build_recipe(yaml.safe_load(dump_recipe(recipe)), "again")
    assert dump_recipe(again) == dump_recipe(recipe)


def recipe_text(text: bytes) -> None:
    """Load arbitrary bytes as a recipe file."""
    from grpo_lite.recipe.load import load_recipe

    with _scratch() as folder:
        path = Path(folder) / "fuzz.yaml"
        path.write_bytes(text)
        with contextlib.suppress(RecipeError):
            load_recipe(str(path))


def override(text: str) -> None:
    """Apply an arbitrary override."""
    from grpo_lite.recipe.load import load_recipe

    with contextlib.suppress(RecipeError):
        load_recipe(str(ROOT / "recipes" / "smoke.yaml"), [text])


def upstream_arguments(given: list[tuple[str, Any]]) -> None:
    """Give keys of GRPOConfig and LoraConfig arbitrary values, and build both as a run does."""
    from grpo_lite.models.base import Base
    from grpo_lite.models.device import Device
    from grpo_lite.models.load import lora_config
    from grpo_lite.recipe.load import build_recipe
    from grpo_lite.runs.run_dir import RunDir
    from grpo_lite.session.build import grpo_config

    raw = yaml.safe_load(_smoke()) | {"name": "fuzz"}
    for key, value in given:
        section, _, name = key.partition(".")
        raw.setdefault(section, {})[name] = value
    with _scratch() as folder, warnings.catch_warnings(), contextlib.suppress(GRPOLiteError):
        warnings.simplefilter("ignore")  # upstream's, of deprecated keys
        recipe = build_recipe(raw, "fuzz")
        base = Base.resolve(recipe.model, Device("cpu", "a CPU", 1 << 34, False))
        grpo_config(recipe, RunDir(folder), base, [1.0])
        lora_config(recipe)


def upstream_keys() -> list[str]:
    """Return `grpo.…` and `lora.…` for every key that upstream's configurations have."""
    from grpo_lite.recipe.upstream import config_fields

    return [f"{section}.{name}" for section in ("grpo", "lora") for name in config_fields(section)]


# Data


def data_file(content: bytes, suffix: str) -> None:
    """Read arbitrary bytes as a data file."""
    from grpo_lite.recipe.recipe import SourceSection
    from grpo_lite.task.prompts import read_rows

    with _scratch() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            rows = read_rows(SourceSection(path=str(path)), 0, "data.train")  # type: ignore[call-arg]
        except DataError:
            return
        assert rows
        assert all(isinstance(row, dict) for row in rows)
        json.dumps(rows, ensure_ascii=False, default=str).encode("utf-8")


def rows(found: list[Any], template: str, chat: bool) -> None:
    """Render arbitrary rows with an arbitrary template, and tokenise the prompts."""
    from transformers import AutoTokenizer

    from grpo_lite.models.base import resolve_base
    from grpo_lite.recipe.load import build_recipe
    from grpo_lite.recipe.recipe import TINY_MODEL
    from grpo_lite.task.prompts import load_prompts
    from grpo_lite.task.tokens import prompt_ids

    with _scratch() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        raw = yaml.safe_load(_smoke()) | {"name": "fuzz"}
        raw["data"] = {
            "train": {"path": str(path)}, "holdout": 1, "prompt": template, "format": "chat" if chat else "text",
        }  # fmt: skip
        tokenizer = _tokenizer(AutoTokenizer, str(resolve_base(TINY_MODEL)))
        try:
            prompts = load_prompts(build_recipe(raw, "fuzz"), tokenizer)
            for row in prompts.train:
                ids = prompt_ids(row["prompt"], tokenizer)
                turns = 1 + (len(row["prompt"]) if chat else -1)
                assert sum(i in tokenizer.all_special_ids for i in ids) <= 2 * turns
        except GRPOLiteError:
            pass


@cache
def _tokenizer(kind: Any, folder: str) -> Any:
    return kind.from_pretrained(folder)


# Weights


@cache
def _adapter_bytes() -> tuple[bytes, bytes]:
    import torch
    from safetensors.torch import save

    tensors = {}
    for name, shape_a, shape_b in (("q_proj", (2, 8), (8, 2)), ("v_proj", (2, 8), (4, 2))):
        prefix = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors |= {f"{prefix}.lora_A.weight": torch.ones(shape_a), f"{prefix}.lora_B.weight": torch.ones(shape_b)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    return save(tensors), json.dumps(config).encode()


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)
    ),
    min_size=1, max_size=5,
)  # fmt: skip


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Return bytes with some overwritten, cut off or inserted."""
    found = bytearray(data)
    for kind, share, new in edits:
        at = int(share * len(found))
        if kind == "set":
            found[at : at + len(new)] = new
        elif kind == "cut":
            del found[at:]
        else:
            found[at:at] = new
    return bytes(found)


def adapter(edits: list[tuple[str, float, bytes]], config: bool) -> None:
    """Open an adapter whose weights or config were damaged."""
    from grpo_lite.export.merge.adapter import open_adapter

    weights, settings = _adapter_bytes()
    with _scratch() as name:
        folder = Path(name)
        (folder / "adapter_model.safetensors").write_bytes(weights if config else edited(weights, edits))
        (folder / "adapter_config.json").write_bytes(edited(settings, edits) if config else settings)
        with contextlib.suppress(ExportError):
            open_adapter(folder)


def checkpoint(edits: list[tuple[str, float, bytes]], which: int) -> None:
    """Damage one file of a checkpoint: it is never taken for whole, unless nothing changed."""
    from grpo_lite.runs.checkpoints import FACTS_FILE, fault_of, saving

    with _scratch() as name:
        run = Path(name)
        with saving(run, 3) as scratch:
            (scratch / "checkpoint-3").mkdir()
            (scratch / "checkpoint-3" / "weights").write_bytes(bytes(range(256)))
            (scratch / "checkpoint-3" / FACTS_FILE).write_text('{"step": 3}')
        path = sorted((run / "checkpoint-3").iterdir())[which]
        before = path.read_bytes()
        path.write_bytes(edited(before, edits))
        fault = fault_of(run / "checkpoint-3")
        if path.read_bytes() == before:
            assert fault is None
        elif path.name != "MANIFEST.sha256":  # a comment of the manifest may change without harm
            assert fault


# Completions


def completions(texts: list[str], gold: str, chat: bool) -> None:
    """Score arbitrary completions with every reward: finite numbers or None, one each."""
    import rewards

    given: Any = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    n = len(texts)
    calls: dict[str, dict[str, Any]] = {
        "accuracy_reward": {"answer": [gold] * n},
        "honest_accuracy": {"answer": [gold] * n},
        "exact_match_reward": {"answer": [gold] * n},
        "format_reward": {},
        "countdown_reward": {"nums": [[1, 2, 3]] * n, "target": [6] * n},
        "soft_overlong_punishment": {"completion_ids": [[1] * len(text) for text in texts], "max_completion_length": 40,
                                     "cache_length": 10},
        "repetition_penalty_reward": {},
    }  # fmt: skip
    for name, columns in calls.items():
        scores = getattr(rewards, name)(completions=given, **columns)
        assert len(scores) == n
        assert all(score is None or math.isfinite(score) for score in scores), (name, scores)


TARGETS: dict[str, tuple[Callable[..., None], dict[str, st.SearchStrategy[Any]]]] = {
    "recipe values": (recipe_with_changed_values, {"changes": RECIPE_CHANGES}),
    "recipe bytes": (recipe_text, {"text": st.one_of(st.binary(max_size=200), TEXT.map(str.encode), VALUE.map(
        lambda value: yaml.safe_dump(value).encode()))}),
    "overrides": (override, {"text": st.one_of(TEXT, st.builds("{}={}".format, st.sampled_from(
        ["grpo.beta", "rewards[0].weight", "data.train", "name", "lora.r", "model", "rewards[9]", "seed.x", "[0]", "."]
    ), TEXT))}),
    "upstream arguments": (upstream_arguments, {"given": st.lists(st.tuples(st.sampled_from(upstream_keys()), st.one_of(
        SCALAR, VALUE, st.sampled_from(["no", "steps", "epoch", "auto", "none", "q_proj", ["q_proj"], 2, 4, 0.5, {}])
    )), min_size=1, max_size=3)}),
    "data bytes": (data_file, {"content": st.one_of(st.binary(max_size=200), VALUE.map(
        lambda value: json.dumps(value).encode()), st.sampled_from(
            [b'{"a": "\\ud83d"}', b'[{"\\udc00": 1}]', b"[" * 99_999, b'{"a":' * 99_999, b"a\n" + b"x" * 200_000])),
        "suffix": st.sampled_from([".jsonl", ".json", ".csv", ".parquet"])}),
    "rows": (rows, {"found": st.lists(st.dictionaries(st.sampled_from(["question", "answer", "prompt", "x"]), VALUE),
                                      min_size=1, max_size=4),
                    "template": st.one_of(st.sampled_from(["{question}=", "{prompt}"]), TEXT), "chat": st.booleans()}),
    "adapters": (adapter, {"edits": EDITS, "config": st.booleans()}),
    "checkpoints": (checkpoint, {"edits": EDITS, "which": st.integers(0, 2)}),
    "completions": (completions, {"texts": st.lists(TEXT, min_size=1, max_size=4), "gold": TEXT,
                                  "chat": st.booleans()}),
}  # fmt: skip
