"""docs/models.md says of each family what its tests prove."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_lite.engine import attention
from grpo_lite.export.gguf.tensors import ARCHITECTURES
from grpo_lite.models.shape import read_shape
from tests.conftest import ROOT
from tests.engine import test_families, test_hybrid
from tests.engine.families import build
from tests.tiny import tiny_model

REGISTRIES: list[dict[str, Any]] = [test_families.FAMILIES, test_hybrid.FAMILIES]
REFUSED: dict[str, Callable[[], Any]] = {
    "GPT2LMHeadModel": lambda: tiny_model("gpt2"),
    "JambaForCausalLM": lambda: build(
        "JambaConfig", "JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, num_experts=1
    ),
}


def classes(heading: str) -> list[str]:
    """Return the classes in a table of the page."""
    page = (ROOT / "docs" / "models.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\|[^|]+\| `(\w+)` \|", section, re.MULTILINE)


def test_the_families_that_share_are_those_with_a_proof() -> None:
    shared = classes("Shared") + classes("Shared, with a remark")
    assert sorted(shared) == sorted({family.args[1] for registry in REGISTRIES for family in registry.values()})


@pytest.mark.parametrize("name", REFUSED)
def test_the_families_on_trl_s_compute_are_refused_by_name(name: str) -> None:
    assert name in classes("TRL's own compute")
    model = REFUSED[name]()
    assert type(model).__name__ == name
    assert attention.obstacle(model) is not None


def test_every_family_on_trl_s_compute_is_tried() -> None:
    assert sorted(classes("TRL's own compute")) == sorted(REFUSED)


@pytest.mark.parametrize(
    "config_class", sorted({family.args[0] for registry in REGISTRIES for family in registry.values()})
)
def test_every_family_that_shares_is_planned(config_class: str) -> None:
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    config = getattr(transformers, config_class)()
    assert read_shape(config.to_dict(), config_class).parameters > 10**8


def test_the_families_that_gguf_is_written_for_are_named() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    row = next(line for line in page.splitlines() if line.endswith("| written here |"))
    for name in ("Llama", "Qwen2", "Qwen3", "LFM2"):
        assert f"{name}," in row
        assert any(name.lower() in known.lower() for known in ARCHITECTURES)
    assert len(ARCHITECTURES) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "data" / "configs").glob("*.json")), ids=lambda path: path.stem
)
def test_the_flags_of_real_checkpoints_are_served(path: Path) -> None:
    """By the text tower's class, without weights; Phi-4-mini's positions change beyond 4,096 tokens, no others do."""
    facts = json.loads(path.read_text())
    config = AutoConfig.for_model(facts.pop("model_type"), **facts).get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    kwargs = {"attn_implementation": "eager"} if capped else {}  # as `load_causal` loads it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    assert type(model).__name__ in classes("Shared") + classes("Shared, with a remark")
    assert attention.obstacle(model) is None
    assert attention.rope_border(model, 100, 5000) == (4096 if "phi-4" in path.stem else None)
