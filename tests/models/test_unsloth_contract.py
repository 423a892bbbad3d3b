"""What we pass to Unsloth exists in the wheel: read from its source, without GPU or import.

`make setup-dev` unpacks it beside the environment's packages; for another version: `pip install --no-deps --target
folder unsloth unsloth_zoo`, and UNSLOTH_SOURCE=folder/unsloth. The slow test imports it, so
UNSLOTH_REQUIREMENTS=folder[:folder] must have what that needs: `pip install --no-deps --target folder tyro
cut_cross_entropy einops msgspec … trl==1.14.0 transformers==5.17.0`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_lite.bootstrap import SOURCE_FOLDER
from grpo_lite.errors import ModelError
from grpo_lite.models.unsloth import adapter_arguments, load_arguments, prepare, with_trl_defaults
from grpo_lite.recipe.load import load_recipe, recipe_names

PRESETS = ["unsloth-gemma3-1b", "unsloth-llama3.2-3b", "unsloth-qwen2.5-3b", "unsloth-qwen3-4b"]


@pytest.fixture(scope="module")
def source() -> Path:
    """The folder of unsloth's source: named by UNSLOTH_SOURCE, installed, or unpacked by `make setup-dev`."""
    if os.environ.get("UNSLOTH_SOURCE"):
        return Path(os.environ["UNSLOTH_SOURCE"])
    spec = importlib.util.find_spec("unsloth")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    unpacked = Path(sys.prefix) / SOURCE_FOLDER / "unsloth"
    if not unpacked.is_dir():
        pytest.skip("unsloth's source is not there (make setup-dev fetches it; or set UNSLOTH_SOURCE)")
    return unpacked


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def parameters(file: Path, class_name: str, function: str) -> set[str]:
    for node in tree(file).body:  # classes at the top only: walking 5,000 lines for each recipe takes minutes
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == function:
                    return {argument.arg for argument in (*item.args.args, *item.args.kwonlyargs)}
    pytest.fail(f"{file.name} has no {class_name}.{function}: unsloth has moved it")


@pytest.mark.parametrize("name", recipe_names())
def test_every_argument_for_loading_exists(name: str, source: Path) -> None:
    known = parameters(source / "models" / "loader.py", "FastLanguageModel", "from_pretrained")
    assert set(load_arguments(load_recipe(name), "folder", 2048, None)) <= known


def test_of_a_multimodal_base_the_text_tower_is_asked_for(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}, "vision_config": {"depth": 1}}')
    recipe = load_recipe("unsloth-gemma3-1b")
    assert load_arguments(recipe, tmp_path, 2048, None)["text_only"] is True
    assert "text_only" not in load_arguments(recipe, "folder", 2048, None)
    assert "text_only" in parameters(source / "models" / "loader.py", "FastLanguageModel", "from_pretrained")


@pytest.mark.parametrize("name", recipe_names())
def test_every_argument_for_the_adapter_exists(name: str, source: Path) -> None:
    known = parameters(source / "models" / "llama.py", "FastLlamaModel", "get_peft_model")
    assert set(adapter_arguments(load_recipe(name))) <= known


def test_all_linear_means_the_layers_that_unsloth_takes_by_default(source: Path) -> None:
    from grpo_lite.models.unsloth import ALL_LINEAR

    for node in tree(source / "models" / "llama.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_DEFAULT_TARGET_MODULES":
            assert ast.literal_eval(node.value) == ALL_LINEAR
            return
    pytest.fail("unsloth has no _DEFAULT_TARGET_MODULES any more")


# What its patched GRPOConfig sets if nothing is said, and that changes nothing about what is learnt: ours or TRL's
# owned keys, evaluation's batch (there is none), logs, and what only vLLM or mixtures of experts read.
HARMLESS = {
    "output_dir", "seed", "bf16", "fp16", "dataloader_pin_memory", "logging_nan_inf_filter", "logging_steps",
    "per_device_eval_batch_size", "eval_accumulation_steps", "torch_empty_cache_steps", "max_seq_length", "vllm_mode",
    "generation_kwargs", "include_tokens_per_second", "include_num_input_tokens_seen", "auto_find_batch_size",
    "padding_free", "vllm_importance_sampling_correction", "router_aux_loss_coef", "report_to",
}  # fmt: skip


def replaced_defaults(source: Path) -> dict[str, Any]:
    """Read the defaults that Unsloth writes into GRPOConfig's signature: dicts named `replacements` in rl.py."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree(source / "models" / "rl.py")):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "replacements":
            assert isinstance(node.value, ast.Dict)
            values = {key.value: value for key, value in zip(node.value.keys, node.value.values, strict=True)}  # type: ignore[union-attr]
            if set(values) != {"loss_type"}:  # that one is SFT's
                found |= values
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("replacements["):
            found[ast.literal_eval(node.targets[0].slice)] = node.value  # type: ignore[attr-defined]
    return found


def test_no_default_of_its_own_changes_what_a_recipe_means(source: Path) -> None:
    found = set(replaced_defaults(source))
    assert {"optim", "weight_decay", "loss_type", "beta"} <= found, "unsloth writes its defaults elsewhere now"
    for name in recipe_names():
        left = found - HARMLESS - {"warmup_ratio"} - set(with_trl_defaults(load_recipe(name).grpo))
        assert not left, f"{name}: unsloth would decide {sorted(left)}"


def test_no_default_of_its_own_changes_what_a_warm_up_means(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from grpo_lite.runs.run_dir import RunDir
    from grpo_lite.session import warmup
    from grpo_lite.task.traces import Trace

    recipe = load_recipe("unsloth-qwen3-4b")
    monkeypatch.setattr(warmup, "uses_unsloth", lambda section: True)
    monkeypatch.setattr("trl.SFTConfig", lambda **values: SimpleNamespace(n_gpu=1, values=values))
    device: Any = SimpleNamespace(kind="cuda")
    base: Any = SimpleNamespace(dtype="float16", device=device)
    stage = warmup._stage(recipe, [Trace([3], [4, 2])] * 50)
    values = warmup._sft_config(recipe, RunDir(Path("x")), base, stage).values
    of_grpo = {
        "loss_type",
        "num_generations",
        "beta",
        "mask_truncated_completions",
        "vllm_importance_sampling_correction",
    }
    left = set(replaced_defaults(source)) - HARMLESS - {"warmup_ratio", "router_aux_loss_coef"} - of_grpo - set(values)
    assert not left, f"unsloth would decide {sorted(left)}"


def test_a_warm_up_s_own_rows_reach_its_loss(source: Path) -> None:
    """It would pack rows, cut them, or change the base's embeddings after reading them, and here it does not."""
    trainer = (source / "trainer.py").read_text(encoding="utf-8")
    blocked = trainer[trainer.index("        blocked = (") :]
    assert "(data_collator is not None)" in blocked[: blocked.index(")\n        requested_pack")]
    rewritten = (source / "models" / "rl_replacements.py").read_text(encoding="utf-8")
    assert "def sft_trainer_compute_loss(" in rewritten
    loss = rewritten[rewritten.index("def sft_trainer_compute_loss(") :]
    assert "outputs = super().compute_loss(" in loss[: loss.index("RL_FUNCTIONS")]
    assert 'replacements = {"loss_type": "nll"}' in (source / "models" / "rl.py").read_text(encoding="utf-8")


def test_what_it_overrides_by_loss_type_is_said_too(source: Path) -> None:
    text = (source / "models" / "rl.py").read_text(encoding="utf-8")
    for statement in ("epsilon_high = 0.28", "mask_truncated_completions = True", "scale_rewards = False"):
        assert statement in text, f"unsloth no longer sets {statement}: see with_trl_defaults"
    dapo = with_trl_defaults({"loss_type": "dapo", "epsilon": 0.3})
    assert (dapo["epsilon_high"], dapo["mask_truncated_completions"]) == (0.3, False)
    assert with_trl_defaults({"epsilon_high": 0.28, "mask_truncated_completions": True})["epsilon_high"] == 0.28
    assert with_trl_defaults({"loss_type": "dr_grpo"})["scale_rewards"] is None
    assert with_trl_defaults({"loss_type": "dr_grpo", "scale_rewards": "none"})["scale_rewards"] == "none"
    assert "scale_rewards" not in with_trl_defaults({"loss_type": "dapo"})


def test_trl_s_defaults_are_trl_s() -> None:
    from trl import GRPOConfig

    from grpo_lite.models.unsloth import TRL_DEFAULTS

    args = GRPOConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none")
    for key, value in TRL_DEFAULTS.items():
        assert getattr(getattr(args, key), "value", getattr(args, key)) == value, key
    assert args.epsilon == 0.2
    assert args.epsilon_high is None or args.epsilon_high == args.epsilon


# Builds TRL's GRPOConfig as Unsloth rewrites it on a GPU, with every recipe's arguments, and prints what it says.
PATCHED = """
import json, sys
import unsloth
from unsloth.models.rl import _patch_trl_rl_trainers
_patch_trl_rl_trainers("grpo_trainer")
from trl import GRPOConfig
assert GRPOConfig.__name__ == "UnslothGRPOConfig" or hasattr(GRPOConfig, "_unsloth_patched_rl_config"), GRPOConfig
for name, given in json.loads(sys.argv[1]).items():
    print("RECIPE", name)
    args = GRPOConfig(output_dir="x", use_cpu=True, bf16=False, fp16=False, **given)
    for key, value in given.items():
        found = getattr(args, key)
        found = getattr(found, "value", found)
        if found != value and key not in ("report_to", "scale_rewards"):
            print("Unsloth: changed", key, value, found)
"""


@pytest.mark.slow
@pytest.mark.matrix
def test_every_recipe_s_config_builds_under_the_patched_one(source: Path, tmp_path: Path) -> None:
    given = {name: with_trl_defaults(load_recipe(name).grpo) for name in recipe_names()}
    environment = {**os.environ, "UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_LOCATION": str(tmp_path)}
    paths = [source.parent, environment.get("UNSLOTH_REQUIREMENTS", ""), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = ":".join(str(path) for path in paths)
    command = [sys.executable, "-W", "ignore", "-c", PATCHED, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500)
    if importlib.util.find_spec("unsloth") is None and "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"unsloth's own requirements are not installed: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = done.stdout[done.stdout.index("RECIPE") :]
    assert said.count("RECIPE") == len(given)
    told = [line for line in said.splitlines() if "Unsloth" in line and "You have set it to" not in line]
    assert not told, "\n".join(told)
    # The comparison could not fail if nothing were patched: left alone, it decides some of them itself.
    alone = json.dumps({"gsm8k": load_recipe("gsm8k").grpo})
    done = subprocess.run([*command[:-1], alone], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "epsilon_high = 0.28" in done.stdout


def test_its_ranges_hold_a_version_that_we_allow(source: Path) -> None:
    from importlib.metadata import PathDistribution

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    folder = next(iter(sorted(source.parent.glob("unsloth-*.dist-info"))), None)
    assert folder is not None, "the wheel's metadata is not beside its source"
    lines = [Requirement(line) for line in PathDistribution(folder).requires or []]
    wanted = {line.name: line.specifier for line in lines if "extra" not in str(line.marker)}
    for package, ours, version in (
        ("trl", ">=1.14,!=1.15.*,<1.17", "1.14.0"),
        ("transformers", ">=5.10,<5.25", "5.17.0"),
        ("torch", ">=2.6,<2.15", "2.11.0"),
    ):
        assert version in SpecifierSet(ours), package
        assert version in wanted[package], f"unsloth now wants {package}{wanted[package]}"


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_keep_the_batch_that_unsloth_would_change(name: str) -> None:
    """Its trainer replaces a batch that is no multiple of the group; ours are one already."""
    recipe = load_recipe(name)
    assert recipe.schedule.batch % recipe.num_generations == 0


def test_a_lora_key_that_unsloth_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora\.use_dora: the backend unsloth has no such argument"):
        adapter_arguments(load_recipe("gsm8k", ["lora.use_dora=true"]))


UNSLOTH = ["model.backend=unsloth"]


def test_without_the_package_or_a_gpu_the_backend_is_refused() -> None:
    with pytest.raises(ModelError, match=r"not installed|no CUDA device|imported before") as refused:
        prepare(load_recipe("smoke", UNSLOTH))
    assert "set model.backend=hf" in str(refused.value)


def test_a_run_begun_with_it_is_not_told_to_change_its_recipe() -> None:
    """The run directory would refuse `model.backend=hf` as another recipe."""
    with pytest.raises(ModelError, match=r"this run was started with unsloth, .* another RUN=…, and model\.backend=hf"):
        prepare(load_recipe("smoke", UNSLOTH), begun=True)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA and a package `unsloth` that cannot be imported."""
    import torch

    from grpo_lite.models import unsloth as unsloth_backend

    there = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: object()))
    monkeypatch.setattr(unsloth_backend, "importlib", there)  # its own: all others look for what is really there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unsloth_backend, "imported_before", list)
    monkeypatch.setitem(sys.modules, "unsloth", None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], r"cannot be imported: .*unsloth.* Install it anew"),
        (["sampling.refill=2"], r"no sampling\.refill"),
        (["sampling.replay=2", "sampling.length_stages={3: 4}"], r"no sampling\.replay and no sampling\.length_stages"),
    ],
)
@pytest.mark.usefixtures("card")
def test_what_it_cannot_do_is_refused_before_training(overrides: list[str], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        prepare(load_recipe("smoke", [*UNSLOTH, *overrides]))


@pytest.mark.usefixtures("card")
def test_its_compiled_modules_are_not_imported_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "given")
    for expected in ("given", str(tmp_path / "unsloth_compiled_cache")):
        with pytest.raises(ModelError, match="cannot be imported"):
            prepare(load_recipe("smoke", UNSLOTH))
        assert os.environ["UNSLOTH_COMPILE_LOCATION"] == expected
        monkeypatch.delenv("UNSLOTH_COMPILE_LOCATION")
    compiler = source.parent / "unsloth_zoo" / "compiler.py"
    assert '_loc = os.getenv("UNSLOTH_COMPILE_LOCATION", None)' in compiler.read_text(encoding="utf-8")


@pytest.mark.usefixtures("card")
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match=r"one process, not in 2\. Set GPUS=1"):
        prepare(load_recipe("smoke", UNSLOTH))


def test_auto_imports_nothing() -> None:
    code = (
        "from grpo_lite.recipe.load import load_recipe; from grpo_lite.models.unsloth import prepare; import sys;"
        "prepare(load_recipe('smoke')); assert not {'torch', 'unsloth'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
