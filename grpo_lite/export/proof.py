"""Prove a merge: the merged folder, reloaded from disk, against base + adapter and against the base alone.

All three compute in one place and dtype on the same token sequences: held-out prompts, each continued greedily by base
+ adapter, so that the trained behaviour is measured too. One model is in memory at a time, on the GPU where it fits.
Nothing of the merge's own arithmetic is used: PEFT computes base + adapter. The tools that compare next-token
distributions serve the other exports too.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_lite.engine.generate import left_padded, stop_ids
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.errors import ExportError
from grpo_lite.export.merge.trained_base import TrainedBase
from grpo_lite.export.model_folder import (
    bytes_to_compute,
    dtype_that_fits,
    free_main_memory_bytes,
    load_saved_tokenizer,
    load_whole,
    stored_bytes,
)
from grpo_lite.export.safetensors import FLOATS, open_checkpoint
from grpo_lite.memory.fit import available_bytes
from grpo_lite.models.base import Base
from grpo_lite.models.device import Device
from grpo_lite.recipe.recipe import ModelSection
from grpo_lite.screen import Show, progress_lines
from grpo_lite.units import gib

CONTINUED_TOKENS = 16  # of the greedy continuation that is compared with each prompt
TOKENS_AT_ONCE = 4096  # of prompts that are continued together: one long prompt, or many short ones
KEPT_BYTES = 256 << 20  # for two sets of logits in float32
# All measured on SmolLM2-135M (docs/measurements/merge.md).
# KL that is no merge's fault, by what the models compute in: 16-bit weights' own rounding, then 16-bit computing's.
NOISE_KL = {"float32": 5e-4, "float16": 1e-3, "bfloat16": 5e-3}
MAX_MEAN_KL = 0.02  # wrong merges are off by tenths of nats and more
MIN_TOP1_AGREEMENT = 0.98  # where the reference is decided
# A reference whose best token leads by less is at a tie: logits near 20 lie 0.125 apart in bfloat16.
DECIDED_LEAD = 0.5
# Of the KL between base and base + adapter. KL grows with the square of a change, so a quarter is half of the effect.
MAX_SHARE_LOST = 0.25
# Right merges carry all of the update, within a few per cent where its KL is ten times the noise; a lost one 0, a
# doubled one 2. Weaker updates cannot be told from rounding, and are judged by KL alone.
CARRIED = (0.8, 1.25)
RESOLVED = 10


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
    """The measured agreement of a merge. The reference is base + adapter, not merged: the base that was merged onto."""

    prompts: int
    positions: int
    compute_dtype: str
    merged: Agreement  # must be close
    base: Agreement  # must be further away than merged
    update_carried: float  # how much of the adapter's change of the logits the merged model has; 1 is all of it
    effect_resolved: bool  # the adapter's effect stands out from rounding, so that update_carried is exact
    merged_against_base: float  # largest logit difference; 0 means the merge changed nothing
    faults: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        """Whether no model's logits hold NaN or infinity."""
        kl = self.merged.mean_kl + self.base.mean_kl
        return math.isfinite(kl + self.merged.max_logit_difference + self.merged_against_base)

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
    device: Device,
    show: Show,
    trained: TrainedBase | None = None,
) -> VerifyRecord:
    """Measure the agreement of a merged folder with base + adapter; the record's `faults` say what is wrong.

    All models compute in one place and one dtype (`proof_place`). Where the GPU's memory runs out all the same, or the
    base leaves float16's range, the proof is repeated on the CPU.

    Args:
        base_dir, adapter_dir, merged_dir: what was merged, and the result.
        prompts: held-out prompts as rendered text (special tokens are not added again).
        device: of this machine.
        show: called with lines for people: where it computes, and how far it is.
        trained: the base as 4-bit training read it, where that was merged onto.

    Raises:
        ExportError: no prompts, too little memory, or a folder that does not load completely.
    """
    place = proof_place(base_dir, device)
    if place.device == "cpu":
        _require_memory(base_dir, merged_dir)
    open_checkpoint(merged_dir)  # names truncated or missing shards
    tokenizer = load_saved_tokenizer(merged_dir)  # the folder's own, which proves that it loads
    sequences = tokenize(tokenizer, prompts)
    show(f"verifying the merge on {len(sequences)} prompts, {place.describe()}")
    record, obstacle = None, None
    try:
        record = _prove(base_dir, adapter_dir, merged_dir, sequences, tokenizer, place, show, trained)
    except RuntimeError as error:
        if place.device == "cpu" or not is_out_of_memory(error):
            raise
        obstacle = "the GPU's memory ran out"
    free_memory()  # outside the handler: the traceback holds the model
    if record and place.dtype == torch.float16 and not record.is_finite:
        obstacle = "the logits leave float16's range"
    if record and not obstacle:
        return record
    _require_memory(base_dir, merged_dir)
    place = Place("cpu", dtype_that_fits(base_dir))
    show(f"verifying the merge again, {place.describe()}: {obstacle}")
    return _prove(base_dir, adapter_dir, merged_dir, sequences, tokenizer, place, show, trained)


@dataclass(frozen=True)
class Place:
    """Where the models of a proof compute, and in which dtype; None: in the base's own."""

    device: Literal["cpu", "cuda"]
    dtype: torch.dtype | None

    def describe(self) -> str:
        """Return `on the GPU in float32` and the like."""
        dtype = "its own dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"on the {'CPU' if self.device == 'cpu' else 'GPU'} in {dtype}"


def proof_place(base_dir: Path, device: Device) -> Place:
    """Return the GPU where one of the models fits into its free memory, else the CPU.

    On a GPU: float32, or the 16-bit dtype that the base is stored in. Another one would round the update away. Only
    bfloat16 becomes float16 on a card that emulates it, because float16 keeps all of its digits; not where the model is
    known to leave float16's range.
    """
    free_memory()
    free = available_bytes(torch.device(device.kind)) or 0  # 0: no GPU
    for dtype in (torch.float32, *_half(base_dir, device)):
        if bytes_to_compute(base_dir, dtype) < free:
            return Place("cuda", dtype)
    return Place("cpu", dtype_that_fits(base_dir))


def _half(base_dir: Path, device: Device) -> Iterator[torch.dtype]:
    """Yield the 16-bit dtype in which a base keeps its digits on a GPU, if there is one."""
    stored = {spec.dtype for shard in open_checkpoint(base_dir) for spec in shard.tensors.values()}
    if stored == {"F16"} or (stored == {"BF16"} and device.bfloat16):
        yield FLOATS[stored.pop()]
    elif stored == {"BF16"} and Base(ModelSection(id=str(base_dir)), device, base_dir).dtype == "float16":  # type: ignore[call-arg]
        yield torch.float16


def _prove(
    base_dir: Path,
    adapter_dir: Path,
    merged_dir: Path,
    prompts: Sequence[torch.Tensor],
    tokenizer: Any,
    place: Place,
    show: Show,
    trained: TrainedBase | None,
) -> VerifyRecord:
    """Compute the logits of base + adapter, base and merged model in one place, and judge them."""
    model = _with_adapter(base_dir, adapter_dir, place, trained)
    dtype = model.dtype
    keep = positions_kept(model.config.get_text_config().vocab_size, len(prompts), CONTINUED_TOKENS)
    sequences, reference, base = [], [], []
    progress = progress_lines(show, "verifying the merge, base and adapter")
    stops = stop_ids(model, tokenizer)
    answers = greedy_answers(model, [prompt[0].tolist() for prompt in prompts], CONTINUED_TOKENS, stops)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        sequences.append(torch.cat([prompt, torch.tensor([answer], dtype=prompt.dtype)], dim=1))
        reference.append(last_logits(model, sequences[-1], keep))
        with model.disable_adapter():
            base.append(last_logits(model, sequences[-1], keep))
        progress(number, len(prompts))
    del model
    free_memory()

    model = load_whole(merged_dir, dtype, place.device)
    progress = progress_lines(show, "verifying the merge, merged model")
    merged = []
    for number, sequence in enumerate(sequences, start=1):
        merged.append(last_logits(model, sequence, keep))
        progress(number, len(sequences))
    del model
    free_memory()
    return judge(str(dtype).removeprefix("torch."), reference, base, merged)


def judge(
    compute_dtype: str, reference: list[torch.Tensor], base: list[torch.Tensor], merged: list[torch.Tensor]
) -> VerifyRecord:
    """Compare a merged model's logits with those of base + adapter (the reference) and base, and say what is wrong."""
    base_agreement = agreement(reference, base)
    record = VerifyRecord(
        prompts=len(reference),
        positions=sum(len(logits) for logits in reference),
        compute_dtype=compute_dtype,
        merged=agreement(reference, merged),
        base=base_agreement,
        update_carried=update_carried(reference, base, merged),
        effect_resolved=base_agreement.mean_kl >= RESOLVED * NOISE_KL.get(compute_dtype, 0.0),
        merged_against_base=max(float((ours - b).abs().max()) for ours, b in zip(merged, base, strict=True)),
        faults=(),
    )
    return dataclasses.replace(record, faults=tuple(_faults(record)))


def _faults(record: VerifyRecord) -> Iterator[str]:
    merged, base = record.merged, record.base
    if not record.is_finite:
        yield "the logits hold NaN or infinity: the weights or the compute dtype are unusable"
        return
    if base.max_logit_difference == 0:
        yield "base + adapter equals the base: the adapter changes nothing"
    elif record.merged_against_base == 0:
        yield "the merged model equals the base: the update is not in it (lost in rounding, or never added)"
    elif record.effect_resolved and not CARRIED[0] <= record.update_carried <= CARRIED[1]:
        yield (
            f"the merged model carries {record.update_carried:.2f} of the adapter's update; right is 1, allowed "
            f"{CARRIED[0]} to {CARRIED[1]} (0: lost; 2: merged twice)"
        )
    if merged.mean_kl - NOISE_KL.get(record.compute_dtype, 0.0) > MAX_SHARE_LOST * base.mean_kl:
        yield (
            f"the merged model is {merged.mean_kl:.1e} nats from base + adapter, the base alone {base.mean_kl:.1e}: "
            f"more than {MAX_SHARE_LOST:.0%} of the update's effect is lost"
        )
    if merged.mean_kl > MAX_MEAN_KL:
        yield f"mean KL {merged.mean_kl:.2g} nats is above {MAX_MEAN_KL}: rounding and noise alone cost below 7e-3"
    if (same := merged.decided_top1_agreement) < MIN_TOP1_AGREEMENT:
        yield f"top-1 agreement away from ties is {same:.1%}, below {MIN_TOP1_AGREEMENT:.0%}"


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


def update_carried(
    reference: Sequence[torch.Tensor], base: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]
) -> float:
    """Project the merged model's change of the logits on the adapter's: 0 if it is lost, 1 if all arrived, 2 if twice.

    Rounding noise points nowhere in particular and mostly averages out here, where it adds up in KL.
    """
    along = wanted = 0.0
    for with_adapter, without, given in zip(reference, base, merged, strict=True):
        change, made = (logits.double() - without.double() for logits in (with_adapter, given))
        change -= change.mean(-1, keepdim=True)  # a constant added to all logits changes nothing
        along += float((change * made).sum())
        wanted += float((change * change).sum())
    return along / wanted if wanted else 0.0


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Return the ids, each (1, T), of the prompts that have any; none at all is an ExportError."""
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    sequences = [torch.tensor([ids]) for ids in encoded if len(ids)]
    if not sequences:
        raise ExportError("No prompts with at least one token are given. Give held-out prompts as text.")
    return sequences


@torch.inference_mode()
def greedy_answers(model: Any, prompts: Sequence[Sequence[int]], cap: int, stops: Sequence[int]) -> list[list[int]]:
    """Return transformers' greedy continuation of each prompt, with its end token if that comes within `cap` tokens.

    Args:
        prompts: token ids.
        cap: most tokens of an answer.
        stops: every token that ends an answer (`stop_ids`).
    """
    from transformers import GenerationConfig

    pad = stops[0] if stops else 0
    config = GenerationConfig(max_new_tokens=cap, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=pad)
    answers: list[list[int]] = []
    rows = max(1, TOKENS_AT_ONCE // max(map(len, prompts), default=1))
    for start in range(0, len(prompts), rows):
        ids, mask = left_padded(prompts[start : start + rows], pad, model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers += [_with_end(row, stops) for row in out[:, ids.shape[1] :].tolist()]
    return answers


def _with_end(row: list[int], stops: Sequence[int]) -> list[int]:
    """Cut what follows a row's first end token: the padding of a batch."""
    ends = (i for i, token in enumerate(row) if token in stops)
    return row[: next(ends, len(row)) + 1]


@torch.no_grad()
def last_logits(model: Any, ids: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the logits of the last `keep` positions of ids (1, T) as float32 on the CPU, (keep, V)."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[0, -keep:].float().cpu()


def positions_kept(vocab_size: int, prompts: int, max_new_tokens: int) -> int:
    """Return how many positions of each prompt can be compared within the memory kept for logits."""
    fits = KEPT_BYTES // (2 * 4 * vocab_size * prompts)
    return max(1, min(fits, max(2 * max_new_tokens, 32)))


def _require_memory(base_dir: Path, merged_dir: Path) -> None:
    """Refuse a proof for which the memory is too small: better than being killed by the system in the middle."""
    need, free = stored_bytes(base_dir) + KEPT_BYTES, free_main_memory_bytes()
    if need > free:
        raise ExportError(
            f"{merged_dir}: is merged but not verified: that takes one of the two models in memory at a time, "
            f"{gib(need)}, and {gib(free)} are free. Close other programs, or copy the run to a "
            "larger machine, and merge again there. Until then it cannot be pushed."
        )


def _with_adapter(base_dir: Path, adapter_dir: Path, place: Place, trained: TrainedBase | None) -> Any:
    from peft import PeftModel

    model = load_whole(base_dir, place.dtype, place.device)
    if trained:
        trained.write_into(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie")  # PEFT's advice on tied embeddings; this compares unmerged
        return PeftModel.from_pretrained(model, adapter_dir).eval()
