"""A model's sizes, layer by layer: exactly those of the real classes, for the config.json of real checkpoints too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from grpo_lite.errors import ModelError
from grpo_lite.models.config import KNOWN, known_config
from grpo_lite.models.lora_targets import choose_targets
from grpo_lite.models.shape import _ATTENDING, _RECURRENT, ModelShape, read_shape

CONFIGS = sorted(Path(__file__).parents[1].glob("data/configs/*.json"))
# Of models whose real files are not at hand, tiny; each key that changes the count has an unusual value.
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWS = ["sliding_attention", "full_attention"] * 2
HYBRID = ["mamba", "attention", "mamba", "mamba"]
MAMBA = {"mamba_n_heads": 6, "mamba_d_state": 10, "mamba_d_conv": 3, "mamba_expand": 2, "layer_types": HYBRID}
LOCAL_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
GEMMA4 = {
    "sliding_window": 40,
    "layer_types": WINDOWS,
    "global_head_dim": 24,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 90,
}
TINY = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 2},
    "lfm2": {"full_attn_idxs": [1, 3], "conv_bias": True, "block_multiple_of": 16, "conv_L_cache": 4},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "granitemoehybrid": MAMBA
    | {"shared_intermediate_size": 56, "num_local_experts": 5, "num_experts_per_tok": 2, "mamba_proj_bias": True},
    "granite": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 40, "layer_types": WINDOWS},
    "olmo_hybrid": {},
    "smollm3": {"attention_bias": True, "mlp_bias": True, "use_sliding_window": False},
    "gemma": {},
    "gemma2": {"sliding_window": 40, "layer_types": WINDOWS},
    "gemma3_text": {"sliding_window": 40, "layer_types": WINDOWS},
    "gemma4_text": GEMMA4 | {"use_double_wide_mlp": True},
    "mistral": {"tie_word_embeddings": True, "sliding_window": None},
    "ministral": {"sliding_window": 40, "layer_types": WINDOWS},
    "ministral3": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 40, "layer_types": WINDOWS},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "mixtral": LOCAL_EXPERTS,
    "gpt_oss": LOCAL_EXPERTS | {"sliding_window": 40, "layer_types": WINDOWS},
    "lfm3": {"conv_bias": True, "sliding_window": 40, "num_hidden_layers": 5},
    "bamba": {key: value for key, value in MAMBA.items() if key != "layer_types"}
    | {"attn_layer_indices": [1], "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    "falcon_h1": MAMBA
    | {"mamba_d_ssm": 72, "mamba_d_head": 12, "mamba_rms_norm": True, "projectors_bias": True, "layer_types": None},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-ME",
        "num_hidden_layers": 5,
        "mamba_num_heads": 6,
        "mamba_head_dim": 12,
        "ssm_state_size": 10,
        "n_groups": 2,
        "conv_kernel": 3,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "moe_latent_size": 20,
        "mlp_bias": True,
    },
}
# More of a family: what its first row leaves out.
VARIANTS = {
    "gemma4_text, experts": GEMMA4
    | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 24},
    "gemma4_text, values are keys": GEMMA4
    | {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "lfm3, ungated": {
        "use_attention_gate": False,
        "use_sandwich_norm": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "olmo_hybrid, given": DELTA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1, plain": MAMBA | {"mamba_d_ssm": None, "mamba_n_heads": 6, "layer_types": None},
}


# `make test` compares these; the others are marked slow.
FIRST = ("qwen3_5_text", "gemma4_text", "falcon_h1", "nemotron_h", "qwen3_moe")
KINDS = [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.slow) for kind in TINY | VARIANTS]


def real_counts(config: dict[str, Any]) -> tuple[ModelShape, int, int, int]:
    """Return the shape, and of the real class: parameters, linear layers in blocks, and their weights."""
    kind = config["text_config"]["model_type"] if "text_config" in config else config["model_type"]
    keys = {key: value for key, value in (config.get("text_config") or config).items() if key != "model_type"}
    real = AutoConfig.for_model(kind, **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real)
    model.tie_weights()
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    weights = sum(linear.weight.numel() for linear in linears)
    # What a run has at hand is the loaded model's own config.
    assert read_shape(real.to_dict(), "x") == read_shape(config, "x")
    return read_shape(config, "x"), sum(p.numel() for p in model.parameters()), len(linears), weights


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_real_checkpoint_has_the_counted_weights(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    shape, parameters, linears, weights = real_counts(config)
    assert (shape.parameters, shape.linear_layers, shape.linear_parameters) == (parameters, linears, weights)


def tiny_config(kind: str) -> dict[str, Any]:
    family = kind.partition(",")[0]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = {"model_type": family, **SIZES, "tie_word_embeddings": False, **(TINY | VARIANTS)[kind]}
    if kind in ("lfm2", "lfm2_moe", "granite", "granitemoehybrid", "mistral", "olmo2", "olmo3", "olmo_hybrid", "bamba"):
        config["head_dim"] = 12  # that of 48 in 4 heads, which these families take
    return {key: value for key, value in config.items() if key != "layer_types" or value}


@pytest.mark.parametrize("kind", TINY | VARIANTS)
def test_each_kind_of_block_has_the_counted_weights(kind: str) -> None:
    shape, parameters, linears, weights = real_counts(tiny_config(kind))
    assert (shape.parameters, shape.linear_layers, shape.linear_parameters) == (parameters, linears, weights)


def test_every_family_that_is_counted_is_compared() -> None:
    composite = {"gemma3", "gemma4"}  # the files of multimodal ones, whose text tower is counted
    assert {*_ATTENDING.split(), *_RECURRENT} - composite == set(TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_all_linear_has_the_counted_weights(kind: str) -> None:
    config = tiny_config(kind)
    real = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real)
        lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
        choose_targets(lora, model)
        wrapped = get_peft_model(model, lora)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert read_shape(config, "x").adapter_parameters(3) == trained


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_keeps_the_counted_keys_values_and_states(kind: str) -> None:
    config, tokens = tiny_config(kind), 7  # within the window
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(tokens)[None], use_cache=True).past_key_values
    kept = dict.fromkeys(("keys", "values", "conv_states", "recurrent_states"), 0)
    for layer in cache.layers:
        for name in kept:
            states = getattr(layer, name, None)
            for each in states.values() if isinstance(states, dict) else [states]:
                kept[name] += each.numel() if isinstance(each, torch.Tensor) else 0
    shape = read_shape(config, "x")
    assert kept["keys"] + kept["values"] == tokens * shape.cached
    assert 2 * kept["conv_states"] + 4 * kept["recurrent_states"] == shape.state_bytes(2)


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if known_config(f"somebody/{path.stem}")], ids=lambda path: path.stem
)
def test_the_built_in_table_says_what_the_real_file_says(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    known = known_config(f"somebody/{path.stem}")
    assert known is not None
    assert read_shape(known, "x") == read_shape(config, "x")


# As the models' cards on the Hub count them; of multimodal ones as transformers counts the text tower.
PUBLISHED = {"lfm2.5-1.2b": 1_170_340_608, "phi-4-mini": 3_836_021_760, "smollm3-3b": 3_075_098_624}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    assert read_shape(KNOWN[name], name).parameters == PUBLISHED[name]


def test_only_layers_that_attend_keep_keys_and_values_and_the_others_a_state() -> None:
    """Qwen3.5-0.8B: 6 of 24 layers attend; the state is 16 × 128 × 128 in float32 and 6,144 × 4 of the convolution."""
    shape = read_shape(KNOWN["qwen3.5-0.8b"], "x")
    assert (shape.layers, shape.cached) == (24, 6 * 2 * 2 * 256)
    assert shape.state_bytes(2) == 18 * (16 * 128 * 128 * 4 + 6144 * 4 * 2)
    assert read_shape(KNOWN["lfm2.5-1.2b"], "x").state_bytes(2) == 10 * 2048 * 3 * 2
    assert read_shape(KNOWN["qwen3-4b"], "x").state_bytes(2) == 0


def test_an_adapter_on_named_layers_counts_those_alone() -> None:
    """LFM2.5: q and out of 6 attention layers, out of 10 convolutions too, all 2,048 by 2,048."""
    shape = read_shape(KNOWN["lfm2.5-1.2b"], "x")
    assert shape.adapter_parameters(4, ("q_proj",)) == 6 * 4 * 4096
    assert shape.adapter_parameters(4, ("out_proj",)) == 16 * 4 * 4096
    # Unsloth's Qwen3.5-4B run of rank 16 reports 32,464,896 trainable weights on all linear layers.
    assert read_shape(KNOWN["qwen3.5-4b"], "x").adapter_parameters(16) > 32_000_000


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts": 128}, "mixture of experts"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"layer_types": ["conv", "full_attention"]}, "it has conv layers"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "it has chunked_attention layers"),
        ({"model_type": "gemma3n_text"}, "not counted"),
        ({"model_type": "jamba"}, "not counted"),
        ({"model_type": "glm4"}, "not counted"),
        ({"model_type": "nemotron_h"}, "lacks hybrid_override_pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_blocks_that_are_not_counted_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=rf"model: no plan for this model .*{words}.*memory\.fit=false"):
        read_shape(KNOWN["qwen3-4b"] | change, "model")
