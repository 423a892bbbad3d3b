"""The lock of a run directory: who holds it is named, and nobody holds it for a process that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lite.errors import RunDirError
from grpo_lite.runs.run_dir import RunDir
from tests.command_line import ROOT, in_process
from tests.run_files import write_run

HOLD = "from grpo_lite.runs.run_dir import RunDir; import os, sys, time\nwith RunDir(sys.argv[1]).locked():\n"


def holding(folder: Path, body: str) -> subprocess.Popen[str]:
    """Start a process that holds a folder's lock; it says `held` once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + body, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("held")
    return process


def test_the_second_is_told_which_process_holds_it_and_a_kill_frees_it(tmp_path: Path) -> None:
    process = holding(tmp_path, "    print('held', flush=True); time.sleep(60)")
    with pytest.raises(RunDirError, match=rf"in it \(process {process.pid} on "), RunDir(tmp_path).locked():
        pass
    assert RunDir(tmp_path).in_use()
    process.kill()
    process.communicate()
    assert RunDir(tmp_path).in_use() is False
    with RunDir(tmp_path).locked():
        pass


def test_workers_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    """A reward's pool of forked processes is not killed with the run, and inherits every open file."""
    body = "    if os.fork(): time.sleep(60)\n    print('held', flush=True); time.sleep(60)"  # the worker says it runs
    process = holding(tmp_path, body)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        with RunDir(tmp_path).locked():
            assert Path(f"/proc/{children[0]}").exists(), "the worker is gone, so this shows nothing"
    finally:
        os.kill(int(children[0]), signal.SIGKILL)
        process.communicate()


def test_a_fork_in_between_leaves_the_lock_with_the_parent(tmp_path: Path) -> None:
    with RunDir(tmp_path).locked():
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert RunDir(tmp_path).in_use()


@pytest.mark.parametrize("written", [b"", b"\xff\xfe", b"not a number", b"9" * 5000], ids=repr)
def test_what_stands_in_the_lock_s_file_may_be_anything(tmp_path: Path, written: bytes) -> None:
    with RunDir(tmp_path).locked():
        (tmp_path / ".lock").write_bytes(written)
        with pytest.raises(RunDirError, match="another process is working in it"), RunDir(tmp_path).locked():
            pass  # a second descriptor of one process is refused as another process's is


@pytest.mark.parametrize("command", [["train"], ["eval"], ["merge"], ["merge", "--overwrite"], ["export"],
                                     ["export", "--nf4"], ["push", "me/x", "--dry-run"]], ids=" ".join)  # fmt: skip
def test_whatever_writes_in_a_run_waits_for_the_one_that_trains_it(tmp_path: Path, command: list[str]) -> None:
    run = write_run(tmp_path / "run")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    before = sorted(path.name for path in run.path.iterdir())
    recipe = ["smoke", "--run"] if command == ["train"] else []
    with run.locked():
        text = in_process(command[0], *recipe, str(run.path), *command[1:], expect=1)
    assert f"another process is working in it (process {os.getpid()} on " in text
    assert sorted(path.name for path in run.path.iterdir()) == sorted([*before, ".lock"])


@pytest.mark.slow
def test_whatever_only_reads_a_run_does_not_wait(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with run.locked():
        assert "step 12/12" in in_process("watch", str(run.path), "--plain")
        assert "report.html" in in_process("report", str(run.path))
        in_process("doctor", str(run.path))


def test_a_path_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"b'r\\xfcn': cannot be written in UTF-8"):
        RunDir(os.fsdecode(b"r\xfcn"))
