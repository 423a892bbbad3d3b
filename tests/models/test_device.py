"""The device's dtype, and what the recipe may force."""

from __future__ import annotations

import pytest

from grpo_lite.errors import ModelError
from grpo_lite.models.base import compute_dtype
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
    assert compute_dtype(section("auto"), device) == expected


def test_forced_bfloat16_on_a_t4_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Tesla T4 .* only emulates it"):
        compute_dtype(section("bfloat16"), T4)


def test_forced_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="a CPU cannot train in it"):
        compute_dtype(section("float16"), NEW_CPU)


def test_gemma_3_runs_in_float32_where_there_is_no_bfloat16() -> None:
    gemma = ModelSection.model_validate({"id": "unsloth/gemma-3-1b-it"})
    assert [compute_dtype(gemma, device) for device in (T4, A10)] == ["float32", "bfloat16"]


def test_forced_float16_is_refused_for_a_model_that_overflows_in_it() -> None:
    gemma = ModelSection.model_validate({"id": "unsloth/gemma-3-1b-it", "dtype": "float16"})
    with pytest.raises(ModelError, match=r"gemma-3-1b-it leave its range .* Set model\.dtype=auto"):
        compute_dtype(gemma, A10)


def test_float32_is_allowed_everywhere() -> None:
    assert {compute_dtype(section("float32"), device) for device in (T4, A10, OLD_CPU)} == {"float32"}


def test_this_machine_is_described() -> None:
    device = detect_device()
    assert device.memory_bytes > 1 << 30
    assert "GiB" in device.describe()
    assert peak_memory_bytes(device) > (1 << 20 if device.kind == "cpu" else -1)
