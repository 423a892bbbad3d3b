"""What the warm-up takes: forward and backward of rows that share no prompt, packed or as TRL pads them. Torch-free.

Place in the line: beside `phases`, whose other phases it does not overlap: the warm-up is over, and its optimizer gone,
before the first rollout. How many tokens go through the model at once changes no gradient, so a step is divided until
it fits, and `memory.tokens_per_microbatch` bounds this stage too.
"""

from __future__ import annotations

import math
from dataclasses import replace

from grpo_lite.memory.phases import Job, PhaseBytes, training_phase

PADDING = 1.25  # times the tokens of a step; a step with more padding goes through the model in parts


def padded_step(tokens_per_step: int) -> int:
    """Return the most tokens, padding included, of a step that goes through the model at once."""
    return math.ceil(PADDING * tokens_per_step)


def warmup_phase(job: Job) -> PhaseBytes:
    """Return the peak of one part of a step: as many rows as its tokens are, each as long as the longest.

    The scored tokens are counted as if no row had a prompt, so it is an estimate from above.
    """
    rows, rest = divmod(warmup_tokens(job), job.warmup_row)
    whole, more = _rows(job, rows), _rows(job, rows + 1)
    return PhaseBytes(
        tuple(
            (name, size + (larger - size) * rest // job.warmup_row)
            for (_, size), (name, larger) in zip(whole.items, more.items, strict=True)
        )
    )


def _rows(job: Job, rows: int) -> PhaseBytes:
    alone = replace(job, prompt=0, completion=job.warmup_row, rows=rows, group=1, tokens=None)
    return training_phase(replace(alone, rollout="generate", holds_reference=False))


def warmup_tokens(job: Job) -> int:
    """Return the padded tokens that go through the model at once."""
    step = _step_tokens(job)
    return step if job.warmup_tokens is None else min(step, max(job.warmup_tokens, job.warmup_row))


def warmup_parts(job: Job) -> int:
    """Return in how many parts a step goes through the model."""
    return math.ceil(_step_tokens(job) / warmup_tokens(job))


def _step_tokens(job: Job) -> int:
    return max(job.warmup_step, job.warmup_row)
