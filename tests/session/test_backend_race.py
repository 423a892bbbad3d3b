"""A race of the two backends: what it measures, and that it leaves nothing behind, however it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import ModelError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.schedule import round_steps
from grpo_lite.session import backend as backend_race
from grpo_lite.session.backend import _CHILD, _output, describe, race, verdict

HF = {"step_s": 40.0, "token_s": 0.2, "peak_memory_bytes": 5 << 30}
FAILED = {"fault": "error: model.backend: unsloth is given, but …"}
SLOW = {"fault": "it took more than 300 s", "slow": True}


def faster(times: float) -> dict[str, Any]:
    return {**HF, "token_s": HF["token_s"] / times}


@pytest.mark.parametrize(
    ("ours", "other", "chosen", "why"),
    [
        (HF, faster(2.0), "unsloth", "0.50 of hf's time"),
        (HF, faster(1.3), "unsloth", "no exact resume"),
        (HF, faster(1.2), "hf", "1.20x as fast; 1.25x would outweigh"),
        (HF, faster(0.5), "hf", "0.50x"),
        (HF, FAILED, "hf", "unsloth did not run"),
        (FAILED, HF, "unsloth", "hf did not run"),
        (FAILED, FAILED, "hf", "nor did hf"),
        (SLOW, HF, "hf", "not done in time"),
        (HF, SLOW, "hf", "unsloth did not run"),
    ],
)
def test_the_verdict_of_a_race(ours: dict[str, Any], other: dict[str, Any], chosen: str, why: str) -> None:
    found, reason = verdict(ours, other)
    assert found == chosen
    assert why in reason


def test_a_race_is_told_in_one_line_a_backend() -> None:
    assert describe(HF) == "40 s a step, 200 ms a token, peak 5.00 GiB"
    assert "peak" in describe({**HF, "peak_memory_bytes": None})
    assert "GiB" not in describe({**HF, "peak_memory_bytes": None})
    assert describe(FAILED).startswith("did not run: error: model.backend")


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 1),
        (["grpo.gradient_accumulation_steps=4"], 1),
        (["grpo.num_iterations=3"], 3),
        (["grpo.steps_per_generation=4"], 4),
        (["grpo.steps_per_generation=4", "grpo.num_iterations=2", "grpo.gradient_accumulation_steps=2"], 4),
    ],
)
def test_a_round_that_is_trained_on_in_several_steps_counts_whole(overrides: list[str], steps: int) -> None:
    """Its first step generates, the others do not: steps two to four of one round would say nothing of sampling."""
    shape = ["grpo.num_generations=4", "grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=1"]
    assert round_steps(load_recipe("smoke", [*shape, *overrides])) == steps


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, float]]], dict[str, Any]]:
    """Let each backend log these steps instead of training."""

    def run(steps: list[dict[str, float]], *overrides: str) -> dict[str, Any]:
        import json

        def output(command: list[str], limit_s: float) -> str:
            folder = Path(command[command.index("--run") + 1])
            folder.mkdir()
            (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
            return "error: out of memory\n[W123] a library's farewell\n"

        monkeypatch.setattr(backend_race, "_output", output)
        return race(load_recipe("smoke", overrides), lambda line: None)["hf"]

    return run


def test_time_for_a_token_is_that_of_whole_rounds(trained: Any) -> None:
    first, later = {"step_time": 9.0, "completions/mean_length": 10.0}, {"step_time": 1.0}
    again = {"step_time": 3.0, "completions/mean_length": 8.0}
    # the first round is left out, and so is the third, of which one step is missing: (3 + 1) / 8
    assert trained([first, later, again, later, again], "grpo.num_iterations=2")["token_s"] == 0.5
    assert trained([first, again, again])["token_s"] == 3 / 8


def test_what_did_not_run_is_told_by_its_error(trained: Any) -> None:
    assert trained([])["fault"] == "error: out of memory"
    assert trained([{"step_time": 9.0, "completions/mean_length": 10.0}])["fault"] == "error: out of memory"


def test_code_that_comes_with_a_model_does_not_run_in_a_race_unless_confirmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GRPO_LITE_TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setattr(backend_race, "_output", pytest.fail)
    with pytest.raises(ModelError, match="confirm with --trust-remote-code"):
        race(load_recipe("smoke", ["model.trust_remote_code=true"]), pytest.fail)


def test_a_base_that_cannot_be_had_is_told_before_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_race, "_output", pytest.fail)
    with pytest.raises(ModelError, match="there is no such folder"):
        race(load_recipe("smoke", ["model.id=/no/such/folder"]), pytest.fail)


def test_a_full_disk_is_an_outcome_of_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(backend_race.tempfile, "TemporaryDirectory", full)
    found = race(load_recipe("smoke"), lambda line: None)
    assert found["hf"] == found["unsloth"] == {"fault": "No space left on device: /tmp/x"}


def test_what_a_backend_says_need_not_be_utf_8() -> None:
    said = "import sys; sys.stdout.buffer.write(b'caf\\xe9'); sys.stderr.write(' and more')"
    assert "caf" in _output([sys.executable, "-c", said], 60)


# A process with one of its own, whose numbers it writes down.
FAMILY = """
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {other.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""
RACER = """
import os, sys
from grpo_lite.session.backend import _CHILD, _output, _stopped_by_signals
child = _CHILD.partition("from grpo_lite.cli")[0] + sys.argv[2]
with _stopped_by_signals():
    _output([sys.executable, "-c", child, str(os.getpid()), sys.argv[1]], 60)
"""


def numbers(file: Path) -> list[int]:
    until = time.monotonic() + 60
    while not file.is_file() and time.monotonic() < until:
        time.sleep(0.02)
    return [int(number) for number in file.read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(processes: list[int]) -> bool:
    until = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, processes))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_race_that_is_stopped_leaves_no_process_behind(tmp_path: Path, sent: signal.Signals) -> None:
    file = tmp_path / "numbers"
    racer = subprocess.Popen([sys.executable, "-c", RACER, str(file), FAMILY], stderr=subprocess.DEVNULL)
    family = numbers(file)
    assert all(map(alive, family))
    racer.send_signal(sent)
    racer.wait(20)
    try:
        # nobody can clear up after SIGKILL: the backend's process is ended by the kernel, its own see that it is gone
        assert gone(family[:1] if sent == signal.SIGKILL else family)
    finally:
        for process in family:
            if alive(process):
                os.kill(process, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_backend_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    with pytest.raises(subprocess.TimeoutExpired):
        _output([sys.executable, "-c", FAMILY, str(file)], 2.0)
    assert gone(numbers(file))


def test_a_backend_s_process_does_not_outlive_one_that_was_gone_before_it_began() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD, "1", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.slow
def test_a_real_race_where_only_ours_can_run() -> None:
    """Two real processes; the second says why it cannot train here, and nothing is left of either."""
    lines: list[str] = []
    recipe = load_recipe("smoke", ["eval.every=2", "limits.max_minutes=1"])
    found = race(recipe, lines.append, steps=3)
    assert found["chosen"] == "hf"
    assert found["hf"]["step_s"] > 0
    assert found["hf"]["peak_memory_bytes"] > 1 << 20
    assert "model.backend: unsloth is given, but" in found["unsloth"]["fault"]
    assert "s a step" in lines[0]
    assert "  unsloth: did not run: error: model.backend" in lines[1]


@pytest.mark.slow
def test_a_race_that_takes_too_long_is_ended() -> None:
    found = race(load_recipe("smoke"), lambda line: None, limit_s=1.0)
    assert found["hf"] == {"fault": "it took more than 1 s", "slow": True}
    assert found["chosen"] == "hf"
