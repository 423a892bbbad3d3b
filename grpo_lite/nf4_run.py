"""export_run_nf4: a run's merged model in 4 bits, with what that cost: logits and held-out score."""

from __future__ import annotations

from collections.abc import Callable

from grpo_lite.data import load_prompts
from grpo_lite.evaluate import evaluate_saved
from grpo_lite.export_folder import clear_leftovers
from grpo_lite.hardware import detect_device
from grpo_lite.manifest import MANIFEST_NAME, sha256_of, verify_manifest
from grpo_lite.model import load_tokenizer
from grpo_lite.nf4 import RECORD_NAME, export_nf4
from grpo_lite.run_dir import RunDir, read_record

LOSS_PROMPTS = 16


def export_run_nf4(run: RunDir, show: Callable[[str], None], overwrite: bool = False) -> list[str]:
    """Write `merged-nf4/` in a run, ready to load with bitsandbytes, and return lines for people.

    The quantisation's loss against the merged model goes into run.json (`nf4`), and where the run is evaluated, its own
    held-out score goes into metrics.json (`merged_nf4`). What is there already of the same merge is kept.

    Raises:
        ExportError: bitsandbytes is missing, or writing fails.
    """
    out = run.path / "merged-nf4"
    recipe = run.load_recipe()
    record = {} if overwrite else read_record(out / RECORD_NAME)
    there = record.get("merged_sha256") == sha256_of(run.merged / MANIFEST_NAME)
    prompts = None
    if there:
        clear_leftovers(out)
        lines = [f"{out}: is there already, of this merge ({verify_manifest(out)} files intact)"]
        run.update_run(nf4=record)  # a kill may have come between the folder and this
    else:
        show(f"writing {out}")
        _forget_score(run)
        tokenizer = load_tokenizer(recipe)
        prompts = load_prompts(recipe, tokenizer)
        texts = prompts.proof_texts(LOSS_PROMPTS, recipe, tokenizer)
        made = export_nf4(run.merged, out, texts, tokenizer, device=detect_device().kind, overwrite=True)
        run.update_run(nf4=made.to_json())
        loss = made.agreement
        lines = [
            f"{out}: {made.size_bytes / 2**20:.0f} MiB (merged: {made.merged_bytes / 2**20:.0f} MiB); against the "
            f"merged model: mean KL {loss.mean_kl:.2g} nats, top-1 {loss.top1_agreement:.1%} of {made.positions}"
        ]
    if recipe.eval.enabled and (scores := run.read_scores()):
        if not there or "merged_nf4" not in scores:
            scores = evaluate_saved(run, show, prompts, out, "merged_nf4")
        merged, nf4 = (scores[key]["lenient"]["rate"] if key in scores else None for key in ("merged", "merged_nf4"))
        beside = "" if merged is None else f", the merged 16-bit model {merged:.3f}"
        lines.append(f"held-out score in 4 bits: {nf4:.3f}{beside}")
    return lines


def _forget_score(run: RunDir) -> None:
    """Take an earlier export's score out of metrics.json: after a kill it would stand for the new one's."""
    scores = run.read_scores()
    if scores.pop("merged_nf4", None) is not None:
        run.write_scores(scores)
