"""Prove a merge: the merged folder, reloaded from disk, against base + adapter and against the base alone.

All three compute in one dtype on the same token sequences: held-out prompts, each continued greedily by base + adapter,
so that the trained behaviour is measured too. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_lite.agreement import VerifyRecord, judge
from grpo_lite.errors import ExportError
from grpo_lite.lora_adapter import open_adapter
from grpo_lite.shadow import keep_odd_widths_unpacked
from grpo_lite.shards import open_checkpoint

_KEPT_BYTES = 256 << 20  # for two sets of logits in float32

Logits = Callable[[torch.Tensor], torch.Tensor]  # token ids (1, T) -> logits (1, T, V)


def verify_merge(
    base_dir: Path,
    adapter_dir: Path,
    merged_dir: Path,
    prompts: Sequence[str],
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 16,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    training_logits: Logits | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyRecord:
    """Measure the agreement of a merged folder with base + adapter; the result's `faults` say what is wrong.

    Args:
        prompts: held-out prompts as rendered text (special tokens are not added again).
        tokenizer: the merged folder's own by default, which proves that it loads.
        max_new_tokens: length of the greedy continuation that is scored with each prompt; 0 scores prompts only.
        dtype: what all three models compute in; by default float32 where it fits the free memory, which leaves the
            merge's rounding as the only difference, else the base's own.
        training_logits: the training-time model; its agreement with the merged one is reported, not judged.

    Raises:
        ExportError: no prompts, or a folder that does not load completely.
    """
    base_dir, adapter_dir, merged_dir = Path(base_dir), Path(adapter_dir), Path(merged_dir)
    open_adapter(adapter_dir)  # refuses zero, NaN and unsupported ones by name
    open_checkpoint(merged_dir)  # and truncated or missing shards
    dtype = dtype or _compute_dtype(base_dir, merged_dir, device)
    sequences = tokenize(tokenizer or load_saved_tokenizer(merged_dir), prompts)
    report = progress or (lambda stage, done, total: None)

    model = _with_adapter(base_dir, adapter_dir, dtype, device)
    dtype = model.dtype
    keep = positions_kept(model.config.get_text_config().vocab_size, len(sequences), max_new_tokens)
    reference, base = [], []
    for number, prompt in enumerate(sequences):
        sequences[number] = _continue(model, prompt, max_new_tokens)
        reference.append(last_logits(model, sequences[number], keep))
        with model.disable_adapter():
            base.append(last_logits(model, sequences[number], keep))
        report("base + adapter", number + 1, len(sequences))
    del model
    gc.collect()

    model = load_whole(merged_dir, dtype, device)
    merged = []
    for number, sequence in enumerate(sequences):
        merged.append(last_logits(model, sequence, keep))
        report("merged", number + 1, len(sequences))
    del model
    gc.collect()

    training = [training_logits(ids)[0, -keep:].float().cpu() for ids in sequences] if training_logits else None
    return judge(str(dtype).removeprefix("torch."), reference, base, merged, training)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Return the ids, each (1, T), of the prompts that have any; none at all is an ExportError."""
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    sequences = [torch.tensor([ids]) for ids in encoded if len(ids)]
    if not sequences:
        raise ExportError("No prompts with at least one token are given. Give held-out prompts as text.")
    return sequences


@torch.no_grad()
def _continue(model: Any, prompt: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Return the prompt with its greedy continuation, up to the end-of-text token; both (1, T), on the CPU."""
    end = model.config.get_text_config().eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    ids, step, cache = prompt, prompt.to(model.device), None
    for _ in range(max_new_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        ids = torch.cat([ids, step.cpu()], dim=1)
        if int(step) in ends:
            break
    return ids


@torch.no_grad()
def last_logits(model: Any, ids: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the logits of the last `keep` positions of ids (1, T) as float32 on the CPU, (keep, V)."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[0, -keep:].float().cpu()


def positions_kept(vocab_size: int, prompts: int, max_new_tokens: int) -> int:
    """Return how many positions of each prompt can be compared within the memory kept for logits."""
    fits = _KEPT_BYTES // (2 * 4 * vocab_size * prompts)
    return max(1, min(fits, max(2 * max_new_tokens, 32)))


def _compute_dtype(base_dir: Path, merged_dir: Path, device: str) -> torch.dtype | None:
    """Return float32 where the model fits the free memory in it, else None; too little for its own dtype is refused."""
    tensors = [spec for shard in open_checkpoint(base_dir) for spec in shard.tensors.values()]
    parameters = sum(math.prod(spec.shape) for spec in tensors)
    stored = sum(spec.end - spec.start for spec in tensors)
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if stored + _KEPT_BYTES > free:  # better said than killed by the system in the middle
        raise ExportError(
            f"{merged_dir}: is merged but not verified: that takes one of the two models in memory at a time, "
            f"{(stored + _KEPT_BYTES) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}. Close other "
            "programs, or copy the run to a larger machine, and merge again there. Until then it cannot be pushed."
        )
    return torch.float32 if 4 * parameters * 1.3 + (1 << 30) < free else None


def load_saved_tokenizer(folder: Path) -> Any:
    """Load an exported folder's own tokenizer; one that does not load is an ExportError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: its tokenizer does not load ({str(error).splitlines()[0]}). Merge again with `tokenizer_dir`."
        ) from None


def _with_adapter(base_dir: Path, adapter_dir: Path, dtype: torch.dtype | None, device: str) -> Any:
    from peft import PeftModel

    model = load_whole(base_dir, dtype, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie")  # PEFT's advice on tied embeddings; this compares unmerged
        return PeftModel.from_pretrained(model, adapter_dir).eval()


def load_whole(folder: Path, dtype: torch.dtype | None, device: str) -> Any:
    """Load a model folder in eval mode; weights that are missing or of another shape are an ExportError."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{folder}: does not load ({str(error).splitlines()[0]}). Fetch or merge it again.") from None
    wrong = sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str)
    if wrong:
        raise ExportError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, for example {wrong[0]}. The config and "
            "the weights are of different models: fetch or merge it again."
        )
    keep_odd_widths_unpacked(model)
    return model.to(device).eval()
