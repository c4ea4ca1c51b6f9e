"""The losses against values worked out by hand or in float64 numpy."""

import math

import numpy as np
import pytest
import torch
from torch import tensor

from gspn2convert.losses import cosine_loss, kl, normalised_difference, relative_error, similarity, smooth_l1, variance


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 15, 6, generator=generator)
    return student, student + 0.5 * torch.randn(4, 15, 6, generator=generator) + 3


def test_cosine_loss_by_hand():
    student = tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    teacher = tensor([[0.0, 3.0], [2.0, 2.0], [5.0, 0.0]])
    assert cosine_loss(student, teacher).item() == pytest.approx(1 - (0 + 1 - 1) / 3, abs=1e-7)


def test_smooth_l1_counts_in_deviations_of_the_teacher():
    # Differences in deviations: 0.5 (quadratic: 0.125) and 4 (linear: 3.5).
    value = smooth_l1(tensor([[11.0, 2.0]]), tensor([[10.0, 0.0]]), tensor([2.0, 0.5]))
    assert value.item() == pytest.approx((0.125 + 3.5) / 2, rel=1e-6)


def test_relative_error_is_the_definition(pair):
    student, teacher = pair
    gamma = torch.linspace(0.1, 2, 6)
    s, t, g = (x.double().numpy() for x in (student, teacher, gamma))
    wrong = ((g * (s - t)) ** 2).sum()
    spread = ((g * (t - t.mean((0, 1)))) ** 2).sum()
    assert relative_error(student, teacher, gamma).item() == pytest.approx(wrong / spread, rel=1e-5)
    assert relative_error(teacher, teacher, gamma).item() == 0
    assert relative_error(teacher.mean((0, 1)).expand_as(teacher), teacher).item() == pytest.approx(1, rel=1e-5)


def test_relative_error_sees_only_what_passes_layer_scale(pair):
    student, teacher = pair
    gamma = torch.ones(6)
    gamma[2] = 0
    changed = student.clone()
    changed[..., 2] += 100
    assert relative_error(changed, teacher, gamma).item() == relative_error(student, teacher, gamma).item()
    assert relative_error(student, teacher, torch.zeros(6)).item() == 0


def test_relative_error_of_a_batch_is_the_mean_of_its_shares(pair):
    student, teacher = pair
    spread = variance(teacher)
    shares = [relative_error(student[part], teacher[part], None, spread) for part in (slice(0, 2), slice(2, 4))]
    assert sum(shares).item() / 2 == pytest.approx(relative_error(student, teacher).item(), rel=1e-6)


def test_kl_by_hand(pair):
    student, teacher = (x[:, 0] for x in pair)
    p, q = (np.exp(x.double().numpy() / 3) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    expected = 9 * (p * np.log(p / q)).sum(-1).mean()
    assert kl(student, teacher, 3.0).item() == pytest.approx(expected, rel=1e-5)
    two = tensor([[0.0, math.log(3.0)]]), tensor([[0.0, 0.0]])
    assert kl(*two, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_normalised_difference_is_two_minus_twice_the_correlation(pair):
    student, teacher = pair
    s, t = (x.double().reshape(-1, 6).numpy() for x in pair)
    correlation = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    # LayerNorm's epsilon of 1e-5 is what keeps the two apart.
    assert normalised_difference(student, teacher).item() == pytest.approx(2 - 2 * correlation, rel=1e-4)
    assert normalised_difference(7 * student + 4, student).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("tokens", "channels"), [(15, 6), (5, 16), (1, 3)])
def test_similarity_is_the_difference_of_all_cosines(tokens, channels):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(3, tokens, channels, generator=generator, dtype=torch.float64) + 2
    teacher = torch.randn(3, tokens, channels, generator=generator, dtype=torch.float64) - 1
    cosines = [
        np.array([[[a @ b / np.sqrt((a @ a) * (b @ b)) for b in image] for a in image] for image in side.numpy()])
        for side in (student, teacher)
    ]
    expected = ((cosines[0] - cosines[1]) ** 2).mean()
    assert similarity(student, teacher).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert similarity(3 * student, student).item() == pytest.approx(0, abs=1e-6)  # lengths do not count


def test_similarity_has_the_gradient_of_all_cosines(pair):
    student, teacher = (x.requires_grad_() for x in pair)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher.detach())]
    ((unit[0] @ unit[0].mT - unit[1] @ unit[1].mT) ** 2).mean().backward()
    expected, student.grad = student.grad, None
    similarity(student, teacher.detach()).backward()
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=1e-4)


def test_similarity_of_nearly_equal_tokens_survives_autocast():
    """Of 256 tokens with a large mean the three powers are near 1, and their sum is near 1e-6."""
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(2, 256, 32, generator=generator) + 2
    for noise in (1e-2, 1e-1, 1.0):
        student = teacher + noise * torch.randn(2, 256, 32, generator=generator)
        unit = [torch.nn.functional.normalize(x.double(), dim=-1) for x in (student, teacher)]
        expected = ((unit[0] @ unit[0].mT - unit[1] @ unit[1].mT) ** 2).mean().item()
        single = similarity(student, teacher).item()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = similarity(student, teacher).item()
        assert single == pytest.approx(expected, abs=1e-6)
        assert mixed == pytest.approx(single, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(pair, dtype):
    student, teacher = (x.to(dtype) for x in pair)
    for loss, arguments in [
        (cosine_loss, ()),
        (smooth_l1, (torch.ones(6),)),
        (relative_error, (torch.full((6,), 1e-5, dtype=dtype),)),
        (normalised_difference, ()),
        (similarity, ()),
        (kl, (2.0,)),
    ]:
        expected = loss(student.float(), teacher.float(), *arguments)
        assert expected.dtype == torch.float32
        assert torch.equal(loss(student, teacher, *arguments), expected)
