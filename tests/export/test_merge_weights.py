"""The real small model: a merge that keeps a small, trained update where rounding to the nearest loses much of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from grpo_lite.export.merge.merge import MergeRecord, merge_adapter
from grpo_lite.export.nf4 import export_nf4
from grpo_lite.export.proof import VerifyRecord, verify_merge
from grpo_lite.files.manifest import verify_manifest
from grpo_lite.models.device import Device
from tests.export.merge_cases import load, tensors

pytestmark = [pytest.mark.weights, pytest.mark.slow]

SHOTS = "2+3=5\n4+4=8\n6+1=7\n9+8=17\n"
HELD_OUT = [f"{SHOTS}{a}+{b}=" for a, b in [(3, 4), (9, 9), (14, 2), (19, 11)]]


@pytest.fixture(scope="module")
def adapter(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter after one step of sign descent on sums: what Adam does in a few steps of 3e-4, without the wait."""
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    torch.manual_seed(0)
    model = get_peft_model(
        load(smollm2_dir, torch.float32), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    text = SHOTS + "\n".join(f"{a}+{b}={a + b}" for a in (2, 5, 8) for b in (1, 6, 7))
    ids = tokenizer(text, return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.sub_(1e-3 * parameter.grad.sign())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(smollm2_dir: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergeRecord]:
    folder = tmp_path_factory.mktemp("export") / "merged"
    return folder, merge_adapter(smollm2_dir, adapter, folder)


def verify(base: Path, adapter: Path, merged: Path) -> VerifyRecord:
    return verify_merge(base, adapter, merged, HELD_OUT, Device("cpu", "a CPU", 1 << 34, bfloat16=True), print)


def test_merge_of_the_real_model_passes_and_beats_rounding_to_the_nearest(
    smollm2_dir: Path,
    adapter: Path,
    merged: tuple[Path, MergeRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, record = merged
    assert verify_manifest(folder) >= 6
    assert (record.tensors_merged, record.tensors_dithered, record.unchanged) == (210, 210, ())
    ours = verify(smollm2_dir, adapter, folder)
    assert ours.passed, ours.faults
    assert ours.effect_resolved
    assert ours.update_carried == pytest.approx(1, abs=0.05)

    monkeypatch.setattr("grpo_lite.export.merge.merge.MAX_NEAREST_LOSS", float("inf"))
    merge_adapter(smollm2_dir, adapter, tmp_path / "nearest")
    nearest = verify(smollm2_dir, adapter, tmp_path / "nearest")
    assert ours.merged.mean_kl < nearest.merged.mean_kl / 5


def test_tensors_beside_the_targets_are_the_base_bit_for_bit(
    smollm2_dir: Path, merged: tuple[Path, MergeRecord]
) -> None:
    before, after = tensors(smollm2_dir), tensors(merged[0])
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != ("_proj." in name), name


def test_nf4_export_of_the_real_model_loads_and_tells_its_loss(
    merged: tuple[Path, MergeRecord], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    record = export_nf4(merged[0], tmp_path / "nf4", HELD_OUT)
    assert record.size_bytes < 0.45 * record.merged_bytes  # the tied embedding, a fifth of it, stays in 16 bits
    assert 1e-3 < record.agreement.mean_kl < 2
