"""`sealed`: TRL's own trainer, or Unsloth's in its place, with checkpoints that are whole or absent, and no NaN in it.

For the backend unsloth, whose patched trainer ours cannot build on. What ours keeps beyond (a round in use, metrics
since the last log) is not kept: a resume goes on from the checkpoint, though not bit for bit. Read in trl 1.14.0 and
1.16.0.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_lite.errors import TrainingError
from grpo_lite.runs import checkpoints
from grpo_lite.trainer.finite import are_finite, require_finite_adapter


def sealed(trainer_class: Any, skipped_steps: int) -> Any:
    """Return a subclass of a GRPOTrainer that saves as `checkpoints.saving` does and skips what is not finite.

    Args:
        trainer_class: the class to build on, patched by then.
        skipped_steps: steps in a row whose gradient may be NaN or infinite before the run stops.
    """

    class SealedGRPOTrainer(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._saving_to: Path | None = None
            self.faults: Counter[str] = Counter()
            super().__init__(*args, **kwargs)
            self.add_callback(_SkipUnlessFinite(self, skipped_steps))

        def _get_output_dir(self, trial: Any) -> str:
            return str(self._saving_to or super()._get_output_dir(trial))

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.require_finite_weights()
            run, step = Path(self.args.output_dir), self.state.global_step
            with checkpoints.saving(run, step) as scratch:
                self._saving_to = scratch
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._saving_to = None
                facts = {"step": step, "processes": 1, "reward": None, "faults": dict(self.faults)}
                folder = scratch / f"{checkpoints.PREFIX}{step}"
                (folder / checkpoints.FACTS_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
            checkpoints.rotate(run, self.args.save_total_limit, step)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.faults.update(checkpoints.read_facts(Path(checkpoint)).get("faults", {}))

        def require_finite_weights(self) -> None:
            """Refuse to save an adapter that holds NaN or infinity (`finite.require_finite_adapter`)."""
            require_finite_adapter(self)

    return SealedGRPOTrainer


class _SkipUnlessFinite(TrainerCallback):
    """Takes the gradients away where one is not finite: the optimizer then changes nothing."""

    def __init__(self, trainer: Any, most: int) -> None:
        self.trainer, self.most, self.in_a_row = trainer, most, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in self.trainer.model.parameters() if p.grad is not None]
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        if not trained or (scaler is not None and scaler.get_scale() > 1.0):
            return  # float16: the grad scaler skips such a step itself, and lowers its scale
        if are_finite(p.grad for p in trained):
            self.in_a_row = 0
            return
        for parameter in trained:
            parameter.grad = None
        self.trainer.faults["skipped_steps"] += 1
        self.in_a_row += 1
        if self.in_a_row >= self.most:
            raise TrainingError(
                f"{args.output_dir}: the gradient was NaN or infinite in {self.in_a_row} steps in a row, the last of "
                f"them step {state.global_step + 1}; these steps were skipped. What was saved before is kept. Lower "
                "grpo.learning_rate or set grpo.max_grad_norm, in a new run directory."
            )
