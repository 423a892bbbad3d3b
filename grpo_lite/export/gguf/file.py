"""Write a merged folder as one GGUF file with a Modelfile, for llama.cpp and Ollama.

What `tensors` and `tokenizer` know is written here with llama.cpp's own `gguf` package: the weights stream from the
safetensors a block of rows at a time, so memory stays at a few blocks. Everything else is left to llama.cpp's own
converter, where LLAMA_CPP_CONVERT names it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_lite
from grpo_lite.errors import ExportError
from grpo_lite.export.folder import replacing_folder
from grpo_lite.export.gguf.convert import K_QUANTS, convert, converter, quantizer
from grpo_lite.export.gguf.ollama import Prompting, ollama_settings
from grpo_lite.export.gguf.tensors import (
    NotWrittenHereError,
    TensorPlan,
    add_architecture_keys,
    architecture,
    plan_tensors,
    write_tensors,
)
from grpo_lite.export.gguf.tokenizer import (
    TokenizerFacts,
    add_tokenizer_keys,
    read_tokenizer,
    read_written_tokenizer,
)
from grpo_lite.export.model_folder import load_saved_tokenizer, read_config
from grpo_lite.files.manifest import MANIFEST_NAME, verify_manifest, write_manifest
from grpo_lite.models.base import weights_bytes
from grpo_lite.models.positions import read_positions

GGUF_RECORD = "gguf.json"
WRITTEN_HERE = ("f16", "bf16", "q8_0")
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
    converted_by: str = "grpo_lite"  # or the name of llama.cpp's script

    def to_json(self) -> dict[str, Any]:
        """Return plain data for gguf.json."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Own:
    """Everything that this kit writes into a file."""

    arch: str
    config: Mapping[str, Any]
    facts: TokenizerFacts
    plans: list[TensorPlan]


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
        kind: one of `KINDS`; the K-quants need llama.cpp's `llama-quantize` or llama-cpp-python.
        prompting: how the run made its prompts, for the Modelfile.

    Raises:
        ExportError: unknown kind, unsupported architecture or tokenizer, damaged input, no room, or no quantizer.
    """
    began = time.monotonic()
    kind = kind.lower()
    if kind not in KINDS:
        raise ExportError(f"--gguf: {kind!r} is given. Allowed: {', '.join(KINDS)}. q8_0 is a good first choice.")
    quantize = quantizer() if kind in K_QUANTS else None
    first_kind = "bf16" if quantize else kind
    source = _plan(merged_dir, first_kind)
    if (merged_dir / MANIFEST_NAME).is_file():
        verify_manifest(merged_dir)
    size = weights_bytes(merged_dir) if isinstance(source, Path) else sum(plan.size_bytes for plan in source.plans)
    file_name = f"{name}-{kind}.gguf"
    with replacing_folder(out_dir, size * (2 if quantize else 1) + (64 << 20), overwrite, [merged_dir]) as partial:
        first = partial / (f"{name}-bf16.gguf" if quantize else file_name)
        record = _write(source, merged_dir, first, name, first_kind)
        if quantize:
            record = dataclasses.replace(record, quantised_by=quantize(first, partial / file_name, kind))
            first.unlink()
        if isinstance(source, Path):
            facts = read_written_tokenizer(merged_dir, record.pre_tokenizer)
        else:
            facts = source.facts
        _write_settings(merged_dir, partial, file_name, facts, prompting)
        record = dataclasses.replace(
            record,
            file=file_name,
            kind=kind,
            stop_tokens=tuple(facts.stop_tokens),
            size_bytes=(partial / file_name).stat().st_size,
            wall_s=round(time.monotonic() - began, 2),
        )
        (partial / GGUF_RECORD).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
        write_manifest(partial)
    return record


def _plan(merged_dir: Path, kind: str) -> _Own | Path:
    """Return what is to be written here, or llama.cpp's converter where it is left to that.

    Raises:
        ExportError: damaged input, or a model that is not written here while no converter is named.
    """
    config = read_config(merged_dir)
    try:
        arch = architecture(config, str(merged_dir))
        facts = read_tokenizer(merged_dir, int(config["vocab_size"]))
        return _Own(arch, config, facts, plan_tensors(merged_dir, config, arch, kind))
    except NotWrittenHereError:
        script = converter()
        if script is None:
            raise
        return script


def _write(source: _Own | Path, merged_dir: Path, target: Path, name: str, kind: str) -> GgufRecord:
    """Write the first file, ours or llama.cpp's converter's, and return what is in it."""
    if isinstance(source, Path):
        convert(source, merged_dir, target, kind)
        arch, pre, count = _contents(target)
        program = source.name
    else:
        writer = _open_writer(target, source.arch, source.config, name, kind)
        add_tokenizer_keys(writer, source.facts)
        arch, pre, count = source.arch, source.facts.pre, write_tensors(writer, source.plans, source.config)
        program = "grpo_lite"
    return GgufRecord(
        file=target.name,
        kind=kind,
        architecture=arch,
        pre_tokenizer=pre,
        stop_tokens=(),
        tensors=count,
        size_bytes=0,
        wall_s=0.0,
        quantised_by=program,
        grpo_lite=grpo_lite.__version__,
        converted_by=program,
    )


def _contents(path: Path) -> tuple[str, str, int]:
    """Return a file's architecture, the name of its pre-tokenizer (empty where it has none) and its tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    names = ("general.architecture", "tokenizer.ggml.pre")
    fields = [reader.get_field(key) for key in names]
    arch, pre = ("" if entry is None else str(entry.contents()) for entry in fields)
    return arch, pre, len(reader.tensors)


def _write_settings(
    merged_dir: Path, folder: Path, file_name: str, facts: TokenizerFacts, prompting: Prompting
) -> None:
    """Write the Modelfile, what the Hub reads for Ollama, and the base model's licence."""
    context = read_positions(read_config(merged_dir)) or 4096
    settings = ollama_settings(load_saved_tokenizer(merged_dir), facts, prompting, context)
    for file, text in {"Modelfile": settings.modelfile(file_name), **settings.hub_files()}.items():
        (folder / file).write_text(text, encoding="utf-8")
    for path in [*merged_dir.glob("LICEN?E*"), *merged_dir.glob("NOTICE*")]:
        shutil.copyfile(path, folder / path.name)


def _open_writer(path: Path, arch: str, config: Mapping[str, Any], name: str, kind: str) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type({"f16": 1, "q8_0": 7, "bf16": 32}[kind])  # llama.cpp's llama_ftype
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_architecture_keys(writer, config)
    return writer
