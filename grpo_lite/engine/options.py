"""What the engine may do differently from plain TRL; torch-free, so that recipes and the CLI can import it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineOptions:
    """Switches of `PackedGRPOTrainer`; `compute="plain", rollout="generate"` with the other defaults is plain TRL."""

    compute: Literal["packed", "plain"] = "packed"
    """`packed`: each prompt is computed once per group, without padding. `plain`: TRL's own padded rows."""
    tokens_per_microbatch: int | None = None
    """Most tokens in one forward and backward; None takes `per_device_train_batch_size` rows at once, as TRL does."""
    rollout: Literal["shared", "generate"] = "shared"
    """`shared`: each prompt is prefilled once per group and finished rows leave the batch. `generate`: TRL's own."""
    rollout_kv_tokens: int | None = None
    """Most tokens whose keys and values are held during a rollout; None generates the whole batch in one wave."""
    warmup_tokens: int | None = None
    """Most padded tokens in one forward and backward of the warm-up; None takes a whole step at once."""
    offload_activations: bool = False
    """Whether what is kept for backward waits in main memory; with activation checkpointing, the layers' inputs."""
    refill: int = 0
    """Most extra groups generated per step to replace groups whose rewards are all equal."""
    replay: int = 0
    """Steps for which a group with a signal is kept, to take the place of one whose rewards are all equal."""
    length_stages: tuple[tuple[int, int], ...] = ()
    """`(until, tokens)`, ascending: before optimizer step `until`, completions have at most `tokens` tokens."""
    max_skipped_steps: int = 5
    """Optimizer steps in a row that may be skipped because loss or gradient is not finite, before the run stops."""

    @property
    def is_plain(self) -> bool:
        """Whether everything is left to TRL."""
        return (
            self.compute == "plain"
            and self.rollout == "generate"
            and not (self.refill or self.replay or self.length_stages)
        )

    def longest_completion(self, step: int, longest: int) -> int:
        """Return the most tokens of a completion in a step (counted from 0); `longest` after the last stage."""
        return next((tokens for until, tokens in self.length_stages if step < until), longest)
