"""Scripts of the tests in processes of their own, alone or two that work together."""

import os
import subprocess
import sys


def environment(**more):
    """This process's, for one that imports what this one can and does with one thread."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return os.environ | own | {name: str(value) for name, value in more.items()}


def start(script, *arguments, **more):
    """Run a script in another process; more is for its environment."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_two(script, *arguments, **more):
    """What each of two processes wrote that know of each other as those do that `accelerate launch` starts."""
    together = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"} | more
    processes = [start(script, *arguments, RANK=rank, LOCAL_RANK=rank, **together) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:  # what waits for the other one would wait for long
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs
