"""A GPU that torch does not use: what a user reads, and when a run is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from grpo_lite import bootstrap, cli
from grpo_lite.cli import set_environment
from grpo_lite.errors import ModelError
from grpo_lite.models import driver
from grpo_lite.models.device import Device, detect_device
from grpo_lite.models.driver import has_kernels, machine_notes, usable_device
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from tests.command_line import in_process

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
P100 = Device("cuda", "Tesla P100-PCIE-16GB", 16 << 30, bfloat16=False, compute_capability=(6, 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this a Linux machine without any GPU software; returns the first folder on its PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(bootstrap, "NVIDIA_SMI", ("nvidia-smi",))
    monkeypatch.setattr(bootstrap, "NVIDIA_PROC", tmp_path / "version")
    monkeypatch.setattr(bootstrap, "ROCM_FOLDER", tmp_path / "rocm")
    monkeypatch.setattr(bootstrap, "_libcuda_answers", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "_installed", lambda name: name == "pip")  # no torchvision
    return tools


def nvidia_smi(folder: Path, line: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\n")
    (folder / "nvidia-smi").chmod(0o755)


def with_torch(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.version, "cuda", cuda)


def recipe(name: str) -> Recipe:
    return load_recipe(name)


def pip(arguments: str) -> str:
    return f"\n  {sys.executable} -m pip install --upgrade {arguments}"


def test_a_driver_too_old_for_torch_is_refused_with_the_command_that_helps(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    with pytest.raises(ModelError) as refusal:
        usable_device(recipe("gsm8k"), print)
    assert str(refusal.value) == (
        "device: the NVIDIA driver 535.183.01 is too old for torch 2.13.0+cu130, so torch does not see the GPU "
        "(Tesla T4): CUDA 13.0 needs driver 580 or newer. Update the driver, or install the build for this one:"
        + pip('"torch==2.13.0+cu126" --index-url https://download.pytorch.org/whl/cu126')
        + "\ngsm8k is meant for a GPU (8 GB; recommended: T4 16 GB). To train it on the CPU anyway, put "
        "CUDA_VISIBLE_DEVICES=-1 before the command."
    )


def test_a_recipe_for_a_cpu_trains_there_and_says_why(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    assert usable_device(recipe("quickstart"), print).kind == "cpu"
    shown = capsys.readouterr().out
    assert shown.startswith("device: the NVIDIA driver 535.183.01 is too old for torch 2.13.0+cu130")
    assert shown.endswith("whl/cu126\nquickstart trains on the CPU instead.\n")


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_a_gpu_that_the_user_hides_is_no_reason_to_refuse(
    machine: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert usable_device(recipe("gsm8k"), pytest.fail).kind == "cpu"
    assert machine_notes(detect_device()) == []


def test_a_machine_without_any_gpu_trains_everything_on_its_cpu(machine: Path) -> None:
    assert usable_device(recipe("gsm8k"), pytest.fail).kind == "cpu"
    assert machine_notes(detect_device()) == []


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("570.86.15, NVIDIA GeForce RTX 3060, 8.6", "torch==2.13.0+cu126"),
        ("580.95.05, NVIDIA GeForce RTX 3060, 8.6", "torch==2.13.0+cu130"),
        ("570.86.15, NVIDIA GeForce RTX 5090, 12.0", "torch>=2.7,<2.12"),  # no 2.13 has a build that fits
    ],
    ids=["570", "580", "Blackwell, 570"],
)
def test_a_cpu_build_beside_a_driver_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch, line: str, command: str
) -> None:
    nvidia_smi(machine, line)
    with_torch(monkeypatch, "2.13.0+cpu", None)
    version, card, _ = line.split(", ")
    start = f"device: torch 2.13.0+cpu is a CPU build, but this machine has the NVIDIA driver {version} ({card}). "
    with pytest.raises(ModelError, match="meant for a GPU") as refusal:
        usable_device(recipe("gsm8k"), print)
    assert str(refusal.value).startswith(start + "Install the CUDA build for it:" + pip(f'"{command}"'))


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (
            ["pip", "torchvision"],
            f'{sys.executable} -m pip install --upgrade "torch==2.13.0+cu126" torchvision --index-url',
        ),
        ([], f'python3 -m pip --python {sys.executable} install --upgrade "torch==2.13.0+cu126" --index-url'),
    ],
    ids=["torchvision, which must be of the same build", "an environment without pip"],
)
def test_the_command_fits_the_environment(
    machine: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str], command: str
) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    monkeypatch.setattr(driver, "_installed", lambda name: name in installed)
    assert f"\n  {command}" in machine_notes(detect_device())[0]


def test_a_nightly_is_replaced_by_a_release(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.14.0.dev20260801+cu132", "13.2")
    assert '"torch>=2.6,<2.15" --index-url https://download.pytorch.org/whl/cu126' in machine_notes(detect_device())[0]


def test_a_driver_too_old_for_every_build_has_to_be_updated(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(machine, "470.256.02, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu126", "12.6")
    (note,) = machine_notes(detect_device())
    assert (
        "CUDA 12.6 needs driver 525 or newer. No build of torch>=2.6,<2.15 fits both the driver and the card." in note
    )


def test_a_new_driver_that_torch_does_not_see_gets_torchs_own_reason(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available\nmore")

    nvidia_smi(machine, "580.95.05, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ModelError, match="gsm8k is meant for a GPU") as refusal:
        usable_device(recipe("gsm8k"), print)
    assert "does not see the GPU (Tesla T4), although this machine has the NVIDIA driver 580.95.05" in str(
        refusal.value
    )
    assert "torch's reason: No CUDA GPUs are available\nAfter a driver update" in str(refusal.value)


@pytest.mark.parametrize("given", [False, True], ids=["no GPU", "a GPU, but no nvidia-smi"])
def test_a_container_without_a_gpu_is_named_as_the_reason(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: bool
) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    monkeypatch.setattr(driver, "CONTROL_DEVICE", tmp_path / "nvidiactl")
    if given:
        (tmp_path / "nvidiactl").touch()
    with_torch(monkeypatch, "2.13.0+cpu", None)
    (note,) = machine_notes(detect_device())
    assert ("there is no GPU in this container. Start the container with `--gpus all`." in note) != given
    assert ("this machine has the NVIDIA driver 535.183.01. Install the CUDA build" in note) == given


def test_rocm_beside_a_cpu_build_is_a_note_not_a_refusal(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine / "rocminfo").write_text("#!/bin/sh\n")
    (machine / "rocminfo").chmod(0o755)
    with_torch(monkeypatch, "2.13.0+cpu", None)
    assert usable_device(recipe("gsm8k"), print).kind == "cpu"
    shown = capsys.readouterr().out
    assert "grpo_lite is not tested on an AMD GPU" in shown
    assert '"torch==2.13.0+rocm7.2" --index-url https://download.pytorch.org/whl/rocm7.2' in shown


@pytest.mark.parametrize("name", ["gsm8k", "quickstart"])
def test_a_card_below_what_torch_was_built_for_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    nvidia_smi(machine, "580.95.05, Tesla P100-PCIE-16GB, 6.0")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    monkeypatch.setattr(driver, "detect_device", lambda: P100)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    with pytest.raises(ModelError) as refusal:
        usable_device(recipe(name), print)
    assert str(refusal.value) == (
        "device: Tesla P100-PCIE-16GB has compute capability 6.0, but torch 2.13.0+cu130 has kernels only for sm_75, "
        "sm_80, sm_86, sm_90, sm_100, sm_120. Install a build that has kernels for it:"
        + pip('"torch==2.13.0+cu126" --index-url https://download.pytorch.org/whl/cu126')
        + "\nTo train on the CPU instead, put CUDA_VISIBLE_DEVICES=-1 before the command."
    )


def test_a_card_that_torch_was_built_for_is_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "detect_device", lambda: P100)
    for architectures in (CU126, [], ["gfx942"]):  # a build that names none, and ROCm's names, exclude nothing
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda names=architectures: names)
        assert usable_device(recipe("gsm8k"), pytest.fail) is P100


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (CU130, (7, 5), True),
        (CU130, (7, 0), False),  # V100
        (CU130, (8, 9), True),  # Ada runs sm_86
        (CU130, (12, 1), True),  # sm_120 of the same major version
        (CU126, (6, 1), True),  # P40 runs sm_60
        (CU126, (12, 0), False),  # Blackwell
        ([*CU126, "compute_90"], (12, 0), True),  # compiled by the driver
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_86"], (8, 0), False),
    ],
)
def test_kernels_run_on_cards_as_nvidia_says(architectures: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert has_kernels(architectures, capability) is runs


def test_the_command_line_refuses_before_the_base_is_fetched_and_the_same_command_goes_on_later(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    text = in_process("train", "gsm8k", "--run", str(tmp_path / "run"), expect=1)
    assert "error: device: the NVIDIA driver 535.183.01 is too old for torch 2.13.0+cu130" in text
    (machine / "nvidia-smi").unlink()
    text = in_process("train", "gsm8k", "--run", str(tmp_path / "run"), expect=1)
    assert "error: model.id: Qwen/Qwen2.5-1.5B-Instruct" in text  # the next thing that a run needs


def test_the_probe_refuses_and_chat_says_why(
    machine: Path, monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    assert "needs driver 580 or newer" in in_process("probe", "gsm8k", expect=1)
    cli._say_why_not_on_the_gpu()
    assert "needs driver 580 or newer" in capsys.readouterr().err


def test_the_doctor_says_why_the_gpu_is_not_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(machine, "535.183.01, Tesla T4, 7.5")
    with_torch(monkeypatch, "2.13.0+cu130", "13.0")
    first, second = in_process("doctor").splitlines()[:2]
    assert first.startswith("device: ")
    assert second.startswith("  the NVIDIA driver 535.183.01 is too old for torch 2.13.0+cu130")


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def allocator_settings(monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, str]:
    """Return the allocator's variables after the command line has set its own."""
    for name in (*NAMES, "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setenv(name, given.get(name, "x"))  # so that the end of the test restores it
        if name not in given:
            monkeypatch.delenv(name)
    set_environment()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize("name", NAMES)
def test_the_users_settings_of_the_allocator_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given = {name: "max_split_size_mb:128"}
    assert allocator_settings(monkeypatch, **given) == given


def test_without_settings_of_the_user_the_allocator_expands_its_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator_settings(monkeypatch) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
