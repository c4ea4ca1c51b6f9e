"""Muon for matrices and AdamW for the rest, against each by itself, and against the definition by singular values."""

import copy

import torch
from torch import Tensor, nn

from gspn2convert.optim import BETAS, MuonAdamW, load_optimizer, make_optimizer, moments, optimizer_tensors

RATE, DECAY = 3e-3, 0.1


def test_a_step_is_an_orthogonal_matrix_of_the_size_of_adamws() -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(24, 16))
    before, matrix.grad = matrix.detach().clone(), torch.randn(24, 16) + 0.5
    make_optimizer("muon", [{"params": [matrix], "lr": RATE, "weight_decay": DECAY}], fused=False).step()
    step = (1 - RATE * DECAY) * before - matrix.detach()
    left, values, right = torch.linalg.svd(matrix.grad, full_matrices=False)
    # Its values are between 0.7 and 1.2, and so are those of the step, of which each has a root mean square of 0.2.
    sizes = torch.diagonal(left.T @ step @ right.T) / (0.2 * RATE * 24**0.5)
    assert 0.6 < sizes.min() < sizes.max() < 1.3
    assert values.max() > 5 * values.min()
    assert abs(step.square().mean().sqrt() / (0.2 * RATE) - 1) < 0.2


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
