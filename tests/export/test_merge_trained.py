"""A merge onto the weights that 4-bit training read is the model that was trained."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_lite.errors import ExportError
from grpo_lite.evaluation import evaluate
from grpo_lite.export import stages
from grpo_lite.export.folder import clear_leftovers, remove_folder
from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.export.merge.trained_base import TrainedBase
from grpo_lite.export.proof import verify_merge
from grpo_lite.export.stages import RunInputs, export_run, merge_and_score
from grpo_lite.files.manifest import write_manifest
from grpo_lite.models.base import Base
from grpo_lite.models.device import detect_device
from grpo_lite.recipe.recipe import ModelSection
from grpo_lite.runs.run_dir import RunDir
from tests.export.merge_cases import edit_tensors, make_adapter, make_base, tensors
from tests.finished_run import make_run

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "every layer": ("wide", {}),
    "one kind of layer": ("wide", {"target_modules": ["q_proj"]}),
    "dora": ("wide", {"use_dora": True}),
    "a saved layer": ("wide", {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}),
    "stored the other way round": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "the other way round, dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
}


def trained_base(folder: Path) -> TrainedBase:
    return TrainedBase(Base(ModelSection(id=str(folder), load_in="4bit"), detect_device(), folder))  # type: ignore[call-arg]


def dequantised_by_transformers(folder: Path) -> Any:
    """The base in 4 bits, given back in float32 by transformers itself."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    dtype = torch.bfloat16 if detect_device().bfloat16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return model.dequantize(torch.float32).float().eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merge_is_peft_s_on_the_dequantised_base_rounded_once(variant: str, tmp_path: Path) -> None:
    kind, lora = VARIANTS[variant]
    base = make_base(tmp_path / "base", kind, torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    record = merge_adapter(base, adapter, tmp_path / "merged", trained=trained_base(base))
    assert record.onto == "trained"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on Conv1D
        expected = PeftModel.from_pretrained(dequantised_by_transformers(base), adapter).merge_and_unload().state_dict()
    merged, before = tensors(tmp_path / "merged"), tensors(base)
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        truth = expected.get(name, expected.get(f"transformer.{name}"))
        assert truth is not None
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            truth = truth.T  # a Linear in 4 bits, a Conv1D in the checkpoint
        # One unit in the last place: the rounding is stochastic where the nearest would lose the update.
        assert ((tensor.float() - truth).abs() <= 2.0**-7 * truth.abs() + 5e-7).all(), name


def test_a_layer_without_an_adapter_is_what_training_read_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "wide", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    trained = trained_base(base)
    merge_adapter(base, adapter, tmp_path / "merged", trained=trained)
    merged, before = tensors(tmp_path / "merged"), tensors(base)
    layer = "model.layers.1.mlp.down_proj"
    assert torch.equal(merged[f"{layer}.weight"], trained.weight(layer).bfloat16())
    assert not torch.equal(merged[f"{layer}.weight"], before[f"{layer}.weight"])
    assert torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])  # never in 4 bits


def test_a_damaged_base_is_found_though_its_weights_are_read_elsewhere(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "wide", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    write_manifest(base)
    up = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(base, lambda held: {**held, up: held[up] + 1}, "model.safetensors")
    with pytest.raises(ExportError, match="is corrupted: its sha256 is"):
        merge_adapter(base, adapter, tmp_path / "merged", trained=trained_base(base))
    assert not (tmp_path / "merged").exists()


def test_the_proof_tells_the_two_bases_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden_size=128)
    base, lines = tmp_path / "base-model", list[str]()
    trained = trained_base(base)
    merge_adapter(base, run.adapter, tmp_path / "merged", trained=trained)
    prompts = ["1+2=", "What is 3+4?", "17"]
    right, wrong = (
        verify_merge(base, run.adapter, tmp_path / "merged", prompts, detect_device(), lines.append, reference)
        for reference in (trained, None)
    )
    assert right.passed
    assert right.merged.mean_kl < wrong.merged.mean_kl / 10


@pytest.mark.parametrize(
    ("label", "onto"),
    [
        ("significant loss", "trained"),
        ("no significant gain", "original"),
        pytest.param("", "trained", id="the rows are not those of the trained model"),
        pytest.param(None, "trained", id="too large to be scored"),
    ],
)
def test_auto_keeps_the_original_unless_it_scores_significantly_worse(
    label: str | None, onto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, hidden_size=128)
    in_four_bits(run)
    rates = {"lenient": {"rate": 0.5, "low": 0.4, "high": 0.6, "n": 20}}

    def scored_as(run: RunDir, *_: Any) -> None:
        is_first = json.loads((run.merged / "merge.json").read_text())["onto"] == "original"
        verdict = {"verdict": {"label": label if is_first else "no significant gain", "sentence": "It fell."}}
        if label is None and is_first:
            return
        assert is_first or not four_bit_layers_in_memory()
        change = {} if label == "" and is_first else {"change": verdict}
        run.write_scores({**run.read_scores(), "merged": {**rates, **change}})

    monkeypatch.setattr(stages, "evaluate_merged", scored_as)
    lines = list[str]()
    record = merge_and_score(run, lines.append, RunInputs(run.load_recipe()), overwrite=True)
    assert record["onto"] == run.read_run()["merge"]["onto"] == onto
    assert record["passed"]
    assert json.loads((run.merged / "merge.json").read_text())["onto"] == onto
    assert ("merged_onto_original" in run.read_scores()) == (label in ("significant loss", ""))
    assert any(line.startswith("It fell. So it is made again") for line in lines) == (label == "significant loss")


@pytest.mark.parametrize("moment", ["evaluate_merged", "check_fit", "remove_folder", "merge_adapter"])
def test_after_a_kill_export_does_not_take_a_merge_that_its_score_speaks_against(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, hidden_size=128)
    in_four_bits(run)

    def scored_as(run: RunDir, *_: Any) -> None:
        is_first = json.loads((run.merged / "merge.json").read_text())["onto"] == "original"
        label = "significant loss" if is_first else "no significant gain"
        change = {"verdict": {"label": label, "sentence": "It fell."}}
        run.write_scores({**run.read_scores(), "merged": {"lenient": {"rate": 0.1}, "change": change}})

    def killed(*_: Any, **named: Any) -> Any:
        if moment != "merge_adapter" or named["trained"]:
            raise KeyboardInterrupt
        return merge_adapter(*_, **named)

    monkeypatch.setattr(stages, "evaluate_merged", scored_as)
    inputs = RunInputs(run.load_recipe())
    with monkeypatch.context() as patch:
        patch.setattr(stages, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            merge_and_score(run, print, inputs, overwrite=True)
    export_run(run, print, inputs)
    assert run.read_run()["merge"]["onto"] == "trained"
    assert json.loads((run.merged / "merge.json").read_text())["onto"] == "trained"


def test_a_merge_that_is_removed_never_lies_under_its_name_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "MANIFEST.json").write_text("{}")

    def killed(folder: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(merged)
    assert not merged.exists()
    clear_leftovers(merged)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scored", [True, False])
def test_weights_that_cannot_be_written_as_training_read_them_leave_the_merge_onto_the_original(
    scored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, hidden_size=128)
    in_four_bits(run)
    if not scored:
        run.scores_file.unlink()
    monkeypatch.setattr(stages, "evaluate_merged", lambda *_: None)
    layer = "model.layers.0.mlp.up_proj"
    elsewhere = TrainedBase.__init__

    def under_another_name(self: TrainedBase, base: Base) -> None:
        elsewhere(self, base)
        self.shapes["model.layers.0.mlp.gate_up_proj"] = self.shapes.pop(layer)

    monkeypatch.setattr(TrainedBase, "__init__", under_another_name)
    lines = list[str]()
    record = merge_and_score(run, lines.append, RunInputs(run.load_recipe()), overwrite=True)
    assert record["onto"] == run.read_run()["merge"]["onto"] == "original"
    assert run.read_run()["merge"]["passed"]
    assert any("1 of 14 layers that training read in 4 bits have no tensor of their own" in line for line in lines)


def test_a_merge_of_which_no_row_can_be_judged_is_kept_without_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    unusable = [{"lenient": None, "strict": None}]  # an episode whose `reset` failed, say
    monkeypatch.setattr(evaluate, "score_model", lambda *_: unusable)
    lines = list[str]()
    assert merge_and_score(run, lines.append, RunInputs(run.load_recipe()), overwrite=True)["passed"]
    assert "merged" not in run.read_scores()
    assert any("not scored" in line and "none of its 1 held-out rows could be judged" in line for line in lines)


def test_a_merge_that_is_kept_says_how_the_same_command_replaces_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden_size=128)
    with pytest.raises(ExportError, match="--onto trained") as refused:
        merge_and_score(run, print, RunInputs(run.load_recipe()), onto="trained")
    assert "--overwrite" in str(refused.value)


def test_without_scores_the_merge_is_the_model_that_was_trained(tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden_size=128)
    in_four_bits(run)
    run.scores_file.unlink()
    assert merge_and_score(run, print, RunInputs(run.load_recipe()), overwrite=True)["onto"] == "trained"


def test_a_base_that_was_trained_in_16_bits_has_no_other_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run.merged)
    with pytest.raises(ExportError, match=r"was trained in 16bit .* write original here"):
        merge_and_score(run, print, RunInputs(run.load_recipe()), onto="trained")
    assert not run.merged.exists()


def four_bit_layers_in_memory() -> int:
    gc.collect()
    return sum(type(held).__name__ == "Linear4bit" for held in gc.get_objects())


def in_four_bits(run: RunDir) -> None:
    text = run.recipe_file.read_text(encoding="utf-8")
    assert "load_in: 16bit" in text
    run.recipe_file.write_text(text.replace("load_in: 16bit", "load_in: 4bit"), encoding="utf-8")
