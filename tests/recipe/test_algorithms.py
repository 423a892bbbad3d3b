"""`algorithm`: one word sets the keys that belong together, explicit keys win, and `show` says where each is from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from grpo_lite.recipe import algorithms
from grpo_lite.recipe.algorithms import ALGORITHMS, Word
from grpo_lite.recipe.load import build_recipe, load_recipe, read_recipe
from grpo_lite.recipe.objective import notes, with_origins
from grpo_lite.recipe.upstream import CHOICES, config_defaults, config_fields
from grpo_lite.runs.run_dir import RunDir, dump_recipe, fixed_keys
from tests.recipe.test_recipe import MINIMAL, faults_of, recipe_from

WORDS = list(ALGORITHMS)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"


def notes_of(extra: str) -> str:
    return "\n".join(notes(recipe_from(MINIMAL + extra + "\n")))


def test_the_words_a_recipe_may_say_are_those_that_are_defined() -> None:
    assert list(get_args(Word)) == WORDS


@pytest.mark.parametrize("word", WORDS)
def test_a_word_sets_its_keys_and_nothing_else(word: Word) -> None:
    plain, recipe = recipe_from(MINIMAL), recipe_from(MINIMAL + f"algorithm: {word}\n")
    assert recipe.grpo == {**plain.grpo, **ALGORITHMS[word].grpo}
    assert recipe.model_copy(update={"grpo": plain.grpo, "algorithm": "trl"}) == plain
    assert build_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe  # as a run's folder keeps it


def test_without_the_key_a_recipe_trains_as_before() -> None:
    recipe = recipe_from(MINIMAL)
    assert recipe.algorithm == "trl"
    assert "loss_type" not in recipe.grpo
    assert {key: config_defaults("grpo")[key] for key in ("loss_type", "scale_rewards", "epsilon", "epsilon_high")} == {
        "loss_type": "dapo",
        "scale_rewards": "group",
        "epsilon": 0.2,
        "epsilon_high": None,
    }


def test_no_word_sets_the_learning_rate_the_batch_or_the_length() -> None:
    assert {key for algorithm in ALGORITHMS.values() for key in algorithm.grpo} <= {
        *("loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation"),
        *("epsilon", "epsilon_high", "delta", "beta", "use_bias_correction_kl"),
        *("mask_truncated_completions", "top_entropy_quantile", "sapo_temperature_pos", "sapo_temperature_neg"),
        *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    }


def test_every_value_is_one_that_upstream_knows() -> None:
    for algorithm in ALGORITHMS.values():
        assert algorithm.grpo.keys() <= config_fields("grpo").keys()
        for key, allowed in CHOICES.items():
            assert algorithm.grpo.get(key, allowed[0]) in allowed


def test_an_explicit_key_wins_and_is_named() -> None:
    extra = "algorithm: gspo\ngrpo: {importance_sampling_level: token, num_iterations: 2}"
    recipe = recipe_from(MINIMAL + extra)
    assert recipe.grpo["importance_sampling_level"] == "token"
    assert recipe.grpo["epsilon_high"] == 4e-4
    assert notes(recipe) == ["grpo.importance_sampling_level: token is given; gspo sets sequence"]


def test_a_word_on_the_command_line_wins_over_the_recipe_and_loses_to_the_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL + "grpo: {loss_type: grpo, epsilon: 0.1, beta: 0.5, max_steps: 7}\n")
    recipe = load_recipe(str(file), ["algorithm=dapo", "grpo.epsilon=0.3"])
    assert {key: recipe.grpo[key] for key in ("loss_type", "epsilon", "epsilon_high", "beta", "max_steps")} == {
        "loss_type": "dapo",
        "epsilon": 0.3,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "max_steps": 7,
    }
    in_the_file = tmp_path / "both.yaml"
    in_the_file.write_text("algorithm: dapo\n" + file.read_text())
    assert load_recipe(str(in_the_file)).grpo["loss_type"] == "grpo"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("algorithm: dappo", "algorithm: 'dappo' is given"),
        ("algorithm: dappo", "(did you mean 'dapo'?)"),
        ("algorithm: [dapo]", "algorithm: ['dapo'] is given"),
        ("algorithm: scalerl\nsampling: {refill: 2}", "Set grpo.scale_rewards=group, or sampling.refill=0"),
        ("algorithm: gdpo\nsampling: {refill: 2}", "Set grpo.multi_objective_aggregation=sum_then_normalize, or"),
        ("algorithm: vespo\ngrpo: {use_vllm: true}\n", "allowed: token_truncate, token_mask"),
        ("algorithm: grpo\ngrpo: {sync_ref_model: true}", "grpo.sync_ref_model: true is given; only false is allowed"),
        ("grpo: {sapo_temperature_pos: 0}", "grpo.sapo_temperature_pos: 0 is given; it must be above 0"),
        ("grpo: {epsilon: -0.2}", "grpo.epsilon: -0.2 is given; it must be above 0"),
        ("grpo: {top_entropy_quantile: 1.5}", "grpo.top_entropy_quantile: 1.5 is given; allowed: 0 to 1"),
    ],
)
def test_a_wrong_combination_is_refused_by_name(extra: str, expected: str) -> None:
    text = MINIMAL.replace("tiny/random-llama", "tiny/random-llama, load_in: 16bit")
    assert expected in faults_of(text + extra + "\n")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("algorithm: gspo", "trains like loss_type: grpo. Set grpo.steps_per_generation=4 (four steps), or"),
        ("algorithm: cispo", "trains like loss_type: dapo"),
        ("algorithm: cispo\ngrpo: {epsilon: 0.1, delta: 4}", "grpo.delta: has no effect with loss_type: cispo"),
        ("algorithm: cispo\ngrpo: {epsilon: 0.1}", "grpo.epsilon: has no effect with loss_type: cispo"),
        ("grpo: {loss_type: cispo}", "so cispo caps the ratio at grpo.epsilon = 0.2"),
        ("grpo: {sapo_temperature_pos: 2}", "grpo.sapo_temperature_pos: has no effect with loss_type: dapo"),
        ("grpo: {importance_sampling_level: sequence}", "algorithm: gspo takes loss_type: grpo"),
        ("algorithm: luspo\ngrpo: {importance_sampling_level: token}", "token is given; luspo sets sequence"),
        ("grpo: {loss_type: luspo}", "grpo.importance_sampling_level: token with loss_type: luspo"),
        ("grpo: {loss_type: vespo, importance_sampling_level: sequence}", "sequence with loss_type: vespo"),
        ("grpo: {loss_type: grpo, importance_sampling_level: sequence}", "grpo.epsilon: 0.2 with ratios of whole"),
        ("algorithm: dapo\ngrpo: {delta: 1.1}", "grpo.delta: 1.1 is not above 1 + epsilon_high = 1.28"),
        ("algorithm: gdpo", "acts on several rewards, and here is one"),
        ("algorithm: dapo", "dynamic sampling is sampling.refill"),
    ],
)
def test_what_a_reader_should_know_is_noted(extra: str, expected: str) -> None:
    assert expected in notes_of(extra)


@pytest.mark.parametrize("extra", ["", "algorithm: dr_grpo", "algorithm: gspo\ngrpo: {num_iterations: 2}"])
def test_nothing_is_noted_where_all_is_well(extra: str) -> None:
    assert notes_of(extra) == ""


def test_a_trl_without_a_key_gives_one_fault_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {key: kind for key, kind in config_fields("grpo").items() if not key.startswith("vespo_k")}
    monkeypatch.setattr(algorithms, "config_fields", lambda section: fields)
    monkeypatch.setattr(algorithms, "installed_versions", lambda: {"trl": "1.2.3"})
    text = faults_of(MINIMAL + "algorithm: vespo\n")
    assert text.startswith("1 fault")
    assert (
        "algorithm: vespo sets grpo.vespo_k_pos, grpo.vespo_k_neg, which the installed trl 1.2.3 does not have" in text
    )


def shown(name: str, *overrides: str) -> str:
    raw, where = read_recipe(name, overrides)
    recipe = build_recipe(raw, where)
    return with_origins(dump_recipe(recipe), recipe, raw.get("grpo") or {})


def test_a_shown_recipe_says_where_each_key_comes_from_and_stays_a_recipe(root: Path) -> None:
    overrides = ["algorithm=dapo", "grpo.epsilon=0.1", "grpo.gradient_checkpointing_kwargs={use_reentrant: false}"]
    text = shown("gsm8k", *overrides)
    for line in (
        "algorithm: dapo  # DAPO, arXiv 2503.14476",
        "  epsilon: 0.1  # recipe; dapo sets 0.2",
        "  epsilon_high: 0.28  # algorithm: dapo",
        "  max_steps: 290  # recipe",
        "  logging_steps: 1  # default",
        "  gradient_checkpointing_kwargs:  # recipe",
        "# grpo.epsilon: 0.1 is given; dapo sets 0.2.",
    ):
        assert line in text.splitlines()
    assert build_recipe(yaml.safe_load(text), "again") == load_recipe("gsm8k", overrides)


def test_a_value_over_several_lines_survives_the_comments() -> None:
    words = " ".join(["a long regular expression"] * 12)
    recipe = recipe_from(MINIMAL + f'grpo: {{vllm_structured_outputs_regex: {words}, run_name: "1\\n2"}}\n')
    assert build_recipe(yaml.safe_load(with_origins(dump_recipe(recipe), recipe, recipe.grpo)), "again") == recipe


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    recipe = recipe_from(MINIMAL)
    now = yaml.safe_load(dump_recipe(recipe))
    before = {key: value for key, value in now.items() if key != "algorithm"}
    assert fixed_keys(before) == fixed_keys(now)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(yaml.safe_dump(before))
    assert run.load_recipe() == recipe


def documented() -> dict[str, dict[str, Any]]:
    """Return the keys and values that the page's first table gives for each word."""
    first_part = DOCS.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", first_part, re.MULTILINE)
    return {
        word: {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+)=([^`]+)`", cell)}
        for word, cell in rows
        if word in ALGORITHMS
    }


def test_the_page_lists_every_word_with_its_keys() -> None:
    assert documented() == {word: dict(algorithm.grpo) for word, algorithm in ALGORITHMS.items()}
