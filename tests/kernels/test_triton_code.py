"""The machine code of the line scan, which a compiler may ruin while every number stays right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def loops() -> dict[str, dict[str, int]]:
    """What the inner loops consist of, compiled in a process that does not interpret."""
    script = Path(__file__).parent / "machine_code.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_products_of_a_latent_fit_into_shared_memory(loops) -> None:
    """Of the least there is: processors of compute capability 8.6 and 8.9 give a program 99 KiB."""
    assert set(loops["shared"]) == {"128", "256"}
    assert max(loops["shared"].values()) <= 99 * 1024


@pytest.mark.parametrize("kernel", ["read_kernel", "product_kernel"])
def test_many_prefix_tokens_and_merges_of_fp32_fit_there_too(loops, kernel: str) -> None:
    assert loops["wide"][kernel]["STACK"] == 0
    assert loops["wide"][kernel]["shared"] <= 99 * 1024


def test_the_pass_of_the_gradients_stays_in_registers(loops) -> None:
    """And leaves room for ten programs of two warps on a multiprocessor, whose loads are under way together."""
    assert loops["gradients"]["STACK"] == 0
    assert loops["gradients"]["REG"] <= 96


# Five positions of a lane, two where warps are few, with x, lam and u of each on their way to shared memory, and the
# logits of one, or weights of each; in planes no x, for the backward u and dy. Eight channels go to either side:
# between lanes, or through shared memory where warps share a line, which takes two barriers for each side. Lanes that
# share out weights hand on two for each of five positions. Scans that read x ask the cache to hold it and to let it go.
# In segments, those of planes too, a lane has one position, whose eight channels (four of ten stages) go to both sides
# at once; of eight, two stores and two barriers are of the launch's last line. A lane has four channels of fp32.
@pytest.mark.parametrize(
    ("kernel", "copies", "stores", "shuffles", "barriers", "hints"),
    [
        ("infer", 16, 16, 10, 4, 2),
        ("train", 16, 16, 10, 4, 2),
        ("planes", 15, 16, 0, 4, 0),
        ("backward", 11, 16, 10, 4, 0),
        ("few warps", 8, 0, 16, 2, 0),
        ("few warps of fp32", 8, 0, 8, 2, 0),
        ("segments of fp32", 4, 4, 0, 2, 0),
        ("planes of fp32", 3, 4, 0, 2, 0),
        ("segments", 4, 10, 0, 5, 0),
        ("segments of planes", 3, 10, 0, 5, 0),
        ("segments of ten stages", 4, 4, 0, 2, 0),
    ],
)
def test_loop_copies_ahead_and_keeps_its_state_in_registers(
    loops, kernel: str, copies: int, stores: int, shuffles: int, barriers: int, hints: int
) -> None:
    loop = loops[kernel]
    assert loop["STACK"] == 0
    assert not {"LDL", "STL", "LDG"} & set(loop), "spills, or loads that are waited for"
    assert loop["LDGSTS"] == copies
    assert loop.get("STS", 0) == stores, "a change of layout"
    assert loop.get("SHFL", 0) == shuffles, "a change of layout"
    assert loop.get("CCTL", 0) == hints
    assert loop["BAR"] <= barriers
    assert loop["room"] >= 0, "more shared memory than the plan tells"


@pytest.mark.parametrize("kernel", ["few warps", "few warps of fp32", "segments", "segments of fp32"])
def test_all_stages_have_room(loops, kernel: str) -> None:
    """What a step only hands on to the next Triton copies just before, if at all, into room for one line."""
    assert loops[kernel]["room"] == 0


def test_stages_hand_no_addresses_on(loops) -> None:
    """What a line writes to is counted when it is written; else a loop of ten stages moves nine numbers a step."""
    assert loops["segments of ten stages"].get("UMOV", 0) + loops["segments of ten stages"].get("MOV", 0) < 5
