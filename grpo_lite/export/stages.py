"""What `merge` and `export` do for a run: merge in 16 bits, write GGUF or NF4; prove and record each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_lite.commands import hint
from grpo_lite.errors import EvaluationError, ExportError, MemoryBudgetError, ModelError, NothingToMerge
from grpo_lite.evaluation.evaluate import evaluate_merged, evaluate_saved
from grpo_lite.export.folder import clear_leftovers, remove_folder
from grpo_lite.export.gguf.file import GGUF_RECORD, export_gguf
from grpo_lite.export.gguf.ollama import Prompting
from grpo_lite.export.gguf.proof import GgufProof, prove_gguf
from grpo_lite.export.merge.merge import MergeRecord, Progress, check_fit, merge_adapter
from grpo_lite.export.merge.trained_base import TrainedBase
from grpo_lite.export.nf4 import NF4_RECORD, export_nf4
from grpo_lite.export.proof import VerifyRecord, verify_merge
from grpo_lite.files.atomic import read_record, write_atomic
from grpo_lite.files.manifest import MANIFEST_NAME, sha256_of, update_manifest, verify_manifest
from grpo_lite.models.adapter import WEIGHTS_NAME
from grpo_lite.models.base import Base
from grpo_lite.models.device import detect_device
from grpo_lite.models.load import load_tokenizer
from grpo_lite.models.unsloth import uses_unsloth
from grpo_lite.recipe.recipe import MergeOnto, Recipe
from grpo_lite.runs.run_dir import MERGED_MODELS, RunDir
from grpo_lite.screen import Show, progress_lines
from grpo_lite.task.prompts import Prompts, load_prompts

MERGE_PROMPTS = 16  # on which a merge, or the loss of NF4, is measured
GGUF_PROMPTS = 8
GGUF_TOKENS = 64  # of each answer, or as many as were trained
LEAST_GGUF_TOKENS = 16


class RunInputs:
    """A run's recipe, base and prompts. Base and prompts are read when they are first needed, once for all stages."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @classmethod
    def loaded(cls, recipe: Recipe, base: Base, prompts: Prompts) -> RunInputs:
        """Return the inputs that a training has loaded already."""
        inputs = cls(recipe)
        inputs.base, inputs.prompts = base, prompts
        return inputs

    @cached_property
    def base(self) -> Base:
        """The base model."""
        return Base.resolve(self.recipe.model)

    @property
    def trained_in_four_bits(self) -> bool:
        """Whether the adapter was trained on 4-bit weights that can be had again."""
        model = self.recipe.model
        return model.load_in == "4bit" and not uses_unsloth(model)  # which may take 4-bit weights of its own

    def trained_base(self) -> TrainedBase:
        """Return the base as 4-bit training read it.

        Raises:
            ExportError: training was not in 4 bits, or by Unsloth.
            ModelError: it cannot be loaded.
        """
        if not self.trained_in_four_bits:
            model = self.recipe.model
            raise ExportError(
                f"merge_onto: trained is given, and the run was trained in {model.load_in} by the backend "
                f"{model.backend}. It is for model.load_in=4bit and the backend hf; write original here."
            )
        return TrainedBase(self.base)

    @cached_property
    def prompts(self) -> Prompts:
        """Training and held-out prompts."""
        return load_prompts(self.recipe, load_tokenizer(self.base))


def merge_run(
    run: RunDir, show: Show, inputs: RunInputs, trained: TrainedBase | None = None, provisional: bool = False
) -> dict[str, Any]:
    """Merge a trained run into `merged/`, verify it on held-out prompts, and record the agreement.

    Args:
        trained: the base as 4-bit training read it, to merge onto; None: its original 16-bit weights.
        provisional: its score decides whether it is kept, so run.json has it as verified only when the caller says so.

    Returns:
        The record kept under `merge` in run.json.

    Raises:
        ExportError: the merge or its verification failed.
    """
    base = inputs.base
    which = f"{base.section.id} as 4-bit training read it" if trained else f"the original 16-bit {base.section.id}"
    show(f"merging {run.adapter} onto {which}")
    run.update_run(merge={"passed": False})  # until verified: an earlier merge's proof is not this one's
    try:
        with _merging(show) as progress:
            record = merge_adapter(
                base.weights, run.adapter, run.merged, trained=trained, overwrite=True, progress=progress
            )
    except NothingToMerge as error:
        run.update_run(merge={"skipped": str(error)})
        raise
    if record.copied_line:
        show(record.copied_line)
    texts = inputs.prompts.proof_texts(MERGE_PROMPTS)
    proof = verify_merge(base.weights, run.adapter, run.merged, texts, base.device, show, trained)
    if proof.faults and _lost_in_rounding(proof):
        remove_folder(run.merged)
        raise NothingToMerge(
            f"the update is too small for {record.dtype} weights to hold (mean KL to the base {proof.base.mean_kl:.1e} "
            "nats, and rounding costs as much), so a merge would return the base. Train for more steps or with a "
            "higher learning rate, or use the adapter as it is"
        )
    summary = _summary(record, proof, held_out=bool(inputs.prompts.eval))
    if inputs.prompts.toolkit is not None:
        summary["episodes"] = True  # verified on their prompts; `evaluate_merged` plays them
    if proof.faults or not provisional:
        run.update_run(merge=summary)
    proof.require_passed(run.merged)
    return summary


def merge_and_score(
    run: RunDir, show: Show, inputs: RunInputs, overwrite: bool = False, onto: MergeOnto | None = None
) -> dict[str, Any]:
    """Merge and verify a run, then score the merged model on the held-out prompts where the run is evaluated.

    After training in 4 bits, `auto` merges onto the original base first. Where that costs a significant part of the
    trained model's score, or no score can tell, it merges onto the weights that training read: that is the trained
    model.

    Args:
        overwrite: replace a merge that is there.
        onto: which base; None: as the recipe says.

    Returns:
        The record kept under `merge` in run.json.

    Raises:
        ExportError: the merge or its verification failed, or `trained` is asked of a run that was not in 4 bits.
        ModelError: the base cannot be loaded in 4 bits.
    """
    clear_leftovers(run.merged)
    if run.merged.exists() and not overwrite:
        raise ExportError(
            f"{run.merged}: a merge is there already, and it is kept. To replace it: "
            f"{hint('merge', run=run.path, overwrite=True, **({'onto': onto} if onto else {}))}"
        )
    onto = onto or inputs.recipe.merge_onto
    if onto == "trained":
        return _merge_once(run, show, inputs, inputs.trained_base())
    if onto == "original" or not inputs.trained_in_four_bits:
        return _merge_once(run, show, inputs)
    return _merge_by_score(run, show, inputs)


def _merge_by_score(run: RunDir, show: Show, inputs: RunInputs) -> dict[str, Any]:
    """Merge onto the original weights, and then onto those that training read if the score does not speak for it."""
    summary: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    if inputs.recipe.eval.enabled and run.scores_file.is_file():
        summary = _merge_once(run, show, inputs, provisional=True)
        scores = run.read_scores().get("merged", {})
        verdict = scores.get("change", {}).get("verdict")
        if verdict and verdict["label"] != "significant loss":
            run.update_run(merge=summary)
            return summary
        reason = verdict["sentence"] if verdict else "What the merge onto the original weights costs is not known."
        show(f"{reason} So it is made again, onto the weights that training read.")
    try:
        trained = inputs.trained_base()
        check_fit(inputs.base.weights, run.adapter, trained)
    except (ModelError, ExportError) as error:
        show(f"merging onto the weights that training read is not possible here: {error}")
        if not summary:
            return _merge_once(run, show, inputs)
        show("the merge onto the original weights stays")
        run.update_run(merge=summary)
        return summary
    if summary:
        remove_folder(run.merged)  # two merges may not fit the disk
    summary = _merge_once(run, show, inputs, trained)
    if scores:
        run.write_scores({**run.read_scores(), "merged_onto_original": scores})
    return summary


def _merge_once(
    run: RunDir, show: Show, inputs: RunInputs, trained: TrainedBase | None = None, provisional: bool = False
) -> dict[str, Any]:
    _forget_scores(run, *MERGED_MODELS)
    summary = merge_run(run, show, inputs, trained, provisional)
    if trained:
        trained.release()  # the merged model needs the memory
    if inputs.recipe.eval.enabled and run.scores_file.is_file():
        try:
            evaluate_merged(run, show, inputs.prompts)
        except (MemoryBudgetError, EvaluationError) as error:  # 16 bits may not fit where 4 bits were trained
            show(f"the merged model is verified but not scored: {error}")
    return summary


def export_run(run: RunDir, show: Show, inputs: RunInputs) -> int:
    """Make sure a run has a verified merge whose files are intact; merge first if there is none.

    Returns:
        The number of files checked against their sha256 sums.

    Raises:
        ExportError: a file was altered, or the merge did not pass.
    """
    clear_leftovers(run.merged)
    if not (run.read_run().get("merge") or {}).get("passed") or run.merged_adapter() != sha256_of(
        run.adapter / WEIGHTS_NAME
    ):
        merge_and_score(run, show, inputs, overwrite=run.merged.is_dir())
    return verify_manifest(run.merged)


def export_run_gguf(run: RunDir, kind: str, show: Show, inputs: RunInputs, overwrite: bool = False) -> list[str]:
    """Write `gguf/<kind>/` in a run, prove the file against the merged model, and return lines for people.

    Raises:
        ExportError: it cannot be written, or the proof failed; a failed file stays for inspection, marked as such.
    """
    recipe = inputs.recipe
    out = run.path / "gguf" / kind.lower()
    merged_sha256 = sha256_of(run.merged / MANIFEST_NAME)
    clear_leftovers(out)
    there = read_record(out / GGUF_RECORD)
    proven = (there.get("proof") or {}).get("passed") and there.get("merged_sha256") == merged_sha256
    if proven and not overwrite:
        try:
            intact = verify_manifest(out)
            return [f"{out / there['file']}: is there already, of this merge and proven ({intact} files intact)"]
        except ExportError as error:  # damaged since, or killed between the record and its checksum
            show(f"written again: {error}")
    show(f"writing {out}")
    prompting = prompting_of(recipe)
    record = export_gguf(run.merged, out, kind, name=recipe.name, prompting=prompting, overwrite=True)
    proof = _prove(run, inputs, out / record.file, record.kind)
    extended = record.to_json() | {"merged_sha256": merged_sha256, "proof": proof.to_json()}
    write_atomic(out / GGUF_RECORD, json.dumps(extended, indent=2) + "\n")
    update_manifest(out, [GGUF_RECORD])
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
        template_kwargs=recipe.template_kwargs,
        max_completion_tokens=recipe.eval_completion_length,
    )


def export_run_nf4(run: RunDir, show: Show, inputs: RunInputs, overwrite: bool = False) -> list[str]:
    """Write `merged-nf4/` in a run, ready to load with bitsandbytes, and return lines for people.

    The quantisation's loss against the merged model goes into run.json (`nf4`), and where the run is evaluated, its own
    held-out score goes into metrics.json (`merged_nf4`). A folder of the same merge is kept.

    Raises:
        ExportError: bitsandbytes is missing, or writing fails.
    """
    out = run.path / "merged-nf4"
    clear_leftovers(out)
    record = {} if overwrite else read_record(out / NF4_RECORD)
    there = record.get("merged_sha256") == sha256_of(run.merged / MANIFEST_NAME)
    if there:
        lines = [f"{out}: is there already, of this merge ({verify_manifest(out)} files intact)"]
        run.update_run(nf4=record)  # a kill may have come between the folder and this
    else:
        show(f"writing {out}")
        _forget_scores(run, "merged_nf4")
        texts = inputs.prompts.proof_texts(MERGE_PROMPTS)
        export = export_nf4(run.merged, out, texts, device=detect_device().kind, overwrite=True)
        run.update_run(nf4=export.to_json())
        loss = export.agreement
        lines = [
            f"{out}: {export.size_bytes / 2**20:.0f} MiB (merged: {export.merged_bytes / 2**20:.0f} MiB); against the "
            f"merged model: mean KL {loss.mean_kl:.2g} nats, top-1 {loss.top1_agreement:.1%} of {export.positions}"
        ]
        if export.left_out:
            lines.append(f"left out: {export.left_out} tensors of heads for more tokens (mtp), which merged/ has")
    if inputs.recipe.eval.enabled and (scores := run.read_scores()):
        if not there or "merged_nf4" not in scores:
            scores = evaluate_saved(run, show, inputs.prompts, out, "merged_nf4")
        merged, nf4 = (scores[key]["lenient"]["rate"] if key in scores else None for key in ("merged", "merged_nf4"))
        beside = "" if merged is None else f", the merged 16-bit model {merged:.3f}"
        lines.append(f"held-out score in 4 bits: {nf4:.3f}{beside}")
    return lines


def _summary(record: MergeRecord, proof: VerifyRecord, held_out: bool) -> dict[str, Any]:
    return {
        "onto": record.onto,
        "prompts": proof.prompts,
        "positions": proof.positions,
        "held_out": held_out,
        "compute_dtype": proof.compute_dtype,
        "top1_agreement": proof.merged.top1_agreement,
        "mean_kl": proof.merged.mean_kl,
        "max_logit_difference": proof.merged.max_logit_difference,
        "max_logit_difference_to_base": proof.merged_against_base,
        "update_carried": proof.update_carried,
        "passed": proof.passed,
        "size_bytes": record.size_bytes,
        "relative_update": record.relative_update,
        "tensors_dithered": record.tensors_dithered,
        **({"other_towers": dict(record.other_towers)} if record.other_towers else {}),
    }


@contextlib.contextmanager
def _merging(show: Show) -> Iterator[Progress]:
    """Yield a progress callback that draws a bar on a terminal, and shows a line now and then elsewhere."""
    from tqdm import tqdm

    lines = progress_lines(show, "merging", "MiB")
    with tqdm(desc="merging", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:

        def progress(shard: str, done: int, total: int) -> None:
            if bar.disable and done >> 20 < total >> 20:
                lines(done >> 20, total >> 20)
            bar.total = total
            bar.set_postfix_str(shard, refresh=False)
            bar.update(done - bar.n)

        yield progress


def _lost_in_rounding(proof: VerifyRecord) -> bool:
    """Return whether the merged model is as near to base + adapter as the base itself is, and both are near."""
    return proof.merged.mean_kl <= 2 * proof.base.mean_kl < 0.02


def _prove(run: RunDir, inputs: RunInputs, file: Path, kind: str) -> GgufProof:
    cap = max(LEAST_GGUF_TOKENS, min(GGUF_TOKENS, inputs.recipe.eval_completion_length))
    return prove_gguf(file, kind, run.merged, inputs.prompts.proof_texts(GGUF_PROMPTS), max_new_tokens=cap)


def _forget_scores(run: RunDir, *names: str) -> None:
    """Remove scores of what is made anew from metrics.json; after a kill they would pass for the new one's."""
    scores = run.read_scores()
    kept = {name: value for name, value in scores.items() if name not in names}
    if kept != scores:
        run.write_scores(kept)
