"""A `trl grpo` YAML becomes a recipe that passes every check, and no key of it is lost without a word."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.convert import Conversion, convert_trl
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.recipe.trl_keys import place_of, why_left_out
from tests.command_line import in_process

# The example of TRL's page on its command line, with the reward that the page names.
DOCUMENTED = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/DeepMath-103K
reward_funcs: [accuracy_reward]
"""
QLORA = """
model_name_or_path: Qwen/Qwen2.5-3B-Instruct
model_revision: 0123abc
dtype: bfloat16
attn_implementation: sdpa
use_peft: true
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
use_rslora: true
load_in_4bit: true
bnb_4bit_quant_type: nf4
dataset_name: AI-MO/NuminaMath-TIR
dataset_config: default
dataset_train_split: train
dataset_test_split: test
reward_funcs: [accuracy_reward, think_format_reward, get_soft_overlong_punishment, my_lib.rewards.brevity]
reward_weights: [1.0, 0.5, 0.25, 0.1]
output_dir: outputs/qlora
bf16: true
learning_rate: 1e-5
lr_scheduler_type: cosine
warmup_ratio: 0.05
num_generations: 8
max_prompt_length: 512
max_completion_length: 1024
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
num_train_epochs: 1
eval_strategy: steps
eval_steps: 50
per_device_eval_batch_size: 16
use_vllm: true
vllm_mode: colocate
vllm_gpu_memory_utilization: 0.3
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
logging_steps: 5
report_to: [trackio]
run_name: qlora
push_to_hub: true
hub_token: hf_secretsecret
seed: 7
"""
SEVERAL_GPUS = """
env: {HF_TOKEN: hf_secretsecret}
accelerate_config: zero2
num_processes: 4
deepspeed: ds.json
model_name_or_path: meta-llama/Llama-3.1-8B-Instruct
dtype: bfloat16
reward_model_name_or_path: some/reward-model
reward_funcs: my_rewards.length
reward_weights: [1.0, 2.0]
datasets:
  - path: json
    data_files: data/train.jsonl
    columns: [prompt, solution]
  - path: openai/gsm8k
    name: main
streaming: false
test_split_size: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
num_generations: 8
eval_strategy: no
learning_rate: 1.0e-6
typo_here: 3
"""
FILES = pytest.mark.parametrize("text", [DOCUMENTED, QLORA, SEVERAL_GPUS], ids=["documented", "qlora", "several GPUs"])


def converted(text: str, folder: Path) -> tuple[Conversion, Recipe]:
    (folder / "trl.yaml").write_text(text)
    conversion = convert_trl(folder / "trl.yaml")
    (folder / "recipe.yaml").write_text(conversion.text())
    return conversion, load_recipe(str(folder / "recipe.yaml"))


def note_on(key: str, conversion: Conversion) -> str:
    return next(note for note in conversion.notes if note.startswith(f"{key}:"))


# Keys of the files above that only say what TRL does without them.
RESTATED = {"dataset_train_split", "dataset_test_split", "bf16", "eval_strategy"}


@FILES
def test_no_key_is_lost_without_a_word(text: str, tmp_path: Path) -> None:
    whole = converted(text, tmp_path)[0].text()
    values = yaml.safe_load(text)
    for key in values.keys() - RESTATED:
        rest = yaml.safe_dump({name: value for name, value in values.items() if name != key})
        try:
            without = converted(rest, tmp_path)[0].text()
        except RecipeError:  # there is no recipe without it
            continue
        assert without != whole, key


def test_the_documented_example_trains_as_trl_would(tmp_path: Path) -> None:
    conversion, recipe = converted(DOCUMENTED, tmp_path)
    assert recipe.model.id == "Qwen/Qwen2.5-0.5B"
    assert (recipe.model.load_in, recipe.data.train.hub, recipe.data.answer) == (
        "16bit",
        "trl-lib/DeepMath-103K",
        "solution",
    )
    assert [reward.function for reward in recipe.rewards] == ["rewards.accuracy_reward"]
    assert recipe.max_completion_length == 512  # TRL's default, not our 256
    assert "TRL trains all weights" in note_on("use_peft", conversion)
    assert not recipe.eval.enabled


@pytest.mark.parametrize(
    "keys, load_in, dtype",
    [
        ("", "16bit", "auto"),  # TRL's default: float32 weights under bfloat16 autocast
        ("dtype: auto", "16bit", "auto"),
        ("torch_dtype: float16", "16bit", "float16"),
        ("fp16: true", "16bit", "float16"),
        ("{dtype: bfloat16, bf16: false}", "16bit", "bfloat16"),
        ("bf16: false", "32bit", "auto"),
        ("{load_in_4bit: true, bf16: false}", "4bit", "float32"),
        ("{load_in_8bit: true, model_init_kwargs: {dtype: bfloat16}}", "8bit", "bfloat16"),
    ],
)  # fmt: skip
def test_the_dtype_computed_in_stays(keys: str, load_in: str, dtype: str, tmp_path: Path) -> None:
    values = {**yaml.safe_load(DOCUMENTED), **(yaml.safe_load(keys) or {})}
    model = converted(yaml.safe_dump(values), tmp_path)[1].model
    assert (model.load_in, model.dtype) == (load_in, dtype)


def test_lora_quantization_rewards_and_evaluation_are_carried_over(tmp_path: Path) -> None:
    conversion, recipe = converted(QLORA, tmp_path)
    assert (recipe.model.load_in, recipe.model.dtype, recipe.model.revision) == ("4bit", "bfloat16", "0123abc")
    assert recipe.lora["r"] == 32
    assert recipe.lora["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert recipe.lora["use_rslora"]
    assert [reward.weight for reward in recipe.rewards] == [1.0, 0.5, 0.25, 0.1]
    assert recipe.rewards[2].kwargs == {"max_completion_length": 1280, "cache_length": 256}
    assert recipe.rewards[3].function == "my_lib.rewards.brevity"
    assert recipe.data.eval is not None
    assert (recipe.data.eval.split, recipe.eval.every, recipe.eval.batch_size) == ("test", 50, 16)
    assert (recipe.grpo["warmup_steps"], recipe.data.max_prompt_tokens, recipe.seed) == (0.05, 512, 7)
    assert "quantized weights" in note_on("use_vllm", conversion)
    assert "use_vllm" not in recipe.grpo
    assert "0.05 in TRL; 0 here" in note_on("lora_dropout", conversion)


@pytest.mark.parametrize(
    "keys, every",
    [
        ("eval_steps: 0.1\nmax_steps: 205", 21),  # 20.5, rounded up as in TrainerState.compute_steps
        ("logging_steps: 0.05\nmax_steps: 40", 2),  # eval_steps is logging_steps where it is not given
        ("eval_steps: 20.0", 20),
        ("eval_steps: 0.1", 10),
    ],
)
def test_a_share_of_all_steps_becomes_a_number_of_steps(keys: str, every: int, tmp_path: Path) -> None:
    text = re.sub("^(eval|logging)_steps: .*\n", "", QLORA, flags=re.MULTILINE)
    conversion, recipe = converted(f"{text}{keys}\n", tmp_path)
    assert recipe.eval.every == every
    unknown = keys == "eval_steps: 0.1"
    assert any("0.1 of all steps in TRL" in note for note in conversion.notes) is unknown


def test_the_batch_of_several_processes_is_kept_and_sharding_left_out(tmp_path: Path) -> None:
    conversion, recipe = converted(SEVERAL_GPUS, tmp_path)
    assert recipe.schedule.batch == 2 * 1 * 4  # rows, accumulation, processes
    assert recipe.data.train.path == "data/train.jsonl"
    assert recipe.data.holdout == 0.1
    assert [(reward.function, reward.weight) for reward in recipe.rewards] == [("my_rewards.length", 2.0)]
    assert "openai/gsm8k" in note_on("datasets[1]", conversion)
    assert "whole model" in note_on("deepspeed", conversion)
    assert "has no such key" in note_on("typo_here", conversion)


@FILES
def test_a_secret_of_the_file_is_not_written(text: str, tmp_path: Path) -> None:
    assert "hf_secret" not in converted(text, tmp_path)[0].text()


def test_the_think_pattern_judges_as_trl_does() -> None:
    import re

    from grpo_lite.recipe.convert import _THINK
    from rewards import format_reward

    trl = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
    texts = ["<think>\na\n</think>\nb", "<think>a", "x <think>a</think>", "<think><think>a</think>", "<think></think>"]
    assert format_reward(texts, pattern=_THINK) == [float(bool(trl.match(text))) for text in texts]


def test_a_file_without_model_data_and_reward_names_all_three(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text("learning_rate: 1e-6\n")
    with pytest.raises(RecipeError) as refused:
        convert_trl(tmp_path / "trl.yaml")
    assert all(key in str(refused.value) for key in ("model_name_or_path", "dataset_name", "reward_funcs"))


def test_a_reward_that_trl_does_not_know_offers_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(DOCUMENTED.replace("accuracy_reward", "acuracy_reward"))
    with pytest.raises(RecipeError, match="did you mean 'accuracy_reward'"):
        convert_trl(tmp_path / "trl.yaml")


def test_a_value_that_trl_would_refuse_is_refused_here_too(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(DOCUMENTED + "loss_type: dapoo\n")
    with pytest.raises(RecipeError, match="did you mean 'dapo'"):
        convert_trl(tmp_path / "trl.yaml")


def fields_of_trl() -> Iterator[str]:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    for file, name in (
        ("scripts/utils.py", "ScriptArguments"),
        ("scripts/grpo.py", "GRPOScriptArguments"),
        ("scripts/utils.py", "DatasetMixtureConfig"),
        ("trainer/model_config.py", "ModelConfig"),
    ):
        tree = ast.parse((Path(spec.origin).parent / file).read_text())
        node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        yield from (ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign))


def test_every_option_of_the_installed_trl_has_a_place_or_a_reason() -> None:
    assert [key for key in fields_of_trl() if not place_of(key) and not why_left_out(key)] == []


def test_a_recipe_that_is_a_trl_file_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(QLORA)
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(tmp_path / "trl.yaml"))
    assert "model_name_or_path: unknown key (did you mean model.id?)" in str(refused.value)
    assert f"`grpo-lite convert {tmp_path / 'trl.yaml'}` turns it into a recipe" in str(refused.value)


def test_the_command_writes_a_recipe_and_never_over_another(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(QLORA)
    out = tmp_path / "recipe.yaml"
    assert yaml.safe_load(in_process("convert", str(tmp_path / "trl.yaml")))["lora"]["r"] == 32
    assert "use_vllm: left out" in in_process("convert", str(tmp_path / "trl.yaml"), "-o", str(out))
    assert load_recipe(str(out)).model.id == "Qwen/Qwen2.5-3B-Instruct"
    assert "exists already" in in_process("convert", str(tmp_path / "trl.yaml"), "-o", str(out), expect=1)
