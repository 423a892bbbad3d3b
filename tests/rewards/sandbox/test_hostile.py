"""No hostile program earns a point, touches the machine or sees a secret: under each stack of layers, root or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rewards import sandbox
from tests.conftest import ROOT, SHARED
from tests.rewards.sandbox.sandbox_world import (
    SECRET,
    Case,
    new_world,
    own_cases,
    play,
    problems_of,
    problems_of_world,
    shared_cases,
)

_SHARED_FILE = SHARED / "cases" / "sandbox_hostile.jsonl"
_CASES = own_cases() + (shared_cases(_SHARED_FILE) if _SHARED_FILE.exists() else [])
_STACKS = {
    "all": "",
    "landlock-seccomp": "namespaces,bubblewrap",
    "bubblewrap": "namespaces",
    "only-namespaces": "landlock,seccomp,bubblewrap",
}
_SLOW = {"bubblewrap", "only-namespaces"}
# These programs report calls that seccomp alone forbids; inside namespaces they are harmless.
_NEED_SECCOMP = {
    "raw_packet_and_netlink", "new_namespaces", "execute_from_memory", "trace_others", "memory_of_others",
    "settings_of_the_machine", "files_by_handle", "scheduling_of_others",
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in _STACKS],
)
def played(request: pytest.FixtureRequest) -> tuple[str, dict[str, sandbox.Outcome], list[str]]:
    """Every program's outcome under one stack of layers, and what happened to the world meanwhile."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sandbox.WITHOUT, _STACKS[name])
        patch.setenv("SECRET_TOKEN", SECRET)
        isolation = sandbox.isolation()
        if isolation.weak or (name == "bubblewrap" and name not in isolation.layers):
            pytest.skip(f"not possible here: {[layer for layer in sandbox.layers() if not layer.available]}")
        with new_world() as world:
            outcomes = play(_CASES, world)
            harm = problems_of_world(world)
        sandbox.close_all()
    return name, outcomes, harm


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_hostile_program_scores_as_expected_and_sees_no_secret(
    played: tuple[str, dict[str, sandbox.Outcome], list[str]], case: Case
) -> None:
    name, outcomes, _ = played
    if name == "only-namespaces" and case.name in _NEED_SECCOMP:
        pytest.skip("tells seccomp's refusals, and seccomp is left out")
    assert problems_of(case, outcomes[case.name]) == []


def test_machine_is_unharmed_by_all_of_them(played: tuple[str, dict[str, sandbox.Outcome], list[str]]) -> None:
    assert played[2] == []


def test_no_process_and_no_file_of_theirs_is_left(played: tuple[str, dict[str, sandbox.Outcome], list[str]]) -> None:
    assert _own_leftovers() == []


def _directories() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("grpo-lite-sandbox-")}


_BEFORE = _directories()  # of runs killed earlier


def _own_leftovers() -> list[str]:
    """Return processes and directories of this process's sandboxes, which are all closed."""
    left = [name for name in _directories() - _BEFORE if not os.path.exists(f"/proc/{name.split('-')[3]}")]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and b"rewards.sandbox." in command:
            left.append(f"process {pid}")
    return left


@pytest.mark.skipif(os.getuid() != 0, reason="already unprivileged: the tests above were as nobody")
@pytest.mark.parametrize(
    "without",
    [
        pytest.param("namespaces,bubblewrap", id="landlock-seccomp"),
        pytest.param("", id="all", marks=pytest.mark.slow),
        pytest.param("namespaces", id="bubblewrap", marks=pytest.mark.slow),
    ],
)
def test_an_unprivileged_user_is_as_safe(without: str, tmp_path: Path) -> None:
    found = _play_as_nobody(without)
    assert found["uid"] == 65534
    assert "uid" not in found["layers"]  # no root to drop
    assert found["problems"] == []


def _play_as_nobody(without: str) -> dict[str, object]:
    """Play all programs as user nobody, with the interpreter and the code shown where nobody can read them."""
    tools = [shutil.which("unshare"), shutil.which("setpriv")]
    if None in tools:
        pytest.skip("needs unshare and setpriv (util-linux)")
    base = tempfile.mkdtemp(prefix="nobody-")
    os.chmod(base, 0o755)
    shown = {"python": Path(sys.base_prefix), "repository": ROOT}
    if _SHARED_FILE.exists():
        shown["shared"] = SHARED
    binds = " && ".join(f"mount --bind '{path}' {base}/{name}" for name, path in shown.items())
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    cases = f"{base}/shared/cases/sandbox_hostile.jsonl" if "shared" in shown else ""
    paths = f"PYTHONPATH={base}/repository"
    command = (
        f"mount --make-rprivate / && {binds} && cd / && exec setpriv --reuid=65534 --regid=65534 --clear-groups "
        f"env -i PATH=/usr/bin:/bin {paths} {sandbox.WITHOUT}={without} "
        f"{base}/python/bin/{version} -B {base}/repository/tests/rewards/sandbox/sandbox_world.py {cases}"
    )
    try:
        for name in shown:
            os.mkdir(f"{base}/{name}")
        run = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, timeout=300)
        if "mount:" in run.stderr or "unshare:" in run.stderr:
            pytest.skip(f"this root may not mount: {run.stderr.strip()[-200:]}")
        assert run.returncode == 0, run.stderr[-2000:]
        found: dict[str, object] = json.loads(run.stdout)
        return found
    finally:
        for name in shown:
            os.rmdir(f"{base}/{name}")
        os.rmdir(base)
