"""What must never be merged: each kind of damage or mismatch is named, and nothing lies under the final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from grpo_lite.errors import ExportError
from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.files.manifest import MANIFEST_NAME, verify_manifest, write_manifest
from tests.export.merge_cases import edit_config, edit_tensors, make_adapter, make_base, tensors

INDEX = "model.safetensors.index.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_base(folder / "base", dtype=torch.bfloat16, shard_bytes=4000)
    make_adapter(folder / "adapter", folder / "base", target_modules=["q_proj", "v_proj"])
    return folder


class Case(NamedTuple):
    base: Path
    adapter: Path
    out: Path


@pytest.fixture
def case(originals: Path, tmp_path: Path) -> Case:
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return Case(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def shard_with(base: Path, tensor: str) -> Path:
    index = json.loads((base / INDEX).read_text())
    return base / index["weight_map"][tensor]


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def truncate(path: Path, by: int = 10) -> None:
    os.truncate(path, path.stat().st_size - by)


def flip_byte(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def rename_tensor(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda saved: {new if name == old else name: value for name, value in saved.items()}


def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda saved: saved | {name: change(saved[name])}


def drop_tensor(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda saved: {name: value for name, value in saved.items() if name not in names}


SHARD = "model.layers.1.mlp.up_proj.weight"

DAMAGE: dict[str, tuple[Callable[[Case], Any], str]] = {
    "missing shard": (lambda c: shard_with(c.base, SHARD).unlink(), r"shards are missing: model-000\d\d-of"),
    "truncated shard": (lambda c: truncate(shard_with(c.base, SHARD)), r"model-000.*truncated or corrupt"),
    "shard cut in its header": (
        lambda c: truncate(shard_with(c.base, SHARD), 10**3),
        r"model-000.*truncated or corrupt",
    ),
    "empty shard": (lambda c: shard_with(c.base, SHARD).write_bytes(b""), r"model-000.*truncated or corrupt"),
    "text in place of a shard": (
        lambda c: shard_with(c.base, SHARD).write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"model-000.*truncated or corrupt",
    ),
    "shard with bytes added": (
        lambda c: append(shard_with(c.base, SHARD), b"more"),
        r"model-000.*the file has",
    ),
    "header damaged": (lambda c: flip_byte(shard_with(c.base, SHARD), 20), r"model-000.*truncated or corrupt"),
    "index broken": (
        lambda c: (c.base / INDEX).write_text("{"),
        r"index\.json: is not a usable index",
    ),
    "index of another model": (
        lambda c: edit_config(c.base, INDEX, weight_map={"x": "model-00001-of-00012.safetensors"}),
        r"(holds other tensors than model\.safetensors\.index\.json|shards are missing)",
    ),
    "index with a path": (
        lambda c: edit_config(c.base, INDEX, weight_map={"x": "../adapter/x.safetensors"}),
        r"a shard's name is a path",
    ),
    "no config": (lambda c: (c.base / "config.json").unlink(), r"config\.json: cannot be read"),
    "quantised base": (
        lambda c: edit_config(c.base, "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"base is quantised \(quantization_config, method bitsandbytes\)",
    ),
    "base with NaN": (
        lambda c: edit_tensors(
            c.base,
            set_tensor("model.layers.0.self_attn.q_proj.weight", lambda t: t.fill_(float("nan"))),
            shard_with(c.base, "model.layers.0.self_attn.q_proj.weight").name,
        ),
        r"layers\.0\.self_attn\.q_proj\.weight: the base holds NaN",
    ),
    "target stored as integers": (
        lambda c: edit_tensors(
            c.base,
            set_tensor("model.layers.0.self_attn.q_proj.weight", lambda t: t.to(torch.uint8)),
            shard_with(c.base, "model.layers.0.self_attn.q_proj.weight").name,
        ),
        r"q_proj\.weight: the base stores it as U8 \(quantised\)",
    ),
    "adapter folder missing": (lambda c: shutil.rmtree(c.adapter), r"no adapter there"),
    "adapter weights missing": (
        lambda c: (c.adapter / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors is missing",
    ),
    "adapter pickled": (
        lambda c: (c.adapter / "adapter_model.safetensors").rename(c.adapter / "adapter_model.bin"),
        r"the adapter is pickled",
    ),
    "adapter truncated": (
        lambda c: truncate(c.adapter / "adapter_model.safetensors"),
        r"adapter_model\.safetensors: .*truncated or corrupt",
    ),
    "adapter config broken": (
        lambda c: (c.adapter / "adapter_config.json").write_text('{"r": '),
        r"adapter_config\.json: is not valid JSON",
    ),
    "adapter with NaN": (
        lambda c: edit_tensors(c.adapter, set_tensor(f"{Q}.lora_B.weight", lambda t: t.fill_(float("nan")))),
        r"q_proj\.lora_B\.weight' holds NaN or infinity",
    ),
    "adapter with infinity": (
        lambda c: edit_tensors(c.adapter, set_tensor(f"{Q}.lora_A.weight", lambda t: t / 0)),
        r"q_proj\.lora_A\.weight' holds NaN or infinity",
    ),
    "adapter all zero": (
        lambda c: edit_tensors(c.adapter, lambda saved: {n: t * 0 if "lora_B" in n else t for n, t in saved.items()}),
        r"the adapter is zero",
    ),
    "alpha zero": (lambda c: edit_config(c.adapter, lora_alpha=0), r"the adapter is zero"),
    "A without B": (lambda c: edit_tensors(c.adapter, drop_tensor(f"{Q}.lora_B.weight")), r"q_proj has no lora_B"),
    "B without A": (lambda c: edit_tensors(c.adapter, drop_tensor(f"{Q}.lora_A.weight")), r"q_proj has no lora_A"),
    "one layer missing": (
        lambda c: edit_tensors(c.adapter, drop_tensor(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")),
        r"layers\.0\.self_attn\.q_proj\.weight: the adapter lacks",
    ),
    "target unknown to the base": (
        lambda c: edit_tensors(
            c.adapter,
            lambda saved: {name.replace("layers.1", "layers.7"): value for name, value in saved.items()},
        ),
        r"layers\.7\.self_attn\.q_proj\.weight: the base has no such tensor",
    ),
    "foreign tensor": (
        lambda c: edit_tensors(c.adapter, rename_tensor(f"{Q}.lora_A.weight", "q_proj.lora_down.weight")),
        r"'q_proj\.lora_down\.weight' \(F32\) is not one that PEFT saves",
    ),
    "unknown LoRA tensor": (
        lambda c: edit_tensors(c.adapter, lambda saved: saved | {f"{Q}.lora_diag": torch.ones(4)}),
        r"q_proj\.lora_diag' is of a LoRA variant",
    ),
    "rank other than the config's": (lambda c: edit_config(c.adapter, r=3), r"adapter_config\.json gives rank 3"),
    "use_dora without magnitudes": (lambda c: edit_config(c.adapter, use_dora=True), r"no lora_magnitude_vector"),
    "bad pattern": (lambda c: edit_config(c.adapter, rank_pattern={"(": 3}), r"not a valid expression"),
    "shapes of another base": (
        lambda c: edit_tensors(c.adapter, set_tensor(f"{Q}.lora_A.weight", lambda t: torch.cat([t, t], dim=1))),
        r"q_proj\.weight: the adapter changes \[16, 32\], the base has \[16, 16\]",
    ),
    "resized vocabulary": (
        lambda c: edit_tensors(
            c.adapter, lambda saved: saved | {"base_model.model.lm_head.weight": torch.ones(41, 16)}
        ),
        r"lm_head\.weight: \[41, 16\] in the adapter, \[40, 16\] in the base \(was the vocabulary resized\?\)",
    ),
    "saved module unknown to the base": (
        lambda c: edit_tensors(c.adapter, lambda saved: saved | {"base_model.model.score.weight": torch.ones(2, 16)}),
        r"score\.weight: the base has no such tensor",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damage_is_named_and_nothing_is_written(damage: str, case: Case) -> None:
    change, message = DAMAGE[damage]
    change(case)
    with pytest.raises(ExportError, match=message):
        merge_adapter(*case)
    assert not list(case.out.parent.glob("merged*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora', which trains against a changed base"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices = \[1, 2\]"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_something_new": 7}, "uses use_something_new = 7, which cannot be merged"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]"),
        ({"alpha_pattern": {"q_proj": "2"}}, "It must map module names to numbers"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"lora_alpha": float("nan")}, "NaN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_adapter_is_refused_by_name(changes: dict[str, Any], message: str, case: Case) -> None:
    edit_config(case.adapter, **changes)
    with pytest.raises(ExportError, match=message):
        merge_adapter(*case)
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.gguf"], r"only a GGUF is there \(model\.gguf\)"),
        (["pytorch_model.bin"], r"only pickled weights are there \(pytorch_model\.bin\)"),
        (["consolidated.00.pth"], r"only pickled weights"),
        ([], r"no safetensors weights there \(found: config\.json\)"),
    ],
    ids=["gguf", "bin", "pth", "nothing"],
)
def test_base_without_safetensors_says_what_to_do(files: list[str], message: str, case: Case) -> None:
    for path in [
        *case.base.glob("*.safetensors"),
        *case.base.glob("*.index.json"),
        case.base / "generation_config.json",
    ]:
        path.unlink()
    for name in files:
        (case.base / name).write_bytes(b"x")
    with pytest.raises(ExportError, match=message):
        merge_adapter(*case)


def test_adapter_in_a_subfolder_is_pointed_out(case: Case) -> None:
    case.adapter.rename(case.adapter.parent / "default")
    case.adapter.mkdir()
    (case.adapter.parent / "default").rename(case.adapter / "default")
    with pytest.raises(ExportError, match="There is one in default: give that folder"):
        merge_adapter(*case)


def test_adapter_of_another_embedding_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    edit_tensors(base, set_tensor("model.embed_tokens.weight", lambda t: t + 0.01), "model.safetensors")
    with pytest.raises(ExportError, match="trained on another embedding than the base's"):
        merge_adapter(base, adapter, tmp_path / "merged")


def test_sum_beyond_float16_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base, scale=300.0, target_modules=["v_proj"])
    with pytest.raises(ExportError, match=r"v_proj\.weight: the merged weight holds NaN or infinity"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_flipped_bit_in_an_adapter_with_a_manifest_is_named(case: Case) -> None:
    write_manifest(case.adapter)
    flip_byte(case.adapter / "adapter_model.safetensors", -3)
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors: corrupted"):
        merge_adapter(*case)


def test_flipped_bit_in_a_base_with_a_manifest_is_named_and_nothing_kept(case: Case) -> None:
    write_manifest(case.base)
    shard = shard_with(case.base, SHARD)
    flip_byte(shard)
    with pytest.raises(ExportError, match=rf"{shard.name}: is corrupted"):
        merge_adapter(*case)
    assert not list(case.out.parent.glob("merged*"))


def test_flipped_bit_in_the_hub_cache_is_named(case: Case) -> None:
    # In the cache a shard is a link to a blob that is named by its sha256.
    import hashlib

    for path in case.base.glob("*.safetensors"):
        blob = case.base / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    merge_adapter(*case)
    shutil.rmtree(case.out)
    shard = shard_with(case.base, SHARD)
    flip_byte(shard.resolve())
    with pytest.raises(ExportError, match=rf"{shard.name}: is corrupted"):
        merge_adapter(*case)
    assert not case.out.exists()


def test_merging_onto_an_earlier_merge_is_refused(case: Case) -> None:
    merge_adapter(*case)
    with pytest.raises(ExportError, match="this adapter is merged into it already"):
        merge_adapter(case.out, case.adapter, case.out.parent / "twice")
    other = make_adapter(case.out.parent / "other", case.out, scale=0.3)
    merge_adapter(case.out, other, case.out.parent / "next")  # another adapter, trained on the merge, is fine


@pytest.mark.parametrize("target", ["base", "adapter", "base/merged", "."])
def test_output_over_an_input_is_refused(target: str, case: Case) -> None:
    with pytest.raises(ExportError, match=r"which is read|already there"):
        merge_adapter(case.base, case.adapter, case.base.parent / target, overwrite=True)
    assert (case.base / "config.json").exists()


def test_existing_output_is_kept_unless_overwritten(case: Case) -> None:
    merge_adapter(*case)
    before = (case.out / "merge.json").read_text()
    with pytest.raises(ExportError, match="is already there"):
        merge_adapter(*case)
    edit_config(case.adapter, lora_alpha=4)
    merge_adapter(*case, overwrite=True)
    assert (case.out / "merge.json").read_text() != before
    verify_manifest(case.out)
    assert sorted(path.name for path in case.out.parent.glob("merged*")) == ["merged"]


def test_folder_that_is_not_ours_is_never_overwritten(case: Case) -> None:
    case.out.mkdir()
    (case.out / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="was not exported by grpo_lite"):
        merge_adapter(*case, overwrite=True)
    assert (case.out / "thesis.txt").read_text() == "mine"


def test_failed_overwrite_keeps_the_previous_merge(case: Case) -> None:
    merge_adapter(*case)
    before = tensors(case.out)
    write_manifest(case.base)
    flip_byte(shard_with(case.base, SHARD))
    edit_config(case.adapter, lora_alpha=4)
    with pytest.raises(ExportError, match="corrupted"):
        merge_adapter(*case, overwrite=True)
    after = tensors(case.out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    verify_manifest(case.out)


def test_output_below_a_file_is_named(case: Case) -> None:
    case.out.write_text("a file")
    with pytest.raises(ExportError, match="cannot be written"):
        merge_adapter(case.base, case.adapter, case.out / "merged")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_folder_without_rights_is_named(case: Case) -> None:
    case.out.mkdir(mode=0o500)
    with pytest.raises(ExportError, match="cannot be written: Permission denied"):
        merge_adapter(case.base, case.adapter, case.out / "merged")


def test_full_disk_is_refused_before_anything_is_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int = 10**12
        used: int = 10**12
        free: int = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage())
    with pytest.raises(ExportError, match=r"the export needs 64\.0 MiB of disk, and 1000 B are free"):
        merge_adapter(*case)
    assert not list(case.out.parent.glob("merged*"))


def test_disk_that_fills_up_while_writing_leaves_nothing(case: Case) -> None:
    def fail(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match=r"the export failed: .*No space left on device"):
        merge_adapter(*case, progress=fail)
    assert not list(case.out.parent.glob("merged*"))


def test_interrupt_leaves_nothing(case: Case) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(*case, progress=interrupt)
    assert not list(case.out.parent.glob("merged*"))


def test_kill_in_the_middle_leaves_nothing_under_the_final_name_and_the_next_merge_succeeds(case: Case) -> None:
    program = f"""
import os, signal
from pathlib import Path
from grpo_lite.export.merge.merge import merge_adapter
def kill(name, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
merge_adapter(Path({str(case.base)!r}), Path({str(case.adapter)!r}), Path({str(case.out)!r}), progress=kill)
"""
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in case.out.parent.glob("merged*")] == ["merged.partial"]
    (case.out.parent / "merged.partial/left-over").write_text("from the killed merge")
    merge_adapter(*case)
    assert not (case.out / "left-over").exists()
    assert not (case.out.parent / "merged.partial").exists()
    verify_manifest(case.out)


def test_two_merges_into_one_folder_do_not_mix(case: Case) -> None:
    messages: list[str] = []

    def second(name: str, done: int, total: int) -> None:
        if not messages:
            with pytest.raises(ExportError) as error:
                merge_adapter(*case)
            messages.append(str(error.value))

    merge_adapter(*case, progress=second)
    assert "another process writes there" in messages[0]
    verify_manifest(case.out)


@pytest.mark.parametrize("aside", [".replaced-merged", "merged.previous"], ids=["now", "an earlier version"])
def test_kill_between_the_renames_of_an_overwrite_loses_nothing(case: Case, aside: str) -> None:
    merge_adapter(*case)
    case.out.rename(case.out.parent / aside)  # the state after such a kill
    with pytest.raises(ExportError, match="already there"):
        merge_adapter(*case)
    verify_manifest(case.out)


def test_folder_beside_the_output_that_is_not_ours_is_never_removed(case: Case) -> None:
    (case.out.parent / "merged.previous").mkdir()
    (case.out.parent / "merged.previous/thesis.txt").write_text("mine")
    merge_adapter(*case)
    merge_adapter(*case, overwrite=True)
    assert (case.out.parent / "merged.previous/thesis.txt").read_text() == "mine"


def test_merged_folder_checks_with_sha256sum(case: Case) -> None:
    merge_adapter(*case)
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("sha256sum is not installed")
    result = subprocess.run([tool, "--strict", "-c", MANIFEST_NAME], cwd=case.out, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
