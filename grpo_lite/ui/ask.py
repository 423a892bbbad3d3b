"""Ask: one question to a trained run, answered by base and trained model.

One model is loaded at a time. It leaves memory when another run is asked, or after ten minutes without a question.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from grpo_lite.errors import DataError, GRPOLiteError
from grpo_lite.runs.run_dir import RunDir, require_trained

LONGEST_QUESTION = 20_000  # characters
IDLE_S = 600.0  # without a question, after which the model leaves memory
UNLOADING_S = 1.0  # a question waits this long for a model that is leaving; an answer takes longer


class Busy(GRPOLiteError):
    """A question is being answered."""


class Asker:
    """Answers questions one after the other; the last run's model stays loaded for the next question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chat: Any = None
        self._loaded: tuple[Any, ...] = ()
        self._idle = threading.Timer(IDLE_S, self._unload)

    def ask(self, run: RunDir, question: str, temperature: float = 0.0) -> dict[str, Any]:
        """Return the answers of both sides, and the seconds that they took.

        Raises:
            DataError: there is no question, or it is too long, or the temperature is not allowed.
            RunDirError: the run is not trained yet.
            Busy: another question is being answered.
        """
        from grpo_lite.ui.chat import Chat, Sampling

        question = question.strip()
        if not 0 < len(question) <= LONGEST_QUESTION:
            raise DataError(f"ask: give a question of 1 to {LONGEST_QUESTION:,} characters.")
        sampling = Sampling(temperature=temperature)
        require_trained(run)
        if not self._lock.acquire(timeout=UNLOADING_S):
            raise Busy("ask: another question is being answered. Ask again when its answer is there.")
        self._idle.cancel()
        try:
            begun = time.monotonic()
            adapter = (run.path, (run.adapter / "adapter_config.json").stat().st_mtime_ns)
            if adapter != self._loaded:
                self._drop_model()  # the next one needs the memory
                self._chat, self._loaded = Chat(run, sampling, compare=True), adapter
            self._chat.sampling = sampling
            answers = self._chat.ask(question)
        finally:
            self._idle = threading.Timer(IDLE_S, self._unload)
            self._idle.daemon = True
            self._idle.start()
            self._lock.release()
        return {"question": question, "answers": answers, "seconds": round(time.monotonic() - begun, 1)}

    def _unload(self) -> None:
        """Drop the model, unless a question came meanwhile: then its end sets the next timer."""
        if self._lock.acquire(blocking=False):
            try:
                self._drop_model()
            finally:
                self._lock.release()

    def _drop_model(self) -> None:
        from grpo_lite.engine.out_of_memory import free_memory

        self._chat, self._loaded = None, ()
        free_memory()
