"""Ask: one question to a trained run, answered by base and trained model; one model is loaded at a time."""

from __future__ import annotations

import threading
import time
from typing import Any

from grpo_lite.errors import DataError, GRPOLiteError
from grpo_lite.runs.run_dir import RunDir, require_trained

LONGEST_QUESTION = 20_000  # characters


class Busy(GRPOLiteError):
    """A question is being answered."""


class Asker:
    """Answers questions one after the other. The last run's model stays loaded until another run is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chat: Any = None
        self._loaded: tuple[Any, ...] = ()

    def ask(self, run: RunDir, question: str, temperature: float = 0.0) -> dict[str, Any]:
        """Return the answers of both sides, and the seconds that they took.

        Raises:
            DataError: there is no question, or it is too long, or the temperature is not allowed.
            RunDirError: the run is not trained yet.
            Busy: another question is being answered.
        """
        from grpo_lite.engine.out_of_memory import free_memory
        from grpo_lite.ui.chat import Chat, Sampling

        question = question.strip()
        if not 0 < len(question) <= LONGEST_QUESTION:
            raise DataError(f"ask: give a question of 1 to {LONGEST_QUESTION:,} characters.")
        sampling = Sampling(temperature=temperature)
        require_trained(run)
        if not self._lock.acquire(blocking=False):
            raise Busy("ask: another question is being answered. Ask again when its answer is there.")
        try:
            begun = time.monotonic()
            adapter = (run.path, (run.adapter / "adapter_config.json").stat().st_mtime_ns)
            if adapter != self._loaded:
                self._chat, self._loaded = None, ()
                free_memory()  # the next model needs it
                self._chat, self._loaded = Chat(run, sampling, compare=True), adapter
            self._chat.sampling = sampling
            answers = self._chat.ask(question)
        finally:
            self._lock.release()
        return {"question": question, "answers": answers, "seconds": round(time.monotonic() - begun, 1)}
