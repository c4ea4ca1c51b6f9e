"""Numbers that are none, gradients that are none, and more images than a launch takes, by the Triton kernels."""

import pytest
import torch

from gspn2_kernels import line_scan, line_scan_ref, register_backend
from gspn2_kernels.eager import line_scan_bwd as eager_bwd
from gspn2_kernels.eager import line_scan_fwd as eager_fwd
from gspn2_kernels.line_scan import Training
from gspn2_kernels.testing import random_inputs
from gspn2_kernels.tuning import Plan

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_line_scan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("apart", [False, True], ids=["logits", "weights"])
@pytest.mark.parametrize("neighbour", [0, 1, 2])
def test_a_logit_that_is_no_number_shows_where_it_does_in_the_reference(neighbour: int, apart: bool) -> None:
    x, lam, logits, u = random_inputs((1, 5, 6, 4), 1, torch.float32, DEVICE)
    logits[0, 2, 3, :, 0, neighbour] = float("nan")
    expected = line_scan_ref(x, lam, logits, u).isnan()
    assert 0 < expected.sum() < expected.numel()
    actual = kernels.line_scan_fwd(x, lam, logits, u, 0, chosen=Plan(1, 1, 1, 4, 1, 3, APART=apart))
    assert torch.equal(actual.isnan(), expected)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.fixture
def triton_on_the_cpu():
    training = Training(kernels.line_scan_train, kernels.line_scan_bwd, kernels.empty_states)
    register_backend("cpu", "triton", kernels.line_scan_fwd, kernels.line_scan_recomputed_bwd, training)
    yield
    register_backend("cpu", "eager", eager_fwd, eager_bwd)


@pytest.mark.usefixtures("triton_on_the_cpu")
@pytest.mark.skipif(DEVICE == "cuda", reason="interprets on the CPU")
def test_a_function_that_gives_no_gradient_leaves_none() -> None:
    inputs = [t.requires_grad_() for t in random_inputs((1, 3, 4, 4), 1, torch.float32, "cpu")]
    y = line_scan(*inputs)
    (_NoGradient.apply(y).sum() + inputs[0].sum()).backward()
    assert torch.equal(inputs[0].grad, torch.ones_like(inputs[0]))
    assert all(t.grad is None for t in inputs[1:])


def test_more_images_than_a_launch_takes_are_refused() -> None:
    inputs = random_inputs((2**16, 1, 1, 1), 1, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="65536 images are more than a launch can take; scan at most 65535 at a time"):
        kernels.line_scan_fwd(*inputs, 0)
