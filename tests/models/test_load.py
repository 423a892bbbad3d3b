"""How a saved model is loaded to be scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_lite.models.device import Device
from grpo_lite.models.load import load_merged


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
