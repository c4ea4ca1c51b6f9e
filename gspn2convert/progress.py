"""What a user sees while a stage runs: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text


class _Figures(ProgressColumn):
    """Figures of the last step; the one column that gives way where a terminal is narrow."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


class Progress:
    """Progress of one stage after another.

    Use as a context manager, so that the terminal is left tidy when a stage fails.

    Args:
        quiet: show nothing.
        console: where to write; stderr by default, so that stdout stays for results.
        interval: seconds between plain lines.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None, interval: float = 5.0) -> None:
        self._console = console or Console(stderr=True, quiet=quiet)
        self._interval = interval
        self._bars: Bars | None = None
        self._task = TaskID(0)
        self._stage, self._steps, self._first = "", 0, 0
        self._started = self._line_at = time.monotonic()
        self._images = 0

    def __enter__(self) -> Progress:
        """Take over the terminal, where there is one."""
        if self._console.is_terminal and not self._console.quiet:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24, table_column=Column(no_wrap=True)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                _Figures(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the terminal back."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def start(self, stage: str, steps: int, first_step: int = 0) -> None:
        """Begin a stage; a resumed one begins at `first_step`."""
        self._stage, self._steps, self._first = stage, steps, first_step
        self._started, self._line_at, self._images = time.monotonic(), 0.0, 0
        if self._bars is not None:
            self._task = self._bars.add_task(stage, total=steps, completed=first_step, figures="")

    def advance(self, step: int, figures: Mapping[str, float], images: int = 0) -> None:
        """Show that `step` steps are done.

        Args:
            step: steps done, 1 to the stage's steps.
            figures: what to show; names with a dot are details and left out.
            images: images that the last step took, over all processes.
        """
        self._images += images
        shown = " ".join(f"{name} {value:.3g}" for name, value in figures.items() if "." not in name)
        if images:
            shown += f" {self.images_per_second:.0f} img/s"
        if self._bars is not None:
            self._bars.update(self._task, completed=step, figures=shown)
        elif time.monotonic() - self._line_at >= self._interval or step == self._steps:
            self._line_at = time.monotonic()
            left = (self._line_at - self._started) / (step - self._first) * (self._steps - step)
            self.say(f"{self._stage} {step}/{self._steps} {shown} {left // 60:.0f}:{left % 60:02.0f} left")

    def say(self, text: str) -> None:
        """Write one line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def images_per_second(self) -> float:
        """Images a second since the stage began, or was resumed."""
        return self._images / max(time.monotonic() - self._started, 1e-9)
