"""The merge agrees with PEFT to one rounding, for every kind of adapter it accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_lite.errors import ExportError
from grpo_lite.export.merge.merge import merge_adapter, round_stochastically
from grpo_lite.files.manifest import verify_manifest
from tests.export.merge_cases import (
    edit_config,
    edit_tensors,
    load,
    load_with_adapter,
    logits,
    make_adapter,
    make_base,
    peft_merged,
    tensors,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "rslora and dora": ("llama", {"use_rslora": True, "use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, r".*\.1\..*up_proj": 6}, "alpha_pattern": {"v_proj": 3}}),
    "anchored pattern": ("llama", {"rank_pattern": {"^model.layers.0.self_attn.k_proj": 7}}),
    "rslora and patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ),
    "some layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\.self_attn\.v_proj"}),
    "regex": ("llama", {"target_modules": r".*\.mlp\.(up|gate)_proj"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "target_modules": ["gate_proj"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved head and norm": ("llama", {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "tied": ("llama-tied", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 dora": ("qwen2", {"use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
}
# Half a unit in the last place, relative.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.slow),
        torch.bfloat16,
        pytest.param(torch.float16, marks=[pytest.mark.slow, pytest.mark.matrix]),
    ],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_merge_is_peft_in_float32_rounded_once(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, lora = VARIANTS[variant]
    base = make_base(tmp_path / "base", kind, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    merge_adapter(base, adapter, tmp_path / "merged")
    exact, same_dtype = (peft_merged(base, adapter, compute) for compute in (torch.float32, dtype))
    merged, before = tensors(tmp_path / "merged"), tensors(base)
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == before[name].dtype
        ours, truth = tensor.float(), exact[name]
        # Float32 sums taken in another order differ by about 1e-7; then one rounding.
        assert ((ours - truth).abs() <= ROUNDOFF[dtype] * truth.abs() + 5e-7).all(), name
        # PEFT in the base's dtype rounds the sum, and for embeddings first the update: at most three roundings apart.
        allowed = ROUNDOFF[dtype] * (2.1 * truth.abs() + (truth - before[name].float()).abs()) + 1e-6
        assert ((ours - same_dtype[name].float()).abs() <= allowed).all(), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_reloaded_merge_gives_the_logits_of_base_and_adapter(variant: str, tmp_path: Path) -> None:
    kind, lora = VARIANTS[variant]
    base = make_base(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    merge_adapter(base, adapter, tmp_path / "merged")
    unmerged, merged = logits(load_with_adapter(base, adapter)), logits(load(tmp_path / "merged", torch.float32))
    assert (unmerged - logits(load(base, torch.float32))).abs().max() > 0.01  # the adapter does something
    assert torch.allclose(unmerged, merged, atol=2e-5)


@pytest.mark.parametrize(
    ("lora", "untied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "sharded", [pytest.param(False, marks=[pytest.mark.slow, pytest.mark.matrix]), True], ids=["one file", "sharded"]
)
def test_tied_embeddings_give_the_unmerged_logits(
    lora: dict[str, Any], untied: bool, kind: str, sharded: bool, tmp_path: Path
) -> None:
    # PEFT's own merge is wrong here: it adds a change of one side to the tensor that both sides share.
    if kind == "gpt2":
        names = {"q_proj": "c_attn", "embed_tokens": "wte"}
        lora = {k: [names.get(n, n) for n in v] if isinstance(v, list) else v for k, v in lora.items()}
    base = make_base(tmp_path / "base", kind, shard_bytes=4000 if sharded else 10**9)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    if kind == "gpt2" and "wte" in lora["target_modules"]:
        untied = True  # peft 0.21 does not tie gpt2's head to a LoRA on its embedding, whatever it is asked
    record = merge_adapter(base, adapter, tmp_path / "merged")
    assert record.untied == untied
    unmerged, merged = logits(load_with_adapter(base, adapter)), logits(load(tmp_path / "merged", torch.float32))
    assert torch.allclose(unmerged, merged, atol=2e-5)
    assert ("lm_head.weight" in tensors(tmp_path / "merged")) == untied
    if sharded:
        index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
        saved = tensors(tmp_path / "merged")
        assert index["weight_map"].keys() == saved.keys()
        assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in saved.values())


def test_sharded_base_keeps_its_shards_and_index(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16, shard_bytes=2000)
    merge_adapter(base, make_adapter(tmp_path / "adapter", base), tmp_path / "merged")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3
    for name in [*shards, "model.safetensors.index.json"]:
        assert (tmp_path / "merged" / name).exists()
    before, after = ((folder / "model.safetensors.index.json").read_text() for folder in (base, tmp_path / "merged"))
    assert json.loads(before) == json.loads(after)
    load(tmp_path / "merged", torch.bfloat16)


def test_tensors_that_are_no_target_are_copied_bit_for_bit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    record = merge_adapter(base, adapter, tmp_path / "merged")
    before, after = tensors(base), tensors(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert record.tensors_merged == 2
    assert record.tensors == len(before)
    assert 0.5 < record.changed_share <= 1
    assert record.unchanged == ()


def test_checkpoint_without_the_model_prefix_is_matched(tmp_path: Path) -> None:
    # The Hub's gpt2 stores h.0.attn… where the model says transformer.h.0.attn…
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"])
    expected = logits(load_with_adapter(base, adapter))
    edit_tensors(base, lambda saved: {k.removeprefix("transformer."): v for k, v in saved.items()}, "model.safetensors")
    merge_adapter(base, adapter, tmp_path / "merged")
    assert "h.0.attn.c_attn.weight" in tensors(tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged", torch.float32)), expected, atol=2e-5)


def test_fan_in_fan_out_in_the_config_does_not_turn_a_square_linear_layer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")  # q_proj is 16 x 16
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    expected = logits(load_with_adapter(base, adapter))
    edit_config(adapter, fan_in_fan_out=True)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged", torch.float32)), expected, atol=2e-5)


def test_adapter_in_bfloat16_is_added_in_float32(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    edit_tensors(adapter, lambda saved: {name: value.bfloat16() for name, value in saved.items()})
    merge_adapter(base, adapter, tmp_path / "merged")
    exact = peft_merged(base, adapter, torch.float32)
    for name, tensor in tensors(tmp_path / "merged").items():
        assert ((tensor.float() - exact[name]).abs() <= 2.0**-8 * exact[name].abs() + 5e-7).all(), name


def test_large_tensors_are_merged_in_blocks_that_join_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    lora: dict[str, Any] = {"target_modules": ["c_attn", "c_fc", "wte"], "use_dora": True}
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    merge_adapter(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("grpo_lite.export.safetensors.row_blocks.__defaults__", (100,))  # some 3 rows a block
    merge_adapter(base, adapter, tmp_path / "blocks")
    whole, blocks = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    for name, tensor in whole.items():
        assert torch.allclose(tensor, blocks[name], atol=1e-6), name


def test_merged_folder_has_tokenizer_template_generation_config_and_manifest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_text("from the base")
    (base / "LICENSE").write_text("terms")
    (base / "README.md").write_text("the base's own card")
    edit_config(base, "config.json", _pre_quantization_dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base)
    folder = tmp_path / "merged"
    merge_adapter(base, adapter, folder)
    assert (folder / "chat_template.jinja").read_text() == "from the base"
    assert (folder / "tokenizer.json").read_text() == "from the base"
    assert (folder / "generation_config.json").exists()
    assert (folder / "LICENSE").read_text() == "terms"
    assert not (folder / "README.md").exists()
    assert "_pre_quantization_dtype" not in json.loads((folder / "config.json").read_text())
    assert verify_manifest(folder) == len(list(folder.iterdir())) - 1


def test_merged_folder_has_the_chat_template_that_the_adapter_was_trained_with(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "tokenizer.json").write_text("from the base")
    (base / "chat_template.jinja").write_text("from the base")
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text("of the recipe")
    merge_adapter(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "of the recipe"


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shard_bytes=3000)
    seen: list[tuple[str, int, int]] = []
    merge_adapter(
        base, make_adapter(tmp_path / "adapter", base), tmp_path / "merged", progress=lambda *args: seen.append(args)
    )
    done = [item[1] for item in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == sum(path.stat().st_size for path in base.glob("*.safetensors"))


def test_update_lost_in_rounding_is_refused_and_measured(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, scale=1e-12)
    # B·A of about 1e-12 against weights of about 0.05: lost in float32 already.
    with pytest.raises(ExportError, match="merged weights equal the base's to rounding"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_untrained_dora_equals_the_base_and_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.0, use_dora=True)
    with pytest.raises(ExportError, match="merged weights equal the base's to rounding"):
        merge_adapter(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["embedding", "head", "saved head", "neither"],
)
def test_tied_head_that_is_stored_twice_is_handled(lora: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama-tied")
    name = "model.embed_tokens.weight"
    edit_tensors(base, lambda saved: saved | {"lm_head.weight": saved[name].clone()}, "model.safetensors")
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    merge_adapter(base, adapter, tmp_path / "merged")
    unmerged, merged = logits(load_with_adapter(base, adapter)), logits(load(tmp_path / "merged", torch.float32))
    assert torch.allclose(unmerged, merged, atol=2e-5)


def test_update_below_the_spacing_of_bfloat16_survives_the_merge(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.00003)
    record = merge_adapter(base, adapter, tmp_path / "merged")
    assert record.nearest_loss > 0.3
    assert record.tensors_dithered == record.tensors_merged == 14
    exact, before, merged = peft_merged(base, adapter, torch.float32), tensors(base), tensors(tmp_path / "merged")
    update, ours, nearest = (
        torch.cat([(values[name].float() - before[name].float()).flatten() for name in merged])
        for values in (exact, merged, {name: value.bfloat16() for name, value in exact.items()})
    )
    for name, tensor in merged.items():  # one of the two neighbours: less than a unit in the last place away
        assert ((tensor.float() - exact[name]).abs() < 2.0**-7 * exact[name].abs() + 1e-7).all(), name
    # The merged update projected on the wanted one: 1 if all of it arrived.
    assert float(ours @ update / (update @ update)) == pytest.approx(1, abs=0.2)
    assert float(nearest @ update / (update @ update)) < 0.5


def test_same_merge_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.00003)
    for name in ("one", "two"):
        torch.manual_seed(len(name) + id(name))
        merge_adapter(base, adapter, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype: torch.dtype) -> None:
    spacing = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]  # between 1 and 2
    generator = torch.Generator().manual_seed(0)
    for part in (0.0, 0.1, 0.5, 0.9):
        for sign in (1.0, -1.0):
            values = torch.full((40_000,), sign * (1 + part * spacing))
            rounded = round_stochastically(values, dtype, generator)
            assert rounded.dtype == dtype
            steps = (rounded.float() * sign - 1) / spacing
            assert set(steps.tolist()) <= {0.0, 1.0}
            # Standard deviation of the mean: at most 0.5 / sqrt(40000) = 0.0025.
            assert float(steps.mean()) == pytest.approx(part, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_stochastic_rounding_keeps_what_the_dtype_holds(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(10_000), torch.randn(1000) * 1e-6, torch.tensor([0.0, -0.0, 1.0, 2.0**-14, -2.0])])
    held = values.to(dtype)
    assert torch.equal(round_stochastically(held.float(), dtype, torch.Generator()), held)


def test_record_tells_how_much_of_the_update_rounding_took(tmp_path: Path) -> None:
    shares = {}
    for scale in (0.02, 0.2):
        base = make_base(tmp_path / f"base{scale}", dtype=torch.bfloat16)
        adapter = make_adapter(tmp_path / f"adapter{scale}", base, scale=scale, target_modules=["q_proj"])
        record = merge_adapter(base, adapter, tmp_path / f"merged{scale}")
        exact, before = peft_merged(base, adapter, torch.float32), tensors(base)
        merged = tensors(tmp_path / f"merged{scale}")
        names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
        update = torch.cat([(exact[n] - before[n].float()).flatten() for n in names]).norm()
        error = torch.cat([(merged[n].float() - exact[n]).flatten() for n in names]).norm()
        assert record.nearest_loss == pytest.approx(float(error / update), rel=1e-3)
        shares[scale] = record.nearest_loss
    assert shares[0.02] > 3 * shares[0.2]  # the rounding error is the same, the update smaller
