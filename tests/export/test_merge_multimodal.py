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


MTP = {
    "mtp.fc.weight": (32, 64),
    "mtp.norm.weight": (32,),
    "mtp.layers.0.self_attn.q_proj.weight": (64, 32),
    "mtp.layers.0.mlp.gate_proj.weight": (48, 32),
}


def test_heads_for_more_tokens_are_copied_bit_for_bit_and_named(tmp_path: Path):
    """Qwen3.5's file holds a layer of its own for multi-token prediction, with names like those of adapted layers."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    save_multimodal(base, "qwen3_5", torch.bfloat16, mtp_num_hidden_layers=1)
    stored = load_file(base / "model.safetensors")
    stored |= {name: torch.randn(shape).to(torch.bfloat16) for name, shape in MTP.items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapt(load_causal(base), tmp_path / "adapter")
    record = merge_adapter(base, tmp_path / "adapter", merged)
    assert record.other_towers["mtp"] == len(MTP)
    assert "mtp 4" in (record.copied_line or "")
    assert not [name for name in changed(base, merged) if name.startswith("mtp.")]
    assert set(load_file(merged / "model.safetensors")) == set(stored)
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert '"mtp_num_hidden_layers": 1' in (merged / "config.json").read_text()
    assert len(changed(base, merged)) == record.tensors_merged


LAYERS = {"num_hidden_layers": 4}  # from 20 adapted modules on, PEFT saves the ends of their names


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("gemma3", LAYERS | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen2_5_vl", LAYERS),
        pytest.param("mistral3", LAYERS, marks=pytest.mark.slow),
        pytest.param(
            "qwen3_5", LAYERS | {"layer_types": ["linear_attention", "full_attention"] * 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_adapter_of_the_tower_loads_on_the_whole_class_by_a_mapping_of_names(kind: str, layers: dict, tmp_path: Path):
    """Without the mapping PEFT warns, and the model answers as the base does; what docs/multimodal.md says."""
    base = tmp_path / "base"
    save_multimodal(base, kind, **layers)
    tower = load_causal(base, dtype=torch.float32).eval()
    untrained, expected = logits(tower), logits(adapt(tower, tmp_path / "adapter"))

    def on_the_whole_class(**settings: object) -> torch.Tensor:
        whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        return logits(PeftModel.from_pretrained(whole, tmp_path / "adapter", **settings).eval())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(on_the_whole_class(), untrained, atol=2e-5, rtol=1e-5)
    assert any("Found missing adapter keys" in str(warning.message) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules of the vision tower with the same names, which stay as they are
        mapped = on_the_whole_class(key_mapping={r"^model\.": "model.language_model."})
    torch.testing.assert_close(mapped, expected, atol=2e-5, rtol=1e-5)


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
