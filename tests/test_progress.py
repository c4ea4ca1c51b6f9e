"""What progress writes, and where."""

import io
import re

from rich.console import Console

from gspn2convert.progress import Progress


def plain(interval=0.0, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=20, **options)
    return Progress(console=console, interval=interval), stream


def test_plain_lines_are_whole_and_show_terms():
    progress, stream = plain()
    with progress:
        progress.start("align", 60, first_step=18)
        progress.advance(19, {"loss": 0.2134, "layer.0": 5.0, "gradient": 12.3456}, images=32)
        progress.advance(60, {"loss": float("nan")})
    first, last = stream.getvalue().splitlines()
    assert re.fullmatch(r"align 19/60 loss 0\.213 gradient 12\.3 \d+ img/s \d+:\d\d left", first)
    assert re.fullmatch(r"align 60/60 loss nan 0:00 left", last)


def test_plain_lines_come_at_intervals_and_at_the_end():
    progress, stream = plain(interval=1e9)
    with progress:
        progress.start("fit", 4)
        for step in range(1, 5):
            progress.advance(step, {"error": 0.1 * step})
        progress.say("layer [1]: closed form")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["4/4", "[1]:"]


def test_quiet_writes_nothing():
    progress, stream = plain(quiet=True)
    with progress:
        progress.start("fit", 1)
        progress.advance(1, {"loss": 1.0}, images=1)
    assert stream.getvalue() == ""


def test_nothing_goes_to_stdout(capsys):
    with Progress(interval=0.0) as progress:
        progress.start("fit", 1)
        progress.advance(1, {"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fit 1/1 loss 1" in captured.err


def test_a_terminal_gets_a_bar_with_the_figures():
    stream = io.StringIO()
    with Progress(console=Console(file=stream, force_terminal=True, width=120)) as progress:
        progress.start("recover", 8)
        progress.advance(3, {"loss": 0.25, "layer.0": 9.0}, images=4)
        progress.say("kept the average")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "recover" in text
    assert "3/8" in text
    assert "loss 0.25" in text
    assert "layer" not in text
    assert "kept the average" in text


def test_a_narrow_terminal_cuts_the_figures_and_nothing_else():
    stream = io.StringIO()
    with Progress(console=Console(file=stream, force_terminal=True, width=64)) as progress:
        progress.start("recover", 1000)
        progress.advance(300, {"loss": 0.25, "patch": 0.0876, "smooth_l1": 0.0992, "prefix": 0.0216}, images=4)
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()[-1]
    assert re.fullmatch(r"recover [━╺╸]+ +300/1000 [-\d:]+ loss .*…\s*", line)
