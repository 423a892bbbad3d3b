"""The CUDA path without a card: each scenario of `tests/fake_cuda` in a process of its own (a fork)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = (
    "train_fp16",
    "graphs_draw_what_the_steps_would",
    "decoding",
    "decoding_at_28_layers",
    "decoding_of_convolutions",
    "turns_read_only_what_is_new",
    "new_tokens_of_all_rows_are_read_at_once",
    "episodes_on_a_card",
    "decoding_of_delta_nets_and_mamba",
    "a_step_that_a_graph_cannot_hold",
    "memory_runs_out_while_a_graph_is_captured",
    "one_attention_call_a_layer",
    "train_bf16_qwen3_with_kl",
    "train_16bit_llama_two_iterations",
    "train_with_refill_and_offload",
    "train_plain_compute",
    "resume_is_exact",
    "a_training_step",
    "memory_runs_out",
    "planted_faults",
    "whole_smoke_fp16",
    "whole_smoke_bf16",
    "warm_up_fp16",
    "warm_up_bf16",
    "warm_up_resumed",
    "memory_runs_out_in_the_warm_up",
    "notebook_order",
)
# Minutes, or of a card whose other dtype is among the usual ones: only `make test-all` runs them.
LONGEST = ("decoding_at_28_layers", "decoding_of_delta_nets_and_mamba", "whole_smoke_bf16", "warm_up_bf16")
USUAL = [name for name in SCENARIOS if name not in LONGEST]
BATCHES = [USUAL[i::4] for i in range(4)]  # one import of torch for several


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, and the simulated device needs it")
@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param(batch, id=f"{batch[0]} and others") for batch in BATCHES),
        pytest.param(list(LONGEST), id="the longest", marks=pytest.mark.matrix),
    ],
)
def test_scenarios(names: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.scenarios", *names]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1700)
    failed = [name for name in names if f"ok {name}" not in result.stdout]
    assert (result.returncode, failed) == (0, []), result.stdout[-3000:] + result.stderr[-5000:]


def test_every_scenario_is_run() -> None:
    text = (ROOT / "tests" / "fake_cuda" / "scenarios.py").read_text(encoding="utf-8")
    written = [part.split("(")[0] for part in text.split("@scenario\ndef ")[1:]]
    assert sorted(written) == sorted(SCENARIOS)
