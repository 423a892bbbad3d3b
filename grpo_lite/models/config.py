"""A model's config.json: the numbers that decide its memory, and how many positions it was made for. Torch-free.

`memory` plans from a shape and offers no length beyond the positions. A local folder's or a cached config.json is read;
otherwise the facts of well-known models in the table below (copied from their config.json on the Hub); otherwise
config.json alone is fetched.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_lite.errors import ModelError
from grpo_lite.files.hub import hub_unreachable
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, TINY_MODEL


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder-only transformer's sizes."""

    kind: str  # config.json's model_type
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2  # Gemma 2 and 3 have four
    sliding_window: int | None = None
    positions: int | None = field(default=None, compare=False)  # of the longest sequence it was made for

    @property
    def overflows_in_float16(self) -> bool:
        """Whether activations are known to leave float16's range: Gemma 3, whose residual stream passes 65,504."""
        return self.kind.startswith("gemma3")

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of one block: what is quantised, and what `all-linear` adapts."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers, without biases."""
        return self.layers * sum(a * b for a, b in self.linear_shapes.values())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding (the output head has as many when it is not tied)."""
        return self.vocab * self.hidden

    @property
    def small_parameters(self) -> int:
        """Norms and biases."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.norms_per_layer * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.layers * (biases + norms) + self.hidden

    @property
    def parameters(self) -> int:
        """All weights, as model cards count them."""
        heads = 1 if self.tied else 2
        return self.linear_parameters + heads * self.embedding_parameters + self.small_parameters


def _config(kind: str, sizes: str, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    )
    values = [int(word) for word in sizes.split()]
    keys = [*names.split(), "max_position_embeddings"]
    config: dict[str, Any] = {"model_type": kind, **dict(zip(keys, values, strict=True))}
    return config | {"tie_word_embeddings": True} | more


# hidden, intermediate, layers, heads, key/value heads, head dim, vocabulary, positions (the fewer ones where the base
# model and the instruction-tuned one differ)
_LOOSE: dict[str, Any] = {"tie_word_embeddings": False}
_GEMMA3: dict[str, Any] = {"sliding_window": 512, "sliding_window_pattern": 6}
KNOWN: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _config("qwen2", "896 4864 24 14 2 64 151936 32768"),
    "qwen2.5-1.5b": _config("qwen2", "1536 8960 28 12 2 128 151936 32768"),
    "qwen2.5-3b": _config("qwen2", "2048 11008 36 16 2 128 151936 32768"),
    "qwen2.5-7b": _config("qwen2", "3584 18944 28 28 4 128 152064 32768", **_LOOSE),
    "qwen2.5-14b": _config("qwen2", "5120 13824 48 40 8 128 152064 32768", **_LOOSE),
    "qwen3-0.6b": _config("qwen3", "1024 3072 28 16 8 128 151936 32768"),
    "qwen3-1.7b": _config("qwen3", "2048 6144 28 16 8 128 151936 32768"),
    "qwen3-4b": _config("qwen3", "2560 9728 36 32 8 128 151936 32768"),
    "qwen3-8b": _config("qwen3", "4096 12288 36 32 8 128 151936 32768", **_LOOSE),
    "llama-3.2-1b": _config("llama", "2048 8192 16 32 8 64 128256 131072"),
    "llama-3.2-3b": _config("llama", "3072 8192 28 24 8 128 128256 131072"),
    "llama-3.1-8b": _config("llama", "4096 14336 32 32 8 128 128256 131072", **_LOOSE),
    "mistral-7b-v0.3": _config("mistral", "4096 14336 32 32 8 128 32768 32768", **_LOOSE),
    "gemma-3-1b": _config("gemma3_text", "1152 6912 26 4 1 256 262144 32768", **_GEMMA3),
    "gemma-3-270m": _config("gemma3_text", "640 2048 18 4 1 256 262144 32768", **_GEMMA3),
    "smollm2-135m": _config("llama", "576 1536 30 9 3 64 49152 8192"),
    "smollm2-360m": _config("llama", "960 2560 32 15 5 64 49152 8192"),
    "smollm2-1.7b": _config("llama", "2048 8192 24 32 32 64 49152 8192"),
}
_OWN = {
    EMBEDDED_MODEL: KNOWN["smollm2-135m"],
    TINY_MODEL: _config("llama", "64 128 2 4 2 16 261 512"),
}


def known_config(model_id: str) -> dict[str, Any] | None:
    """Return the config.json facts of a well-known model, whoever repackaged it (`-Instruct`, `-bnb-4bit` …)."""
    if model_id in _OWN:
        return _OWN[model_id]
    name = model_id.rpartition("/")[2].lower().removeprefix("meta-")
    name = re.sub(r"-(unsloth-)?bnb-[48]bit$", "", name)
    name = re.sub(r"-(instruct|it|base|chat)(-[0-9]{4})?$", "", name)
    name = re.sub(r"^(qwen2\.5)-(coder|math)-", r"\1-", name)
    known = KNOWN.get(name)
    return known | {"max_position_embeddings": 4096} if known and "-math-" in model_id.lower() else known


def read_shape(config: dict[str, Any], where: str) -> ModelShape:
    """Read the sizes off a config.json.

    Raises:
        ModelError: it is not a dense decoder-only transformer with one kind of block.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    kind = str(config.get("model_type", "?"))
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not isinstance(config.get(name), int) or config[name] < 1]
    experts = next(
        (name for name in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(name)), None
    )
    kinds = sorted(set(config.get("layer_types") or []) - {"full_attention", "sliding_attention"})
    if missing or experts or kinds:
        what = f"it lacks {', '.join(missing)}" if missing else f"it is a mixture of experts ({experts})"
        what = f"it has {', '.join(kinds)} layers" if kinds else what
        raise ModelError(
            f"{where}: no plan for this model ({kind}): {what}. Planned are dense decoder-only models; "
            "train it without a plan: memory.fit=false."
        )
    heads = config["num_attention_heads"]
    qwen2, gemma3 = kind.startswith("qwen2"), kind.startswith("gemma3")
    return ModelShape(
        kind=kind,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", gemma3 or kind.startswith("gemma"))),
        qkv_bias=qwen2 or bool(config.get("attention_bias")),
        qk_norm=kind.startswith("qwen3") or gemma3,
        norms_per_layer=4 if gemma3 or kind.startswith("gemma2") else 2,
        sliding_window=config.get("sliding_window") if _slides(config, qwen2) else None,
        positions=read_positions(config),
    )


def _slides(config: dict[str, Any], qwen2: bool) -> bool:
    """Return whether some layer really attends within `sliding_window` only (attention.sliding_window)."""
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return False
    return bool(config.get("use_sliding_window", not qwen2))


def model_shape(model_id: str, revision: str | None = None) -> tuple[ModelShape, str]:
    """Return the shape of a model that need not be here, for a plan, and where it was read; see `Base.shape`.

    Raises:
        ModelError: no config.json can be found, or it cannot be planned.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return read_shape(_read(folder / "config.json"), f"model.id {model_id}"), "its config.json"
    cached_file = None if model_id in _OWN else _cached(model_id, revision)
    if cached_file:
        return read_shape(_read(cached_file), f"model.id {model_id}"), "its config.json"
    config = known_config(model_id)
    if config:
        return read_shape(config, f"model.id {model_id}"), "the built-in table"
    if model_id.count("/") == 1:
        hub_file = _fetched(model_id, revision)
        return read_shape(_read(hub_file), f"model.id {model_id}"), "its config.json on the Hub"
    raise ModelError(
        f"model.id: {model_id} has no config.json here and is not in the built-in table "
        f"({', '.join(sorted(KNOWN))}). Connect once, or give a local folder."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a model's config.json: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: a model's config.json is a JSON object.")
    return config


def _cached(model_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def _fetched(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(model_id, "config.json", revision=revision, etag_timeout=5))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(unreachable_model(model_id, error)) from None


# A table of learned (or precomputed) positions: the next one is an index error, on a GPU a dead CUDA context.
TABLED = {"codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt"}


def read_positions(config: dict[str, Any]) -> int | None:
    """Return the longest sequence a config.json stands for, rope scaling counted; None where it says nothing.

    `max_position_embeddings` holds the scaled length for llama3, longrope and Gemma 3, and the original one, to be
    multiplied by the factor, for linear, dynamic and yarn.
    Source: vLLM, `_get_and_verify_max_len` (v0.8), which refuses longer ones.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    declared = _count(config.get("max_position_embeddings")) or _count(config.get("n_positions"))
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if declared is None or not isinstance(rope, dict) or str(config.get("model_type")).startswith("gemma3"):
        return declared
    if rope and all(isinstance(value, dict) for value in rope.values()):  # one for each kind of layer
        rope = rope.get("full_attention") or next(iter(rope.values()))
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or isinstance(factor, bool) or not isinstance(factor, int | float):
        return declared
    original = _count(rope.get("original_max_position_embeddings")) if kind == "yarn" else None
    return max(declared, int((original or declared) * factor))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def too_long(
    model_id: str, positions: int | None, prompt: int, completion: int, key: str = "grpo.max_completion_length"
) -> str | None:
    """Return what is wrong with a prompt and a completion of so many tokens, and what to do; None if nothing is."""
    if positions is None or prompt + completion <= positions:
        return None
    spare = positions - prompt
    change = f"{key}={spare}" if spare > 0 else f"data.max_prompt_tokens={positions // 2}"
    return (
        f"{model_id} was made for {positions} positions, and prompts of up to {prompt} tokens with completions of up "
        f"to {completion} need {prompt + completion}; paste: {change}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json; an empty mapping where there is none to read: whoever loads it says why."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def unreachable_model(model_id: str, error: BaseException) -> str:
    """Return the message for a model that is neither cached nor reachable."""
    return (
        f"{hub_unreachable('model.id', model_id, error)}, or train the model that needs no Hub: "
        f"model.id={EMBEDDED_MODEL}."
    )
