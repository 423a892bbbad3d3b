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
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bootstrap_under_test", module)  # dataclasses look their module up
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


# Which build of torch
T4_535 = "535.183.01, Tesla T4, 7.5"
PROC = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.144.03  Release Build  (root@x)\nGCC version:  12\n"
)


@pytest.fixture
def machine(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this a Linux machine without any GPU software; returns the one folder on its PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(bootstrap.platform, "system", lambda: "Linux")
    monkeypatch.setattr(bootstrap, "NVIDIA_PROC", tmp_path / "version")
    monkeypatch.setattr(bootstrap, "NVIDIA_SMI", ("nvidia-smi", str(tmp_path / "wsl" / "nvidia-smi")))
    monkeypatch.setattr(bootstrap, "ROCM_FOLDER", tmp_path / "rocm")
    monkeypatch.setattr(bootstrap, "_libcuda_answers", lambda: False)
    return tools


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def nvidia_smi(folder: Path, *lines: str) -> None:
    executable(folder / "nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))


def test_without_a_driver_only_cpu_builds_are_asked_for(bootstrap: ModuleType, machine: Path) -> None:
    assert bootstrap.nvidia_driver() is None
    for command in bootstrap.torch_source(None).commands:
        assert any(part.endswith(("+cpu", "/cpu")) for part in command)


def test_with_a_new_driver_the_range_of_pyproject_is_asked_for(bootstrap: ModuleType, machine: Path) -> None:
    nvidia_smi(machine, "580.95.05, NVIDIA GeForce RTX 4090, 8.9")
    source = bootstrap.torch_source(bootstrap.nvidia_driver())
    ((requirement,),) = source.commands
    assert f'"{requirement}"' in (PATH.parent.parent / "pyproject.toml").read_text()
    assert source.cuda
    assert source.index is None


@pytest.mark.parametrize(
    ("lines", "requirement", "tag"),
    [
        ([T4_535], "torch>=2.6,<2.15", "cu126"),
        (["525.60.13, NVIDIA A100-SXM4-40GB, 8.0"], "torch>=2.6,<2.15", "cu126"),
        (["570.86.15, NVIDIA GeForce RTX 3060, 8.6"], "torch>=2.6,<2.15", "cu126"),
        (["570.86.15, NVIDIA GeForce RTX 5090, 12.0"], "torch>=2.7,<2.12", "cu128"),
        (["580.95.05, Tesla P100-PCIE-16GB, 6.0"], "torch>=2.6,<2.15", "cu126"),
        (["580.95.05, Tesla V100-SXM2-16GB, 7.0"], "torch>=2.6,<2.15", "cu126"),
    ],
    ids=["T4, 535", "A100, 525", "Ampere, 570", "Blackwell, 570", "Pascal, 580", "Volta, 580"],
)
def test_the_cuda_build_fits_the_driver_and_the_card(
    bootstrap: ModuleType, machine: Path, lines: list[str], requirement: str, tag: str
) -> None:
    nvidia_smi(machine, *lines)
    source = bootstrap.torch_source(bootstrap.nvidia_driver())
    index = f"https://download.pytorch.org/whl/{tag}"
    assert source.commands == ((requirement, "--index-url", index),)
    assert source.index == index  # torchvision must be of the same build
    assert source.cuda
    assert source.why == f"{tag}, which fits the NVIDIA driver {lines[0].split(',')[0]}"


def test_two_cards_get_the_build_of_the_newer_one(bootstrap: ModuleType, machine: Path) -> None:
    nvidia_smi(machine, "580.95.05, Tesla P40, 6.1", "580.95.05, NVIDIA GeForce RTX 4090, 8.9")
    assert bootstrap.torch_source(bootstrap.nvidia_driver()).commands == (("torch>=2.6,<2.15",),)


def test_a_driver_too_old_for_every_build_gets_the_cpu_build_and_a_reason(bootstrap: ModuleType, machine: Path) -> None:
    nvidia_smi(machine, "470.256.02, Tesla K80, 3.7")
    source = bootstrap.torch_source(bootstrap.nvidia_driver())
    assert source.commands[0][-1].endswith("+cpu")
    assert source.why.startswith("no CUDA build fits the NVIDIA driver 470.256.02 with Tesla K80, so the CPU build")
    assert not source.cuda


def test_a_driver_that_does_not_know_compute_cap_is_asked_without_it(bootstrap: ModuleType, machine: Path) -> None:
    executable(machine / "nvidia-smi", 'case "$1" in *compute_cap*) exit 2;; esac; echo "470.82.01, Tesla T4"')
    assert bootstrap.nvidia_driver() == bootstrap.Driver("470.82.01", ("Tesla T4",), ())


def test_the_kernel_module_tells_the_version_where_nvidia_smi_does_not(bootstrap: ModuleType, machine: Path) -> None:
    executable(machine / "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (machine.parent / "version").write_text(PROC)
    assert bootstrap.nvidia_driver() == bootstrap.Driver("550.144.03")
    assert bootstrap.torch_source(bootstrap.nvidia_driver()).index.endswith("/cu126")


def test_a_driver_seen_only_through_libcuda_gets_a_cuda_build(
    bootstrap: ModuleType, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "_libcuda_answers", lambda: True)
    assert bootstrap.nvidia_driver() == bootstrap.Driver("")
    assert bootstrap.torch_source(bootstrap.nvidia_driver()).cuda


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'"], ids=["no driver", "no card"])
def test_an_nvidia_smi_without_a_card_is_no_driver(bootstrap: ModuleType, machine: Path, script: str) -> None:
    executable(machine / "nvidia-smi", script)
    assert bootstrap.nvidia_driver() is None


def test_wsl_keeps_its_nvidia_smi_off_the_path(bootstrap: ModuleType, machine: Path) -> None:
    nvidia_smi(machine.parent / "wsl", T4_535)
    assert bootstrap.nvidia_driver() == bootstrap.Driver("535.183.01", ("Tesla T4",), ((7, 5),))


@pytest.mark.parametrize("sign", ["rocminfo", "/opt/rocm"])
def test_rocm_gets_the_rocm_build_not_the_cpu_one(bootstrap: ModuleType, machine: Path, sign: str) -> None:
    if sign == "rocminfo":
        executable(machine / "rocminfo", "true")
    else:
        (machine.parent / "rocm").mkdir()
    source = bootstrap.torch_source(bootstrap.nvidia_driver())
    assert source.commands == (("torch>=2.12,<2.14", "--index-url", "https://download.pytorch.org/whl/rocm7.2"),)
    assert "not tested on an AMD GPU" in source.why
    assert not source.cuda


def test_rocm_beside_an_nvidia_driver_changes_nothing(bootstrap: ModuleType, machine: Path) -> None:
    executable(machine / "rocminfo", "true")
    nvidia_smi(machine, T4_535)
    assert bootstrap.torch_source(bootstrap.nvidia_driver()).index.endswith("/cu126")


def test_every_build_lies_in_the_range_of_pyproject(bootstrap: ModuleType) -> None:
    assert f'"{bootstrap.TORCH_RANGE}"' in (PATH.parent.parent / "pyproject.toml").read_text()
    for build in (*bootstrap.BUILDS, bootstrap.ROCM):
        assert (2, 6) <= build.torch[0] < build.torch[1] <= (2, 14)
        assert build.cuda in (*bootstrap.OLDEST_DRIVER, 0)


def test_setup_says_which_torch_and_takes_the_rest_from_the_same_index(
    bootstrap: ModuleType,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[str, ...]] = []
    nvidia_smi(machine, T4_535)
    (tmp_path / "env").mkdir()
    monkeypatch.setattr(bootstrap, "installed_torch", lambda: None)
    monkeypatch.setattr(bootstrap, "install", lambda target, *arguments: calls.append(arguments) or True)
    executable(tmp_path / "env" / "bin" / "python", "exit 1")  # a fresh environment has no torch
    assert bootstrap.main(["bootstrap.py", str(tmp_path / "env"), "unsloth?"]) == 0
    index = "https://download.pytorch.org/whl/cu126"
    assert calls[0] == ("torch>=2.6,<2.15", "--index-url", index)
    assert calls[1][2:4] == ("--extra-index-url", index)
    assert calls[1][-1].endswith("[unsloth]")
    assert "torch: cu126, which fits the NVIDIA driver 535.183.01" in capsys.readouterr().out


# The rest of set-up
def test_a_torch_that_is_there_is_pinned_and_shared(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, ...]] = []
    made: list[bool] = []
    monkeypatch.setattr(bootstrap, "nvidia_driver", lambda: bootstrap.Driver("535.183.01"))
    monkeypatch.setattr(bootstrap, "installed_torch", lambda: "2.9.1+cu128")
    monkeypatch.setattr(bootstrap, "install", lambda target, *arguments: calls.append(arguments) or True)
    monkeypatch.setattr(
        bootstrap, "make_environment", lambda target, share_packages: (target.mkdir(), made.append(share_packages))
    )
    monkeypatch.setattr(bootstrap, "compile_packages", lambda target: None)
    assert bootstrap.main(["bootstrap.py", str(tmp_path / "env"), "dev"]) == 0
    assert made == [True]
    assert (tmp_path / "env" / "torch-constraint.txt").read_text() == "torch==2.9.1+cu128\n"
    assert not any(part.startswith(("torch", "--extra-index-url")) for call in calls for part in call)
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

    def install(target: Path, *arguments: str) -> bool:
        calls.append(arguments[-1])
        return works or not arguments[-1].endswith("[unsloth]")

    monkeypatch.setattr(bootstrap, "install", install)
    monkeypatch.setattr(bootstrap, "nvidia_driver", lambda: bootstrap.Driver("580.95.05") if driver else None)
    monkeypatch.setattr(bootstrap, "installed_torch", lambda: "2.13.0")
    monkeypatch.setattr(bootstrap, "make_environment", lambda target, share_packages: target.mkdir())
    monkeypatch.setattr(bootstrap, "compile_packages", lambda target: None)
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
    monkeypatch.setattr(bootstrap, "install_torch", lambda target, source: False)
    assert bootstrap.main(["bootstrap.py", str(tmp_path / "env")]) == 1


@pytest.mark.parametrize(
    ("uv", "shared", "expected"),
    [
        ("exit 0", False, ["uv"]),
        ("exit 1", False, ["uv", "pip"]),  # a mirror that only pip.conf names
        ("exit 0", True, ["pip"]),  # uv does not see shared packages
        (None, False, ["pip", "own uv"]),  # pip gets one
        (None, True, ["pip"]),
    ],
    ids=["uv", "uv fails", "shared packages", "no uv", "no uv, shared packages"],
)
def test_uv_installs_where_it_is_there_and_pip_otherwise(
    bootstrap: ModuleType, machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    uv: str | None, shared: bool, expected: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setenv("PIP_CONSTRAINT", "/oldest.txt")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example.org/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example.org/simple")
    log = tmp_path / "log"
    if uv:
        executable(machine / "uv", f'echo "uv $UV_FIND_LINKS $UV_DEFAULT_INDEX $*" >> {log}; {uv}')
    target = tmp_path / "env"
    target.mkdir()
    own = f'printf "#!/bin/sh\\necho own uv >> {log}\\n" > {target}/bin/uv; /bin/chmod +x {target}/bin/uv'
    executable(
        target / "bin" / "python", f'case "$*" in *uv) {own};; esac; case "$*" in *install*) echo pip >> {log};; esac'
    )
    (target / "pyvenv.cfg").write_text(f"include-system-site-packages = {str(shared).lower()}\n")
    assert bootstrap.install(target, "--index-url", "https://index.example.org/cpu", "-e", ".")
    lines = log.read_text().splitlines()
    assert [line.partition(" /")[0] for line in lines] == expected
    if expected[0] == "uv":
        python = target / "bin" / "python"
        assert lines[0].startswith(f"uv /wheels,/more https://own.example.org/simple pip install --python {python} ")
        assert " -c /oldest.txt " in lines[0]
        assert lines[0].endswith(" --default-index https://index.example.org/cpu -e .")


@pytest.mark.parametrize(
    ("listed", "own"),
    [
        ("global.index-url='https://mirror.example.org/simple'", True),
        ("install.no-index='true'", True),
        ("global.find-links='/wheels'\n:env:.index-url='https://mirror.example.org/simple'", False),  # passed on
        ("", False),
    ],
)
def test_an_index_that_only_pip_conf_names_is_left_to_pip(
    bootstrap: ModuleType, tmp_path: Path, listed: str, own: bool
) -> None:
    executable(tmp_path / "bin" / "python", f'case "$*" in *config*) cat <<"END"\n{listed}\nEND\n;; esac')
    assert bootstrap.has_own_index(tmp_path) == own


def test_what_pip_downloads_is_shown_and_a_failure_is_told(
    bootstrap: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = """Collecting torch==2.13.0
  Downloading https://example.org/torch-2.13.0-cp311-cp311-linux_x86_64.whl (187.3 MB)
Collecting packaging
  Using cached packaging-26.0-py3-none-any.whl (74 kB)
  Using cached numpy-2.4.1-cp311-cp311-manylinux_2_27_x86_64.whl.metadata (6.6 kB)
  Downloading nvidia_cublas-13.1-py3-none-manylinux.whl (1.2 GB)
Installing collected packages: packaging, torch
Successfully installed packaging-26.0 torch-2.13.0"""
    script = f"case \"$1$2$3\" in -mpipinstall) cat <<'END'\n{printed}\nEND\necho broken >&2; exit 3;; esac"
    executable(tmp_path / "bin" / "python", script)
    assert not bootstrap.pip(tmp_path, "torch==2.13.0")
    shown = capfd.readouterr()
    assert shown.out.splitlines() == [
        "pip install torch==2.13.0", "  torch, 187.3 MB", "  nvidia_cublas, 1.2 GB", "  installing 2 packages",
    ]  # fmt: skip
    assert shown.err == "broken\n"


def test_what_was_installed_is_compiled_and_what_is_no_python_does_no_harm(
    bootstrap: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "good.py").write_text("x = 1\n")
    (packages / "template.py").write_text("x = {{ no_python }\n")
    executable(tmp_path / "bin" / "python", f'exec {sys.executable} "$@"')
    bootstrap.compile_packages(tmp_path)
    assert [path.name.partition(".")[0] for path in (packages / "__pycache__").iterdir()] == ["good"]
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_environment_has_a_python_that_sees_shared_packages(bootstrap: ModuleType, tmp_path: Path) -> None:
    bootstrap.make_environment(tmp_path / "env", share_packages=True)
    assert (tmp_path / "env" / "bin" / "python").exists()
    assert "include-system-site-packages = true" in (tmp_path / "env" / "pyvenv.cfg").read_text()
