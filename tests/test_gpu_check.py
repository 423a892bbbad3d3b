"""bench/gpu_check.sh tried without a GPU: on a CPU at a tiny size, and its CUDA branches on the simulated device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu_check import Check, Part, run_part, run_parts

ON_A_MADE_UP_GPU = """
from tests.fake_cuda import device, scenarios
import torch
from dataclasses import replace
from bench import decode, gpu_check

def counted(run):
    device.launches.clear(), device.waits.clear()
    run()
    return sum(device.launches.values()), sum(device.waits.values())

def policy(settings):  # nothing can be built on that device
    with device.off():
        model = build(replace(settings, device="cpu"))
    device.move(model)
    return model

class Tiny(decode.Settings):
    def __init__(self, **settings):
        super().__init__(**(dict(shape="tiny", rows=8, group=4, prompt=12, completion=16, turns=1) | settings))

build, decode.policy, decode.launches_and_waits, decode.Settings = decode.policy, policy, counted, Tiny
gpu_check.attention_kernels = lambda run: {}
device.install((8, 6))
scenarios._load_models_there()
raise SystemExit(gpu_check.main())
"""


def script(root: Path, tmp_path: Path, parts: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(root),
        "GPU_CHECK_DEVICE": "cpu",
        "PARTS": parts,
        "OUT": str(tmp_path / "out"),
        "RUNS": str(tmp_path / "runs"),
        "SECONDS_LEFT": "900",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    command = ["bash", str(root / "bench" / "gpu_check.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)


def recorded(tmp_path: Path) -> dict[str, Any]:
    """Return what the parts left; more than 8 files or a folder there would not all come back from a lent machine."""
    paths = list((tmp_path / "out").iterdir())
    assert {path.name for path in paths} == {"gpu_check.json", "gpu_check.log"}
    assert sum(path.stat().st_size for path in paths) < 1 << 20
    record: dict[str, Any] = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    return record["parts"]


@pytest.mark.slow
def test_the_first_round(root: Path, tmp_path: Path) -> None:
    """Every part of it, on a CPU at a tiny size; the memory is a pretended one."""
    first, _ = gpu_check.parts("cpu")
    done = script(root, tmp_path, " ".join(first))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = recorded(tmp_path)
    assert {name: entry["state"] for name, entry in record.items()} == dict.fromkeys(first, "ok")
    assert "out of memory in rollout at step 1" in record["oom"]["result"]["lines"][0]
    assert record["smoke-bfloat16"]["result"]["merged_onto"] == "trained"
    variants = record["decode-bfloat16"]["result"]["variants"]
    assert variants["loop"]["tokens_per_s"] > 0
    assert variants["static"]["launches_per_step"] < variants["loop"]["launches_per_step"]
    assert "skipped" in variants["graph"]
    turns = record["turns"]["result"]
    assert len(turns) > 1
    assert all(turn["read"][0] < turn["read"][1] for turn in turns[1:]), "a later turn reads only what is new"
    assert len(record["planner"]["result"]) == 2 * 2 * 2  # 4-bit and 16-bit, two lengths, two phases
    assert all(row["found_gib"] > 0 for row in record["planner"]["result"])
    assert len(set(record["microsteps"]["result"]["tokens"])) > 1, "each turn has fresh lengths"


@pytest.mark.slow
@pytest.mark.matrix
def test_the_second_round(root: Path, tmp_path: Path) -> None:
    done = script(root, tmp_path, "sums trl peers unsloth")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = recorded(tmp_path)
    assert record["sums"]["result"]["median_step_s"] > 0
    norms = record["trl"]["result"]["grad_norm"]
    assert norms["plain"] == pytest.approx(norms["grpo_lite"], rel=0.1)
    assert set(record["peers"]["result"]["variants"]) == {"graph", "batching", "vllm"}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, and the simulated device needs it")
def test_the_branches_for_cuda(root: Path, tmp_path: Path) -> None:
    """What the script asserts of a GPU holds on the simulated one: packed compute, static rows and graphs on."""
    names = ["smoke-float16", "smoke-bfloat16", "decode-bfloat16", "turns", "microsteps"]
    command = [sys.executable, "-W", "ignore", "-c", ON_A_MADE_UP_GPU, "--out", str(tmp_path / "out")]
    command += ["--runs", str(tmp_path / "runs"), "--seconds", "590", "--parts", *names]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]
    assert record["smoke-float16"]["result"]["graphs"] > 0
    variants = record["decode-bfloat16"]["result"]["variants"]
    assert variants["graph"]["launches_per_step"] == 1
    assert variants["graph"]["waits_per_token"] == 0.12  # one look in 8 tokens
    assert variants["static"]["launches_per_step"] < 0.6 * variants["loop"]["launches_per_step"]
    assert variants["loop"]["waits_per_token"] > 1


@pytest.mark.slow
def test_a_part_that_kills_its_process_is_named_and_the_next_one_runs(root: Path, tmp_path: Path) -> None:
    """One ends the process, the next hangs and does not hear its alarm, as a hanging kernel would not."""
    code = (
        "import os, signal, sys, time; from bench import gpu_check\n"
        "def hang(check, part):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM}); time.sleep(60)\n"
        "gpu_check.GRACE_S = 1\n"
        "parts = {'dies': gpu_check.Part(30, lambda check, part: os._exit(9)), 'hangs': gpu_check.Part(1, hang),\n"
        "         'works': gpu_check.Part(30, lambda check, part: 'fine')}\n"
        "gpu_check.parts = lambda device: (parts, {})\n"
        "gpu_check.Check.is_tiny = False\n"
        "sys.exit(gpu_check.main())\n"
    )
    command = [sys.executable, "-c", code, "--out", str(tmp_path), "--runs", str(tmp_path), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    codes = [subprocess.run([*command, "--resume"], env=environment, cwd=root).returncode for _ in range(3)]
    assert codes == [9, 1, 3]
    record = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert {name: entry["state"] for name, entry in record.items()} == {
        "dies": "failed",
        "hangs": "failed",
        "works": "ok",
    }


def check_in(tmp_path: Path) -> Check:
    return Check("cpu", tmp_path, tmp_path, {"begun": time.time(), "parts": {}})


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    def fail(check: Check, part: str) -> None:
        check.note(part, "half of it")
        raise AssertionError("packed compute is off")

    check = check_in(tmp_path)
    run_parts(check, {"one": Part(60, fail), "two": Part(60, lambda check, part: part)}, seconds=600)
    written = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert written["one"]["state"] == "failed"
    assert written["one"]["error"] == "AssertionError: packed compute is off"
    assert written["one"]["result"] == "half of it"
    assert written["two"]["result"] == "two"


def test_a_part_ends_at_its_time_limit(tmp_path: Path) -> None:
    def slow(check: Check, part: str) -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as a library would swallow it
                continue

    check = check_in(tmp_path)
    assert not run_part(check, "slow", Part(1, slow), limit_s=0.2)
    assert check.record["parts"]["slow"]["error"] == "TimeLimit: it took longer than 0 s"
    assert check.record["parts"]["slow"]["seconds"] < 10


def test_a_part_that_would_begin_too_late_is_left_out(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    check.record["begun"] -= 590
    run_parts(check, {"late": Part(60, lambda check, part: part)}, seconds=600)
    assert check.record["parts"]["late"]["state"] == "left out"


def test_a_missing_package_is_named_before_anything_runs(root: Path, tmp_path: Path) -> None:
    """What a lent machine lacks is seen in its first second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'gguf' else real(name, *rest)\n",
        encoding="utf-8",
    )
    done = script(root, tmp_path, "sums", PYTHONPATH=f"{tmp_path}:{root}")
    assert done.returncode == 1
    assert done.stderr == "missing here: gguf\n"
    assert done.stdout == ""
