"""llama.cpp's own programs: its converter for models that this kit does not write, and its quantizer.

PyPI has no maintained package of the converter: it is a script in a llama.cpp checkout, and so in the source archive
of llama-cpp-python (`vendor/llama.cpp`). The quantizer is a program of llama.cpp or a function of llama-cpp-python.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_lite.errors import ExportError

CONVERTER = "LLAMA_CPP_CONVERT"
Quantizer = Callable[[Path, Path, str], str]  # from, to, kind -> the name of the program

K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q3_k_s", "q2_k")


def converter() -> Path | None:
    """Return llama.cpp's convert_hf_to_gguf.py, as $LLAMA_CPP_CONVERT names it; None where it is not set.

    Raises:
        ExportError: it names no file.
    """
    named = os.environ.get(CONVERTER)
    if not named:
        return None
    path = Path(named).expanduser()
    path = path / "convert_hf_to_gguf.py" if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"{CONVERTER}={named}: there is no such file. Name llama.cpp's convert_hf_to_gguf.py.")
    return path


def convert(script: Path, folder: Path, target: Path, kind: str) -> None:
    """Write a merged folder as a GGUF with llama.cpp's converter, in this Python and offline.

    Args:
        kind: f16, bf16 or q8_0.

    Raises:
        ExportError: the converter failed.
    """
    command = [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", kind]
    _run(command, target, f"{script.name} on {folder}", "Update llama.cpp, or install what the converter asks for.")


def quantizer() -> Quantizer:
    """Return llama.cpp's quantizer: $LLAMA_QUANTIZE, `llama-quantize` on the PATH, or llama-cpp-python's.

    Raises:
        ExportError: there is none.
    """
    named = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if named and os.access(named, os.X_OK):
        return lambda source, target, kind: _by_program(Path(named), source, target, kind)
    if not named and importlib.util.find_spec("llama_cpp"):
        return _by_library
    raise ExportError(
        f"--gguf: K-quants need llama.cpp's llama-quantize, which is not at {named or 'any place in PATH'}. "
        "Install llama-cpp-python (pip), or llama.cpp (brew, winget, your distribution, or from source) and put it on "
        "the PATH, or set LLAMA_QUANTIZE=/path/to/llama-quantize. These kinds need nothing else: f16, bf16, q8_0."
    )


def _by_program(program: Path, source: Path, target: Path, kind: str) -> str:
    command = [str(program), str(source), str(target), kind.upper(), str(os.cpu_count() or 1)]
    _run(command, target, f"{program} on {kind}", "Update llama.cpp.")
    return program.name


def _by_library(source: Path, target: Path, kind: str) -> str:
    from gguf import LlamaFileType

    lib: Any = importlib.import_module("llama_cpp")
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it prints lines for each tensor
    params = lib.llama_model_quantize_default_params()
    params.ftype = int(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    params.nthread = os.cpu_count() or 1
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0 or not is_gguf(target):
        raise ExportError(f"llama_cpp: llama_model_quantize failed with status {status} on {kind}. Update it.")
    return f"llama-cpp-python {lib.__version__}"


def _run(command: list[str], target: Path, what: str, advice: str) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=offline)
    if result.returncode != 0 or not is_gguf(target):
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ExportError(f"{what}: failed with status {result.returncode}:\n{last}\n{advice}")


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
