"""Device: what this machine computes on, and in which number formats it really does so."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from grpo_lite.errors import ModelError
from grpo_lite.units import gib

DtypeName = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Device:
    """One compute device."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    bfloat16: bool  # computes in it natively, not by emulation
    compute_capability: tuple[int, int] | None = None
    count: int = 1  # devices of this kind that are visible; one is used

    @property
    def best_dtype(self) -> DtypeName:
        """The compute dtype: bfloat16 where native, else float16 on CUDA (a T4 only emulates it), float32 on CPU."""
        if self.bfloat16:
            return "bfloat16"
        return "float16" if self.kind == "cuda" else "float32"

    def describe(self) -> str:
        """Return one line for people."""
        capability = f", sm_{self.compute_capability[0]}{self.compute_capability[1]}" if self.compute_capability else ""
        return f"{self.name} ({gib(self.memory_bytes, 0)}{capability}, computes in {self.best_dtype})"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for run.json."""
        return asdict(self)


@dataclass(frozen=True)
class Card:
    """A GPU as it is sold, for `make plan` on a machine without it. `detect_device` reads the one that trains."""

    name: str
    memory_bytes: int  # as torch reports it, below the name's number
    bfloat16: bool
    tflops: float = 0.0  # as published, see CARDS; 0: not known
    gb_per_s: float = 0.0  # the same


# TFLOPS: of the tensor cores in 16 bits, added up in float32, without sparsity. On a GeForce that is twice its float32
# rate, half of what it reaches when it adds up in 16 bits. GB/s: of the memory. Above each card stand the pages that
# its figures were read on, on 2026-11-29; NVIDIA's own data sheets could not be opened from here.
CARDS = {
    # hmc-tech.com/gpu/nvidia-l4-vs-nvidia-t4 (65.13), sysrqmts.com/en/gpus/nvidia/tesla/t4 (320.0)
    "t4": Card("Tesla T4 16 GB", int(14.56 * 2**30), bfloat16=False, tflops=65, gb_per_s=320),
    # sysrqmts.com/ru/gpus/compare/nvidia-geforce-rtx-3060-vs-nvidia-rtx-a6000 (float32 12.74, so 25.5; 360.0)
    "rtx3060-12": Card("RTX 3060 12 GB", int(11.6 * 2**30), bfloat16=True, tflops=25.5, gb_per_s=360),
    # hmc-tech.com/gpu/nvidia-geforce-rtx-4060-vs-nvidia-geforce-rtx-4060 (30.23)
    # fpsbench.com/compare/gpu/nvidia-geforce-rtx-4060-vs-nvidia-t600 (272.0)
    "rtx4060-8": Card("RTX 4060 8 GB", int(7.6 * 2**30), bfloat16=True, tflops=30.2, gb_per_s=272),
    # huggingface.co/hardware/rtx-4070-ti-super (float32 44.1, so 88.2)
    # github.com/CYBIRD-D/How-to-Choose-your-LLM-Model-for-translation, Nvidia_GPU_Specification.md (672)
    "rtx4070ti-16": Card("RTX 4070 Ti Super 16 GB", int(15.6 * 2**30), bfloat16=True, tflops=88.2, gb_per_s=672),
    # github.com/gmasse/gpu-specs, specs.md (165.2; 1,008)
    "rtx4090": Card("RTX 4090 24 GB", int(23.5 * 2**30), bfloat16=True, tflops=165.2, gb_per_s=1008),
    # the same page (121; 300)
    "l4": Card("L4 24 GB", int(22.0 * 2**30), bfloat16=True, tflops=121, gb_per_s=300),
    # the same page (125; 600); the A10G of AWS is another card
    "a10": Card("A10 24 GB", int(22.0 * 2**30), bfloat16=True, tflops=125, gb_per_s=600),
    # glennklockwood.com/garden/processors/A100, after NVIDIA's data sheet (312; 1,555)
    "a100-40": Card("A100 40 GB", int(39.4 * 2**30), bfloat16=True, tflops=312, gb_per_s=1555),
    # glennklockwood.com/garden/processors/h100 (as SXM: 989.4; 3,350); the PCIe card is slower
    "h100": Card("H100 80 GB", int(79.1 * 2**30), bfloat16=True, tflops=989, gb_per_s=3350),
}


def published_speed(name: str) -> tuple[float, float]:
    """Return (TFLOPS, GB/s) as published for a device by its name in torch or in CARDS; zeros: not known.

    >>> published_speed("NVIDIA A100-SXM4-40GB"), published_speed("NVIDIA GeForce RTX 4060 Ti")
    ((312, 1555), (0.0, 0.0))
    """
    short = re.sub(r"^(NVIDIA )?(GeForce )?", "", name.strip())
    for card in CARDS.values():
        model = re.sub(r" \d+ GB$", "", card.name)
        if re.fullmatch(rf"{re.escape(model)}([- ].*GB.*)?", short, re.IGNORECASE):
            return card.tflops, card.gb_per_s
    return 0.0, 0.0


def find_card(name: str) -> Card:
    """Return a card by its short name, or an unnamed card by its memory (`11GiB`, `12GB`).

    Raises:
        ModelError: the name is neither.
    """
    if name.lower() in CARDS:
        return CARDS[name.lower()]
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(GiB|GB|G)?", name.strip(), re.IGNORECASE)
    size = float(match[1]) * (1e9 if match[2] and match[2].lower() == "gb" else 2**30) if match else 0.0
    if not 2**28 < size < 2**44:
        raise ModelError(f"gpu: {name!r} is given; allowed: {', '.join(CARDS)}, or a size such as 11GiB.")
    return Card(f"{name.strip()} of memory", int(size), bfloat16=True)


def detect_device() -> Device:
    """Return the device to train on: the first CUDA device where there is one, else the CPU.

    Never trusts `torch.cuda.is_bf16_supported()`, which counts emulation: native bfloat16 needs compute capability 8.0.
    """
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return Device(
            kind="cuda",
            name=properties.name,
            memory_bytes=properties.total_memory,
            bfloat16=capability >= (8, 0),
            compute_capability=capability,
            count=torch.cuda.device_count(),
        )
    import psutil

    return Device(
        kind="cpu",
        name=_cpu_name(),
        memory_bytes=psutil.virtual_memory().total,
        bfloat16=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bf16_instructions(),
    )


def _has_bf16_instructions() -> bool:
    """Return whether the CPU multiplies bfloat16 itself; oneDNN's own answer is true for emulation on AVX512 too."""
    if platform.machine() == "arm64":
        return True  # Apple silicon from M2; oneDNN's answer above has already excluded the rest
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = file.read()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def peak_memory_bytes(device: Device) -> int:
    """Return the peak so far: CUDA memory allocated by torch, or this process's peak resident set (RSS)."""
    if device.kind == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
