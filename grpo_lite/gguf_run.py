"""export_run_gguf: a run's merged model as GGUF, proven on held-out prompts and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grpo_lite.data import load_prompts
from grpo_lite.errors import ExportError
from grpo_lite.export_folder import clear_leftovers
from grpo_lite.gguf_export import RECORD_NAME, export_gguf
from grpo_lite.gguf_proof import GgufProof, prove_gguf
from grpo_lite.manifest import MANIFEST_NAME, sha256_of, update_manifest, verify_manifest
from grpo_lite.model import load_tokenizer
from grpo_lite.ollama import Prompting
from grpo_lite.recipe import Recipe
from grpo_lite.run_dir import RunDir, read_record, write_atomic

PROOF_PROMPTS = 8
PROOF_TOKENS = 64  # of each answer, or as many as were trained
LEAST_PROOF_TOKENS = 16


def export_run_gguf(run: RunDir, kind: str, show: Callable[[str], None], overwrite: bool = False) -> list[str]:
    """Write `gguf/<kind>/` in a run, prove the file against the merged model, and return lines for people.

    Raises:
        ExportError: it cannot be written, or the proof failed; a failed file stays for inspection, marked as such.
    """
    recipe = run.load_recipe()
    out = run.path / "gguf" / kind.lower()
    merged_sha256 = sha256_of(run.merged / MANIFEST_NAME)
    made = read_record(out / RECORD_NAME)
    fit = (made.get("proof") or {}).get("passed") and made.get("merged_sha256") == merged_sha256
    if fit and not overwrite:
        try:
            intact = verify_manifest(out)
            clear_leftovers(out)
            return [f"{out / made['file']}: is there already, of this merge and proven ({intact} files intact)"]
        except ExportError as error:  # damaged since, or killed between the record and its checksum
            show(f"written again: {error}")
    show(f"writing {out}")
    prompting = prompting_of(recipe)
    # Overwrite in any case: after a kill between the swap's two renames the old folder gets its name back first.
    record = export_gguf(run.merged, out, kind, name=recipe.name, prompting=prompting, overwrite=True)
    proof = _prove(run, recipe, out / record.file, record.kind)
    added = record.to_json() | {"merged_sha256": merged_sha256, "proof": proof.to_json()}
    write_atomic(out / RECORD_NAME, json.dumps(added, indent=2) + "\n")
    update_manifest(out, [RECORD_NAME])
    if not proof.passed:
        raise ExportError(
            f"{out / record.file}: is not proven right:\n"
            + "\n".join(f"  {fault}" for fault in proof.faults)
            + "\nDo not use or publish it. Try q8_0 or bf16, or llama.cpp's own converter on the merged folder."
        )
    name = recipe.name.lower()
    return [
        f"{out / record.file}: {record.size_bytes / 2**20:.0f} MiB in {record.wall_s:.0f} s. {proof.describe()}",
        f"  ollama create {name} -f {out / 'Modelfile'} && ollama run {name}",
    ]


def prompting_of(recipe: Recipe) -> Prompting:
    """Return how a recipe makes its prompts, for a Modelfile."""
    data = recipe.data
    return Prompting(
        format=data.format,
        system=data.system,
        examples=tuple((example.prompt, example.answer) for example in data.examples),
        question=data.prompt,
        template_kwargs=recipe.grpo.get("chat_template_kwargs"),
        max_completion_tokens=recipe.eval.max_new_tokens or recipe.max_completion_length,
    )


def _prove(run: RunDir, recipe: Recipe, file: Path, kind: str) -> GgufProof:
    tokenizer = load_tokenizer(recipe)
    texts = load_prompts(recipe, tokenizer).proof_texts(PROOF_PROMPTS, recipe, tokenizer)
    trained = recipe.eval.max_new_tokens or recipe.max_completion_length
    cap = max(LEAST_PROOF_TOKENS, min(PROOF_TOKENS, trained))
    return prove_gguf(file, kind, run.merged, texts, max_new_tokens=cap)
