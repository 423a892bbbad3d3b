"""How a saved model is loaded to be scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_lite.models.base import Base
from grpo_lite.models.device import Device
from grpo_lite.models.load import load_merged, load_model
from grpo_lite.recipe.recipe import ModelSection


@pytest.mark.parametrize(
    "kind, bfloat16, overflows, expected",
    [
        ("cuda", True, False, "auto"),
        ("cuda", False, False, torch.float16),
        ("cuda", False, True, torch.float32),
        ("cpu", True, False, "auto"),
        ("cpu", False, False, torch.float32),
    ],
    ids=["native bfloat16", "a T4", "a model that overflows, on a T4", "a CPU with bfloat16", "another CPU"],
)
def test_a_merged_model_is_scored_in_a_dtype_that_the_device_computes_in(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, bfloat16: bool, overflows: bool, expected: Any
) -> None:
    """Its folder is in bfloat16, which a T4 only emulates."""
    asked: list[dict[str, Any]] = []
    real = AutoModelForCausalLM.from_pretrained

    def load(folder: Path, **given: Any) -> Any:
        asked.append(given)
        return real(folder, dtype="float32")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr("grpo_lite.models.base.Base.overflows_in_float16", overflows)
    load_merged(tiny_dir, Device(kind, "it", 1 << 34, bfloat16=bfloat16, compute_capability=(7, 5)))
    assert asked[0]["dtype"] == expected
    assert asked[0].get("device_map") == ({"": 0} if kind == "cuda" else None)


GPU, CPU = (Device(kind, "it", 1 << 34, bfloat16=True) for kind in ("cuda", "cpu"))


@pytest.mark.parametrize("load", ["base", "merged"])
@pytest.mark.parametrize(
    "device, environment, expected",
    [
        (GPU, {}, False),
        (CPU, {}, True),
        (GPU, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}, True),
        (GPU, {"TORCH_CUDNN_SDPA_PREFERRED": "1"}, True),
    ],
    ids=["a GPU", "a CPU", "the user chose cuDNN", "the user chose cuDNN, by its older name"],
)
def test_cudnn_attention_is_off_on_a_gpu_before_a_model_is_loaded(
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: str,
    device: Device,
    environment: dict[str, str],
    expected: bool,
) -> None:
    """Training, evaluation, chat and the probe load their model with one of these two."""
    seen: list[bool] = []
    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder: Path, **_: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(folder, dtype="float32")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for name in ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_PREFERRED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        if load == "base":
            load_model(Base(ModelSection(id=str(tiny_dir), load_in="16bit"), device, tiny_dir))
        else:
            load_merged(tiny_dir, device)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [expected]


def test_a_torch_without_the_switch_for_cudnn_attention_loads_as_before(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.backends.cuda, "enable_cudnn_sdp")
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda folder, **_: real(folder, dtype="float32"))
    load_merged(tiny_dir, GPU)
