"""What we pass to Unsloth exists in the installed wheel: read from its source, without GPU or import."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lite.errors import ModelError
from grpo_lite.recipe import ModelSection
from grpo_lite.recipe_load import load_recipe, recipe_names
from grpo_lite.unsloth_backend import adapter_arguments, load_arguments, prepare

PRESETS = ["unsloth-gemma3-1b", "unsloth-llama3.2-3b", "unsloth-qwen2.5-3b", "unsloth-qwen3-4b"]


@pytest.fixture(scope="module")
def source() -> Path:
    """The folder of unsloth's source: installed, or unpacked and named by UNSLOTH_SOURCE."""
    if os.environ.get("UNSLOTH_SOURCE"):
        return Path(os.environ["UNSLOTH_SOURCE"])
    spec = importlib.util.find_spec("unsloth")
    if spec is None or spec.origin is None:
        pytest.skip("unsloth is not installed (pip download --no-deps unsloth, unpack, set UNSLOTH_SOURCE)")
    return Path(spec.origin).parent


def parameters(file: Path, class_name: str, function: str) -> set[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == function:
                    return {argument.arg for argument in (*item.args.args, *item.args.kwonlyargs)}
    pytest.fail(f"{file.name} has no {class_name}.{function}: unsloth has moved it")


@pytest.mark.parametrize("name", recipe_names())
def test_every_argument_for_loading_exists(name: str, source: Path) -> None:
    known = parameters(source / "models" / "loader.py", "FastLanguageModel", "from_pretrained")
    assert set(load_arguments(load_recipe(name), "folder", 2048, None)) <= known


@pytest.mark.parametrize("name", recipe_names())
def test_every_argument_for_the_adapter_exists(name: str, source: Path) -> None:
    known = parameters(source / "models" / "llama.py", "FastLlamaModel", "get_peft_model")
    assert set(adapter_arguments(load_recipe(name))) <= known


def test_all_linear_means_the_layers_that_unsloth_takes_by_default(source: Path) -> None:
    from grpo_lite.unsloth_backend import ALL_LINEAR

    for node in ast.parse((source / "models" / "llama.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_DEFAULT_TARGET_MODULES":
            assert ast.literal_eval(node.value) == ALL_LINEAR
            return
    pytest.fail("unsloth has no _DEFAULT_TARGET_MODULES any more")


def test_its_ranges_hold_a_version_that_we_allow(source: Path) -> None:
    from importlib.metadata import PathDistribution

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    folder = next(iter(sorted(source.parent.glob("unsloth-*.dist-info"))), None)
    assert folder is not None, "the wheel's metadata is not beside its source"
    wanted = {(r := Requirement(line)).name: r.specifier for line in PathDistribution(folder).requires or []}
    for package, ours, version in (
        ("trl", ">=1.14,!=1.15.*,<1.17", "1.14.0"),
        ("transformers", ">=5.10,<5.24", "5.17.0"),
        ("torch", ">=2.6,<2.15", "2.11.0"),
    ):
        assert version in SpecifierSet(ours), package
        assert version in wanted[package], f"unsloth now wants {package}{wanted[package]}"


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_keep_the_batch_that_unsloth_would_change(name: str) -> None:
    """Its trainer replaces a batch that is no multiple of the group; ours are one already."""
    recipe = load_recipe(name)
    assert recipe.generation_batch % recipe.num_generations == 0


def test_a_lora_key_that_unsloth_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora\.use_dora: the backend unsloth has no such argument"):
        adapter_arguments(load_recipe("gsm8k", ["lora.use_dora=true"]))


def test_without_the_package_or_a_gpu_the_backend_is_refused() -> None:
    section = ModelSection.model_validate({"id": "x", "backend": "unsloth"})
    with pytest.raises(ModelError, match=r"not installed|no CUDA device|imported before"):
        prepare(section)


def test_auto_imports_nothing() -> None:
    code = (
        "from grpo_lite.recipe import ModelSection; from grpo_lite.unsloth_backend import prepare; import sys;"
        "prepare(ModelSection.model_validate({'id': 'x'})); assert not {'torch', 'unsloth'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
