"""How training is watched: a board in a terminal, one that is redrawn in a notebook cell, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import TrainerCallback

from grpo_lite.memory.times import kept_times
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import MOST_FINDINGS, Board, GRPOAhead, Progress, WarmupBoard, rendered
from grpo_lite.report.evidence import Finding
from grpo_lite.screen import Show, ignore_closed_screen

ViewKind = Literal["plain", "live", "notebook"]
Stage = Literal["warmup", "grpo"]
Latest = Callable[[], list[dict[str, Any]]]


def make_view(kind: ViewKind, recipe: Recipe, show: Show, stage: Stage = "grpo", grpo_steps: int = 0) -> View:
    """Return the view of a stage: "plain" lines, a "live" board in a terminal, or one in a "notebook" cell.

    Args:
        stage: whose trainer it is added to; each stage has a view of its own.
        grpo_steps: with "warmup", the steps of GRPO that follow in the same command; 0: none.
    """
    board = WarmupBoard(recipe, ahead=grpo_ahead(recipe, grpo_steps)) if stage == "warmup" else Board(recipe)
    return {"plain": PlainView, "live": LiveView, "notebook": NotebookView}[kind](board, show)


def grpo_ahead(recipe: Recipe, steps: int) -> GRPOAhead | None:
    """Return what follows the warm-up, with its time by the last probe of this very recipe; None without steps."""
    times = kept_times(recipe) if steps else {}
    step_s = times.get("step_s")
    return GRPOAhead(steps, step_s and step_s * steps, times.get("measured_at", "")) if steps else None


class View(TrainerCallback):
    """Follows a training and draws its board at every log; enter it around `trainer.train()`."""

    shows_lines = False  # samples are lines of their own, not part of a board

    def __init__(self, board: Board | WarmupBoard, show: Show) -> None:
        self.show = show
        self.board = board
        self.latest: Latest = list
        self._start_s = 0.0

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the screen as it should stay, and let go of the trainer: its optimizer's memory is needed."""
        self.latest = list

    def show_findings(self, findings: Sequence[Finding]) -> None:
        """Put what the doctor finds at present on the board, instead of what it found before."""
        self.board.findings = findings[:MOST_FINDINGS]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_s = time.monotonic()
        self.board = replace(self.board, total=state.max_steps, begun_at=state.global_step, steps=[])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and self.board.logged in logs:
            self.board.steps.append({"step": state.global_step, **logs})
            self.board.seconds = time.monotonic() - self._start_s
            self.board.rows = self.latest()
            self.draw()

    def draw(self) -> None:
        """Show the board as it is now."""
        raise NotImplementedError


class PlainView(View):
    """One line a log: no carriage return, nothing that is ever redrawn."""

    shows_lines = True

    def draw(self) -> None:
        self.show(self.board.line())


class LiveView(View):
    """A board at the bottom of a terminal; lines that are printed or logged meanwhile scroll by above it.

    rich replaces sys.stdout and sys.stderr and counts the lines that pass through them. What is written to the terminal
    directly moves the cursor without rich's knowledge, and a part of the old board then stays above the new one.
    """

    def __enter__(self) -> View:
        from rich.live import Live

        terminal = (sys.stdout, sys.stderr)
        # Redrawn at each log only: no thread of rich's that a forked judge or sandbox could inherit in mid-write.
        self._live = Live(get_renderable=self._render, auto_refresh=False, vertical_overflow="crop")
        with ignore_closed_screen():
            self._live.__enter__()
        self._logs = [(handler, handler.stream) for handler in _log_handlers() if handler.stream in terminal]
        for handler, stream in self._logs:
            handler.setStream(sys.stdout if stream is terminal[0] else sys.stderr)
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        with ignore_closed_screen():
            for handler, stream in self._logs:
                handler.setStream(stream)
            self._live.__exit__(None, None, None)

    def _render(self) -> Any:
        return rendered(self.board, self.board.recipe.name)

    def draw(self) -> None:
        with ignore_closed_screen():
            self._live.refresh()


def _log_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yield the handlers of all loggers that write to a stream: each keeps the stream that it began with."""
    for logger in (logging.getLogger(), *logging.Logger.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):  # a placeholder for a parent has none
            if isinstance(handler, logging.StreamHandler):
                yield handler


class NotebookView(View):
    """A board in a notebook's cell, redrawn in place; needs IPython and no widgets."""

    _handle: Any = None

    def draw(self) -> None:
        from IPython.display import HTML, display

        picture = HTML(as_html(self.board))
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)


def as_html(board: Progress, width: int = 100) -> str:
    """Return the board as HTML with its colours, everything escaped."""
    import io

    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=width, force_jupyter=False)
    console.print(rendered(board, board.recipe.name))
    code = console.export_html(inline_styles=True, code_format="{code}")
    return f'<pre style="font-family:monospace;line-height:1.25;overflow-x:auto">{code}</pre>'
