"""Long silent steps of the set-up are said before they begin, and short ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_lite import train
from grpo_lite.errors import GRPOLiteError
from grpo_lite.models.base import Base
from grpo_lite.models.device import Device
from grpo_lite.models.embedded import embedded_folder
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session.announce import announce_base, announce_data, announce_weights

CPU = Device("cpu", "a CPU", 1 << 34, bfloat16=True)


def test_the_embedded_models_conversion_is_announced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    lines: list[str] = []
    announce_base(load_recipe("quickstart"), lines.append)
    assert lines == ["model: embedded/SmolLM2-135M-Instruct is converted to bfloat16, once (about 20 s)"]
    embedded_folder().mkdir()
    announce_base(load_recipe("quickstart"), lines.append)
    announce_base(load_recipe("smoke"), lines.append)
    assert len(lines) == 1


def test_datasets_of_the_hub_are_named_once_and_local_ones_not_at_all() -> None:
    lines: list[str] = []
    announce_data(load_recipe("gsm8k"), lines.append)  # its held-out rows are a split of the same dataset
    assert lines == ["data: reading openai/gsm8k from the Hub or its cache"]
    announce_data(load_recipe("smoke"), lines.append)
    assert len(lines) == 1


def test_a_model_that_is_fetched_or_large_is_announced_and_a_small_one_is_not(tmp_path: Path) -> None:
    lines: list[str] = []
    base = Base(load_recipe("gsm8k").model, CPU, tmp_path)
    announce_weights(base, lines.append)
    weights = tmp_path / "model.safetensors"
    for size in (3 << 29, 1 << 20):
        with weights.open("wb") as file:
            file.truncate(size)  # a hole: it takes no room
        announce_weights(base, lines.append)
    assert lines == [
        "model: fetching the weights of Qwen/Qwen2.5-1.5B-Instruct, then loading them in 4bit",
        "model: loading Qwen/Qwen2.5-1.5B-Instruct in 4bit (1.5 GiB of weights)",
    ]


def test_a_training_says_what_it_reads_before_it_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise GRPOLiteError("no network")

    lines: list[str] = []
    monkeypatch.setattr(train, "load_prompts", failing)
    recipe = load_recipe("gsm8k", ["model.id=tiny/random-llama"])
    with pytest.raises(GRPOLiteError, match="no network"):
        train.train_run(recipe, RunDir(tmp_path / "run"), lines.append)
    assert lines[-1] == "data: reading openai/gsm8k from the Hub or its cache"
