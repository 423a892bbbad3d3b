"""PushCheckpoints: the callback that copies every checkpoint to where `remote_checkpoints` finds it again.

Apart from it, since a run's recipe is fetched before transformers may be imported (Unsloth comes first).
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from grpo_lite.checkpoints import checkpoint_folders, step_of
from grpo_lite.hub_errors import hub_message
from grpo_lite.remote_checkpoints import Remote, Show
from grpo_lite.run_dir import RunDir


class PushCheckpoints(TrainerCallback):
    """Copy each checkpoint elsewhere once it is whole."""

    def __init__(self, run: RunDir, remote: Remote, show: Show) -> None:
        self.run, self.remote, self.show = run, remote, show

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = checkpoint_folders(self.run.path)
        if not kept or step_of(kept[-1]) != state.global_step:
            return
        try:
            self.remote.push(self.run, kept[-1], [step_of(path) for path in kept])
        except Exception as error:  # whatever a drive or a network does, training goes on
            reason = hub_message(error, self.remote.name) or f"{type(error).__name__}: {error}"
            self.show(f"push_checkpoints: {kept[-1].name} was not copied to {self.remote.name}: {reason}")
