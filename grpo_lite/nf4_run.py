"""export_run_nf4: a run's merged model in 4 bits, with what that cost: logits and held-out score."""

from __future__ import annotations

from collections.abc import Callable

from grpo_lite.data import load_prompts, prompt_text
from grpo_lite.errors import ExportError
from grpo_lite.evaluate import evaluate_saved
from grpo_lite.hardware import detect_device
from grpo_lite.model import load_tokenizer
from grpo_lite.nf4 import export_nf4
from grpo_lite.run_dir import RunDir

LOSS_PROMPTS = 16


def export_run_nf4(run: RunDir, show: Callable[[str], None], overwrite: bool = False) -> list[str]:
    """Write `merged-nf4/` in a run, ready to load with bitsandbytes, and return lines for people.

    The quantisation's loss against the merged model goes into run.json (`nf4`), and where the run is evaluated, its own
    held-out score goes into metrics.json (`merged_nf4`).

    Raises:
        ExportError: it is there already and `overwrite` is not given, bitsandbytes is missing, or writing fails.
    """
    recipe = run.load_recipe()
    tokenizer = load_tokenizer(recipe)
    prompts = load_prompts(recipe, tokenizer)
    rows = (prompts.eval or prompts.train)[:LOSS_PROMPTS]
    kwargs = recipe.grpo.get("chat_template_kwargs")
    texts = [prompt_text(row["prompt"], tokenizer, kwargs) for row in rows]
    out = run.path / "merged-nf4"
    if out.exists() and not overwrite:
        raise ExportError(
            f"{out}: is there already, and it is kept. To replace it: grpo-lite export {run.path} --nf4 --overwrite "
            f"(make export RUN={run.path} NF4=1 ARGS=--overwrite)."
        )
    show(f"writing {out}")
    device = detect_device()
    record = export_nf4(run.merged, out, texts, tokenizer, device=device.kind, overwrite=overwrite)
    run.update_run(nf4=record.to_json())
    loss = record.agreement
    lines = [
        f"{out}: {record.size_bytes / 2**20:.0f} MiB (merged: {record.merged_bytes / 2**20:.0f} MiB); against the "
        f"merged model: mean KL {loss.mean_kl:.2g} nats, top-1 {loss.top1_agreement:.1%} of {record.positions}"
    ]
    if recipe.eval.enabled and run.scores_file.is_file():
        scores = evaluate_saved(run, show, prompts, out, "merged_nf4")
        merged, nf4 = (scores[key]["lenient"]["rate"] if key in scores else None for key in ("merged", "merged_nf4"))
        beside = "" if merged is None else f", the merged 16-bit model {merged:.3f}"
        lines.append(f"held-out score in 4 bits: {nf4:.3f}{beside}")
    return lines
