"""The norm after the last block, by a kernel where it is on a GPU."""

from collections.abc import Callable

import pytest
import timm.layers
import torch
from torch import nn

from gspn2_kernels.testing import assert_close
from gspn2convert.model import build_student
from gspn2convert.vit import FinalNorm


def test_students_have_it_where_their_teacher_has_that_of_timm(make_teacher: Callable[..., nn.Module]) -> None:
    for options, kind in (({}, FinalNorm), ({"global_pool": "avg"}, nn.Identity)):
        teacher = make_teacher(**options)
        student = build_student(teacher, [0], {"proxy_dim": 4})
        assert (type(teacher.norm), type(student.norm)) == (kind.__base__ if kind is FinalNorm else kind, kind)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 24), (3, 24)], ids=["tokens", "pooled"])
def test_it_is_the_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    norm = timm.layers.LayerNorm(24, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.to(device, dtype)
    x = (torch.randn(shape) + 2).to(device, dtype)
    expected = nn.functional.layer_norm(x.double(), (24,), norm.weight.double(), norm.bias.double(), 1e-6).detach()
    norm.__class__ = FinalNorm
    assert_close("with gradients", expected, norm(x).detach())
    with torch.no_grad():
        assert_close("without", expected, norm(x))
