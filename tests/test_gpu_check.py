"""bench/gpu_check.sh tried without a GPU: every part's own code runs once, at a tiny size, before a GPU is lent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = "tiny/random-llama"
SMALL = [
    f"model.id={TINY}",
    "grpo.max_steps=2",
    "grpo.per_device_train_batch_size=8",
    "grpo.num_generations=4",
    "grpo.gradient_accumulation_steps=1",
    "grpo.generation_batch_size=null",
    "grpo.steps_per_generation=null",
    "check.enabled=false",
    "eval.limit=4",
    "eval.samples=2",
    "log.preflight=true",
]


def script(root: Path, tmp_path: Path, parts: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(root),
        "GPU_CHECK_DEVICE": "cpu",
        "PARTS": parts,
        "OUT": str(tmp_path / "out"),
        "RUNS": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    command = ["bash", str(root / "bench" / "gpu_check.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)


def returned(tmp_path: Path) -> set[str]:
    """Return what lies under OUT; more than 8 files or a folder there would not all come back from a lent machine."""
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.parent == tmp_path / "out" for path in found)
    assert len(found) <= 8
    assert sum(path.stat().st_size for path in found) < 1 << 20
    return {path.name for path in found}


@pytest.mark.slow
def test_quickstart_and_a_run_without_memory(root: Path, tmp_path: Path) -> None:
    arguments = " ".join([*SMALL, "grpo.max_completion_length=64"])
    done = script(root, tmp_path, "quickstart oom", ARGS=arguments, OOM_GIB="0.6")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count('"median_step_s"') == 2
    assert "out of memory in rollout at step 1" in done.stdout
    assert "all parts ended well" in done.stdout
    assert returned(tmp_path) == {"quickstart-bfloat16.log", "quickstart-float32.log", "oom.log"}


@pytest.mark.slow
def test_the_planner_s_measurement_and_the_comparison_with_trl(root: Path, tmp_path: Path) -> None:
    done = script(root, tmp_path, "planner trl", MODELS="tiny", TRL_MODEL=TINY, SHAPES="quickstart", REPEATS="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert returned(tmp_path) == {"planner.log", "planner.json", "trl.log", "compare_trl.json"}
    records = json.loads((tmp_path / "out" / "planner.json").read_text())
    assert len(records) == 2 * 2 * 2  # 4-bit and 16-bit, two lengths, two phases
    assert all(record["found_gib"] > 0 for record in records)
    result = json.loads((tmp_path / "out" / "compare_trl.json").read_text())["results"][0]
    assert result["grad_norm"]["plain"] == pytest.approx(result["grad_norm"]["grpo_lite"], rel=0.1)


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_the_next_one_begins(root: Path, tmp_path: Path) -> None:
    done = script(root, tmp_path, "quickstart planner", MODELS="nothing", ARGS="no.such=key")
    assert done.returncode == 1
    assert "FAILED: quickstart-bfloat16 quickstart-float32 planner" in done.stdout
    assert "== planner took" in done.stdout


def test_a_missing_package_is_named_before_anything_runs(root: Path, tmp_path: Path) -> None:
    """What a lent machine lacks is seen in its first second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'gguf' else real(name, *rest)\n",
        encoding="utf-8",
    )
    done = script(root, tmp_path, "quickstart", PYTHONPATH=f"{tmp_path}:{root}")
    assert done.returncode == 1
    assert done.stderr == "missing here: gguf\n"
    assert done.stdout == ""
