"""The run of `sums`, a few steps of it, exported to every form that the command line offers; each proves itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.command_line import grpo_lite

pytestmark = [pytest.mark.weights, pytest.mark.slow]

K_QUANTS = ["q4_k_m"] if os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize") else []
KINDS = ["f16", "q8_0", *K_QUANTS]


@pytest.fixture(scope="module")
def run(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe `sums` as it is, but 3 steps and 32 held-out prompts, trained by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "sums"
    short = ["grpo.max_steps=3", "eval.limit=32", "eval.samples=0"]
    grpo_lite("train", "sums", "--run", str(folder), *short)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> tuple[Path, str]:
    for kind in KINDS:
        grpo_lite("export", str(run), "--gguf", kind)
    return run, grpo_lite("export", str(run), "--nf4")


def test_the_merge_is_verified_and_scored(run: Path) -> None:
    merge = json.loads((run / "run.json").read_text())["merge"]
    assert merge["passed"]
    assert merge["held_out"]
    assert merge["update_carried"] == pytest.approx(1, abs=0.1)
    assert json.loads((run / "metrics.json").read_text())["merged"]["lenient"]["n"] == 32


@pytest.mark.parametrize("kind", KINDS)
def test_each_gguf_is_proven_against_the_merged_model(exported: tuple[Path, str], kind: str) -> None:
    folder = exported[0] / "gguf" / kind
    record = json.loads((folder / "gguf.json").read_text())
    proof = record["proof"]
    assert proof["passed"], proof["faults"]
    assert proof["prompts"] == 8
    assert record["stop_tokens"] == ["<|im_end|>"]
    if kind == "f16":
        assert proof["decided_agreement"] == 1
        assert proof["stopped"] == proof["stopped_merged"]
    modelfile = (folder / "Modelfile").read_text()
    assert f"FROM ./sums-{kind}.gguf" in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "9+8=17" in modelfile  # the recipe's examples come before the question
    assert "files intact" in grpo_lite("verify", str(folder))


def test_the_four_bit_folder_tells_its_loss_and_its_score(exported: tuple[Path, str]) -> None:
    run, text = exported
    record = json.loads((run / "run.json").read_text())["nf4"]
    assert record["size_bytes"] < 0.45 * record["merged_bytes"]
    assert 0 < record["agreement"]["mean_kl"] < 2
    assert json.loads((run / "metrics.json").read_text())["merged_nf4"]["lenient"]["n"] == 32
    assert "held-out score in 4 bits" in text
    assert "files intact" in grpo_lite("verify", str(run / "merged-nf4"))


@pytest.mark.parametrize("what", ["adapter", "merged", "gguf"])
def test_dry_run_of_a_push_shows_an_honest_card(exported: tuple[Path, str], what: str) -> None:
    run = exported[0]
    text = grpo_lite("push", str(run), "me/sums", "--what", what, "--dry-run")
    header = yaml.safe_load(text.partition("\n---\n")[2].partition("\n---\n")[0])
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header["base_model_relation"] == ("adapter" if what == "adapter" else "finetune")
    assert header["license"] == "apache-2.0"
    scores = json.loads((run / "metrics.json").read_text())
    own = {"adapter": scores["lenient"]["trained"], "merged": scores["merged"]["lenient"], "gguf": None}[what]
    if own is None:  # made from the merged model, and not scored itself
        assert "model-index" not in header
    else:
        values = [metric["value"] for metric in header["model-index"][0]["results"][0]["metrics"]]
        assert values[0] == round(own["rate"], 4)
    assert "32 held-out prompts" in text
    assert "| peak memory |" in text
    assert "## Not measured" in text
    assert str(Path.home()) not in text
    assert str(run) not in text.replace(f"RUN={run}", "")


def test_a_question_is_answered_by_base_and_trained_model(run: Path) -> None:
    text = grpo_lite("chat", str(run), "7+5=", "--compare")
    assert "base" in text
    assert "trained" in text
