"""A multimodal checkpoint's text tower alone: the same logits, no vision tower, names that lead back to the file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_lite.engine import attention
from grpo_lite.errors import ModelError
from grpo_lite.export.merge.names import tensor_names
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_trained
from grpo_lite.models.text_tower import causal_config, load_causal, other_towers
from grpo_lite.recipe.recipe import ModelSection
from tests.conftest import ROOT
from tests.models.tiny_multimodal import KINDS, save_multimodal
from tests.tiny import tiny_model

IDS = torch.arange(3, 3 + 48).reshape(2, 24) * 7 % 300


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_text_tower_gives_the_logits_of_the_whole_model(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    whole = save_multimodal(tmp_path, kind)
    prefix, class_name = KINDS[kind]
    assert f"{prefix}layers.0.mlp.down_proj.weight" in names_in(tmp_path)  # the layout of the released files
    tower = load_causal(tmp_path, dtype=torch.float32).eval()
    assert type(tower).__name__ == class_name
    assert not any("vis" in name for name, _ in tower.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(tower(input_ids=IDS).logits, whole(input_ids=IDS).logits, atol=2e-5, rtol=1e-5)
    assert "vis" not in caplog.text
    assert "multimodal" not in (attention.obstacle(tower) or "")


def test_capped_scores_are_computed_by_attention_that_caps_them(tmp_path: Path):
    """Transformers before 5.22 loads Gemma 2 with SDPA, which does not."""
    tiny_model("gemma2", sliding_window=512).save_pretrained(tmp_path)
    model = load_causal(tmp_path)
    assert model.config._attn_implementation == "eager"
    assert attention.obstacle(model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapted_module_finds_its_tensor_and_the_rest_is_counted(kind: str, tmp_path: Path):
    save_multimodal(tmp_path, kind)
    stored = load_file(tmp_path / "model.safetensors")
    tower = load_causal(tmp_path, dtype=torch.float32)
    own = set(tower.state_dict())
    model = get_peft_model(tower, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = [name for name, part in model.base_model.model.named_modules() if hasattr(part, "lora_A")]
    names = tensor_names(tmp_path, stored)
    in_file = {of_model: name for name, of_model in names.of_model.items()}
    weights = {f"{name}.weight": model.get_submodule(f"base_model.model.{name}").weight for name in adapted}
    assert len(adapted) >= 13
    assert "lm_head" not in adapted
    for name, weight in weights.items():
        assert torch.equal(stored[in_file[name]], weight)
    text = [name for name in stored if names.of_model.get(name) in own]
    assert sum(names.other_towers.values()) == len(stored) - len(text) > 0
    assert all("vis" in part or "projector" in part for part in names.other_towers)


def test_prediction_heads_and_towers_are_counted_apart():
    names = ["mtp.fc.weight", "model.visual.a", "model.visual.b", "model.language_model.norm.weight", "lm_head.weight"]
    assert other_towers(names) == {"mtp": 1, "visual": 2}


def test_head_stored_under_the_text_tower_is_the_head(tmp_path: Path):
    save_multimodal(tmp_path, "mistral3")
    names = tensor_names(tmp_path, ["language_model.lm_head.weight", "language_model.model.norm.weight"])
    assert names.of_model["language_model.lm_head.weight"] == "lm_head.weight"


def test_text_tower_under_a_name_that_is_not_known_is_refused_and_not_random(tmp_path: Path):
    save_multimodal(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {name.replace("language_model.", "decoder."): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights of the text tower .Gemma3ForCausalLM. are not in the checkpoint"):
        load_causal(tmp_path, dtype=torch.float32)


def test_saving_an_adapter_of_a_tower_saves_no_embedding(tmp_path: Path):
    save_multimodal(tmp_path / "base", "qwen3_vl")
    model = get_peft_model(load_causal(tmp_path / "base"), LoraConfig(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "adapter")
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_adapter_of_the_whole_class_is_refused_and_not_left_out_silently(tmp_path: Path):
    whole = save_multimodal(tmp_path / "base")
    targets = r".*language_model.*\.q_proj"
    get_peft_model(whole, LoraConfig(target_modules=targets)).save_pretrained(tmp_path / "adapter")
    section = ModelSection(id=str(tmp_path / "base"), load_in="16bit")  # type: ignore[call-arg]
    with pytest.raises(ModelError, match=r"4 of its 4 tensors belong to modules that Gemma3ForCausalLM does not have"):
        load_trained(Base.resolve(section), "shared", tmp_path / "adapter")


FLAT = {
    "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000,
    "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 70, "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "eos_token_id": 151645,
    "torch_dtype": "bfloat16", "vision_config": {"depth": 32},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "class_name", "billions"),
    [
        ("gemma-3-4b-it", "Gemma3ForCausalLM", 3.88),
        ("qwen3.5-0.8b", "Qwen3_5ForCausalLM", 0.752),
        ("flat", "Qwen2ForCausalLM", 3.086),  # Qwen2.5-VL-3B: the text's sizes stand beside `vision_config`
    ],
)
def test_a_released_config_gives_the_tower_its_sizes(
    name: str, class_name: str, billions: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    released = FLAT if name == "flat" else json.loads((ROOT / f"tests/data/configs/{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = causal_config(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == class_name
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert (config.dtype, config.tie_word_embeddings) == (torch.bfloat16, True)
    assert not any("mrope" in str(value) for value in (config.rope_parameters, caplog.text)) or "3_5" in class_name
