"""`ResumableGRPOTrainer`: checkpoints that are whole or absent, and from which training goes on bit for bit.

TRL 1.14-1.16 and transformers save adapter, optimizer, scheduler, grad scaler and random states. What they lose, and is
kept here: TRL's count of micro-steps, the generation batch that is still in use, the metrics and the loss gathered
since the last log, the adaptive entropy controller's window. The part of the seam to TRL (`trainer.py`) that concerns
checkpoints; read in trl 1.14.0 and 1.16.0, transformers 5.17 and 5.23.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from grpo_lite.engine.options import EngineOptions
from grpo_lite.runs import checkpoints
from grpo_lite.trainer.finite import FaultTolerantGRPOTrainer, require_finite_adapter

STATE_FILE = "grpo_lite_state.pt"
_COUNTERS = ("_step", "entropy_coef", "_last_world_entropy", "_globalstep_last_logged", "_total_loss_scalar")


class ResumableGRPOTrainer(FaultTolerantGRPOTrainer):
    """GRPOTrainer with atomic, checksummed checkpoints and an exact resume."""

    # TRL's and transformers' own attributes that we also write
    _buffered_inputs: list[dict[str, Any]] | None
    _tr_loss: torch.Tensor
    _entropy_window_stats: torch.Tensor | None

    def __init__(self, *args: Any, options: EngineOptions | None = None, **kwargs: Any) -> None:
        self._saving_to: Path | None = None
        self._begun = time.monotonic()
        self.seconds_before = 0.0  # trained by the processes before this one
        self._rewards_since_save: list[float] = []
        super().__init__(*args, options=options, **kwargs)

    @property
    def seconds_trained(self) -> float:
        """Seconds of training in this process and those it resumed."""
        return self.seconds_before + time.monotonic() - self._begun

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._begun = time.monotonic()
        if isinstance(resume_from_checkpoint, str) and self._was_the_last(Path(resume_from_checkpoint)):
            return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _was_the_last(self, checkpoint: Path) -> bool:
        """Take up a checkpoint of the last step; transformers 5.23 would train a step beyond the end from it."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps  # a longer run goes on from there
        if state.global_step < last:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        self._take_up(checkpoints.read_facts(checkpoint))
        return True

    def _take_up(self, facts: dict[str, Any]) -> None:
        self.seconds_before = float(facts.get("seconds_trained", 0.0))
        self.faults.update(facts.get("faults", {}))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        reward = self.state.log_history[-1].get("reward") if self.state.log_history else None
        if reward is not None and math.isfinite(reward):
            self._rewards_since_save.append(float(reward))

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to) if self._saving_to else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite_weights()
        run, step = Path(self.args.output_dir), self.state.global_step
        with checkpoints.saving(run, step) as scratch:
            self._save_into(scratch, model, trial)
            facts = scratch / f"{checkpoints.PREFIX}{step}" / checkpoints.FACTS_FILE
            facts.write_text(json.dumps(self._facts(step)) + "\n", encoding="utf-8")
        self._rewards_since_save = []
        checkpoints.rotate(run, self.args.save_total_limit, step)

    def _save_into(self, scratch: Path, model: Any, trial: Any) -> None:
        """Write this process's part of a checkpoint below `scratch`."""
        self._saving_to = scratch
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_to = None
        torch.save(self._captured(), scratch / f"{checkpoints.PREFIX}{self.state.global_step}" / self._state_file)

    @property
    def _state_file(self) -> str:
        rank = self.accelerator.process_index
        return f"grpo_lite_state_{rank}.pt" if rank else STATE_FILE

    def _facts(self, step: int) -> dict[str, Any]:
        rewards = self._rewards_since_save
        return {
            "step": step,
            "processes": self.accelerator.num_processes,
            "reward": sum(rewards) / len(rewards) if rewards else None,
            "seconds_trained": round(self.seconds_trained, 1),
            "faults": dict(self.faults),
        }

    def _captured(self) -> dict[str, Any]:
        """Return what TRL keeps in memory only: plain values and tensors, loadable with `weights_only`."""
        rounds = self.args.steps_per_generation * self.num_iterations
        in_use = self._buffered_inputs is not None and self._step % rounds != 0
        return {
            "counters": {name: getattr(self, name) for name in _COUNTERS if hasattr(self, name)},
            "loss": self._tr_loss.detach().cpu(),
            "entropy_window": None if self._entropy_window_stats is None else self._entropy_window_stats.detach().cpu(),
            "metrics": {key: [float(v) for v in values] for key, values in self._metrics["train"].items()},
            "rewards_since_save": [],
            "buffered": self._buffered_inputs if in_use else None,
            "logs": _plain_logs(self._logs) if in_use else None,
            "faults_in_a_row": dict(self.faults_in_a_row),
            "spent_s": dict(self._spent_s),
        }

    # Resuming

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._take_up(checkpoints.read_facts(Path(checkpoint)))
        state = self._own_state(Path(checkpoint))
        if state is None:
            return
        self._step = state["counters"]["_step"]
        self._buffered_inputs = state["buffered"]
        if state["logs"] is not None:
            _restore_logs(self._logs, state["logs"])
        self.faults_in_a_row.update(state["faults_in_a_row"])
        self._spent_s.update(state["spent_s"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Also restore what `train` resets on its way here: transformers calls this just before the first step."""
        self._is_supported(self.model)  # its self-check must not come between the random states and the first step
        super()._load_rng_state(checkpoint)
        state = self._own_state(Path(checkpoint)) if checkpoint else None
        if state is None:
            return
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._tr_loss = state["loss"]
        self._entropy_window_stats = state["entropy_window"]
        self._metrics["train"] = defaultdict(list, state["metrics"])

    def _own_state(self, checkpoint: Path) -> dict[str, Any] | None:
        """Return what this process kept in a checkpoint; None where another number of processes wrote it.

        Their rounds are divided otherwise: the rest of a round in use is then sampled anew.
        """
        path = checkpoint / self._state_file
        if not path.is_file() or checkpoints.processes_of(checkpoint) != self.accelerator.num_processes:
            return None
        device = self.args.device
        where = device.type if device.type == "cpu" else device  # torch does not know the "cpu:0" of a launcher
        state: dict[str, Any] = torch.load(path, map_location=where, weights_only=True)
        return state

    # Weights

    def require_finite_weights(self) -> None:
        """Refuse to save an adapter that holds NaN or infinity (`finite.require_finite_adapter`)."""
        require_finite_adapter(self, self._last_good)

    def _last_good(self) -> str:
        found = checkpoints.last_usable(Path(self.args.output_dir)).folder
        return f"The last good checkpoint is {found}." if found else "No checkpoint had been saved before."


def _plain_logs(logs: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's log of the last completions as plain values (images are left out)."""
    return {
        "prompt": json.dumps(list(logs["prompt"]), default=str),
        "completion": json.dumps(list(logs["completion"]), default=str),
        "advantages": [float(value) for value in logs["advantages"]],
        "rewards": {key: [_number(value) for value in values] for key, values in logs["rewards"].items()},
        "extra": json.dumps({key: list(values) for key, values in logs["extra"].items()}, default=str),
    }


def _restore_logs(logs: dict[str, Any], plain: dict[str, Any]) -> None:
    length = logs["prompt"].maxlen
    for key in ("prompt", "completion"):
        logs[key].extend(json.loads(plain[key]))
    logs["advantages"].extend(plain["advantages"])
    for key, values in plain["rewards"].items():
        logs["rewards"][key] = deque(values, maxlen=length)
    for key, values in json.loads(plain["extra"]).items():
        logs["extra"][key] = deque(values, maxlen=length)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
