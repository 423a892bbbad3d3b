"""What `all-linear` adapts by family: every linear layer whose change a merge can write, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_lite.errors import ModelError
from grpo_lite.models.lora_targets import choose_targets

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}
# Model type -> settings beside the common sizes, and the last parts of the adapted modules' names.
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lfm2": (
        {"layer_types": ["conv", "full_attention"]},
        {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
    ),
    "qwen3_5_text": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        {*_ATTENTION, *_MLP, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"},
    ),
    "falcon_h1": ({**_MAMBA, "mamba_d_ssm": 64}, {*_ATTENTION, *_MLP, "in_proj"}),
    "granitemoehybrid": (
        {
            **_MAMBA, "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 0, "shared_intermediate_size": 48,
        },
        {*_ATTENTION, "in_proj", "input_linear", "output_linear"},
    ),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, _ATTENTION),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, _ATTENTION),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, _ATTENTION),
}  # fmt: skip


def tiny(kind: str) -> Any:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | FAMILIES[kind][0])))


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_linear_takes_what_a_merge_can_write(kind: str):
    model = tiny(kind)
    config = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    choose_targets(config, model)
    with torch.device("meta"):
        wrapped = get_peft_model(model, config)
    adapted = {name for name, part in wrapped.named_modules() if hasattr(part, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == FAMILIES[kind][1]
    assert not any(name.endswith(("mamba.out_proj", "experts")) for name in adapted)


def test_routed_experts_named_by_hand_are_refused_before_training():
    config = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ModelError, match=r"routed experts .*gate_up_proj.*Set lora.target_modules=\[q_proj\]"):
        choose_targets(config, tiny("qwen3_moe"))
