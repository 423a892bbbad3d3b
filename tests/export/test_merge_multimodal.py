"""A merge onto a multimodal checkpoint: the text tower changes, all else is copied bit for bit, both classes load."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.models.text_tower import load_causal
from tests.models.tiny_multimodal import save_multimodal

IDS = torch.arange(3, 3 + 24).reshape(1, 24) * 7 % 300


def adapt(model: torch.nn.Module, folder: Path, **lora: object) -> PeftModel:
    """Save an adapter that changes the logits, and return the model with it."""
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings
        wrapped = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # zero before training
                parameter.data.normal_(0, 0.1)
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def changed(before: Path, after: Path) -> set[str]:
    ours, theirs = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "qwen2_5_vl"])
def test_merged_folder_loads_as_either_class_with_the_trained_text_tower(kind: str, tmp_path: Path):
    base = tmp_path / "base"
    save_multimodal(base, kind)
    (base / "preprocessor_config.json").write_text("{}")
    trained = adapt(load_causal(base, dtype=torch.float32), tmp_path / "adapter")
    record = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    expected = logits(trained)
    torch.testing.assert_close(logits(load_causal(tmp_path / "merged", dtype=torch.float32).eval()), expected)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(whole), expected, atol=2e-5, rtol=1e-5)
    assert (expected - logits(load_causal(base, dtype=torch.float32).eval())).abs().max() > 0.01
    assert len(changed(base, tmp_path / "merged")) == record.tensors_merged > 10
    assert not [name for name in changed(base, tmp_path / "merged") if "vis" in name]
    assert f"{sum(record.other_towers.values())} tensors beside the text tower are" in (record.copied_line or "")
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_adapter_trained_on_the_whole_class_merges_too(tmp_path: Path):
    base = tmp_path / "base"
    whole = save_multimodal(base)
    trained = adapt(whole, tmp_path / "adapter", target_modules=r".*language_model.*\.(q_proj|down_proj)")
    record = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert record.tensors_merged == 4
    torch.testing.assert_close(logits(load_causal(tmp_path / "merged").eval()), logits(trained), atol=2e-5, rtol=1e-5)


def test_head_untied_by_the_merge_is_loaded_by_both_classes(tmp_path: Path):
    base = tmp_path / "base"
    save_multimodal(base)
    trained = adapt(load_causal(base), tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    assert merge_adapter(base, tmp_path / "adapter", tmp_path / "merged").untied
    torch.testing.assert_close(logits(load_causal(tmp_path / "merged").eval()), logits(trained), atol=1e-4, rtol=1e-4)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(whole), logits(trained), atol=2e-5, rtol=1e-5)


def test_keys_that_the_model_takes_from_earlier_layers_are_no_gap_of_the_adapter(tmp_path: Path):
    base = tmp_path / "base"
    layers = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    save_multimodal(base, "gemma4", **layers)
    stored = load_file(base / "model.safetensors")
    unused = "model.language_model.layers.{}.self_attn.{}_proj.weight"  # released files hold them
    for layer, part in ((2, "k"), (2, "v"), (3, "k"), (3, "v")):
        stored[unused.format(layer, part)] = stored[unused.format(layer - 2, part)].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    trained = adapt(load_causal(base), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load_causal(tmp_path / "merged").eval()), logits(trained), atol=1e-4, rtol=1e-4)
