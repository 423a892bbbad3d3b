"""The merge agrees with PEFT to one rounding, for every kind of adapter it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import (
    load,
    load_with_adapter,
    logits,
    make_adapter,
    make_base,
    peft_merged,
    tensors,
)

from grpo_lite.merge import merge_adapter

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "rslora and dora": ("llama", {"use_rslora": True, "use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, r".*\.1\..*up_proj": 6}, "alpha_pattern": {"v_proj": 3}}),
    "anchored pattern": ("llama", {"rank_pattern": {"^model.layers.0.self_attn.k_proj": 7}}),
    "rslora and patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ),
    "some layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\.self_attn\.v_proj"}),
    "regex": ("llama", {"target_modules": r".*\.mlp\.(up|gate)_proj"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "target_modules": ["gate_proj"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved head and norm": ("llama", {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "tied": ("llama-tied", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 dora": ("qwen2", {"use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
}
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_merge_is_peft_in_float32_rounded_once(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, lora = VARIANTS[variant]
    base = make_base(tmp_path / "base", kind, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    merge_adapter(base, adapter, tmp_path / "merged")
    exact, same_dtype = (peft_merged(base, adapter, compute) for compute in (torch.float32, dtype))
    merged, before = tensors(tmp_path / "merged"), tensors(base)
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == before[name].dtype
        ours, truth = tensor.float(), exact[name]
        # Float32 sums taken in another order differ by about 1e-7; then one rounding.
        assert ((ours - truth).abs() <= ROUNDOFF[dtype] * truth.abs() + 5e-7).all(), name
        # PEFT in the base's dtype rounds the sum, and for embeddings first the update: at most three roundings apart.
        allowed = ROUNDOFF[dtype] * (2.1 * truth.abs() + (truth - before[name].float()).abs()) + 1e-6
        assert ((ours - same_dtype[name].float()).abs() <= allowed).all(), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_reloaded_merge_gives_the_logits_of_base_and_adapter(variant: str, tmp_path: Path) -> None:
    kind, lora = VARIANTS[variant]
    base = make_base(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    merge_adapter(base, adapter, tmp_path / "merged")
    unmerged, merged = logits(load_with_adapter(base, adapter)), logits(load(tmp_path / "merged", torch.float32))
    assert (unmerged - logits(load(base, torch.float32))).abs().max() > 0.01  # the adapter does something
    assert torch.allclose(unmerged, merged, atol=2e-5)
