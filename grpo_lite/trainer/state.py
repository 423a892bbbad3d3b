"""Checkpoints that are whole or absent (`Checkpoints`), and from which training resumes bit for bit (`ExactState`).

TRL 1.14-1.16 and transformers save adapter, optimizer, scheduler, grad scaler and random states. `ExactState` keeps
what they lose: TRL's count of micro-steps, the generation batch that is still in use, the metrics and the loss gathered
since the last log, the adaptive entropy controller's window. Also read in transformers 5.17 and 5.23.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_lite.runs import checkpoints
from grpo_lite.trainer.finite import require_finite_adapter
from grpo_lite.trainer.parallel import Peers

STATE_FILE = "grpo_lite_state.pt"
_COUNTERS = ("_step", "entropy_coef", "_last_world_entropy", "_globalstep_last_logged", "_total_loss_scalar")


class Checkpoints:
    """Saves what a trainer saves, whole or not at all, with the facts of the run so far.

    Args:
        trainer: a GRPOTrainer with `journal` and `faults`.
        peers: its processes.
        writers: write further files into a checkpoint's folder, each process its own.
        facts: returns further facts.
    """

    def __init__(
        self,
        trainer: Any,
        peers: Peers,
        writers: Sequence[Callable[[Path], None]] = (),
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.trainer, self.peers, self.writers, self.facts = trainer, peers, writers, facts
        self.folder: Path | None = None  # where the trainer's files go while a checkpoint is being written

    def save(self, write: Callable[[], None]) -> None:
        """Save a checkpoint; `write` is the trainer's own way to.

        Raises:
            TrainingError: the adapter holds NaN or infinity.
        """
        require_finite_adapter(self.trainer)
        if not self.peers.is_first:
            self._write_part(Path(), write)
            return
        run, step, journal = Path(self.trainer.args.output_dir), self.trainer.state.global_step, self.trainer.journal
        with checkpoints.saving(run, step) as scratch:
            folder = self._write_part(scratch, write)
            rewards = journal.rewards_since_save
            facts = {
                "step": step,
                "processes": self.trainer.accelerator.num_processes,
                "reward": sum(rewards) / len(rewards) if rewards else None,
                "seconds_trained": round(journal.seconds_trained, 1),
                "faults": dict(self.trainer.faults.counts),
                **self.facts(),
            }
            (folder / checkpoints.FACTS_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        journal.rewards_since_save = []
        checkpoints.rotate(run, self.trainer.args.save_total_limit, step)

    def _write_part(self, scratch: Path, write: Callable[[], None]) -> Path:
        """Write this process's files into the first one's folder, before that is sealed; return that folder."""
        self.folder = self.peers.first_ones(scratch)
        folder = self.folder / f"{checkpoints.PREFIX}{self.trainer.state.global_step}"
        if self.peers.are_there:
            folder.mkdir(exist_ok=True)
        try:
            write()
        finally:
            self.folder = None
        for write_own in self.writers:
            write_own(folder)
        self.peers.wait()
        return folder

    def load(self, checkpoint: Path) -> None:
        """Continue the counts of a checkpoint: seconds trained and faults."""
        facts = checkpoints.read_facts(checkpoint)
        self.trainer.journal.seconds_before = float(facts.get("seconds_trained", 0.0))
        self.trainer.faults.counts.update(facts.get("faults", {}))


class ExactState:
    """What TRL keeps in memory only, in a file of each process."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def _file_name(self) -> str:
        rank = self.trainer.accelerator.process_index
        return f"grpo_lite_state_{rank}.pt" if rank else STATE_FILE

    def save(self, folder: Path) -> None:
        """Write plain values and tensors, loadable with `weights_only`."""
        trainer = self.trainer
        rounds = trainer.args.steps_per_generation * trainer.num_iterations
        in_use = trainer._buffered_inputs is not None and trainer._step % rounds != 0
        window = trainer._entropy_window_stats
        state = {
            "counters": {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)},
            "loss": trainer._tr_loss.detach().cpu(),
            "entropy_window": None if window is None else window.detach().cpu(),
            "metrics": {key: [float(v) for v in values] for key, values in trainer._metrics["train"].items()},
            "buffered": trainer._buffered_inputs if in_use else None,
            "logs": _plain_logs(trainer._logs) if in_use else None,
            "faults_in_a_row": dict(trainer.faults.in_a_row),
            "spent_s": dict(trainer.journal.spent_s),
        }
        torch.save(state, folder / self._file_name)

    def load(self, checkpoint: Path) -> None:
        """Restore the round in use, with optimizer and scheduler."""
        state, trainer = self._read(checkpoint), self.trainer
        if state is None:
            return
        trainer._step = state["counters"]["_step"]
        trainer._buffered_inputs = state["buffered"]
        if state["logs"] is not None:
            _restore_logs(trainer._logs, state["logs"])
        trainer.faults.in_a_row.update(state["faults_in_a_row"])
        trainer.journal.spent_s.update(state["spent_s"])

    def load_last(self, checkpoint: Path) -> None:
        """Restore what `train` resets on its way to the first step."""
        state, trainer = self._read(checkpoint), self.trainer
        if state is None:
            return
        for name, value in state["counters"].items():
            setattr(trainer, name, value)
        trainer._tr_loss = state["loss"]
        trainer._entropy_window_stats = state["entropy_window"]
        trainer._metrics["train"] = defaultdict(list, state["metrics"])

    def _read(self, checkpoint: Path) -> dict[str, Any] | None:
        """Return what this process kept in a checkpoint; None where another number of processes wrote it.

        Those divided their rounds differently: the rest of a round in use is then sampled anew.
        """
        path = checkpoint / self._file_name
        if not path.is_file() or checkpoints.processes_of(checkpoint) != self.trainer.accelerator.num_processes:
            return None
        device = self.trainer.args.device
        where = device.type if device.type == "cpu" else device  # torch does not know the "cpu:0" of a launcher
        state: dict[str, Any] = torch.load(path, map_location=where, weights_only=True)
        return state


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
