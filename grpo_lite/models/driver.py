"""Driver: why torch does not use the GPU that this machine has, and what to type.

A driver older than the installed torch wants, or a CPU build of torch, leaves `torch.cuda.is_available()` False, and a
run would go to the CPU without a word. `usable_device` refuses that where a run meets the device (`train_run`), unless
the recipe is meant for a CPU; `machine_notes` tells it to the doctor. The facts about drivers and builds are those that
`make setup` chooses by (`bootstrap`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from grpo_lite.bootstrap import (
    OLDEST_DRIVER,
    ROCM,
    TORCH_RANGE,
    Build,
    Driver,
    fitting_build,
    has_rocm,
    nvidia_driver,
)
from grpo_lite.errors import ModelError, first_line
from grpo_lite.models.device import Device, detect_device
from grpo_lite.recipe.recipe import Recipe

CONTROL_DEVICE = Path("/dev/nvidiactl")  # what a container without a GPU lacks
ON_THE_CPU = "put CUDA_VISIBLE_DEVICES=-1 before the command"


def usable_device(recipe: Recipe, show: Callable[[str], None]) -> Device:
    """Return the device that a recipe runs on.

    Args:
        recipe: the recipe; its `least_gpu` begins with "none" if it is meant for a CPU.
        show: gets a line where the run goes on the CPU although there is a GPU.

    Raises:
        ModelError: torch cannot use this machine's GPU, and the recipe is meant for one. A GPU that
            CUDA_VISIBLE_DEVICES hides does not count.
    """
    device = detect_device()
    if device.kind == "cuda":
        if fault := _missing_kernels(device):
            raise ModelError(f"device: {fault}\nTo train on the CPU instead, {ON_THE_CPU}.")
        return device
    fault = _unused_nvidia_gpu()
    if fault and not recipe.least_gpu.lower().startswith("none"):
        raise ModelError(
            f"device: {fault}\n{recipe.name} is meant for a GPU ({recipe.least_gpu}). To train it on the CPU "
            f"anyway, {ON_THE_CPU}."
        )
    if note := fault or _unused_amd_gpu():
        show(f"device: {note}\n{recipe.name} trains on the CPU instead.")
    return device


def machine_notes(device: Device) -> list[str]:
    """Return what is wrong with how torch and this machine's GPU fit together; empty if nothing is."""
    notes = [_missing_kernels(device)] if device.kind == "cuda" else [_unused_nvidia_gpu() or _unused_amd_gpu()]
    return [note for note in notes if note]


def has_kernels(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether a torch with kernels for these architectures runs on a card.

    Machine code (`sm_86`) runs on cards of the same major version and the same or a higher minor version, with the
    suffix `a` only on exactly that one. The driver compiles PTX (`compute_90`) for every newer card.
    Source: NVIDIA, CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".

    Args:
        architectures: from `torch.cuda.get_arch_list()`.
        capability: the card's.
    """
    for name in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name):
            built, suffix = (int(match[2]), int(match[3])), match[4]
            same_major = built[0] == capability[0]
            if built == capability:
                return True
            if built < capability and suffix != "a" and (same_major or (match[1] == "compute" and not suffix)):
                return True
    return False


def _missing_kernels(device: Device) -> str | None:
    """Return why torch cannot run on the card: without kernels for it a run would end in a CUDA error. None: it can."""
    import torch

    architectures = [name for name in torch.cuda.get_arch_list() if name.startswith(("sm_", "compute_"))]
    capability = device.compute_capability
    if capability is None or not architectures or has_kernels(architectures, capability):
        return None
    driver = nvidia_driver() or Driver()
    return (
        f"{device.name} has compute capability {capability[0]}.{capability[1]}, but torch {torch.__version__} has "
        f"kernels only for {', '.join(architectures)}. "
        + _advice("Install a build that has kernels for it", driver, capability)
    )


def _unused_nvidia_gpu() -> str | None:
    """Return why torch sees no GPU although there is an NVIDIA driver; None where the user hides the GPU."""
    driver = None if _hidden() else nvidia_driver()
    if driver is None:
        return None
    import torch

    name = f"the NVIDIA driver {driver.version}" if driver.version else "an NVIDIA driver"
    cards = f" ({', '.join(driver.cards)})" if driver.cards else ""
    newest = max(driver.capabilities, default=None)
    if driver.version and not driver.cards and not CONTROL_DEVICE.exists():
        return f"{name} is loaded, but there is no GPU in this container. Start the container with `--gpus all`."
    if torch.version.cuda is None:
        kind = "ROCm" if torch.version.hip else "CPU"
        return f"torch {torch.__version__} is a {kind} build, but this machine has {name}{cards}. " + _advice(
            "Install the CUDA build for it", driver, newest
        )
    needed = OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]))
    if needed and driver.major and driver.major < needed:
        return (
            f"{name} is too old for torch {torch.__version__}, so torch does not see the GPU{cards}: CUDA "
            f"{torch.version.cuda} needs driver {needed} or newer. "
            + _advice("Update the driver, or install the build for this one", driver, newest)
        )
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not see the GPU{cards}, although this machine has "
        f"{name}. torch's reason: {_reason()}\nAfter a driver update, restart the machine. Start a container with "
        "`--gpus all`."
    )


def _hidden() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides every GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (not visible.strip() or visible.strip().startswith("-"))


def _unused_amd_gpu() -> str | None:
    import torch

    if torch.version.hip or not has_rocm():
        return None
    return (
        f"ROCm is installed here, but torch {torch.__version__} is not a ROCm build, so an AMD GPU is not used. "
        f"grpo_lite is not tested on an AMD GPU. To try it:\n  {_pip(ROCM)}"
    )


def _advice(lead: str, driver: Driver, capability: tuple[int, int] | None) -> str:
    """Return what to type for a driver and a card, after words that lead to it."""
    build = fitting_build(driver.major, capability)
    if build is None:
        return (
            f"No build of {TORCH_RANGE} fits both the driver and the card. Driver {OLDEST_DRIVER[13]} or newer fits "
            "every card of compute capability 7.5 or higher."
        )
    return f"{lead}:\n  {_pip(build)}"


def _pip(build: Build) -> str:
    """Return the command that installs a build, in the version that is installed where that has one."""
    import torch

    public = str(torch.__version__).partition("+")[0]
    exact = re.fullmatch(r"(\d+)\.(\d+)\.\d+", public)  # not a nightly
    published = exact and build.torch[0] <= (int(exact[1]), int(exact[2])) <= build.torch[1]
    requirement = f"torch=={public}+{build.tag}" if published else build.requirement
    beside = " torchvision" if _installed("torchvision") else ""  # must be of the same build
    pip = f"{sys.executable} -m pip"
    if not _installed("pip"):  # an environment made where ensurepip is missing
        pip = f"python3 -m pip --python {sys.executable}"
    return f'{pip} install --upgrade "{requirement}"{beside} --index-url {build.index}'


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _reason() -> str:
    """Return torch's own reason for not seeing a GPU."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "none is given."
