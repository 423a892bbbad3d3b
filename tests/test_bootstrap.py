"""`make setup`: which torch is asked for, and that one already there is kept."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parent.parent / "grpo_lite" / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_needs_the_standard_library_only() -> None:
    import ast

    names = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(PATH.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names <= set(sys.stdlib_module_names)


def test_without_a_driver_only_cpu_builds_are_asked_for(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(bootstrap.platform, "system", lambda: "Linux")
    for command in bootstrap.torch_commands():
        assert any(part.endswith(("+cpu", "/cpu")) for part in command)


def test_with_a_driver_the_range_of_pyproject_is_asked_for(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: True)
    ((requirement,),) = bootstrap.torch_commands()
    assert f'"{requirement}"' in (PATH.parent.parent / "pyproject.toml").read_text()


def test_a_torch_that_is_there_is_pinned_and_shared(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, ...]] = []
    made: list[bool] = []
    monkeypatch.setattr(bootstrap, "installed_torch", lambda: "2.9.1+cu128")
    monkeypatch.setattr(bootstrap, "pip", lambda target, *arguments: calls.append(arguments) or True)
    monkeypatch.setattr(
        bootstrap, "make_environment", lambda target, share_packages: (target.mkdir(), made.append(share_packages))
    )
    assert bootstrap.main(["bootstrap.py", str(tmp_path / "env"), "dev"]) == 0
    assert made == [True]
    assert (tmp_path / "env" / "torch-constraint.txt").read_text() == "torch==2.9.1+cu128\n"
    assert not any(part.startswith("torch") for call in calls for part in call)
    assert calls[0][0] == "-c"
    assert calls[-1][:3] == ("--no-deps", "--upgrade", "--target")  # Unsloth's source, for the contract tests


@pytest.mark.parametrize(
    ("driver", "works", "asked"),
    [(False, True, [""]), (True, True, ["[unsloth]"]), (True, False, ["[unsloth]", ""])],
    ids=["no driver", "a driver", "a driver, but it cannot be installed"],
)
def test_unsloth_is_installed_where_there_is_a_driver(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    driver: bool,
    works: bool,
    asked: list[str],
) -> None:
    calls: list[str] = []

    def pip(target: Path, *arguments: str) -> bool:
        calls.append(arguments[-1])
        return works or not arguments[-1].endswith("[unsloth]")

    monkeypatch.setattr(bootstrap, "pip", pip)
    monkeypatch.setattr(bootstrap, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(bootstrap, "installed_torch", lambda: "2.13.0")
    monkeypatch.setattr(bootstrap, "make_environment", lambda target, share_packages: target.mkdir())
    assert bootstrap.main(["bootstrap.py", str(tmp_path / "env"), "unsloth?"]) == 0
    root = str(PATH.parent.parent)
    assert calls == [*[root + extra for extra in asked], bootstrap.EMBEDDED]
    assert ("unsloth cannot be installed here" in capsys.readouterr().out) == (not works)


@pytest.mark.parametrize(("backend", "extras"), [("", ["unsloth?"]), ("BACKEND=hf", []), ("BACKEND=unsloth", [])])
def test_make_setup_asks_for_it_unless_told_not_to(tmp_path: Path, backend: str, extras: list[str]) -> None:
    command = ["make", "-n", "setup", f"VENV={tmp_path / 'env'}", *filter(None, [backend])]
    lines = subprocess.run(command, cwd=PATH.parent.parent, capture_output=True, text=True, check=True).stdout
    first = next(line for line in lines.splitlines() if "bootstrap.py" in line)
    assert shlex.split(first.partition("&&")[0])[3:] == extras
    assert ("bootstrap.py" in lines.replace(first, "")) == (backend == "BACKEND=unsloth")


def test_a_backend_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    command = ["make", "-n", "setup", f"VENV={tmp_path / 'env'}", "BACKEND=unslot"]
    done = subprocess.run(command, cwd=PATH.parent.parent, capture_output=True, text=True)
    assert done.returncode != 0
    assert "BACKEND=unslot: give auto, hf or unsloth" in done.stderr


def test_a_failed_install_is_a_failed_setup(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "installed_torch", lambda: None)
    monkeypatch.setattr(bootstrap, "make_environment", lambda target, share_packages: target.mkdir())
    monkeypatch.setattr(bootstrap, "install_torch", lambda target: False)
    assert bootstrap.main(["bootstrap.py", str(tmp_path / "env")]) == 1


def test_the_environment_has_a_python_that_sees_shared_packages(bootstrap: ModuleType, tmp_path: Path) -> None:
    bootstrap.make_environment(tmp_path / "env", share_packages=True)
    assert (tmp_path / "env" / "bin" / "python").exists()
    assert "include-system-site-packages = true" in (tmp_path / "env" / "pyvenv.cfg").read_text()
