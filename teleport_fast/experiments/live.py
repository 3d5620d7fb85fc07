"""Live progress of a comparison: a bar per run on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from teleport_fast.experiments.train import Run

SECONDS_BETWEEN_LINES = 10.0
WORDS = 72


class Live:
    """A context manager and the Watcher of runs with `steps` steps each; `runs=None`: nobody knows yet how many."""

    def __init__(self, console: Console, runs: int | None, steps: int) -> None:
        self.console, self.runs, self.steps = console, runs, steps
        self.progress: Progress | None = None
        if console.is_terminal:
            # What is left beside the words of the longest line, so that 80 columns still show a bar.
            bar = BarColumn(bar_width=max(8, min(40, console.width - WORDS)))
            columns = (TextColumn("{task.description}"), bar, TextColumn("{task.fields[state]}"))
            self.progress = Progress(*columns, console=console)
        self.task: TaskID | None = None
        self.begun, self.last_line = 0, 0.0

    def __enter__(self) -> Live:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress:
            self.progress.stop()

    def _title(self, arm: str, seed: int) -> str:
        count = f"{self.begun}/{self.runs}" if self.runs else f"{self.begun}:"
        return f"{count} {arm}, seed {seed}"

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, arm: str, seed: int) -> None:
        """A new bar, or a line."""
        self.begun += 1
        self.last_line = time.perf_counter()
        if self.progress:
            self.task = self.progress.add_task(self._title(arm, seed), total=self.steps, state="")
        else:
            self._line(f"{self._title(arm, seed)}: starts, {self.steps} steps")

    def step(self, run: Run) -> None:
        """The bar moves; a line where the last one is old."""
        if self.progress and self.task is not None:
            self.progress.update(self.task, completed=len(run.losses), state=_state(run))
        elif time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            self._line(f"{self._title(run.arm, run.seed)}: step {len(run.losses)}/{run.steps}, {_state(run)}")

    def finished(self, run: Run) -> None:
        """The bar stays with the last validation loss."""
        ended = "diverged" if run.diverged else "interrupted" if run.interrupted else f"{run.seconds:.0f} s"
        state = ", ".join([*_measured(run), ended])
        if self.progress and self.task is not None:
            self.progress.update(self.task, state=state)
            self.progress.stop_task(self.task)
        else:
            self._line(f"{self._title(run.arm, run.seed)}: {state}")


def _state(run: Run) -> str:
    return ", ".join([f"loss {run.losses[-1]:.3f}"] * bool(run.losses) + _measured(run))


def _measured(run: Run) -> list[str]:
    parts = [f"val {run.validation[-1][1]:.3f}"] if run.validation else []
    if run.tokens_per_second == run.tokens_per_second:
        parts.append(f"{run.tokens_per_second:,.0f} tokens/s")
    return parts
