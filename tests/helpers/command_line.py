"""The program as a process of its own, and what it says where something is wrong."""

import subprocess
import sys

PROGRAM = (sys.executable, "-m", "gspn2convert")
RECIPE = """
name: tiny
mixer: {proxy_dim: 4}
fit: {images: 24, held_out: 8, batch_size: 8}
align: {steps: 2, batch_size: 4}
recover: {steps: 2, batch_size: 4}
held_out: 12
"""


def the_error(result):
    """The one line of the error."""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [lines[0]] == result.stderr.splitlines()[-1:]
    assert len(lines) == 1
    return lines[0]


def execute(*arguments, **options):
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=600, check=False, **options)
