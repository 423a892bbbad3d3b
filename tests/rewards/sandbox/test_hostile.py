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
# These programs report calls that seccomp alone forbids; inside namespaces they are harmless.
_NEED_SECCOMP = {
    "raw_packet_and_netlink", "new_namespaces", "execute_from_memory", "trace_others", "memory_of_others",
    "settings_of_the_machine", "files_by_handle", "scheduling_of_others",
}  # fmt: skip


@pytest.mark.parametrize(
    "stack",
    [
        "all",
        pytest.param("landlock-seccomp", marks=pytest.mark.slow),
        pytest.param("bubblewrap", marks=pytest.mark.slow),
        pytest.param("only-namespaces", marks=pytest.mark.slow),
    ],
)
def test_no_hostile_program_earns_a_point_harms_the_machine_or_leaves_anything(stack: str) -> None:
    """Under one stack of layers: every score, every canary, every process and directory, all reported at once."""
    assert _problems(stack, _CASES) == []


def test_a_sample_of_them_is_as_harmless_where_a_container_allows_no_namespaces() -> None:
    sample = [case for case in _CASES if not case.hangs][::5]
    assert len(sample) > 20
    assert _problems("landlock-seccomp", sample) == []


def _problems(stack: str, cases: list[Case]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sandbox.WITHOUT, _STACKS[stack])
        patch.setenv("SECRET_TOKEN", SECRET)
        isolation = sandbox.isolation()
        if isolation.weak or (stack == "bubblewrap" and stack not in isolation.layers):
            pytest.skip(f"not possible here: {[layer for layer in sandbox.layers() if not layer.available]}")
        with new_world() as world:
            outcomes = play(cases, world)
            harm = problems_of_world(world)
        sandbox.close_all()
    if stack == "only-namespaces":
        cases = [case for case in cases if case.name not in _NEED_SECCOMP]
    return [problem for case in cases for problem in problems_of(case, outcomes[case.name])] + harm + _own_leftovers()


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
        pytest.param("namespaces,bubblewrap", id="landlock-seccomp", marks=pytest.mark.slow),
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
