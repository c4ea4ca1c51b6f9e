"""Schedules and averages against their formulas."""

import math

import pytest
import torch

from gspn2convert.optim import Ema, learning_rate, load_optimizer, optimizer_tensors


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    rates = [learning_rate(step, 24, warmup=0.125, peak=3e-3, final=1e-5) for step in range(24)]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[3] == pytest.approx(3e-3)
    assert rates[23] == pytest.approx(1e-5)
    for step in range(3, 24):
        assert rates[step] == pytest.approx(1e-5 + 2.99e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 20)))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99)])
def test_learning_rate_of_short_stages_stays_in_range(steps, warmup):
    rates = [learning_rate(step, steps, warmup=warmup, peak=1.0, final=0.1) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


def test_ema_is_the_recurrence_with_a_shorter_memory_at_first():
    module = torch.nn.Linear(3, 2).to(torch.float64)
    ema = Ema(module, 0.9)
    expected = module.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            module.weight += torch.sin(torch.arange(6.0) + step).view(2, 3)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    assert ema.average["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.average["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_ema_swap_and_back_changes_nothing():
    module = torch.nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    with torch.no_grad():
        module.weight += 1
    raw, average = module.weight.detach().clone(), ema.average["weight"].clone()
    ema.swap()
    assert torch.equal(module.weight, average)
    ema.swap()
    assert torch.equal(module.weight, raw)
    assert torch.equal(ema.average["weight"], average)


def test_optimizer_state_goes_over_by_name():
    def make():
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1), torch.nn.Linear(1, 1))
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    module, optimizer = make()
    for _ in range(3):
        module[:2](torch.ones(2, 3)).sum().backward()
        optimizer.step()
    tensors = optimizer_tensors(optimizer, module.named_parameters())
    assert sorted(tensors) == sorted(
        f"{layer}.{part}.{key}"
        for layer in (0, 1)
        for part in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    )
    other, fresh = make()
    other.load_state_dict(module.state_dict())
    load_optimizer(fresh, other.named_parameters(), {name: value.clone() for name, value in tensors.items()})
    for both in ((module, optimizer), (other, fresh)):
        both[1].zero_grad()
        both[0](torch.full((2, 3), 0.5)).sum().backward()
        both[1].step()
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
