"""Recipes: every fault is named at once, values are coerced by upstream, shipped recipes all resolve."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import rewards
from grpo_lite.errors import RecipeError
from grpo_lite.recipe.checks import schema_text
from grpo_lite.recipe.load import apply_override, build_recipe, load_recipe, recipe_names
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.recipe.upstream import config_fields
from grpo_lite.runs.run_dir import RunDir, dump_recipe

MINIMAL = """
description: sums
least_gpu: none
model: {id: tiny/random-llama}
data: {train: {generator: sums}, holdout: 10, prompt: "{question}="}
rewards: [{function: rewards.accuracy_reward}]
"""

SHIPPED = [
    *("code", "countdown", "countdown-base", "custom", "deepmath", "gemma3-4b"),
    *("gsm8k", "gsm8k-base", "lfm2.5-1.2b", "math", "python-tool", "quickstart"),
    *(
        "qwen3-0.6b",
        "qwen3-1.7b",
        "qwen3.5-0.8b",
        "qwen3.5-2b",
        "qwen3.5-4b",
        "search",
        "smoke",
        "smollm3-3b",
        "sudoku",
        "sums",
        "tool-sums",
    ),
    *("unsloth-gemma3-1b", "unsloth-llama3.2-3b", "unsloth-qwen2.5-3b", "unsloth-qwen3-4b", "wordle"),
]


def recipe_from(text: str) -> Recipe:
    return build_recipe({"name": "test", **yaml.safe_load(text)}, "test.yaml")


def faults_of(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from(text)
    return str(caught.value)


def test_the_shipped_recipes_are_these(root: Path) -> None:
    assert recipe_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_resolves_and_survives_a_round_trip(root: Path, name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert build_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_a_shipped_recipe_is_at_most_60_lines_and_names_its_schema(root: Path) -> None:
    for path in Path("recipes").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, path
        assert lines[0] == "# yaml-language-server: $schema=schema.json", path


def test_what_upstream_must_be_told_is_written_into_the_resolved_recipe() -> None:
    recipe = recipe_from(MINIMAL)
    assert recipe.lora["target_modules"] == "all-linear"
    assert recipe.grpo["learning_rate"] == 2e-5
    assert recipe.grpo["report_to"] == "none"


def test_all_faults_are_reported_together() -> None:
    text = faults_of(
        MINIMAL.replace("least_gpu: none", "least_gpus: none")
        + "lora: {rr: 8}\ngrpo: {num_generation: 4, max_prompt_length: 5, beta: lots}\n"
    )
    assert text.startswith("6 faults")
    for part in ("least_gpu: missing", "least_gpus", "lora.rr", "num_generation", "max_prompt_length", "grpo.beta"):
        assert part in text


@pytest.mark.parametrize(
    "extra, expected",
    [
        ("modle: 1", "modle: unknown key (did you mean 'model'?)"),
        ("eval: {sample: 3}", "eval.sample: unknown key (did you mean 'samples'?)"),
        ("lora: {target_module: q}", "lora.target_module: unknown key, peft.LoraConfig has none"),
        ("grpo: {num_generatoins: 4}", "(did you mean 'num_generations'?)"),
        ("grpo: {loss_type: dapoo}", "'dapoo' is given; allowed: grpo, dr_grpo, dapo"),
        ("grpo: {loss_type: dapoo}", "(did you mean 'dapo'?)"),
        ("grpo: {lr_scheduler_type: cosin}", "(did you mean 'cosine'?)"),
        ("grpo: {max_prompt_length: 512}", "use data.max_prompt_tokens"),
        ("grpo: {warmup_ratio: 0.1}", "use warmup_steps"),
        ("grpo: {torch_dtype: bfloat16}", "use model.dtype"),
        ("grpo: {bf16: true}", "chosen from the device"),
        ("grpo: {reward_weights: [1]}", "rewards[i].weight"),
        ("grpo: {hub_token: abc}", "a secret has no place in a recipe"),
        ("grpo: {num_generations: three}", "grpo.num_generations: 'three' is given; allowed: int or null"),
        ("lora: {lora_dropout: 0.05}", "only 0 is allowed"),
        ("lora: {target_modules: [q_proj, lm_head]}", "would never be trained"),
        ("sampling: {replay: 2}\nrollout: generate", "sampling.replay: 2 is given with rollout: generate"),
        ("sampling: {replay: 2}\ngrpo: {scale_rewards: batch}", "Set grpo.scale_rewards=group, or sampling.replay=0"),
        ("sampling: {length_stages: {9: 999}}", "all of them below grpo.max_completion_length, such as {50: "),
        ("sampling: {length_stages: {5: 9, 9: 8}}", "steps from 1 on with growing lengths are allowed"),
        ("sampling: {length_stages: {5: 0}}", "sampling.length_stages[5]: 0 is given"),
        ("sampling: {length_stages: {0: 8}}", "steps from 1 on"),
        ("sampling: {length_stages: {5: 8}}\ntools: [a.py:b]", "sampling.length_stages is given with tools"),
        ("grpo: 3", "allowed is a mapping of trl.GRPOConfig keys"),
        ("grpo: {learning_rate: 0}", "it must be above 0"),
        ("grpo: {num_generations: 1}", "needs at least 2"),
        ("grpo: {num_generations: null}", "grpo.num_generations: null is given; a whole number is needed"),
        ("grpo: {max_completion_length: null}", "grpo.max_completion_length: null is given; a whole number"),
        ("grpo: {steps_per_generation: -2}", "grpo.steps_per_generation: -2 is given; it must be above 0"),
        ("seed: -1", "seed: -1 is given"),
        ("learning_rate: 1e-5", "learning_rate: unknown key (did you mean grpo.learning_rate?)"),
        ("learning_rat: 1e-5", "learning_rat: unknown key (did you mean grpo.learning_rate?)"),
        ("target_modules: all-linear", "target_modules: unknown key (did you mean lora.target_modules?)"),
        ("lora_r: 8", "lora_r: unknown key (did you mean lora.r?)"),
        ("use_peft: true", "use_peft: unknown key: every recipe trains a LoRA; delete the key."),
        ("max_prompt_length: 512", "max_prompt_length: unknown key (did you mean data.max_prompt_tokens?)"),
        ("output_dir: out", "output_dir: unknown key: the run directory decides it"),
    ],
)  # fmt: skip
def test_a_fault_says_what_is_allowed(extra: str, expected: str) -> None:
    assert expected in faults_of(MINIMAL + extra + "\n")


@pytest.mark.parametrize(
    "data, expected",
    [
        ("{train: {}, holdout: 1}", "exactly one of hub, path, generator is needed, none is given"),
        ("{train: {hub: a, path: b}, holdout: 1}", "hub and path is given"),
        ("{train: {path: b, kwargs: {x: 1}}, holdout: 1}", "kwargs belong to a generator"),
        ("{train: {generator: sum}, holdout: 1}", "(did you mean 'sums'?)"),
        ("{train: {path: b}}", "Set data.holdout=100, or data.eval.path"),
        ("{train: {path: b}, holdout: -2}", "greater than or equal to 0"),
    ],
)
def test_a_fault_of_the_data_section_is_named(data: str, expected: str) -> None:
    text = re.sub(r"^data:.*$", f"data: {data}", MINIMAL, flags=re.MULTILINE)
    assert expected in faults_of(text)


def test_a_batch_that_the_group_does_not_divide_says_which_numbers_would_work() -> None:
    text = faults_of(
        MINIMAL + "grpo: {per_device_train_batch_size: 4, gradient_accumulation_steps: 3, num_generations: 8}"
    )
    assert "a round generates 12 completions" in text
    assert "num_generations may be 2, 3, 4, 6, 12" in text
    # 4 rows a device: 16 is the next multiple of 8, so 4 steps
    assert "gradient_accumulation_steps=4 (a round of 16)" in text


@given(batch=st.integers(1, 40), steps=st.integers(1, 12), group=st.integers(2, 20))
def test_the_advice_on_the_batch_is_itself_valid(batch: int, steps: int, group: int) -> None:
    grpo = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "num_generations": group,
    }
    raw = {"name": "x", **yaml.safe_load(MINIMAL), "grpo": grpo}
    if batch * steps % group == 0:
        assert build_recipe(raw, "x").schedule.batch == batch * steps
        return
    with pytest.raises(RecipeError) as caught:
        build_recipe(raw, "x")
    advised = re.search(r"gradient_accumulation_steps=(\d+)", str(caught.value))
    assert advised
    raw["grpo"] = {**grpo, "gradient_accumulation_steps": int(advised[1])}
    build_recipe(raw, "x")


def test_yaml_reads_1e_5_as_text_and_upstream_makes_it_a_number() -> None:
    assert recipe_from(MINIMAL + "grpo: {learning_rate: 1e-5}").grpo["learning_rate"] == 1e-5


def test_a_count_stays_a_count_where_upstream_also_takes_a_share() -> None:
    assert repr(recipe_from(MINIMAL + "grpo: {logging_steps: 5}").grpo["logging_steps"]) == "5"


def test_the_first_reward_cannot_be_gated() -> None:
    assert "opens the gate" in faults_of(
        MINIMAL.replace("{function: rewards.accuracy_reward}", "{function: rewards.accuracy_reward, gate: true}")
    )


def test_an_unknown_recipe_offers_the_nearest(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"'gsm9k': unknown \(did you mean 'gsm8k'\?\)"):
        load_recipe("gsm9k")


def test_a_path_that_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine\.yaml: no such file"):
        load_recipe("mine.yaml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: b\n  c: [d\n", r"line 2, column 4: not valid YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: the key 'seed' is given twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("\0", "not valid YAML|cannot be read"),
    ],
    ids=["malformed", "list", "duplicate", "code", "binary"],
)
def test_malformed_yaml_is_placed(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(str(path))


def test_an_override_sets_a_nested_value(root: Path) -> None:
    recipe = load_recipe("gsm8k", ["grpo.max_steps=50", "rewards[1].weight=0.5", "data.eval.limit=7"])
    assert recipe.grpo["max_steps"] == 50
    assert recipe.rewards[1].weight == 0.5
    assert recipe.data.eval is not None
    assert recipe.data.eval.limit == 7


def test_overriding_the_source_replaces_it_with_its_details(root: Path) -> None:
    recipe = load_recipe("gsm8k", ["data.train.path=my.jsonl"])
    assert (recipe.data.train.path, recipe.data.train.hub, recipe.data.train.config) == ("my.jsonl", None, None)
    # the Hub's test set belongs to the Hub's train set
    assert (recipe.data.eval, recipe.data.holdout) == (None, 0.1)


def test_overriding_both_sources_keeps_both(root: Path) -> None:
    recipe = load_recipe("gsm8k", ["data.train.path=a.jsonl", "data.eval.path=b.jsonl"])
    assert recipe.data.eval is not None
    assert recipe.data.eval.path == "b.jsonl"


@pytest.mark.parametrize(
    "override", ["max_steps", "=3", "rewards[9].weight=1", "seed.x=1", "rewards.x.weight=1", "a=[1"]
)
def test_an_override_that_cannot_be_applied_is_refused(root: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"override|seed"):
        load_recipe("smoke", [override])


@given(st.text(alphabet="abc.[]=01{}\n:-", max_size=30))
def test_no_override_ends_in_anything_but_a_recipe_error(text: str) -> None:
    raw = yaml.safe_load(MINIMAL)
    with contextlib.suppress(RecipeError):
        apply_override(raw, text)
        build_recipe({"name": "x", **raw}, "x")


def test_a_removed_key_is_ignored_where_it_changed_nothing_and_else_explained(root: Path, tmp_path: Path) -> None:
    """A released run's recipe.yaml holds every key with its value."""
    text = (root / "recipes" / "smoke.yaml").read_text()
    path = tmp_path / "old.yaml"
    path.write_text(text + "\nsampling: {refill: 1, difficulty: false}\n")
    assert load_recipe(str(path)).sampling.model_dump(exclude_defaults=True) == {"refill": 1}
    path.write_text(text + "\nsampling: {difficulty: true}\n")
    with pytest.raises(RecipeError, match=r"sampling\.difficulty: removed\..* no gain .*Delete the key"):
        load_recipe(str(path))


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_vllm_on_a_quantized_base_is_refused_with_what_to_do(root: Path, load_in: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gsm8k", ["grpo.use_vllm=true", f"model.load_in={load_in}"])
    (line,) = str(caught.value).splitlines()[1:]
    assert f"grpo.use_vllm: true is given with model.load_in={load_in}; allowed with 16bit or 32bit" in line
    for part in ("merges the adapter", "drifts", "2.2 %", "20 % after ten", "load_in=16bit", "leave grpo.use_vllm"):
        assert part in line


@pytest.mark.parametrize("load_in", ["16bit", "32bit"])
def test_vllm_on_a_base_that_is_not_quantized_stays_allowed(root: Path, load_in: str) -> None:
    keys = ["grpo.use_vllm=true", "grpo.vllm_mode=server", f"model.load_in={load_in}"]
    assert load_recipe("gsm8k", keys).grpo["use_vllm"] is True
    assert load_recipe("gsm8k", ["grpo.use_vllm=false"]).model.load_in == "4bit"


@pytest.mark.parametrize("key", ["use_transformers_continuous_batching", "use_transformers_paged"])
@pytest.mark.parametrize("load_in", ["4bit", "16bit"])
def test_continuous_batching_is_refused_because_it_casts_the_adapter(root: Path, key: str, load_in: str) -> None:
    if key not in config_fields("grpo"):
        pytest.skip(f"this TRL has no {key}")
    with pytest.raises(RecipeError, match=rf"grpo\.{key}: true is given; only false .*casts the adapter .*GradScaler"):
        load_recipe("gsm8k", [f"grpo.{key}=true", f"model.load_in={load_in}"])
    load_recipe("gsm8k", [f"grpo.{key}=false"])


def test_a_run_that_was_trained_so_can_still_be_read(root: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    text = dump_recipe(load_recipe("gsm8k", ["grpo.use_vllm=true", "model.load_in=16bit"]))
    run.recipe_file.write_text(text.replace("load_in: 16bit", "load_in: 4bit"))
    assert run.load_recipe().grpo["use_vllm"] is True
    with pytest.raises(RecipeError, match=r"grpo\.use_vllm"):
        load_recipe(str(run.recipe_file))


def test_the_schema_file_is_current(root: Path) -> None:
    made = json.loads(schema_text())
    kept = json.loads(Path("recipes/schema.json").read_text())
    if made["$comment"] != kept["$comment"]:  # other upstream versions here: compare what is ours
        for schema in (made, kept):
            schema.pop("$comment")
            for section in ("lora", "grpo"):
                schema["properties"][section].pop("properties")
    assert made == kept, "run: grpo-lite schema recipes/schema.json"


@pytest.mark.slow
def test_the_schema_does_not_depend_on_what_was_imported_before() -> None:
    code = "import transformers, peft; from grpo_lite.recipe.checks import schema_text; print(schema_text(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == json.loads(schema_text()), done.stderr


def test_every_recipe_fits_the_schema_keys(root: Path) -> None:
    properties = json.loads(Path("recipes/schema.json").read_text())["properties"]
    for path in Path("recipes").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        assert set(raw) <= set(properties)
        for section in ("lora", "grpo"):
            assert set(raw.get(section, {})) <= set(properties[section]["properties"])


@pytest.mark.slow
def test_upstream_fields_equal_the_real_dataclasses() -> None:
    code = (
        "import dataclasses, json; from trl import GRPOConfig; from peft import LoraConfig;"
        "print(json.dumps([[f.name for f in dataclasses.fields(c)] for c in (GRPOConfig, LoraConfig)]))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    grpo, lora = json.loads(out.splitlines()[-1])
    assert set(grpo) == set(config_fields("grpo"))
    assert set(lora) == set(config_fields("lora"))


def test_every_closed_set_is_the_one_in_trl_s_source() -> None:
    import importlib.util

    from grpo_lite.recipe.upstream import CHOICES

    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    trainer = Path(spec.origin).parent.joinpath("trainer/grpo_trainer.py").read_text()
    branches = re.findall(r'loss_type (?:==|in) (\[[^\]]*\]|"[a-z_]+")', trainer)
    in_source = set(re.findall(r'"([a-z_]+)"', " ".join(branches)))
    assert in_source == set(CHOICES["loss_type"])


def test_an_evaluation_is_as_long_as_training_unless_the_recipe_says_otherwise() -> None:
    lengths = [
        load_recipe("quickstart", ["grpo.max_completion_length=40", *extra]).eval_completion_length
        for extra in ([], ["eval.max_new_tokens=60"])
    ]
    assert lengths == [40, 60]


@pytest.mark.parametrize(
    "warmup, expected",
    [
        ("{steps: 5}", "needs rows with completions: give warmup.data, or source: self"),
        ("{source: self, data: {path: x.jsonl}}", "samples the training prompts itself, so data is not given with it"),
        ("{data: {path: x.jsonl}, steps: 5, epochs: 2}", "steps and epochs are both given"),
        ("{data: {path: x.jsonl}, rate: 1.0}", "warmup.rate: unknown key"),
    ],
)
def test_a_fault_of_the_warm_up_section_is_named(warmup: str, expected: str) -> None:
    assert expected in faults_of(MINIMAL + f"warmup: {warmup}\n")


def test_a_new_training_source_leaves_out_the_warm_up_on_the_old_data(tmp_path: Path) -> None:
    file = tmp_path / "warm.yaml"
    file.write_text(MINIMAL + "warmup: {data: {path: traces.jsonl}}\n")
    assert load_recipe(str(file)).warmup is not None
    assert load_recipe(str(file), ["data.train.path=my.jsonl"]).warmup is None
    both = load_recipe(str(file), ["data.train.path=my.jsonl", "warmup.data.path=mine.jsonl"]).warmup
    assert both is not None
    assert both.data is not None
    assert both.data.path == "mine.jsonl"
    (tmp_path / "self.yaml").write_text(MINIMAL + "warmup: {source: self}\n")
    assert load_recipe(str(tmp_path / "self.yaml"), ["data.train.path=my.jsonl"]).warmup is not None


def test_a_new_training_source_leaves_out_what_the_old_one_was_scored_on(tmp_path: Path) -> None:
    file = tmp_path / "also.yaml"
    file.write_text(MINIMAL + "eval: {also: {hard: {path: hard.jsonl}}}\n")
    assert load_recipe(str(file)).eval.also["hard"].limit == 200
    assert load_recipe(str(file)).sources["eval.also.hard"].path == "hard.jsonl"
    assert load_recipe(str(file), ["data.train.path=my.jsonl"]).eval.also == {}
    mine = load_recipe(str(file), ["data.train.path=my.jsonl", "eval.also.hard.path=mine.jsonl"])
    assert mine.eval.also["hard"].path == "mine.jsonl"


def paid(recipe: Recipe, completion: str, **columns: list[Any]) -> list[float]:
    """What each reward of a recipe pays for a completion."""
    functions = [getattr(rewards, section.function.removeprefix("rewards.")) for section in recipe.rewards]
    return [f([completion], **columns, **s.kwargs)[0] for f, s in zip(functions, recipe.rewards, strict=True)]


WARM_UPS = [name for name in SHIPPED if (warmup := load_recipe(name).warmup) and warmup.data and warmup.data.hub]


@pytest.mark.parametrize("name", WARM_UPS)
def test_the_traces_of_a_warm_up_are_in_the_form_that_its_rewards_pay(name: str) -> None:
    recipe = load_recipe(name)
    row = {"generated_solution": "<think>\n40+2\n</think>\nIt is \\boxed{42}.", "expected_answer": "42"}
    assert recipe.warmup is not None
    trace = recipe.warmup.completion.format_map(row)
    assert paid(recipe, trace, answer=["42"]) == [1.0] * len(recipe.rewards)
    assert paid(recipe, trace, answer=["41"])[0] == 0.0
    assert paid(recipe, trace[:-8], answer=["42"]) == [0.0] * len(recipe.rewards)


@pytest.mark.parametrize(
    ("name", "right", "columns"),
    [
        ("gsm8k-base", "40 + 2 = 42. The answer is 42.", {"answer": [42]}),
        ("gsm8k-base", "She has $42 left.", {"answer": [42]}),
        ("countdown-base", "40+2</think> <answer>40 + 2</answer>", {"nums": [[40, 2]], "target": [42]}),
    ],
)
def test_a_base_model_is_paid_for_its_last_answer_whatever_the_form(
    name: str, right: str, columns: dict[str, list[Any]]
) -> None:
    recipe = load_recipe(name)
    assert len(recipe.rewards) == 1
    assert paid(recipe, right, **columns) == [1.0]
    assert paid(recipe, f"{right}\n\nQuestion:\n3+4?\nAnswer:\n3 + 4 = 7 <answer>3 + 4</answer>", **columns) == [0.0]
