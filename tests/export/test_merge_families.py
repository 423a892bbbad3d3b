"""`all-linear` on hybrid layers and mixtures of experts: adapted, merged by name, the same logits after reloading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.export.merge.names import tensor_names
from grpo_lite.models.lora_targets import choose_targets
from grpo_lite.models.text_tower import load_causal
from tests.engine.test_hybrid import cases, model_of

IDS = torch.arange(3, 3 + 40).reshape(1, 40)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "family", cases("lfm2 nemotron_h qwen3_next", "granite falcon_h1 olmo_hybrid lfm2_moe lfm3 qwen3_5_moe bamba")
)
def test_merge_gives_the_logits_of_base_and_adapter(family: str, tmp_path: Path):
    model_of(family, torch.float32).save_pretrained(tmp_path / "base")
    base = load_causal(tmp_path / "base", dtype=torch.float32).eval()
    before = logits(base)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    choose_targets(config, base)
    torch.manual_seed(1)
    trained = get_peft_model(base, config).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    trained.save_pretrained(tmp_path / "adapter")
    record = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert record.tensors_merged == sum(hasattr(part, "lora_A") for part in trained.modules()) > 5
    merged = logits(load_causal(tmp_path / "merged", dtype=torch.float32).eval())
    torch.testing.assert_close(merged, logits(trained), atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 1e-2


def test_names_of_the_file_lead_to_the_model_s_or_to_what_they_are_joined_into(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nemotron_h"}))
    stored = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.1.mixer.experts.0.up_proj.weight"]
    names = tensor_names(tmp_path, stored)
    assert names.of_model == {"backbone.layers.0.mixer.in_proj.weight": "model.layers.0.mixer.in_proj.weight"}
    assert list(names.joined.values()) == ["model.layers.1.mixer.experts.up_proj"]
