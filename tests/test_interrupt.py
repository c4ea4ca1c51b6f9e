"""Signals: those that are ignored, and those that come to the workers of a data loader."""

import os
import signal

import pytest
import torch
from torch.utils.data._utils import signal_handling

from gspn2convert.data import open_images
from gspn2convert.interrupt import SIGNALS, StopWish
from helpers.pictures import MakeFolder, train


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_that_was_ignored_stays_so(number: signal.Signals, ignored: bool) -> None:
    before = signal.getsignal(number)
    if ignored:
        signal.signal(number, signal.SIG_IGN)
    try:
        with StopWish() as stop:
            signal.raise_signal(number)
            assert stop.made != ignored
        assert (signal.getsignal(number) == signal.SIG_IGN) == ignored
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_outlive_a_signal_that_comes_as_they_start(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    images = open_images(str(make_folder(10)), "train")
    expected = train(images)
    torchs_own = signal_handling._set_worker_signal_handlers

    def signalled() -> None:
        torchs_own()  # by which SIGTERM ends a worker
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    assert torch.equal(torch.stack(train(images, workers=2)), torch.stack(expected))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
