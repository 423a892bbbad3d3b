"""`lora.init_from`: where an adapter is found, what is refused about it, each in one message."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_lite.errors import ModelError, RecipeError
from grpo_lite.files.manifest import sha256_of, write_manifest
from grpo_lite.models.adapter import load_into, other_weights, read_adapter, read_sealed
from grpo_lite.models.base import Base, resolve_base
from grpo_lite.models.load import lora_config
from grpo_lite.models.reference import hold_reference
from grpo_lite.models.unsloth import adapter_arguments
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import TINY_MODEL, Recipe, without_paths
from grpo_lite.runs.run_dir import dump_recipe
from tests.export.hub_server import Hub, Repo, hub_in_place

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_adapter(folder: Path, **lora: Any) -> Path:
    """Save an adapter of the tiny model as PEFT does, with weights that are not zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(resolve_base(TINY_MODEL)), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "good")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def recipe_from(address: object, *overrides: str) -> Recipe:
    return load_recipe("smoke", [f"lora.init_from={address}", *overrides])


def read(recipe: Recipe) -> Any:
    return read_adapter(recipe, Base.resolve(recipe.model))


def refusal(address: object, *overrides: str) -> str:
    with pytest.raises(ModelError) as error:
        read(recipe_from(address, *overrides))
    return str(error.value)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def test_an_adapter_that_fits_is_read_in_float32_with_its_sum(root: Path, saved: Path) -> None:
    adapter = read(recipe_from(saved))
    stored = load_file(saved / WEIGHTS)
    assert adapter.tensors.keys() == stored.keys()
    assert all(torch.equal(adapter.tensors[name], stored[name].float()) for name in stored)
    assert adapter.to_json() == {"address": str(saved), "sha256": sha256_of(saved / WEIGHTS), "base_revision": None}
    assert adapter.line.startswith(f"starts from the adapter {saved} (rank 4, 28 tensors, sha256 ")


def test_the_explicit_list_that_peft_stores_equals_all_linear(root: Path, saved: Path) -> None:
    assert isinstance(json.loads((saved / CONFIG).read_text())["target_modules"], list)
    read(recipe_from(saved, "lora.target_modules=all-linear"))
    names = "[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj]"
    read(recipe_from(saved, f"lora.target_modules={names}"))


def test_it_is_kept_out_of_peft_s_and_unsloth_s_arguments_and_shown_in_the_recipe(root: Path, saved: Path) -> None:
    recipe = recipe_from(saved)
    assert lora_config(recipe).r == 4
    assert "init_from" not in adapter_arguments(recipe)
    assert f"init_from: {saved}" in dump_recipe(recipe).replace("\n    ", " ")
    assert without_paths(recipe).init_from == saved.name
    assert load_recipe("smoke", ["lora.init_from=null"]) == load_recipe("smoke")


@pytest.mark.parametrize(("value", "fault"), [("3", "lora.init_from: 3 is given"), ("''", "lora.init_from: an empty")])
def test_an_address_that_is_none_is_a_fault_of_the_recipe(root: Path, value: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        recipe_from(value)


def test_a_misspelt_key_is_offered_ours(root: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'init_from'"):
        load_recipe("smoke", ["lora.init_form=runs/x"])


def test_reading_it_leaves_the_random_state_alone(root: Path, saved: Path) -> None:
    before = torch.get_rng_state()
    read(recipe_from(saved))
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_copies_every_weight_and_keeps_float32(root: Path, saved: Path) -> None:
    recipe = recipe_from(saved)
    adapter = read(recipe)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(resolve_base(TINY_MODEL)), lora_config(recipe))
    load_into(model, adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter.tensors)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, adapter.tensors[name.replace(".default.", ".")])


# --- it does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "overrides", "expected"),
    [
        pytest.param(
            {"r": 8}, [], "lora.r: the adapter has 8, the recipe 4. Set lora.r=8.", id="rank"
        ),
        pytest.param(
            {"lora_alpha": 16}, [], "lora.lora_alpha: the adapter has 16, the recipe 8. Set lora.lora_alpha=16.",
            id="alpha",
        ),
        pytest.param(
            {"target_modules": ["q_proj", "v_proj"]}, [],
            "lora.target_modules: the adapter trains q_proj, v_proj; the recipe (all-linear) trains down_proj, "
            "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj. Set lora.target_modules=[q_proj,v_proj].",
            id="targets",
        ),
        pytest.param(
            {}, ["lora.target_modules=[q_proj]"],
            "the recipe (its list) trains q_proj. Set lora.target_modules=[down_proj,gate_proj,", id="targets, a list",
        ),
        pytest.param(
            {"use_rslora": True}, [], "lora.use_rslora: the adapter has true, the recipe false. Set",
            id="rslora",
        ),
        pytest.param(
            {"target_modules": r".*layers\.0\..*_proj"}, [],
            "lora.target_modules: the adapter has 14 tensors, the recipe needs 28",
            id="layers",
        ),
        pytest.param(
            {}, ["lora.init_lora_weights=pissa"], "lora.init_lora_weights: the recipe has pissa, which rewrites",
            id="PiSSA",
        ),
    ],
)  # fmt: skip
def test_another_adapter_is_refused_with_what_to_change(
    root: Path, tmp_path: Path, lora: dict[str, Any], overrides: list[str], expected: str
) -> None:
    assert expected in refusal(make_adapter(tmp_path / "other", **lora), *overrides)


def test_dora_and_biases_are_differences(root: Path, copied: Path) -> None:
    change_config(copied, use_dora=True, bias="all")
    text = refusal(copied)
    assert "lora.use_dora: the adapter has true, the recipe false. Set lora.use_dora=true." in text
    assert "lora.bias: the adapter has all, the recipe none." in text


def test_all_differences_stand_in_one_message(root: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "other", r=8, lora_alpha=32, target_modules=["q_proj"])
    change_config(folder, base_model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct")
    text = refusal(folder)
    assert text.splitlines()[0] == f"lora.init_from: {folder} does not fit this recipe (4 differences):"
    starts = [line.strip().partition(":")[0] for line in text.splitlines()[1:]]
    assert starts == ["model.id", "lora.r", "lora.lora_alpha", "lora.target_modules"]


def test_another_base_is_named_and_so_are_its_shapes(root: Path, tmp_path: Path, copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({**tensors, name: torch.ones(4, 96)}, copied / WEIGHTS)
    change_config(copied, base_model_name_or_path="Qwen/Qwen2.5-1.5B")
    text = refusal(copied)
    assert "model.id: the adapter was trained on Qwen/Qwen2.5-1.5B, the recipe's base is tiny/random-llama. " in text
    assert f"1 tensors have another shape than this base and recipe need, for example {name}: [4, 96], needed " in text


def test_a_module_trained_whole_is_a_difference_and_no_target(root: Path, copied: Path) -> None:
    save_file({**load_file(copied / WEIGHTS), "base_model.model.lm_head.weight": torch.ones(4, 64)}, copied / WEIGHTS)
    change_config(copied, modules_to_save=["lm_head"])
    text = refusal(copied)
    assert "lora.modules_to_save: the adapter has ['lm_head'], the recipe null. Set lora.modules_to_save=" in text
    assert "the adapter has 29 tensors, the recipe needs 28; for example it has base_model.model.lm_head.weight" in text


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("unsloth/random-llama-unsloth-bnb-4bit", True),  # a re-upload of the same weights
        ("/elsewhere/models--tiny--random-llama/snapshots/" + "a" * 40, True),
        ("/elsewhere/models--other--llama/snapshots/" + "a" * 40, False),
        ("", True),
    ],
)
def test_a_base_is_known_by_its_name(root: Path, copied: Path, name: str, fits: bool) -> None:
    change_config(copied, base_model_name_or_path=name)
    if fits:
        read(recipe_from(copied))
    else:
        assert "model.id: the adapter was trained on other/llama" in refusal(copied)


def test_another_commit_of_the_base_is_a_difference(root: Path, copied: Path, tmp_path: Path) -> None:
    here, there = "b" * 40, "a" * 40
    snapshot = tmp_path / "hub" / "models--me--base" / "snapshots" / here
    shutil.copytree(resolve_base(TINY_MODEL), snapshot)
    change_config(copied, base_model_name_or_path="me/base", revision=there)
    recipe = recipe_from(copied, "model.id=me/base")
    base = Base(recipe.model, Base.resolve(load_recipe("smoke").model).device, snapshot)
    with pytest.raises(
        ModelError, match=f"model.revision: the adapter was trained on commit {there[:12]}, .*{here[:12]}"
    ):
        read_adapter(recipe, base)
    change_config(copied, revision=here)
    assert read_adapter(recipe, base).base_revision == here


# --- it is damaged --------------------------------------------------------------------------------------------------


def one_line(address: object) -> str:
    text = refusal(address)
    assert "\n" not in text
    assert text.startswith("lora.init_from: ")
    return text


def test_missing_weights_are_named(root: Path, copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing. Save or fetch the adapter again." in one_line(copied)
    (copied / "adapter_model.bin").write_bytes(b"pickle")
    assert "Only the pickle adapter_model.bin is there, which is never loaded" in one_line(copied)


@pytest.mark.parametrize("length", [0, 5, 400, -1])
def test_truncated_weights_are_named(root: Path, copied: Path, length: int) -> None:
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[:length])
    assert "is not a whole safetensors file" in one_line(copied)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object_is_named(root: Path, copied: Path, text: str) -> None:
    (copied / CONFIG).write_text(text)
    assert f"{CONFIG}: is not valid JSON" in one_line(copied)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA can be trained on"),
        ({"r": None}, "r is None; it must be a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; it must be a positive number"),
    ],
)
def test_a_config_without_its_values_is_named(root: Path, copied: Path, values: Any, expected: str) -> None:
    change_config(copied, **values)
    assert expected in one_line(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(root: Path, copied: Path, value: float) -> None:
    tensors = load_file(copied / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = value
    save_file(tensors, copied / WEIGHTS)
    assert f"tensor {name} holds NaN or infinity" in one_line(copied)


def test_weights_that_differ_from_their_manifest_are_refused(root: Path, copied: Path) -> None:
    write_manifest(copied)
    read(recipe_from(copied))
    tensors = load_file(copied / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copied / WEIGHTS)
    assert "is not the file that was saved" in one_line(copied)


# --- where it is ----------------------------------------------------------------------------------------------------


def lay_out_run(folder: Path, adapter: Path | None, model_id: str = TINY_MODEL, **record: Any) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"model: {{id: {model_id}}}\n")
    (folder / "run.json").write_text(json.dumps(record))
    if adapter:
        shutil.copytree(adapter, folder / "adapter")
    return folder


def test_a_run_directory_stands_for_its_adapter_and_knows_its_base(root: Path, saved: Path, tmp_path: Path) -> None:
    commit = "c" * 40
    run = lay_out_run(tmp_path / "run", saved, base_revision=commit)
    for address in (run, run / "adapter"):
        assert read(recipe_from(address)).base_revision == commit
    other = lay_out_run(tmp_path / "other", saved, "Qwen/Qwen2.5-0.5B")
    assert "the adapter was trained on Qwen/Qwen2.5-0.5B" in refusal(other)


def test_a_run_that_is_not_trained_yet_offers_its_checkpoint(root: Path, saved: Path, tmp_path: Path) -> None:
    run = lay_out_run(tmp_path / "run", None)
    assert "this run is not trained yet (no adapter/). Finish it first." in one_line(run)
    shutil.copytree(saved, run / "checkpoint-3")
    assert f"or give a checkpoint of it: {run / 'checkpoint-3'}." in one_line(run)
    read(recipe_from(run / "checkpoint-3"))


def test_places_without_an_adapter_are_named(root: Path, tmp_path: Path, saved: Path) -> None:
    assert "no adapter there (adapter_config.json is missing)" in one_line(tmp_path)
    assert "there is no such folder" in one_line(tmp_path / "nothing")
    assert "there is no such folder" in one_line("nothing")
    assert "is a file. Give the folder" in one_line(saved / WEIGHTS)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from grpo_lite.files.hub import hub_answers

    with hub_in_place(monkeypatch, tmp_path / "hub-cache") as state:
        hub_answers.cache_clear()
        yield state
    hub_answers.cache_clear()


def upload(hub: Hub, repo_id: str, folder: Path) -> None:
    repo = hub.repos[repo_id] = Repo(private=True)
    for path in folder.iterdir():
        digest = sha256_of(path)
        hub.stored[digest], repo.files[path.name] = path.read_bytes(), digest
    repo.files["model.safetensors"] = "0" * 64  # not there: fetching it would fail


def test_a_repository_is_fetched_without_its_other_files_and_then_cached(root: Path, hub: Hub, saved: Path) -> None:
    upload(hub, "me/adapter", saved)
    adapter = read(recipe_from("me/adapter"))
    assert adapter.to_json()["sha256"] == sha256_of(saved / WEIGHTS)
    assert not any("README" in path or Path(path).name == "model.safetensors" for _, path in hub.requests)
    hub.status["/"] = 503
    assert read(recipe_from("me/adapter")).sha256 == adapter.sha256


def test_a_missing_repository_and_a_local_folder_of_that_name_are_both_named(root: Path, hub: Hub) -> None:
    text = one_line("runs/typo")
    assert "runs/typo was not found on the Hub (or is private and you are not logged in)" in text
    assert "there is no folder runs/typo here" in text


def test_a_repository_without_an_adapter_is_named(root: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    upload(hub, "me/model", tmp_path / "files")
    assert "no adapter there (adapter_config.json is missing)" in one_line("me/model")


def test_offline_says_how_to_get_it(root: Path) -> None:
    text = one_line("me/adapter")
    assert re.search("me/adapter is no folder here, and as a repository of the Hub it is not in the local cache", text)
    assert "HF_HUB_OFFLINE is set. Connect once" in text


# --- a run's own adapter in the place of the trained one ------------------------------------------------------------


def bits(model: Any) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("with_reference", [False, True], ids=["alone", "beside ref"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
def test_other_weights_are_in_the_model_for_the_block_only(
    tmp_path: Path, lora: dict[str, Any], with_reference: bool
) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    if lora.get("modules_to_save"):
        settings["target_modules"] = ["q_proj", "down_proj"]
    warm = make_adapter(tmp_path / "warm", **settings)
    write_manifest(warm)
    base = AutoModelForCausalLM.from_pretrained(resolve_base(TINY_MODEL))
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))
    if with_reference:
        hold_reference(model)
    ids = torch.arange(5, 12)[None]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(resolve_base(TINY_MODEL)), warm)
    before, trained = bits(model), model(ids).logits
    with other_weights(model, read_sealed(warm)):
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
        assert not torch.allclose(model(ids).logits, trained)
    assert bits(model) == before
    assert model.active_adapter == "default"


def test_the_own_weights_come_back_when_the_block_fails(saved: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(resolve_base(TINY_MODEL))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    before = bits(model)
    with contextlib.suppress(ZeroDivisionError), other_weights(model, load_file(saved / WEIGHTS)):
        assert bits(model) != before
        raise ZeroDivisionError
    assert bits(model) == before


@pytest.mark.parametrize("fault", ["missing", "truncated", "changed", "unsealed"])
def test_a_sealed_adapter_that_is_damaged_is_refused_in_one_line(copied: Path, fault: str) -> None:
    write_manifest(copied)
    path, data = copied / WEIGHTS, (copied / WEIGHTS).read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "unsealed":
        (copied / "MANIFEST.sha256").unlink()
    else:
        path.write_bytes(data[:-8] if fault == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"^[^\n]*: the adapter is damaged: [^\n]*$") as error:
        read_sealed(copied)
    assert ("MANIFEST.sha256" if fault == "unsealed" else WEIGHTS) in str(error.value)
