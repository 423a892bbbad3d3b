"""What a model does to the logits of its output layer before the softmax: a scale, then a soft cap.

Granite, Cohere and Falcon-H1 scale them, Gemma 2 and its successors cap them. Both are read off the configuration, and
`score.self_check` compares the result with the model's own logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """A scale and a soft cap: `logits -> softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def read(cls, config: Any) -> "LogitTransform":
        """Read the transformation off a causal language model's configuration.

        Source: TRL 1.16, `add_fused_lm_head` in trl/trainer/utils.py, which names the same for transformers 5.23.
        """
        config = config.get_text_config()
        factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
        scale = next((factor for factor in factors if factor is not None), None)
        divisor = getattr(config, "logits_scaling", None)
        if scale is None and divisor is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(1.0 if scale is None else float(scale), None if softcap is None else float(softcap))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the transformed logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


UNCHANGED = LogitTransform()
