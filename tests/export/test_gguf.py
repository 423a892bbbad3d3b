"""GGUF files: what is in them, and that other programs read out of them the model that went in."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lite.errors import ExportError
from grpo_lite.export.gguf.file import export_gguf
from grpo_lite.export.gguf.proof import prove_gguf, stop_faults
from grpo_lite.export.gguf.tensors import interleave_halves, rope_frequency_factors
from grpo_lite.export.gguf.tokenizer import pre_tokenizer_name, read_tokenizer
from grpo_lite.export.stages import RunInputs, export_run_gguf
from grpo_lite.files.manifest import verify_manifest
from tests.finished_run import LLAMA3_SPLIT, bpe_tokenizer, make_base, make_recipe, make_run, set_recipe

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (pip install it)"
)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def fields(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def load_gguf(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "kind, config",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 128}),  # transformers 5.23 takes 128, as all Qwen3 have, and does not read the key
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "conv_L_cache": 4}),
    ],
    ids=[
        "llama",
        "llama-untied-bias",
        "llama3-rope",
        "llama-mha",
        "qwen2",
        "qwen2-untied",
        "qwen3",
        "lfm2",
    ],
)
def test_bf16_file_has_the_very_weights(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", kind, **config)
    record = export_gguf(base, tmp_path / "out", "bf16")
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    after = load_gguf(tmp_path / "out" / record.file)
    if config.get("attention_bias"):  # transformers 5.23 reads no Llama biases from a GGUF: compare the file itself
        return assert_biases_are_there(tmp_path / "out" / record.file, before)
    ids = [5, 80, 17, 200, 40, 41, 7, 7, 90, 33] * 3
    if "rope_parameters" in config:  # nor the frequency factors, which llama.cpp applies
        assert_frequency_factors(tmp_path / "out" / record.file, before)
        ids = ids[:1]  # at position 0 no rotation is left
    torch.testing.assert_close(logits(after, ids), logits(before, ids), atol=1e-4, rtol=1e-4)


def assert_biases_are_there(path: Path, model: Any) -> None:
    from gguf import GGUFReader

    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}
    q = model.model.layers[1].self_attn.q_proj.bias  # (heads * head_dim)
    k = model.model.layers[1].self_attn.k_proj.bias
    # Row 2i of a head is transformers' row i, row 2i+1 its row i + head_dim/2; heads of 8 rows here.
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    torch.testing.assert_close(tensors["blk.1.attn_q.bias"], q.reshape(4, 8)[:, order].reshape(-1))
    torch.testing.assert_close(tensors["blk.1.attn_k.bias"], k.reshape(2, 8)[:, order].reshape(-1))
    assert "output.weight" in tensors


def assert_frequency_factors(path: Path, model: Any) -> None:
    from gguf import GGUFReader

    found = next(torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / found, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_frequency_factors_are_none_without_llama3_scaling() -> None:
    assert rope_frequency_factors({"rope_theta": 1e4, "hidden_size": 32, "num_attention_heads": 4}) is None


def test_rotary_rows_alternate_head_by_head() -> None:
    rows = torch.arange(8).reshape(8, 1)  # two heads of four rows
    assert interleave_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind, tolerance", [("f16", 2e-2), ("q8_0", 0.5)])
def test_smaller_kinds_stay_close(tmp_path: Path, kind: str, tolerance: float) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    record = export_gguf(base, tmp_path / "out", kind)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    difference = (logits(load_gguf(tmp_path / "out" / record.file), [5, 80, 17]) - logits(before, [5, 80, 17])).abs()
    assert difference.max() < tolerance
    bf16 = export_gguf(base, tmp_path / "bf16", "bf16")
    assert record.size_bytes <= bf16.size_bytes


def test_q8_file_is_half_of_bf16(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", hidden_size=256, num_hidden_layers=4, intermediate_size=512)
    sizes = [export_gguf(base, tmp_path / kind, kind).size_bytes for kind in ("q8_0", "bf16")]
    assert 0.5 < sizes[0] / sizes[1] < 0.6  # 34 bytes for 32 values instead of 64


def test_metadata_says_how_to_stop_and_to_talk(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    record = export_gguf(base, tmp_path / "out", "bf16", name="sums")
    found = fields(tmp_path / "out" / record.file)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    normal, control, user_defined, unused = 1, 3, 4, 5
    assert [types[t] for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")] == [control] * 3
    assert types["<think>"] == user_defined  # shown, so not control
    assert types["a"] == normal
    assert list(types.values()).count(unused) == 20
    assert found["llama.vocab_size"] == len(types) == len(tokenizer) + 20
    assert record.stop_tokens == ("<|im_end|>",)


def test_end_of_turn_is_a_stop_where_the_template_uses_another_token_than_eos(tmp_path: Path) -> None:
    """A base model's tokenizer: eos ends a text, the chat template ends turns with <|im_end|>."""
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base = make_base(tmp_path / "base", tokenizer=tokenizer)
    facts = read_tokenizer(base, len(tokenizer) + 20)
    assert facts.tokens[facts.eos_id] == "<|endoftext|>"
    assert facts.tokens[facts.eot_id or 0] == "<|im_end|>"
    assert facts.stop_tokens == ["<|im_end|>", "<|endoftext|>"]


def test_every_end_token_that_the_model_declares_is_a_stop(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = json.loads((base / "generation_config.json").read_text())
    both = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": both}))
    assert read_tokenizer(base, len(tokenizer) + 20).stop_tokens == ["<|im_end|>", "<|endoftext|>"]


def test_model_without_any_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(template=None)
    base = make_base(tmp_path / "base", tokenizer=tokenizer)
    for name in ("tokenizer_config.json", "generation_config.json"):
        config = json.loads((base / name).read_text())
        config.pop("eos_token", None)
        config.pop("eos_token_id", None)
        (base / name).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="never stop"):
        export_gguf(base, tmp_path / "out", "bf16")


@pytest.mark.parametrize(
    "split, name",
    [
        (None, "gpt-2"),
        (LLAMA3_SPLIT, "llama-bpe"),
        (LLAMA3_SPLIT.replace("{1,3}", ""), "qwen2"),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2"],
)
def test_way_of_splitting_is_recognised(split: str | None, name: str) -> None:
    assert pre_tokenizer_name(bpe_tokenizer(split).backend_tokenizer, "here") == name


def test_smollm_splitting_is_recognised() -> None:
    from tokenizers import pre_tokenizers

    backend = bpe_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert pre_tokenizer_name(backend, "here") == "smollm"


def test_unknown_splitting_is_refused_rather_than_guessed() -> None:
    backend = bpe_tokenizer(LLAMA3_SPLIT.replace("{1,3}", "{1,2}")).backend_tokenizer
    with pytest.raises(ExportError, match=r"no way of splitting text that llama\.cpp knows matches this tokenizer's"):
        pre_tokenizer_name(backend, "here")


def test_begin_token_is_added_only_where_the_template_starts_with_it(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(template="<|endoftext|>{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer.bos_token = "<|endoftext|>"
    base = make_base(tmp_path / "base", tokenizer=tokenizer)
    assert read_tokenizer(base, len(tokenizer) + 20).add_bos is True
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(base)
    assert read_tokenizer(base, len(tokenizer) + 20).add_bos is False


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "mistral", "gpt2"])
def test_other_architectures_are_refused_by_name_and_with_the_way_out(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", kind)
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    words = rf"architecture {name} cannot.*LlamaForCausalLM, Qwen2ForCausalLM.*LLAMA_CPP_CONVERT=/path"
    with pytest.raises(ExportError, match=words):
        export_gguf(base, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "rope_type=longrope"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"vocab_size": 5000}, "embedding has .* rows, config.json says vocab_size 5000"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* has no place"),
        ({"tie_word_embeddings": False}, "no lm_head.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_writer_does_not_know_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | change
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=words):
        export_gguf(base, tmp_path / "out", "bf16")
    assert not list(tmp_path.glob("out*"))


def rewrite(base: Path, name: str, value: float) -> None:
    weights = load_file(base / "model.safetensors")
    weights[name][0, 0] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    rewrite(base, "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.up_proj.weight holds NaN"):
        export_gguf(base, tmp_path / "out", "q8_0")
    assert not list(tmp_path.glob("out*"))


def test_weight_beyond_float16_is_refused_for_f16_and_kept_for_bf16(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    rewrite(base, "model.layers.1.mlp.up_proj.weight", 1e6)
    with pytest.raises(ExportError, match=r"beyond float16's 65504.*bf16"):
        export_gguf(base, tmp_path / "out", "f16")
    export_gguf(base, tmp_path / "out", "bf16")


def test_altered_merge_is_not_converted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run.merged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ExportError, match=r"model.safetensors: corrupted"):
        export_gguf(run.merged, tmp_path / "out", "bf16")


def test_folder_has_manifest_modelfile_and_record(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    lines = export_run_gguf(run, "BF16", lambda line: None, RunInputs(run.load_recipe()))
    folder = run.path / "gguf" / "bf16"
    assert "greedy answers" in lines[0]
    assert verify_manifest(folder) == len(list(folder.iterdir())) - 1
    record = json.loads((folder / "gguf.json").read_text())
    assert record["proof"]["passed"] is True
    assert record["proof"]["prompts"] == 8
    assert f"FROM ./{record['file']}" in (folder / "Modelfile").read_text()


def test_second_export_keeps_what_is_proven_and_renews_what_is_of_another_merge(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    export_run_gguf(run, "q8_0", lambda line: None, RunInputs(run.load_recipe()))
    assert "is there already" in export_run_gguf(run, "q8_0", lambda line: None, RunInputs(run.load_recipe()))[0]
    from grpo_lite.files.manifest import write_manifest

    (run.merged / "NOTICE").write_text("changed")
    write_manifest(run.merged)
    assert "is there already" not in export_run_gguf(run, "q8_0", lambda line: None, RunInputs(run.load_recipe()))[0]


def test_text_recipe_is_exported_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    examples = [{"prompt": "1+1=", "answer": "2"}]
    set_recipe(run, make_recipe(tmp_path / "base-model", format="text", examples=examples))
    export_run_gguf(run, "bf16", lambda line: None, RunInputs(run.load_recipe()))
    modelfile = (run.path / "gguf" / "bf16" / "Modelfile").read_text()
    assert 'TEMPLATE """1+1=2\n{{ .Prompt }}"""' in modelfile
    assert 'PARAMETER stop "\\n"' in modelfile


def test_file_with_another_models_weights_fails_the_proof(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    other = make_base(tmp_path / "other", num_hidden_layers=1)
    record = export_gguf(other, tmp_path / "out", "bf16")
    proof = prove_gguf(tmp_path / "out" / record.file, "bf16", base, ["2+3=", "What is it?"], max_new_tokens=16)
    assert not proof.passed
    assert "of the next tokens" in proof.faults[0]


def test_llama3_scaling_is_proven_by_transformers_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", rope_parameters=LLAMA3_ROPE | {"factor": 8.0})
    record = export_gguf(base, tmp_path / "out", "bf16")
    prompt = "the sum of the two is thirteen " * 12
    proof = prove_gguf(tmp_path / "out" / record.file, "bf16", base, [prompt], loader="transformers")
    assert proof.faults == ()


def test_failed_proof_is_an_error_and_stays_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr(
        "grpo_lite.export.gguf.tensors.interleave_halves", lambda weight, heads: weight
    )  # the classic fault
    monkeypatch.setattr("grpo_lite.export.gguf.proof.LEAST_AGREEMENT", {"bf16": 1.0})
    with pytest.raises(ExportError, match="is not proven right"):
        export_run_gguf(run, "bf16", lambda line: None, RunInputs(run.load_recipe()))
    assert json.loads((run.path / "gguf" / "bf16" / "gguf.json").read_text())["proof"]["passed"] is False


def test_damaged_file_does_not_load(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    record = export_gguf(base, tmp_path / "out", "bf16")
    path = tmp_path / "out" / record.file
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ExportError, match="does not load it"):
        prove_gguf(path, "bf16", base, ["2+3="], max_new_tokens=4, loader="transformers")


def test_kind_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'q9_9' is given. Allowed: f16, bf16, q8_0, .*q4_k_m"):
        export_gguf(tmp_path, tmp_path / "out", "q9_9")


def test_k_quant_without_llama_quantize_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_QUANTIZE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no llama-cpp-python either
    with pytest.raises(ExportError, match=r"llama-quantize.*LLAMA_QUANTIZE=.*f16, bf16, q8_0"):
        export_gguf(tmp_path, tmp_path / "out", "q4_k_m")


CONVERTER = """
import argparse, os, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
options = argparse.ArgumentParser()
options.add_argument("model")
options.add_argument("--outfile")
options.add_argument("--outtype")
given = options.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == "1"
from gguf import GGUFWriter
writer = GGUFWriter(given.outfile, "gemma2")
writer.add_tokenizer_pre(given.outtype)
import numpy
writer.add_tensor("token_embd.weight", numpy.zeros((2, 2), dtype=numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def test_llama_cpp_s_converter_writes_what_is_not_written_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "gemma2")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(folder=str(tmp_path)))
    monkeypatch.setenv("LLAMA_CPP_CONVERT", str(tmp_path))  # the folder of the script does, too
    record = export_gguf(base, tmp_path / "out", "bf16")
    assert (record.architecture, record.pre_tokenizer, record.tensors) == ("gemma2", "bf16", 1)
    assert record.converted_by == record.quantised_by == "convert_hf_to_gguf.py"
    assert record.stop_tokens
    assert 'PARAMETER stop "' in (tmp_path / "out" / "Modelfile").read_text()
    assert verify_manifest(tmp_path / "out") == len(list((tmp_path / "out").iterdir())) - 1


def test_what_is_written_here_is_not_left_to_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setenv("LLAMA_CPP_CONVERT", str(script))
    base = make_base(tmp_path / "base")
    assert export_gguf(base, tmp_path / "out", "bf16").converted_by == "grpo_lite"
    other = make_base(tmp_path / "other", "gemma2")
    with pytest.raises(ExportError, match=r"convert_hf_to_gguf\.py on .*failed with status 1"):
        export_gguf(other, tmp_path / "second", "bf16")
    assert not (tmp_path / "second").exists()
    monkeypatch.setenv("LLAMA_CPP_CONVERT", str(tmp_path / "nowhere.py"))
    with pytest.raises(ExportError, match="there is no such file"):
        export_gguf(other, tmp_path / "second", "bf16")


def test_a_file_that_nothing_here_can_load_is_not_proven_and_says_what_can(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "qwen35")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match=r"not proven: .* architecture qwen35.*pip install llama-cpp-python"):
        prove_gguf(tmp_path / "model.gguf", "bf16", tmp_path, ["2+3="], loader="transformers")


def test_k_quants_are_made_by_llama_cpp_python_where_there_is_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the library's interface: default parameters, a number for the kind, 0 on success."""
    base = make_base(tmp_path / "base")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_QUANTIZE", raising=False)
    library = types.ModuleType("llama_cpp")
    asked: list[int] = []

    def quantize(source: bytes, target: bytes, params: types.SimpleNamespace) -> int:
        asked.append(params.ftype)
        shutil.copyfile(os.fsdecode(source), os.fsdecode(target))
        return 0

    library.__version__ = "0.3.36"  # type: ignore[attr-defined]
    library.llama_model_quantize_default_params = types.SimpleNamespace  # type: ignore[attr-defined]
    library.llama_model_quantize = quantize  # type: ignore[attr-defined]
    library.__spec__ = importlib.util.spec_from_loader("llama_cpp", loader=None)
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    record = export_gguf(base, tmp_path / "out", "q4_k_m")
    assert asked == [15]  # llama.h: LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert record.quantised_by == "llama-cpp-python 0.3.36"


def tool(folder: Path, script: str) -> str:
    path = folder / "llama-quantize"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_k_quant_calls_llama_quantize_on_a_bf16_file_and_keeps_its_output_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool(tmp_path, f'echo "$3" > {tmp_path}/kind; cp "$1" "$2"')
    record = export_gguf(base, tmp_path / "out", "q4_k_m")
    assert (tmp_path / "kind").read_text() == "Q4_K_M\n"
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == [record.file]
    assert record.quantised_by == "llama-quantize"


@pytest.mark.parametrize("script", ["echo no such type >&2; exit 1", "exit 0", 'echo rubbish > "$2"'])
def test_llama_quantize_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    base = make_base(tmp_path / "base")
    monkeypatch.setenv("LLAMA_QUANTIZE", tool(tmp_path, script))
    with pytest.raises(ExportError, match="failed with status"):
        export_gguf(base, tmp_path / "out", "q4_k_m")
    assert not list(tmp_path.glob("out*"))


@needs_llama_cpp
@pytest.mark.parametrize(
    "split", [None, LLAMA3_SPLIT, LLAMA3_SPLIT.replace("{1,3}", "")], ids=["gpt2", "llama3", "qwen2"]
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_reads_the_model_that_went_in(tmp_path: Path, kind: str, split: str | None) -> None:
    config = {"rope_parameters": LLAMA3_ROPE} if kind == "llama" else {}
    base = make_base(tmp_path / "base", kind, bpe_tokenizer(split), **config)
    record = export_gguf(base, tmp_path / "out", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = ["What is 12345+67?", "  two   spaces\n\n 7  8\n", "it's  I'LL été 你好 \t x"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in asked
    ]
    proof = prove_gguf(tmp_path / "out" / record.file, "bf16", base, prompts, loader="llama_cpp")
    assert proof.faults == ()
    assert proof.tokenised_alike is True


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize(
    "loader",
    [
        pytest.param("transformers", marks=pytest.mark.matrix),  # test_export_weights.py reads a real one back too
        pytest.param("llama_cpp", marks=needs_llama_cpp),
    ],
)
def test_real_model_answers_alike_and_stops(smollm2_dir: Path, tmp_path: Path, loader: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in ("What is 2+3?", "Name a fruit.", "Say yes or no: is snow white?")
    ]
    for kind in ("bf16", "q8_0"):
        record = export_gguf(smollm2_dir, tmp_path / kind, kind)
        proof = prove_gguf(tmp_path / kind / record.file, kind, smollm2_dir, prompts, loader=loader)
        assert proof.faults == ()
        if kind == "bf16":
            assert proof.stopped == proof.stopped_merged > 0
            assert proof.same_answers == 3


def test_a_file_that_ends_less_than_half_of_the_answers_that_the_merged_model_ends_is_not_proven() -> None:
    assert [stop_faults(stopped, 7, 8) != [] for stopped in (0, 1, 3, 4, 7, 8)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert stop_faults(0, 0, 8) == []  # the merged model was cut by the cap each time
