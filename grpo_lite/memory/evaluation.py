"""What generating for the evaluation takes, and how many completions at once the memory that is free holds. Torch-free.

Place in the line: beside `phases`, whose other two phases it does not overlap. An evaluation's prompts are all
different, so many of them are read at once.
How many are generated at once changes no greedy completion, but which samples are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from grpo_lite.memory.phases import (
    WORKSPACE_BYTES,
    Job,
    PhaseBytes,
    attended_bytes,
    kept_items,
    mixing_bytes,
    static_items,
    wave_items,
)


def evaluation_phase(job: Job) -> PhaseBytes:
    """Return the peak of generating `eval_rows` completions at once, every one at its cap."""
    items = [item for item in kept_items(job) if job.eval_while_training or item[0] != "optimizer"]
    return PhaseBytes((*items, *evaluation_items(job), ("kernels' workspace", WORKSPACE_BYTES)))


def evaluation_items(job: Job) -> list[tuple[str, int]]:
    shape, width, rows = job.shape, job.dtype_bytes, job.eval_rows
    longest = job.prompt + job.eval_completion
    if job.rollout != "generate" and not job.crosses_rope(longest):
        whole = replace(job, has_turns=False)  # each turn is read like a prompt
        return static_items(whole, rows, rows, job.eval_completion, bytes_per_logit=20)  # 16 greedy, 24 sampled
    dequantised = width * shape.largest_linear if job.load_in in ("4bit", "8bit") else 0
    # A block's result, the adapter's in float32, its product with the scale; in the attention's and the MLP's width.
    mlp = job.prompt * (2 * width + 8) * (shape.intermediate + shape.hidden)
    reading = rows * max(mlp, mixing_bytes(shape, job.prompt))
    attention = rows * longest * attended_bytes(shape, width)
    states = rows * shape.state_bytes(width)
    prompt_kv, row_kv = (states + width * shape.cached * rows * tokens for tokens in (job.prompt, longest))
    return wave_items(rows, (prompt_kv, reading), (row_kv, max(attention, rows * shape.vocab * 20) + dequantised))


def most_rows(rows: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `rows` that fits, one even where one does not."""
    low, high = 1, rows + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
