"""The judge process: bounded, killable, and the same from threads, forks, daemons and scripts without a main guard."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import accuracy_reward, judge
from rewards.judge import client

ROOT = Path(__file__).resolve().parents[2]
SURD = ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}")  # needs computer algebra
HANGING, HANGING_GOLD = "\\boxed{\\prod_{n=2}^{10^{8}} n}", "\\prod_{n=1}^{10^{8}} n"


def surd() -> list[float | None]:
    return accuracy_reward([SURD[0], "\\boxed{\\sqrt{13}}"], [SURD[1]] * 2)


def judge_pid() -> int:
    assert client._judge.process is not None
    return client._judge.process.pid


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=120
    )


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_verdicts_are_the_same_in_a_thread() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(surd) for _ in range(8)]] == [[1.0, 0.0]] * 8


def test_a_time_limit_holds_in_a_thread() -> None:
    results: list[list[float | None]] = []
    thread = threading.Thread(
        target=lambda: results.append(accuracy_reward([HANGING, SURD[0]], [HANGING_GOLD, SURD[1]], timeout_s=0.2))
    )
    thread.start()
    thread.join(60)
    assert results == [[0.0, 1.0]]


def _send_surd(connection: object) -> None:
    connection.send((surd(), judge_pid()))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_daemonic_worker_gets_a_judge_of_its_own(method: str) -> None:
    assert surd() == [1.0, 0.0]
    mine = judge_pid()
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_send_surd, args=(sender,), daemon=True)
    worker.start()
    assert receiver.poll(100)
    scores, theirs = receiver.recv()
    worker.join(30)
    assert scores == [1.0, 0.0]
    assert theirs != mine
    assert surd() == [1.0, 0.0]
    assert judge_pid() == mine


def test_a_script_without_a_main_guard_works_and_leaves_no_process() -> None:
    done = run_script("""
        from rewards import accuracy_reward
        from rewards.judge import client
        print(accuracy_reward([r"\\boxed{\\sqrt{12}}"], [r"2\\sqrt{3}"]))
        print(client._judge.process.pid)
    """)
    assert done.stderr == ""
    scores, pid = done.stdout.splitlines()
    assert scores == "[1.0]"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@linux
def test_the_judge_ends_when_its_caller_is_killed() -> None:
    done = run_script("""
        import os, signal
        from rewards import accuracy_reward
        from rewards.judge import client
        accuracy_reward([r"\\boxed{\\sqrt{12}}"], [r"2\\sqrt{3}"])
        print(client._judge.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    pid = int(done.stdout)
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        threading.Event().wait(0.05)
    else:
        pytest.fail("the judge is still running")


def test_a_killed_judge_is_replaced() -> None:
    assert surd() == [1.0, 0.0]
    first = judge_pid()
    os.killpg(first, signal.SIGKILL)
    assert surd() == [1.0, 0.0]
    assert judge_pid() != first


def test_a_judge_that_cannot_start_is_an_error_and_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    judge.stop_judge()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(judge.JudgeError, match="does not start"):
        surd()
    monkeypatch.undo()
    assert surd() == [1.0, 0.0]


def test_the_judge_sees_no_environment_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    judge.stop_judge()
    monkeypatch.setenv("SOME_SECRET", "secret")
    assert surd() == [1.0, 0.0]
    environment = Path(f"/proc/{judge_pid()}/environ")
    if not environment.exists():
        pytest.skip("reads /proc")
    assert b"secret" not in environment.read_bytes()


@linux
def test_many_batches_and_time_outs_leak_no_descriptor_and_no_process() -> None:
    accuracy_reward([HANGING] * 2, [HANGING_GOLD] * 2, timeout_s=0.05)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        accuracy_reward([HANGING, SURD[0]], [HANGING_GOLD, SURD[1]], timeout_s=0.05)
    assert len(os.listdir("/proc/self/fd")) == before
    server = judge_pid()
    assert len(children_of(server)) <= 4
    assert [pid for pid in children_of(os.getpid()) if pid == server] == [server]


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(judge.JudgeError, match="no such task; the tasks are math, math_verify, reasoning_gym"):
        judge.ask("physics", [["1", "1"]], 1.0)
    assert surd() == [1.0, 0.0]


def test_no_items_ask_nobody() -> None:
    judge.stop_judge()
    assert judge.ask("math", [], 1.0) == []
    assert client._judge.process is None


def test_an_interrupted_batch_does_not_mix_its_answers_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert surd() == [1.0, 0.0]
    read_line = client._judge.read_line

    def interrupted(deadline: float) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(client._judge, "read_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        surd()
    monkeypatch.setattr(client._judge, "read_line", read_line)
    assert accuracy_reward(["\\boxed{\\sqrt{13}}", SURD[0]], [SURD[1]] * 2) == [0.0, 1.0]


def test_memory_hungry_answers_are_bounded() -> None:
    """A million-digit power is refused; a matrix of powers that would fill the memory fails alone."""
    big = "\\boxed{\\begin{pmatrix}" + "&".join(["x^{99999}+3^{99999}"] * 9) + "\\end{pmatrix}}"
    assert accuracy_reward([big, SURD[0]], ["x", SURD[1]], timeout_s=1.0) == [0.0, 1.0]
