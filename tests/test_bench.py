"""The benchmark's arithmetic against numbers by hand, and one real run."""

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gspn2convert.bench import bench, crossover
from gspn2convert.commands.bench import _show as show
from gspn2convert.commands.models import load_rival
from gspn2convert.errors import UserError
from gspn2convert.model import build_student


@pytest.fixture
def student(tiny_teacher):
    return build_student(tiny_teacher, [0, 1], {"proxy_dim": 4})


def row(side, speedup):
    return {"height": side, "width": side, "tokens": side * side // 256, "speedup": speedup}


def test_crossover_is_interpolated_between_the_sizes_around_it():
    found = crossover([row(512, 1.5), row(224, 0.75)])
    # A third of the way from 196 to 1024 tokens.
    assert found["tokens"] == 196 + round((1024 - 196) / 3)
    assert "faster from about 472 tokens on, between 224x224 and 512x512" in found["verdict"]


@pytest.mark.parametrize(
    ("speedups", "verdict"),
    [
        ((0.5, 0.9), "SLOWER at every size measured (0.50x at 224x224, 0.90x at 512x512)"),
        ((1.2, 2.0), "faster at every size measured (1.20x at 224x224, 2.00x at 512x512)"),
        ((1.2, 0.9), "no clear crossover"),
    ],
)
def test_no_crossover_is_said_plainly(speedups, verdict):
    found = crossover([row(224, speedups[0]), row(512, speedups[1])])
    assert found["tokens"] is None
    assert verdict in found["verdict"]


def test_figures_of_a_run_hang_together(student, tiny_teacher):
    result = bench(student, tiny_teacher, [(32, 48), (64, 64)], batch_size=3, device=torch.device("cpu"))
    assert [(row["height"], row["width"], row["tokens"]) for row in result["sizes"]] == [(32, 48, 24), (64, 64, 64)]
    for row in result["sizes"]:
        assert row["speedup"] == pytest.approx(row["teacher"]["median_ms"] / row["student"]["median_ms"])
        for figures in (row["teacher"], row["student"]):
            assert 0 < figures["p20_ms"] <= figures["median_ms"] <= figures["p80_ms"]
            assert figures["images_per_second"] == pytest.approx(3000 / figures["median_ms"])
            assert figures["peak_bytes"] is None
    assert {"device", "torch", "timm", "commit", "date"} <= result["environment"].keys()


def test_a_model_that_computes_nan_is_not_timed(student, tiny_teacher):
    student.blocks[0].attn.proj.bias.data[0] = math.nan
    with pytest.raises(UserError, match="student: output at 32x48, fp32 holds NaN"):
        bench(student, tiny_teacher, [(32, 48)], device=torch.device("cpu"))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(student, tiny_teacher):
    with pytest.raises(UserError, match="30x48"):
        bench(student, tiny_teacher, [(32, 48), (30, 48)], device=torch.device("cpu"))


def test_a_teacher_that_cannot_take_the_students_size_is_told_whose_size(student):
    # The student takes 32 x 32, which is no multiple of 14.
    with pytest.raises(UserError, match=r"is no multiple of the patch 14x14.* \(dinov2_small .* OUT's size\)"):
        load_rival(student, Path("OUT"), "dinov2_small", pretrained=False)


def test_verdict_tells_where_a_student_is_slower_launched_one_by_one():
    rows = [
        row(512, 1.5) | {"teacher": {"launched_ms": 10.0}, "student": {"launched_ms": 16.0}},
        row(1024, 2.0) | {"teacher": {"launched_ms": 20.0}, "student": {"launched_ms": 16.0}},
    ]
    verdict = crossover(rows)["verdict"]
    assert verdict.startswith("the student is faster at every size measured (1.50x at 512x512, 2.00x at 1024x1024); ")
    assert verdict.endswith("; launched one by one, not as a CUDA graph, it is SLOWER: 0.62x at 512x512")
    assert "launched" not in crossover(rows[1:])["verdict"]


def test_table_tells_both_times_of_a_gpu(capsys):
    """As a CUDA graph, and launched one by one, which can be slower by far."""
    figures = {"p20_ms": 4.0, "p80_ms": 7.0, "images_per_second": 9.0, "peak_bytes": None}
    row = {"height": 32, "width": 48, "speedup": 1.25}
    row |= {"teacher": {**figures, "median_ms": 6.25, "launched_ms": 6.5}}
    row |= {"student": {**figures, "median_ms": 5.0, "launched_ms": 16.7}}
    document = {"environment": {"device": "a GPU"}, "batch_size": 1, "dtype": "bf16", "compiled": False}
    document |= {"rival": "teacher", "sizes": [row], "crossover": {"verdict": "so"}}
    show(document, Console(width=120))
    head, titles, teacher, student, _ = capsys.readouterr().out.splitlines()
    assert head == "a GPU; batch 1, bf16, as CUDA graphs"
    assert titles.split()[-4:] == ["launched", "one", "by", "one"]
    assert (teacher.split()[2], teacher.split()[-1]) == ("6.25", "6.5")
    assert (student.split()[2], student.split()[-2:]) == ("5", ["1.25x", "16.7"])
