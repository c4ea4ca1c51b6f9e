"""Ctrl-C and SIGTERM as a wish to stop at the next good moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A stage was stopped by Ctrl-C or SIGTERM; all that can be resumed is saved.

    Args:
        stage: the stage.
        step: steps or layers of it that are done.
        steps: steps or layers of it in all.
    """

    def __init__(self, stage: str, step: int, steps: int) -> None:
        # The closed-form fit holds sums over all images: it is quick to repeat, and too large to save. Quick is
        # the choice of the blocks that keep attention, too.
        again = "resume to begin this stage again" if stage in ("fit", "select") else "resume to go on"
        super().__init__(f"stopped in stage {stage} after {step} of {steps}; {again}")
        self.stage, self.step, self.steps = stage, step, steps


class StopWish:
    """Notes the first Ctrl-C or SIGTERM inside a `with` block; a second one acts as it did before the block.

    Only the main thread can receive signals; in any other the wish never comes. One that was ignored stays so: shells
    keep from their background jobs the Ctrl-C that is meant for another.

    Attributes:
        made: whether a signal has come.
    """

    def __init__(self) -> None:
        self.made = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopWish:
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the earlier handlers back."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back inside a `with`, so that a process started there meets none before it is ready."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows sends them to one process alone
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and a first SIGTERM in a worker: both may be sent to all processes, and the parent ends its own.

    Args:
        worker: its number, which a data loader tells.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _hear_the_next)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _hear_the_next(number: int, frame: FrameType | None) -> None:
    # A second one is the parent's, for a worker that hangs.
    signal.signal(number, signal.SIG_DFL)
