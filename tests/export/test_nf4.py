"""The NF4 export loads by itself and tells its own loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from grpo_lite.errors import ExportError
from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.export.nf4 import export_nf4
from grpo_lite.files.manifest import verify_manifest
from grpo_lite.models.device import detect_device
from grpo_lite.models.load import load_merged
from tests.export.merge_cases import edit_config, make_adapter, make_base
from tests.export.test_proof import PROMPTS, ByteTokenizer
from tests.models.tiny_multimodal import save_multimodal

pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_lite.export.nf4.load_saved_tokenizer", lambda folder: ByteTokenizer())


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base", "wide", torch.bfloat16)
    merge_adapter(base, make_adapter(tmp_path / "adapter", base, scale=0.05), tmp_path / "merged")
    return tmp_path / "merged"


def test_nf4_export_is_smaller_loads_in_4_bit_and_records_its_loss(merged: Path, tmp_path: Path) -> None:
    record = export_nf4(merged, tmp_path / "nf4", PROMPTS)
    # Linear layers at 4 bits and their scales instead of 16; embedding and head stay.
    assert record.size_bytes < 0.6 * record.merged_bytes
    assert 0 < record.agreement.mean_kl < 0.5
    assert json.loads((tmp_path / "nf4/nf4.json").read_text())["agreement"]["mean_kl"] == record.agreement.mean_kl
    verify_manifest(tmp_path / "nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    assert (tmp_path / "nf4/model.safetensors").stat().st_mode == (tmp_path / "nf4/config.json").stat().st_mode


def test_nf4_of_a_multimodal_model_keeps_the_vision_tower_in_16_bits(tmp_path: Path) -> None:
    save_multimodal(tmp_path / "m", dtype=torch.bfloat16)
    record = export_nf4(tmp_path / "m", tmp_path / "nf4", PROMPTS)
    assert 0 < record.agreement.mean_kl < 0.5
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "nf4"))
    vision = [name for name in before if not name.startswith("language_model.")]
    assert len(vision) > 10
    assert all(torch.equal(before[name], after[name]) for name in vision)
    tower = load_merged(tmp_path / "nf4", detect_device())
    assert type(tower.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "nf4")
    assert type(whole.model.multi_modal_projector).__name__ == "Gemma3MultiModalProjector"
    assert "4bit" not in str(whole.model.vision_tower)


def test_nf4_counts_the_heads_for_more_tokens_that_it_leaves_out(tmp_path: Path) -> None:
    save_multimodal(tmp_path / "m", "qwen3_5", torch.bfloat16, mtp_num_hidden_layers=1)
    stored = load_file(tmp_path / "m/model.safetensors")
    heads = {"mtp.fc.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)}
    save_file(stored | heads, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    assert export_nf4(tmp_path / "m", tmp_path / "nf4", PROMPTS).left_out == 2
    assert not any("mtp" in name for name in load_file(tmp_path / "nf4/model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "intermediate"), [pytest.param(30, 77, marks=pytest.mark.matrix), (32, 33)])
def test_nf4_export_of_odd_widths_works_too(tmp_path: Path, hidden: int, intermediate: int) -> None:
    """No multiples of 32 rows and 64 columns: bitsandbytes' layout for AVX512-BF16 has no place for them."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=2, head_dim=12,
        num_key_value_heads=1, vocab_size=261,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    record = export_nf4(tmp_path / "m", tmp_path / "nf4", PROMPTS)
    assert 0 < record.agreement.mean_kl < 0.1
    model = load_merged(tmp_path / "nf4", detect_device())
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_nf4_export_of_a_quantised_folder_is_refused(merged: Path, tmp_path: Path) -> None:
    edit_config(merged, "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ExportError, match="the base is quantised"):
        export_nf4(merged, tmp_path / "nf4", PROMPTS)
    assert not (tmp_path / "nf4").exists()


def test_nf4_export_without_prompts_is_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No prompts"):
        export_nf4(merged, tmp_path / "nf4", [])
