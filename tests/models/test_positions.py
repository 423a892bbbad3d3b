"""No plan offers more positions than a model has, and a run that goes beyond them says so before it loads anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_lite import train
from grpo_lite.errors import ModelError
from grpo_lite.memory.plan import largest_completion
from grpo_lite.memory.report import plan_recipe, report_lines
from grpo_lite.models.base import Base
from grpo_lite.models.config import KNOWN, known_config
from grpo_lite.models.device import CARDS, find_card
from grpo_lite.models.positions import read_positions, too_long
from grpo_lite.models.shape import read_shape
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from tests.memory.known_models import job_of

QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768}
OLD = {"model_type": "llama", "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "config, expected",
    [
        (QWEN, 32768),
        (QWEN | {"rope_scaling": None}, 32768),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "mystery"}, None),
        (QWEN | {"max_position_embeddings": None}, None),
        (QWEN | {"max_position_embeddings": True}, None),
        # Qwen2.5's own words for long texts: 32,768 stays, and 4 × 32,768 is meant.
        (QWEN | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        # Some write the scaled length beside it; it is not scaled again.
        (
            {
                "model_type": "qwen3",
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            OLD | {"rope_scaling": {"type": "linear", "factor": 4}},
            16384,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "dynamic", "factor": 2.5},
            },
            10240,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "model_type": "phi3",
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
            },
            131072,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            131072,
        ),
        (
            {
                "model_type": "other",
                "max_position_embeddings": 2048,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                },
            },
            16384,
        ),
        (QWEN | {"rope_scaling": {"type": "video_rope", "factor": None}}, 32768),
        (QWEN | {"rope_scaling": {"type": "yarn", "factor": None}}, 32768),
        (QWEN | {"rope_scaling": {}}, 32768),
        ({"model_type": "x", "text_config": QWEN}, 32768),
    ],
    ids=lambda value: str(value.get("rope_scaling") or value)[:40] if isinstance(value, dict) else str(value),
)
def test_positions_are_read_with_their_scaling(config: dict[str, Any], expected: int | None) -> None:
    assert read_positions(config) == expected


def test_models_in_the_built_in_table_have_positions_and_qwen_math_has_its_own() -> None:
    assert all(read_shape(config, name).positions for name, config in KNOWN.items())
    math, coder = (known_config(f"Qwen/Qwen2.5-{kind}-1.5B-Instruct") for kind in ("Math", "Coder"))
    assert math is not None
    assert (math["max_position_embeddings"], coder) == (4096, KNOWN["qwen2.5-1.5b"])
    assert read_shape(math, "x") == read_shape(KNOWN["qwen2.5-1.5b"], "x")  # the same family for advice


@pytest.mark.parametrize("prompt, longest", [(200, 7992), (8191, 1), (8192, None), (9000, None), (8150, 42)])
def test_the_longest_completion_ends_where_the_positions_end(prompt: int, longest: int | None) -> None:
    job = job_of(load_recipe("sums"), prompt=prompt)
    assert job.shape.positions == 8192
    assert largest_completion(job, 10**15, whole_groups=False) == longest
    assert largest_completion(job, 10**15, whole_groups=True) == longest


def test_the_report_says_what_bounds_the_length() -> None:
    recipe = load_recipe("sums")

    def line(card: str) -> str:
        lines = report_lines(recipe, find_card(card), plan_recipe(recipe, find_card(card), 192))
        return next(line for line in lines if line.startswith("longest completions"))

    assert "(both bounded by the model's 8192 positions, not by memory)" in line("h100")
    assert "8000 one completion at a time (the latter bounded by" in line("6GiB")
    assert "bounded" not in line("1GiB")


@pytest.mark.parametrize("card", list(CARDS))
def test_no_card_is_offered_more_than_the_model_has(card: str) -> None:
    for name in ("gsm8k", "sums", "math"):
        job = job_of(load_recipe(name))
        for whole in (True, False):
            longest = largest_completion(job, CARDS[card].memory_bytes, whole)
            assert job.shape.positions is not None
            assert job.prompt + (longest or 0) <= job.shape.positions


def test_a_recipe_beyond_the_positions_is_told_with_what_to_change() -> None:
    recipe = load_recipe("sums", ["grpo.max_completion_length=9000"])
    text = "\n".join(report_lines(recipe, find_card("h100"), plan_recipe(recipe, find_card("h100"), 200)))
    assert "too long: embedded/SmolLM2-135M-Instruct was made for 8192 positions" in text
    assert "need 9200; paste: grpo.max_completion_length=7992" in text
    assert too_long("m", 8192, 200, 7992) is None
    assert too_long("m", None, 10**9, 10**9) is None
    assert "paste: data.max_prompt_tokens=4096" in (too_long("m", 8192, 8192, 16) or "")


def note(recipe: Recipe, prompt_tokens: int) -> str | None:
    return Base.resolve(recipe.model).positions_note(recipe, prompt_tokens)


@pytest.mark.parametrize("key", ["grpo.max_completion_length", "eval.max_new_tokens"])
def test_training_and_evaluation_count(key: str) -> None:
    """The tiny model has 512 positions."""
    assert note(load_recipe("smoke", [f"{key}=500"]), 12) is None
    assert f"paste: {key}=499" in (note(load_recipe("smoke", [f"{key}=500"]), 13) or "")
    if key.startswith("eval"):
        assert note(load_recipe("smoke", [f"{key}=500", "eval.enabled=false"]), 13) is None


class Loading(Exception):
    """The model is being loaded."""


def test_a_training_says_it_before_it_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise Loading

    monkeypatch.setattr("grpo_lite.session.build.load_base", load)
    said: list[str] = []
    recipe = load_recipe("smoke", ["grpo.max_completion_length=510"])
    with pytest.raises(Loading):
        train.train_run(recipe, RunDir(tmp_path / "run"), said.append)
    assert [line for line in said if line.startswith("model: tiny/random-llama was made for 512 positions")]


def test_a_table_of_learned_positions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 256}), encoding="utf-8")
    recipe = load_recipe("smoke", [f"model.id={tmp_path}", "grpo.max_completion_length=250"])
    assert note(recipe, 6) is None
    with pytest.raises(ModelError, match=r"made for 256 positions.*paste: grpo\.max_completion_length=249"):
        note(recipe, 7)


def test_a_config_that_cannot_be_read_is_left_to_whoever_loads_it(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [f"model.id={tmp_path}"])
    assert note(recipe, 10**6) is None
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    assert note(recipe, 10**6) is None
