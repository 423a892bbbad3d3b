"""`unsloth_trainer`: Unsloth's trainer (or TRL's own) with checkpoints that are whole or absent, and no NaN in it.

For the backend unsloth, whose patched trainer `PackedGRPOTrainer` cannot build on. What ours keeps beyond (a round in
use, metrics since the last log) is not kept: a resume continues from the checkpoint, though not bit for bit. Read in
trl 1.14.0 and 1.16.0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from grpo_lite.models.reference import load_trained
from grpo_lite.trainer.finite import Faults
from grpo_lite.trainer.journal import Journal
from grpo_lite.trainer.parallel import Peers
from grpo_lite.trainer.state import Checkpoints


def unsloth_trainer(trainer_class: Any, skipped_steps: int) -> Any:
    """Return a subclass of a GRPOTrainer that saves as `checkpoints.saving` does and skips what is not finite.

    Args:
        trainer_class: the class to build on, patched by then.
        skipped_steps: steps in a row whose gradient may be NaN or infinite before the run stops.
    """

    class UnslothTrainer(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.journal = Journal(self)
            self.faults = Faults(self, skipped_steps)
            self.checkpoints = Checkpoints(self, Peers(self))

        def sampling(self) -> AbstractContextManager[Any]:
            return nullcontext()

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.journal.start()
            return super().train(*args, **kwargs)

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.journal.write_figures()
            super().log(*args, **kwargs)
            self.journal.note_reward()

        def _get_output_dir(self, trial: Any) -> str:
            return str(self.checkpoints.folder or super()._get_output_dir(trial))

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.checkpoints.save(partial(super()._save_checkpoint, model, trial))

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(checkpoint, model)
            load_trained(self.model, checkpoint)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.checkpoints.load(Path(checkpoint))

    return UnslothTrainer
