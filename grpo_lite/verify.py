"""Prove a merge: the merged folder, reloaded from disk, against base + adapter and against the base alone.

All three compute in one dtype on the same token sequences: held-out prompts, each continued greedily by base + adapter,
so that the trained behaviour is measured too. One model is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_lite.errors import ExportError
from grpo_lite.lora_adapter import open_adapter
from grpo_lite.shards import open_checkpoint

# Measured on SmolLM2-135M (docs/measurements/merge.md): wrong merges are off by whole nats, right ones by 1e-6 to 1e-4
# where all computes in float32, and by the noise of 16-bit computing otherwise, which no merge can be blamed for.
NOISE_KL = {"float32": 0.0, "bfloat16": 5e-3, "float16": 5e-4}
MAX_MEAN_KL = 0.02
MIN_TOP1_AGREEMENT = 0.98  # where the reference is decided
# A reference whose best token leads by less is at a tie: logits near 20 lie 0.125 apart in bfloat16.
DECIDED_LEAD = 0.5
# Of the KL between base and base + adapter. KL grows with the square of a change, so a quarter is half of the effect.
MAX_SHARE_LOST = 0.25

_KEPT_BYTES = 256 << 20  # for two sets of logits in float32

Logits = Callable[[torch.Tensor], torch.Tensor]  # token ids (1, T) -> logits (1, T, V)


@dataclass(frozen=True)
class Agreement:
    """How one model's next-token distributions stand to the reference's."""

    mean_kl: float  # KL(reference ‖ model), nats a token
    max_kl: float
    top1_agreement: float  # share of positions with the same most likely token
    decided_top1_agreement: float  # the same where the reference leads by DECIDED_LEAD; 1 if nowhere
    max_logit_difference: float

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"top-1 agreement {self.top1_agreement:.2%} ({self.decided_top1_agreement:.2%} away from ties), "
            f"mean KL {self.mean_kl:.1e} nats, largest logit difference {self.max_logit_difference:.2g}"
        )


@dataclass(frozen=True)
class VerifyRecord:
    """The measured agreement of a merge. The reference is 16-bit base + adapter, not merged."""

    prompts: int
    positions: int
    compute_dtype: str
    merged: Agreement  # must be close
    base: Agreement  # must be further away than merged
    merged_against_base: float  # largest logit difference; 0 means the merge changed nothing
    training: Agreement | None  # reference: the training-time model (4-bit base + adapter), against the merged
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with `passed`."""
        return dataclasses.asdict(self) | {"passed": self.passed}

    def require_passed(self, merged_dir: Path) -> None:
        """Raise an ExportError that says what is wrong, if anything is."""
        if self.faults:
            raise ExportError(
                f"{merged_dir}: the merge is not proven right ({self.merged.describe()}):\n"
                + "\n".join(f"  {fault}" for fault in self.faults)
                + "\nDo not use or publish it. Merge again onto the base that the adapter was trained on."
            )


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
    open_adapter(adapter_dir)  # refuses zero, NaN and unsupported ones by name
    open_checkpoint(merged_dir)  # and truncated or missing shards
    dtype = dtype or _compute_dtype(base_dir, device)
    tokenizer = tokenizer or _load_tokenizer(merged_dir)
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    sequences = [torch.tensor([ids]) for ids in encoded if len(ids)]
    if not sequences:
        raise ExportError("verify: no prompts with at least one token are given. Give held-out prompts as text.")
    report = progress or (lambda stage, done, total: None)

    model = _with_adapter(base_dir, adapter_dir, dtype, device)
    dtype = model.dtype
    keep = _positions_kept(model.config.get_text_config().vocab_size, len(sequences), max_new_tokens)
    reference, base = [], []
    for number, prompt in enumerate(sequences):
        sequences[number] = _continue(model, prompt, max_new_tokens)
        reference.append(_last_logits(model, sequences[number], keep))
        with model.disable_adapter():
            base.append(_last_logits(model, sequences[number], keep))
        report("base + adapter", number + 1, len(sequences))
    del model
    gc.collect()

    model = _load(merged_dir, dtype, device)
    merged = []
    for number, sequence in enumerate(sequences):
        merged.append(_last_logits(model, sequence, keep))
        report("merged", number + 1, len(sequences))
    del model
    gc.collect()

    training = [training_logits(ids)[0, -keep:].float().cpu() for ids in sequences] if training_logits else None
    return _record(dtype, reference, base, merged, training)


def agreement(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Agreement:
    """Compare logits of two models at the same positions; each item is (T, V)."""
    kl, same, decided, largest = [], [], [], 0.0
    for expected, given in zip(reference, other, strict=True):
        log_p, log_q = expected.double().log_softmax(-1), given.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
        best = log_p.topk(2, dim=-1)
        same.append(best.indices[:, 0] == given.argmax(-1))
        decided.append(best.values[:, 0] - best.values[:, 1] >= DECIDED_LEAD)
        largest = max(largest, float((expected - given).abs().max()))
    all_kl, all_same, all_decided = torch.cat(kl), torch.cat(same).double(), torch.cat(decided)
    return Agreement(
        mean_kl=float(all_kl.mean()),
        max_kl=float(all_kl.max()),
        top1_agreement=float(all_same.mean()),
        decided_top1_agreement=float(all_same[all_decided].mean()) if all_decided.any() else 1.0,
        max_logit_difference=largest,
    )


def _record(
    dtype: torch.dtype | None,
    reference: list[torch.Tensor],
    base: list[torch.Tensor],
    merged: list[torch.Tensor],
    training: list[torch.Tensor] | None,
) -> VerifyRecord:
    merged_agreement, base_agreement = agreement(reference, merged), agreement(reference, base)
    moved = max(float((ours - theirs).abs().max()) for ours, theirs in zip(merged, base, strict=True))
    name = str(dtype).removeprefix("torch.")
    return VerifyRecord(
        prompts=len(reference),
        positions=sum(len(logits) for logits in reference),
        compute_dtype=name,
        merged=merged_agreement,
        base=base_agreement,
        merged_against_base=moved,
        training=agreement(training, merged) if training else None,
        faults=tuple(_faults(name, merged_agreement, base_agreement, moved)),
    )


def _faults(dtype: str, merged: Agreement, base: Agreement, moved: float) -> Iterator[str]:
    if not math.isfinite(merged.mean_kl + merged.max_logit_difference + moved):
        yield "the logits hold NaN or infinity: the weights or the compute dtype are unusable"
        return
    if base.max_logit_difference == 0:
        yield "base + adapter equals the base: the adapter changes nothing"
    elif moved == 0:
        yield "the merged model equals the base: the update is not in it (lost in rounding, or never added)"
    elif merged.mean_kl - NOISE_KL.get(dtype, 0.0) > MAX_SHARE_LOST * base.mean_kl:
        yield (
            f"the update did not survive: the merged model is {merged.mean_kl:.1e} nats from base + adapter, the base "
            f"alone {base.mean_kl:.1e}; at most {MAX_SHARE_LOST:.0%} of that is allowed. A small update is lost in "
            "rounding to the base's dtype: train for more steps or with a higher learning rate, or use the adapter "
            "unmerged"
        )
    if merged.mean_kl > MAX_MEAN_KL:
        yield f"mean KL {merged.mean_kl:.2g} nats is above {MAX_MEAN_KL}: rounding and noise alone cost below 5e-3"
    if merged.decided_top1_agreement < MIN_TOP1_AGREEMENT:
        yield f"top-1 agreement away from ties {merged.decided_top1_agreement:.1%} is below {MIN_TOP1_AGREEMENT:.0%}"


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
def _last_logits(model: Any, ids: torch.Tensor, keep: int) -> torch.Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits[0, -keep:].float().cpu()


def _positions_kept(vocab_size: int, prompts: int, max_new_tokens: int) -> int:
    fits = _KEPT_BYTES // (2 * 4 * vocab_size * prompts)
    return max(1, min(fits, max(2 * max_new_tokens, 32)))


def _compute_dtype(base_dir: Path, device: str) -> torch.dtype | None:
    parameters = sum(math.prod(spec.shape) for shard in open_checkpoint(base_dir) for spec in shard.tensors.values())
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return torch.float32 if 4 * parameters * 1.3 + (1 << 30) < free else None


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: its tokenizer does not load ({str(error).splitlines()[0]}). Merge again with `tokenizer_dir`."
        ) from None


def _with_adapter(base_dir: Path, adapter_dir: Path, dtype: torch.dtype | None, device: str) -> Any:
    from peft import PeftModel

    model = _load(base_dir, dtype, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie")  # PEFT's advice on tied embeddings; this compares unmerged
        return PeftModel.from_pretrained(model, adapter_dir).eval()


def _load(folder: Path, dtype: torch.dtype | None, device: str) -> Any:
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
    return model.to(device).eval()
