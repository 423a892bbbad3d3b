"""What the warm-up takes: one forward and backward of padded rows, as TRL's SFTTrainer computes them. Torch-free.

Place in the line: beside `phases`, whose other phases it does not overlap: the warm-up is over, and its optimizer gone,
before the first rollout. How many tokens go through the model at once changes no gradient.
"""

from __future__ import annotations

from dataclasses import replace

from grpo_lite.memory.phases import Job, PhaseBytes, training_phase


def warmup_phase(job: Job) -> PhaseBytes:
    """Return the peak of one part of a step, every row as long as the longest.

    The scored tokens are counted as if no row had a prompt, so it is an estimate from above.
    """
    rows = max(1, warmup_tokens(job) // job.warmup_row)
    padded = replace(
        job, compute="plain", rollout="generate", prompt=0, completion=job.warmup_row, rows=rows, holds_reference=False
    )
    return training_phase(padded)


def warmup_tokens(job: Job) -> int:
    """Return the padded tokens that go through the model at once."""
    step = max(job.warmup_step, job.warmup_row)
    return step if job.warmup_tokens is None else min(step, max(job.warmup_tokens, job.warmup_row))
