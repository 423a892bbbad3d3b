"""Verification passes right merges and fails every wrong one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_lite.engine.generate import stop_ids
from grpo_lite.errors import ExportError
from grpo_lite.export import proof
from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.export.proof import Place, VerifyRecord, agreement, proof_place, update_carried, verify_merge
from grpo_lite.models.device import Device
from tests.export.merge_cases import edit_tensors, load, make_adapter, make_base

PROMPTS = ["abcdef", "a quick test", "zzz"]


class ByteTokenizer:
    """Characters as token ids below the tiny models' vocabulary of 40."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) % 40 for character in text]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    base = make_base(folder / "base", dtype=torch.bfloat16)
    merge_adapter(base, make_adapter(folder / "adapter", base, scale=0.2), folder / "merged")
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a saved tokenizer, which the tiny models have none of; and four tokens are long enough here."""
    monkeypatch.setattr("grpo_lite.export.proof.load_saved_tokenizer", lambda folder: ByteTokenizer())
    monkeypatch.setattr("grpo_lite.export.proof.CONTINUED_TOKENS", 4)


CPU = Device("cpu", "a CPU", 1 << 34, bfloat16=True)
T4 = Device("cuda", "Tesla T4", 15 << 30, bfloat16=False, compute_capability=(7, 5))
L4 = Device("cuda", "L4", 22 << 30, bfloat16=True, compute_capability=(8, 9))


def verify(
    folder: Path, prompts: list[str] = PROMPTS, device: Device = CPU, lines: list[str] | None = None
) -> VerifyRecord:
    show = [].append if lines is None else lines.append
    return verify_merge(folder / "base", folder / "adapter", folder / "merged", prompts, device, show)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_right_merge_passes(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("grpo_lite.export.proof.dtype_that_fits", lambda folder: dtype)
    record = verify(folder)
    assert record.passed, record.faults
    assert record.compute_dtype == str(dtype).removeprefix("torch.")
    assert record.merged.mean_kl < 0.1 * record.base.mean_kl
    assert record.merged_against_base > 0
    assert record.prompts == 3
    record.require_passed(folder / "merged")


def test_merge_in_float32_of_a_float32_base_differs_only_by_float32_noise(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    merge_adapter(base, make_adapter(tmp_path / "adapter", base, scale=0.2), tmp_path / "merged")
    record = verify(tmp_path)
    assert record.compute_dtype == "float32"
    assert record.merged.max_logit_difference < 1e-4
    assert record.merged.top1_agreement == 1


def test_positions_cover_prompt_and_greedy_continuation(folder: Path) -> None:
    # 6 + 12 + 3 prompt tokens; with 1 to 4 new tokens each: the random model may say end-of-text.
    assert 24 <= verify(folder).positions <= 33


def test_greedy_answers_are_those_of_each_prompt_alone_with_its_end_token(folder: Path) -> None:
    model = load(folder / "base", torch.float32)
    prompts = [[1, 2, 3], [7], [5, 6, 7, 8, 9, 10], [11, 12]]
    free = proof.greedy_answers(model, prompts, 6, stop_ids(model, ByteTokenizer()))
    end = free[0][2]
    model.generation_config.eos_token_id = end
    stops = stop_ids(model, ByteTokenizer())
    together = proof.greedy_answers(model, prompts, 6, stops)
    assert together == [proof.greedy_answers(model, [prompt], 6, stops)[0] for prompt in prompts]
    assert together == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert together[0][-1] == end
    assert together[0] != free[0]


def test_base_in_place_of_the_merge_fails(folder: Path) -> None:
    shutil.rmtree(folder / "merged")
    shutil.copytree(folder / "base", folder / "merged")
    record = verify(folder)
    assert not record.passed
    assert "the merged model equals the base" in record.faults[0]
    with pytest.raises(ExportError, match=r"not proven right(?s:.*)equals the base(?s:.*)Do not use or publish it"):
        record.require_passed(folder / "merged")


def test_merge_of_another_adapter_fails(folder: Path) -> None:
    shutil.rmtree(folder / "merged")
    other = make_adapter(folder / "other", folder / "base", scale=0.2, init_lora_weights=False)
    merge_adapter(folder / "base", other, folder / "merged")
    assert any("of the adapter's update; right is 1" in fault for fault in verify(folder).faults)


def test_adapter_merged_twice_fails(folder: Path) -> None:
    (folder / "merged/merge.json").unlink()  # which would have it refused
    merge_adapter(folder / "merged", folder / "adapter", folder / "twice")
    shutil.rmtree(folder / "merged")
    (folder / "twice").rename(folder / "merged")
    assert not verify(folder).passed


def test_one_wrong_matrix_fails(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(folder / "merged", lambda saved: saved | {name: saved[name].flip(0)}, "model.safetensors")
    assert not verify(folder).passed


def test_weights_that_are_not_finite_fail(folder: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(folder / "merged", lambda saved: saved | {name: saved[name] * float("nan")}, "model.safetensors")
    assert verify(folder).faults == ("the logits hold NaN or infinity: the weights or the compute dtype are unusable",)


def test_zero_adapter_fails(folder: Path) -> None:
    edit_tensors(folder / "adapter", lambda saved: {name: value * 0 for name, value in saved.items()})
    assert "base + adapter equals the base: the adapter changes nothing" in verify(folder).faults


def test_weight_missing_from_the_merged_folder_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder / "merged", lambda saved: {k: v for k, v in saved.items() if k != name}, "model.safetensors")
    with pytest.raises(ExportError, match=r"1 weights are missing .*layers\.1\.mlp\.up_proj\.weight"):
        verify(folder)


def test_truncated_merged_weights_are_named(folder: Path) -> None:
    path = folder / "merged/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match=r"model\.safetensors: is not a whole safetensors file"):
        verify(folder)


def test_too_little_memory_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200 << 20))
    with pytest.raises(ExportError, match=r"merged but not verified.*0\.3 GiB, and 0\.2 GiB are free"):
        verify(folder)


@pytest.mark.parametrize(
    "device, stored, free_gib, overflows, expected",
    [
        # The stand-in model takes 4 GiB in float32 and 2 GiB in 16 bits.
        (CPU, torch.bfloat16, None, False, Place("cpu", torch.float32)),
        (T4, torch.bfloat16, 5, False, Place("cuda", torch.float32)),
        (T4, torch.bfloat16, 3, False, Place("cuda", torch.float16)),
        (T4, torch.bfloat16, 3, True, Place("cpu", torch.float32)),
        (T4, torch.bfloat16, 1, False, Place("cpu", torch.float32)),
        (L4, torch.bfloat16, 3, False, Place("cuda", torch.bfloat16)),
        (L4, torch.bfloat16, 3, True, Place("cuda", torch.bfloat16)),
        (L4, torch.float16, 3, False, Place("cuda", torch.float16)),
        (L4, torch.float32, 5, False, Place("cuda", torch.float32)),
        (L4, torch.float32, 3, False, Place("cpu", torch.float32)),
    ],
    ids=[
        "no CUDA",
        "fits in float32",
        "a card without bfloat16: float16",
        "a model that overflows in float16",
        "does not fit",
        "a card with bfloat16",
        "bfloat16 has float32's range",
        "float16 stays float16",
        "a float32 base fits",
        "16 bits would round a float32 base's update away",
    ],
)
def test_the_models_are_compared_on_the_gpu_where_one_of_them_fits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    stored: torch.dtype,
    free_gib: int | None,
    overflows: bool,
    expected: Place,
) -> None:
    base = make_base(tmp_path / "base", dtype=stored)
    order: list[str] = []
    monkeypatch.setattr(proof, "free_memory", lambda: order.append("free_memory"))
    if free_gib is not None:
        monkeypatch.setattr(proof, "available_bytes", lambda device: order.append(device.type) or free_gib << 30)
    monkeypatch.setattr(proof, "bytes_to_compute", lambda folder, dtype: dtype.itemsize << 30)
    monkeypatch.setattr("grpo_lite.models.base.Base.overflows_in_float16", overflows)
    assert proof_place(base, device) == expected
    assert order[0] == "free_memory"  # what training's model has left in PyTorch's cache is free


def on_stand_in_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Let the proof choose a GPU that is this CPU, and note where each model should have been loaded."""
    loads: list[tuple[str, str]] = []
    real = proof.load_whole

    def load(folder: Path, dtype: torch.dtype | None, device: str = "cpu") -> Any:
        loads.append((folder.name, device))
        return real(folder, dtype)

    monkeypatch.setattr(proof, "load_whole", load)
    monkeypatch.setattr(proof, "proof_place", lambda base, device: Place("cuda", dtype))
    return loads


def test_on_a_gpu_both_models_are_loaded_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, lines = on_stand_in_gpu(monkeypatch, torch.float32), list[str]()
    on_gpu = verify(folder, device=T4, lines=lines)
    assert loads == [("base", "cuda"), ("merged", "cuda")]
    assert lines == [
        "verifying the merge on 3 prompts, on the GPU in float32",
        "verifying the merge, base and adapter: 3/3 prompts",
        "verifying the merge, merged model: 3/3 prompts",
    ]
    monkeypatch.undo()
    monkeypatch.setattr(proof, "load_saved_tokenizer", lambda folder: ByteTokenizer())
    monkeypatch.setattr(proof, "CONTINUED_TOKENS", 4)
    lines.clear()
    assert verify(folder, lines=lines) == on_gpu  # the same computation, elsewhere
    assert lines[0] == "verifying the merge on 3 prompts, on the CPU in float32"


def test_a_gpu_whose_memory_runs_out_all_the_same_costs_time_and_not_the_proof(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, lines = on_stand_in_gpu(monkeypatch, torch.float16), list[str]()
    real = proof.load_whole

    def load(folder: Path, dtype: torch.dtype | None, device: str = "cpu") -> Any:
        model = real(folder, dtype, device)
        if loads[-1] == ("merged", "cuda"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return model

    monkeypatch.setattr(proof, "load_whole", load)
    record = verify(folder, device=T4, lines=lines)
    assert record.passed
    assert record.compute_dtype == "float32"
    assert loads == [("base", "cuda"), ("merged", "cuda"), ("base", "cpu"), ("merged", "cpu")]
    assert "verifying the merge again, on the CPU in float32: the GPU's memory ran out" in lines
    monkeypatch.setattr(proof, "last_logits", lambda *_: 1 / 0 if loads else None)
    with pytest.raises(ZeroDivisionError):  # any other fault is no reason to try elsewhere
        verify(folder, device=T4)


def test_a_model_that_leaves_float16s_range_is_compared_on_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, lines = on_stand_in_gpu(monkeypatch, torch.float16), list[str]()
    real = proof.last_logits

    def logits(model: Any, ids: torch.Tensor, keep: int) -> torch.Tensor:
        values = real(model, ids, keep)
        return values / 0 if model.dtype == torch.float16 else values

    monkeypatch.setattr(proof, "last_logits", logits)
    assert verify(folder, device=T4, lines=lines).passed
    assert loads[2:] == [("base", "cpu"), ("merged", "cpu")]
    assert "verifying the merge again, on the CPU in float32: the logits leave float16's range" in lines


def test_no_prompts_is_an_error(folder: Path) -> None:
    with pytest.raises(ExportError, match="No prompts"):
        verify(folder, ["", ""])


def test_missing_tokenizer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ExportError, match="merged: its tokenizer does not load"):
        verify(folder)


def test_agreement_of_known_distributions() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = ½·ln 2 + ½·ln(2/3) = ½·ln(4/3); then p = q.
    reference = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.2, 0.8]]).log()]
    other = [torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.2, 0.8]]).log()]
    result = agreement(reference, other)
    assert result.mean_kl == pytest.approx(math.log(4 / 3) / 4)
    assert result.max_kl == pytest.approx(math.log(4 / 3) / 2)
    assert result.top1_agreement == 0.5  # the best of a tie is the first, so the first position disagrees
    assert result.decided_top1_agreement == 1  # only the second leads, by ln 4
    assert result.max_logit_difference == pytest.approx(math.log(2))


@pytest.mark.parametrize("times", [0.0, 0.5, 1.0, 2.0])
def test_share_of_the_update_is_measured_through_noise(times: float) -> None:
    torch.manual_seed(0)
    base = [torch.randn(50, 1000) for _ in range(4)]
    updates = [0.1 * torch.randn(50, 1000) for _ in base]
    reference = [logits + update for logits, update in zip(base, updates, strict=True)]
    merged = [
        logits + times * update + 0.3 * torch.randn(50, 1000) + 7 for logits, update in zip(base, updates, strict=True)
    ]
    # Standard deviation of the estimate: 0.3 / 0.1 / sqrt(200,000 values) = 0.007.
    assert update_carried(reference, base, merged) == pytest.approx(times, abs=0.03)
