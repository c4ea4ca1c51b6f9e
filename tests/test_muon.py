"""Muon's steps against their definition by singular values, in fp64, and what it leaves to AdamW."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gspn2convert.muon import COEFFICIENTS, Muon, orthogonal
from gspn2convert.optim import BETAS, MuonAdamW, load_optimizer, make_optimizer, moments, optimizer_tensors

RATE, DECAY = 3e-3, 0.1


def by_singular_values(matrix: Tensor) -> Tensor:
    """What five steps of the iteration make of a matrix: its singular vectors, with other values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    first, third, fifth = COEFFICIENTS
    for _ in range(5):
        values = first * values + third * values**3 + fifth * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)], ids=str)
def test_orthogonal_is_the_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1) + 0.1
    found = orthogonal(matrices)
    for matrix, one in zip(matrices, found, strict=True):
        torch.testing.assert_close(one.double(), by_singular_values(matrix), rtol=1e-4, atol=1e-4)
    assert torch.linalg.svdvals(found[1]).max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_steps_are_those_of_the_definition():
    matrices = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (4, 6), (3, 3))]
    expected = [matrix.detach().double() for matrix in matrices]
    averages = [torch.zeros_like(matrix) for matrix in expected]
    optimizer = Muon([{"params": matrices, "lr": RATE, "weight_decay": DECAY}])
    for _ in range(4):
        for i, matrix in enumerate(matrices[:3]):  # the last has no gradient
            matrix.grad = torch.randn_like(matrix) + 0.5
            averages[i] = 0.95 * averages[i] + 0.05 * matrix.grad.double()
            direction = by_singular_values(0.05 * matrix.grad.double() + 0.95 * averages[i])
            expected[i] = (1 - RATE * DECAY) * expected[i] - RATE * 0.2 * max(matrix.shape) ** 0.5 * direction
        optimizer.step()
    for matrix, one in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.detach().double(), one, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
def test_steps_are_pytorchs():
    """PyTorch's iterates in bfloat16, so the steps agree as far as that goes."""
    ours = [nn.Parameter(torch.randn(16, 8)) for _ in range(2)]
    theirs = copy.deepcopy(ours)
    how = {"lr": RATE, "weight_decay": DECAY}
    optimizers = Muon([{"params": ours, **how}]), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **how)
    before = [one.detach().clone() for one in ours]
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for old, one, other in zip(before, ours, theirs, strict=True):
        step = (one - old).norm()
        assert (one - other).norm() < 0.02 * step


class Mixed(nn.Module):
    """A matrix, vectors, a convolution and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.scale = nn.Linear(4, 6), nn.Conv2d(1, 2, 2), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x).square().sum() + self.conv(x.view(1, 1, 2, -1)).square().sum()


def groups(module: nn.Module) -> list[dict]:
    """Two groups of weights, the first of which has all the matrices."""
    parameters = list(module.parameters())
    return [{"params": parameters[:2], "lr": RATE, "weight_decay": DECAY}, {"params": parameters[2:], "lr": 2 * RATE}]


def test_everything_but_matrices_is_adamws():
    torch.manual_seed(0)
    ours = Mixed()
    theirs = copy.deepcopy(ours)
    optimizers = make_optimizer("muon", groups(ours), fused=False), torch.optim.AdamW(groups(theirs), betas=BETAS)
    assert isinstance(optimizers[0], MuonAdamW)
    x = torch.randn(3, 4)
    ours(x).backward()
    theirs(x).backward()
    for optimizer in optimizers:
        optimizer.step()
    same = {name: torch.equal(p, dict(theirs.named_parameters())[name]) for name, p in ours.named_parameters()}
    assert [name for name, equal in same.items() if not equal] == ["linear.weight"]
    kept = sum(v.numel() for state in optimizers[0].state.values() for key, v in state.items() if key != "step")
    assert moments("muon", ours.parameters()) == kept
    assert moments("adamw", ours.parameters()) == kept + ours.linear.weight.numel()


def test_a_loaded_state_goes_on_with_the_same_bits():
    """By name, and by what Accelerate does with an optimizer, which makes its groups and state new."""
    torch.manual_seed(0)
    module, x = Mixed(), torch.randn(3, 4)
    optimizer = make_optimizer("muon", groups(module), fused=False)
    for _ in range(2):
        module(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    others = []
    for _ in range(2):
        other = copy.deepcopy(module)
        others.append((other, make_optimizer("muon", groups(other), fused=False)))
    tensors = optimizer_tensors(optimizer, module.named_parameters())
    load_optimizer(others[0][1], others[0][0].named_parameters(), {name: t.clone() for name, t in tensors.items()})
    others[1][1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in others[1][1].param_groups:
        group["lr"] *= 0.5
    for group in (*optimizer.param_groups, *others[0][1].param_groups):
        group["lr"] *= 0.5
    for each, its in ((module, optimizer), *others):
        each(x).backward()
        its.step()
    for other, _ in others:
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter, dict(module.named_parameters())[name]), name
