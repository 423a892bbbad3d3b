"""The device's dtype, and what the recipe may force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import ModelError
from grpo_lite.models.base import Base, compute_dtype
from grpo_lite.models.config import KNOWN
from grpo_lite.models.device import Device, detect_device, peak_memory_bytes
from grpo_lite.recipe.recipe import ModelSection

T4 = Device("cuda", "Tesla T4", 15 << 30, bfloat16=False, compute_capability=(7, 5), count=2)
A10 = Device("cuda", "NVIDIA A10", 23 << 30, bfloat16=True, compute_capability=(8, 6))
OLD_CPU = Device("cpu", "laptop", 8 << 30, bfloat16=False)
NEW_CPU = Device("cpu", "server", 8 << 30, bfloat16=True)


def section(dtype: str) -> ModelSection:
    return ModelSection.model_validate({"id": "x", "dtype": dtype})


@pytest.mark.parametrize(
    "device, expected",
    [(T4, "float16"), (A10, "bfloat16"), (OLD_CPU, "float32"), (NEW_CPU, "bfloat16")],
    ids=["T4", "A10", "old CPU", "new CPU"],
)
def test_auto_computes_in_what_the_device_has(device: Device, expected: str) -> None:
    assert compute_dtype(section("auto"), device, False) == expected


def test_forced_bfloat16_on_a_t4_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Tesla T4 .* only emulates it"):
        compute_dtype(section("bfloat16"), T4, False)


def test_forced_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="a CPU cannot train in it"):
        compute_dtype(section("float16"), NEW_CPU, False)


def base(model_id: str, config: dict[str, Any], device: Device, folder: Path, dtype: str = "auto") -> Base:
    (folder / "config.json").write_text(json.dumps(config))
    return Base(ModelSection.model_validate({"id": model_id, "dtype": dtype}), device, folder)


def test_gemma_3_runs_in_float32_where_there_is_no_bfloat16(tmp_path: Path) -> None:
    bases = [base("unsloth/gemma-3-1b-it", KNOWN["gemma-3-1b"], device, tmp_path) for device in (T4, A10)]
    assert [base.dtype for base in bases] == ["float32", "bfloat16"]


def test_forced_float16_is_refused_for_a_model_that_overflows_in_it(tmp_path: Path) -> None:
    gemma = base("unsloth/gemma-3-1b-it", KNOWN["gemma-3-1b"], A10, tmp_path, "float16")
    with pytest.raises(ModelError, match=r"gemma-3-1b-it leave its range .* Set model\.dtype=auto"):
        gemma.dtype  # noqa: B018


def test_a_model_without_a_known_shape_computes_in_what_the_device_has(tmp_path: Path) -> None:
    mixture = base("me/experts", KNOWN["qwen3-4b"] | {"num_experts": 128}, T4, tmp_path)
    with pytest.raises(ModelError, match="mixture of experts"):
        mixture.shape  # noqa: B018
    assert mixture.dtype == "float16"


def test_float32_is_allowed_everywhere() -> None:
    assert {compute_dtype(section("float32"), device, False) for device in (T4, A10, OLD_CPU)} == {"float32"}


def test_this_machine_is_described() -> None:
    device = detect_device()
    assert device.memory_bytes > 1 << 30
    assert "GiB" in device.describe()
    assert peak_memory_bytes(device) > (1 << 20 if device.kind == "cpu" else -1)
