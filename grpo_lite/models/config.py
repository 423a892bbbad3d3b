"""Where a model's config.json is read: a folder, the Hub's cache, a table of known models, or the Hub. Torch-free.

The table holds what decides memory and length, copied from the models' config.json on the Hub. Where each number of the
later ones was read is in tests/data/configs/README.md; a test compares the two.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from grpo_lite.errors import ModelError
from grpo_lite.files.hub import hub_unreachable
from grpo_lite.models.shape import ModelShape, read_shape
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, TINY_MODEL


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
_DELTA: dict[str, Any] = {  # every fourth layer attends, the others are gated delta nets
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_CONV: dict[str, Any] = {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "conv_L_cache": 3}  # of 16 layers
KNOWN: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _config("qwen2", "896 4864 24 14 2 64 151936 32768"),
    "qwen2.5-1.5b": _config("qwen2", "1536 8960 28 12 2 128 151936 32768"),
    "qwen2.5-3b": _config("qwen2", "2048 11008 36 16 2 128 151936 32768"),
    "qwen2.5-7b": _config("qwen2", "3584 18944 28 28 4 128 152064 32768", **_LOOSE),
    "qwen2.5-14b": _config("qwen2", "5120 13824 48 40 8 128 152064 32768", **_LOOSE),
    "deepseek-r1-distill-qwen-1.5b": _config("qwen2", "1536 8960 28 12 2 128 151936 131072", **_LOOSE),
    "qwen3-0.6b": _config("qwen3", "1024 3072 28 16 8 128 151936 32768"),
    "qwen3-1.7b": _config("qwen3", "2048 6144 28 16 8 128 151936 32768"),
    "qwen3-4b": _config("qwen3", "2560 9728 36 32 8 128 151936 32768"),
    "qwen3-8b": _config("qwen3", "4096 12288 36 32 8 128 151936 32768", **_LOOSE),
    "qwen3.5-0.8b": _config("qwen3_5_text", "1024 3584 24 8 2 256 248320 262144", **_DELTA),
    "qwen3.5-2b": _config("qwen3_5_text", "2048 6144 24 8 2 256 248320 262144", **_DELTA),
    "qwen3.5-4b": _config(
        "qwen3_5_text", "2560 9216 32 16 4 256 248320 262144", **_DELTA | {"linear_num_value_heads": 32}
    ),
    "llama-3.2-1b": _config("llama", "2048 8192 16 32 8 64 128256 131072"),
    "llama-3.2-3b": _config("llama", "3072 8192 28 24 8 128 128256 131072"),
    "llama-3.1-8b": _config("llama", "4096 14336 32 32 8 128 128256 131072", **_LOOSE),
    "mistral-7b-v0.3": _config("mistral", "4096 14336 32 32 8 128 32768 32768", **_LOOSE),
    "gemma-3-1b": _config("gemma3_text", "1152 6912 26 4 1 256 262144 32768", **_GEMMA3),
    "gemma-3-270m": _config("gemma3_text", "640 2048 18 4 1 256 262144 32768", **_GEMMA3),
    "gemma-3-4b": _config("gemma3_text", "2560 10240 34 8 4 256 262208 131072", **_GEMMA3 | {"sliding_window": 1024}),
    "gemma-2-2b": _config("gemma2", "2304 9216 26 8 4 256 256000 8192", sliding_window=4096),
    "gemma-4-e2b": _config(
        "gemma4_text",
        "1536 6144 35 8 1 256 262144 131072",
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
        sliding_window=512,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
    ),
    "lfm2.5-1.2b": _config("lfm2", "2048 12288 16 32 8 64 65536 32768", **_CONV),
    "granite-4.0-micro": _config(
        "granitemoehybrid",
        "2560 8192 40 40 8 64 100352 131072",
        shared_intermediate_size=8192,
        layer_types=["full_attention"] * 40,
        num_local_experts=0,
    ),
    "granite-4.0-h-350m": _config(
        "granitemoehybrid",
        "768 2048 32 12 4 64 100352 32768",
        shared_intermediate_size=2048,
        layer_types=["attention" if layer in (10, 13, 17, 27) else "mamba" for layer in range(32)],
        num_local_experts=0,
        mamba_n_heads=48,
        mamba_d_head=32,
        mamba_d_state=128,
    ),
    "falcon-h1-0.5b": _config(
        "falcon_h1",
        "1024 2048 36 8 2 64 32784 16384",
        mamba_n_heads=24,
        mamba_d_head=64,
        mamba_d_ssm=1536,
        mamba_d_state=128,
        mamba_chunk_size=128,
        **_LOOSE,
    ),
    "phi-4-mini": _config(
        "phi3",
        "3072 8192 32 24 8 128 200064 131072",
        sliding_window=262144,
        rope_scaling={"type": "longrope"},
        original_max_position_embeddings=4096,
    ),
    "smollm3-3b": _config("smollm3", "2048 11008 36 16 4 128 128256 65536"),
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


def model_shape(model_id: str, revision: str | None = None) -> tuple[ModelShape, str]:
    """Return the shape of a model that need not be here, for a plan, and where it was read; see `Base.shape`.

    Raises:
        ModelError: no config.json can be found, or it cannot be planned.
    """
    config, source = _find_config(model_id, revision)
    return read_shape(config, f"model.id {model_id}"), source


def _find_config(model_id: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """Return a model's config.json, or what the table holds of it, and where that was read."""
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return _read(folder / "config.json"), "its config.json"
    if model_id not in _OWN and (cached_file := _cached(model_id, revision)):
        return _read(cached_file), "its config.json"
    if known := known_config(model_id):
        return known, "the built-in table"
    if model_id.count("/") == 1:
        return _read(_fetched(model_id, revision)), "its config.json on the Hub"
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


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json; an empty mapping where there is none to read: whoever loads it says why."""
    try:
        return _read(folder / "config.json")
    except ModelError:
        return {}


def unreachable_model(model_id: str, error: BaseException) -> str:
    """Return the message for a model that is neither cached nor reachable."""
    return (
        f"{hub_unreachable('model.id', model_id, error)}, or train the model that needs no Hub: "
        f"model.id={EMBEDDED_MODEL}."
    )
