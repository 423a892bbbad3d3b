"""merge_run: a run's adapter onto its 16-bit base, verified on held-out prompts and recorded in run.json."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from grpo_lite.base_model import resolve_base
from grpo_lite.data import Prompts, load_prompts
from grpo_lite.errors import ExportError, MemoryBudgetError, NothingToMerge
from grpo_lite.export_folder import clear_leftovers
from grpo_lite.lora_adapter import WEIGHTS_NAME
from grpo_lite.manifest import sha256_of, verify_manifest
from grpo_lite.merge import merge_adapter
from grpo_lite.merge_write import Progress
from grpo_lite.model import load_tokenizer
from grpo_lite.run_dir import RunDir
from grpo_lite.verify import VerifyRecord, verify_merge

VERIFY_PROMPTS = 16


def merge_run(
    run: RunDir, show: Callable[[str], None], prompts: Prompts | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Merge a trained run into `merged/`, verify it on held-out prompts, and record the agreement.

    Args:
        run: a trained run.
        show: called with lines for people.
        prompts: the run's prompts, if already loaded.
        overwrite: replace a merge that is there.

    Returns:
        The record kept under `merge` in run.json.

    Raises:
        ExportError: the merge or its verification failed.
    """
    recipe = run.load_recipe()
    if run.merged.exists() and not overwrite:
        raise ExportError(
            f"{run.merged}: a merge is there already, and it is kept. To replace it: grpo-lite merge {run.path} "
            f"--overwrite (make merge RUN={run.path} ARGS=--overwrite)."
        )
    base = resolve_base(recipe.model.id, recipe.model.revision)
    _refuse_untrained(run)
    show(f"merging {run.adapter} onto the 16-bit {recipe.model.id}")
    run.update_run(merge={"passed": False})  # until verified: an earlier merge's proof is not this one's
    with _progress_bar() as progress:
        record = merge_adapter(base, run.adapter, run.merged, overwrite=overwrite, progress=progress)
    tokenizer = load_tokenizer(recipe)
    loaded = prompts or load_prompts(recipe, tokenizer)
    texts = loaded.proof_texts(VERIFY_PROMPTS, recipe, tokenizer)
    show(f"verifying the merge on {len(texts)} prompts")
    proof = verify_merge(base, run.adapter, run.merged, texts)
    summary = {
        "prompts": proof.prompts,
        "positions": proof.positions,
        "held_out": bool(loaded.eval),
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
    }
    if proof.faults and _lost_in_rounding(proof):
        shutil.rmtree(run.merged)
        raise NothingToMerge(
            f"the update is too small for {record.dtype} weights to hold (mean KL to the base {proof.base.mean_kl:.1e} "
            "nats, and rounding costs as much), so a merge would return the base. Train for more steps or with a "
            "higher learning rate, or use the adapter as it is"
        )
    run.update_run(merge=summary)
    proof.require_passed(run.merged)
    return summary


def merge_and_score(
    run: RunDir, show: Callable[[str], None], prompts: Prompts | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Merge and verify a run, then score the merged model on the held-out prompts where the run is evaluated.

    Returns:
        The record kept under `merge` in run.json.

    Raises:
        ExportError: the merge or its verification failed.
    """
    summary = merge_run(run, show, prompts, overwrite)
    if run.load_recipe().eval.enabled and run.scores_file.is_file():
        from grpo_lite.evaluate import evaluate_merged

        try:
            evaluate_merged(run, show, prompts)
        except MemoryBudgetError as error:  # a 16-bit model where a 4-bit one was trained
            show(f"the merged model is verified but not scored: {error}")
            run.write_scores({name: value for name, value in run.read_scores().items() if name != "merged"})
    return summary


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Yield a progress callback that draws a bar on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc="merging", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:

        def progress(shard: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(shard, refresh=False)
            bar.update(done - bar.n)

        yield progress


def _refuse_untrained(run: RunDir) -> None:
    """Raise NothingToMerge for an adapter whose B factors are all zero, as they are before the first gradient."""
    from safetensors import safe_open

    with safe_open(run.adapter / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        factors = [name for name in names if ".lora_B." in name or ".lora_embedding_B" in name]
        others = [name for name in names if ".lora_" not in name]
        moved = others or any(bool(file.get_tensor(name).any()) for name in factors)
    if not moved:
        raise NothingToMerge(
            "the adapter is zero, it still equals the base: no gradient ever flowed. Every group's rewards were equal "
            "in every step (see what earns a reward with `grpo-lite check`), or the learning rate was 0 (warm-up)"
        )


def _lost_in_rounding(proof: VerifyRecord) -> bool:
    """Return whether the merged model is as near to base + adapter as the base itself is, and both are near."""
    return proof.merged.mean_kl <= 2 * proof.base.mean_kl < 0.02


def export_run(run: RunDir, show: Callable[[str], None]) -> int:
    """Make sure a run has a verified merge whose files are intact; merge first if there is none.

    Returns:
        The number of files checked against their sha256 sums.

    Raises:
        ExportError: a file was altered, or the merge did not pass.
    """
    if not (run.read_run().get("merge") or {}).get("passed") or run.merged_adapter() != sha256_of(
        run.adapter / WEIGHTS_NAME
    ):
        merge_and_score(run, show, overwrite=run.merged.is_dir())
    files = verify_manifest(run.merged)
    clear_leftovers(run.merged)
    return files
