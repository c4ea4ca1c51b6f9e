"""One run at a time in an output folder: a lock on the folder itself, which the kernel drops when the process dies.

It leaves no file behind. Between machines that share a file system it may not hold, and a folder that is removed under
a run takes its lock along.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from gspn2convert.artifact import check_output_folder, make_folder
from gspn2convert.errors import UserError
from gspn2convert.processes import anywhere


@contextlib.contextmanager
def sole_writer(folder: Path, resume: bool, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of an output folder, inside a `with`; if it was made here and stays empty, it goes again.

    The main process holds the lock. Where the file system knows no locks, the run goes on without.

    Args:
        folder: output folder.
        resume: see `check_output_folder`, which is asked again, for another run may have ended meanwhile.
        accelerator: of the run; all its processes have to come here, and all end where the main one is refused.

    Raises:
        UserError: another run is writing there, or has written there.
    """
    with contextlib.ExitStack() as stack:
        refusal: Exception | None = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(_locked(folder))
                check_output_folder(folder, resume)
            except (UserError, OSError) as error:  # told to the other processes, which wait
                refusal = error
        if anywhere(refusal is not None, accelerator.device):
            raise refusal or UserError(f"the main process of this run cannot write to {folder}, and says why")
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = _Lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            for each in made:
                each.rmdir()
        lock.release()


class _Lock:
    """A folder's lock, where there is one to be had."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = _open_locked(folder)
        if self._descriptor is not None:
            # Processes that read images would share the lock, and outlive a run that is killed by seconds.
            os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open_locked(folder: Path) -> int | None:
    """Make the folder and lock it; the descriptor that holds the lock, None without one."""
    for _ in range(3):  # a run that ends may take an empty folder away before it is locked here
        make_folder(folder)
        descriptor = _flock(folder)
        if descriptor is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)
    return None


def _flock(folder: Path) -> int | None:
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(
                f"another run is writing to {folder}; let it end or stop it, or name another output folder"
            ) from error
        return None
    return descriptor
