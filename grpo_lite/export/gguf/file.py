"""Write a merged folder as one GGUF file with a Modelfile, for llama.cpp and Ollama.

The weights stream from the safetensors a block of rows at a time, so memory stays at a few blocks. PyPI has no
maintained converter (DECISIONS.md, "GGUF"), so the file is written here with llama.cpp's own `gguf` package.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_lite
from grpo_lite.errors import ExportError
from grpo_lite.export.folder import replacing_folder
from grpo_lite.export.gguf.ollama import Prompting, ollama_settings
from grpo_lite.export.gguf.tensors import add_architecture_keys, architecture, plan_tensors, write_tensors
from grpo_lite.export.gguf.tokenizer import add_tokenizer_keys, read_tokenizer
from grpo_lite.export.model_folder import load_saved_tokenizer, read_config
from grpo_lite.files.manifest import MANIFEST_NAME, verify_manifest, write_manifest

GGUF_RECORD = "gguf.json"
WRITTEN_HERE = ("f16", "bf16", "q8_0")
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q3_k_s", "q2_k")
KINDS = WRITTEN_HERE + K_QUANTS


@dataclass(frozen=True)
class GgufRecord:
    """What an export to GGUF wrote; saved as gguf.json beside the file."""

    file: str
    kind: str
    architecture: str
    pre_tokenizer: str
    stop_tokens: tuple[str, ...]
    tensors: int
    size_bytes: int
    wall_s: float
    quantised_by: str  # "grpo_lite" or the path-free name of llama.cpp's tool
    grpo_lite: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for gguf.json."""
        return dataclasses.asdict(self)


def export_gguf(
    merged_dir: Path,
    out_dir: Path,
    kind: str,
    *,
    name: str = "model",
    prompting: Prompting = Prompting(),  # noqa: B008 - frozen
    overwrite: bool = False,
) -> GgufRecord:
    """Write `<name>-<kind>.gguf`, a Modelfile, a record and a manifest into a folder of their own.

    Args:
        merged_dir: a merged folder; checked against its manifest where it has one.
        kind: one of `KINDS`; the K-quants need llama.cpp's `llama-quantize` on the PATH.
        prompting: how the run made its prompts, for the Modelfile.

    Raises:
        ExportError: unknown kind, unsupported architecture or tokenizer, damaged input, no room, or no llama-quantize.
    """
    began = time.monotonic()
    kind = kind.lower()
    if kind not in KINDS:
        raise ExportError(f"--gguf: {kind!r} is given. Allowed: {', '.join(KINDS)}. q8_0 is a good first choice.")
    tool = llama_quantize() if kind in K_QUANTS else None
    config = read_config(merged_dir)
    arch = architecture(config, str(merged_dir))
    if (merged_dir / MANIFEST_NAME).is_file():
        verify_manifest(merged_dir)
    facts = read_tokenizer(merged_dir, int(config["vocab_size"]))
    first_kind = "bf16" if tool else kind
    plans = plan_tensors(merged_dir, config, arch, first_kind)
    need = sum(plan.size_bytes for plan in plans) * (2 if tool else 1) + (64 << 20)
    file_name = f"{name}-{kind}.gguf"
    with replacing_folder(out_dir, need, overwrite, [merged_dir]) as partial:
        first = partial / (f"{name}-bf16.gguf" if tool else file_name)
        writer = _open_writer(first, arch, config, name, first_kind)
        add_tokenizer_keys(writer, facts)
        count = write_tensors(writer, plans, config)
        if tool:
            _quantise(tool, first, partial / file_name, kind)
            first.unlink()
        tokenizer, context = load_saved_tokenizer(merged_dir), int(config["max_position_embeddings"])
        settings = ollama_settings(tokenizer, facts, prompting, context)
        for file, text in {"Modelfile": settings.modelfile(file_name), **settings.hub_files()}.items():
            (partial / file).write_text(text, encoding="utf-8")
        for path in [*merged_dir.glob("LICEN?E*"), *merged_dir.glob("NOTICE*")]:
            shutil.copyfile(path, partial / path.name)
        record = GgufRecord(
            file=file_name,
            kind=kind,
            architecture=arch,
            pre_tokenizer=facts.pre,
            stop_tokens=tuple(facts.stop_tokens),
            tensors=count,
            size_bytes=(partial / file_name).stat().st_size,
            wall_s=round(time.monotonic() - began, 2),
            quantised_by=tool.name if tool else "grpo_lite",
            grpo_lite=grpo_lite.__version__,
        )
        (partial / GGUF_RECORD).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
        write_manifest(partial)
    return record


def llama_quantize() -> Path:
    """Return llama.cpp's quantiser: $LLAMA_QUANTIZE, or `llama-quantize` on the PATH.

    Raises:
        ExportError: there is none.
    """
    found = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if not found or not os.access(found, os.X_OK):
        raise ExportError(
            f"--gguf: K-quants need llama.cpp's llama-quantize, which is not at {found or 'any place in PATH'}. "
            "Install llama.cpp (brew, winget, your distribution, or from source) and put it on the PATH, or set "
            "LLAMA_QUANTIZE=/path/to/llama-quantize. These kinds need nothing else: " + ", ".join(WRITTEN_HERE) + "."
        )
    return Path(found)


def _open_writer(path: Path, arch: str, config: Mapping[str, Any], name: str, kind: str) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type({"f16": 1, "q8_0": 7, "bf16": 32}[kind])  # llama.cpp's llama_ftype
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_architecture_keys(writer, config)
    return writer


def _quantise(tool: Path, source: Path, target: Path, kind: str) -> None:
    command = [str(tool), str(source), str(target), kind.upper(), str(os.cpu_count() or 1)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0 or not target.is_file() or _magic(target) != b"GGUF":
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ExportError(f"{tool}: failed with status {result.returncode} on {kind}:\n{last}\nUpdate llama.cpp.")


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)
