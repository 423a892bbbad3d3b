"""The bounds in pyproject.toml are what is tested: constraints/ holds both ends, the workflow runs them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
ENDS = ("newest", "oldest")


def bounds() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {Requirement(line).name: Requirement(line) for line in project["dependencies"]}


def pins(end: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints" / f"{end}.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement for requirement in requirements}


def pinned(requirement: Requirement) -> Version | None:
    return next((Version(part.version) for part in requirement.specifier if part.operator == "=="), None)


@pytest.mark.parametrize("end", ENDS)
def test_what_is_tested_lies_within_the_bounds(end: str) -> None:
    for name, requirement in pins(end).items():
        version = pinned(requirement)
        assert version is None or version in bounds()[name].specifier, f"{name} {version}"


def test_an_environment_for_one_end_holds_its_versions() -> None:
    end = Path(os.environ.get("PIP_CONSTRAINT", "")).stem
    if end not in ENDS:
        pytest.skip("not run by make test-newest or make test-oldest")
    for name, requirement in pins(end).items():
        assert importlib.metadata.version(name) in requirement.specifier, name


def test_a_bound_ends_at_the_newest_version_tested() -> None:
    """The next major version is refused, and the next minor one where the bound names minor versions."""
    for name, requirement in pins("newest").items():
        tested = pinned(requirement)
        assert tested is not None, name
        above = next(Version(part.version) for part in bounds()[name].specifier if part.operator == "<")
        wanted = (tested.major, tested.minor + 1) if len(above.release) > 1 else (tested.major + 1,)
        assert above.release == wanted, name


def test_decisions_names_the_newest_versions_tested() -> None:
    table = (ROOT / "DECISIONS.md").read_text().partition("## 2026-11-22 · Dependencies")[2].partition("\n## ")[0]
    for name in ("transformers", "datasets", "huggingface_hub", "trl"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        assert str(pinned(pins("newest")[name])) in row, row


def test_the_workflow_is_valid() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, the workflow linter, is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_runs_the_readme_and_targets_that_exist() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    ran = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"make train", "make test", "make lint"} <= {*ran}
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for line in ran for target in re.findall(r"^make ([a-z-]+)", line)}
    targets |= {*jobs["bounds"]["strategy"]["matrix"]["target"]}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert jobs["readme"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
