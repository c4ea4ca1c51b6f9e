"""The closed-form fit: moments against their definition, and a fit of what a mixer can represent exactly."""

import copy
from collections.abc import Iterator

import pytest
import torch
from timm.layers import Attention
from torch import Tensor

from gspn2_kernels import line_scan_ref
from gspn2_kernels.testing import assert_close
from gspn2convert.fit import fit_closed_form, fit_gate, fit_svd, patches, proxy_projection
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.moments import Moments, local_moments, ridge_solve, scan_features

DIM, HEADS, GRID = 16, 2, (5, 7)


def make_mixer(prefix: int, **options: int | bool) -> Gspn2Mixer:
    torch.manual_seed(0)
    attention = Attention(DIM, HEADS, qkv_bias=True).eval().requires_grad_(False)
    return Gspn2Mixer(attention, has_prefix=prefix > 0, **{"proxy_dim": 4, **options}).eval().requires_grad_(False)


def tokens(images: int, prefix: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A mean, and channels that go together: what tokens of a network look like.
    mix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9))
    return torch.randn(images, prefix + GRID[0] * GRID[1], DIM, generator=generator) @ mix / 4 + 0.5


def relative_error(mixer: Gspn2Mixer, x: Tensor, y: Tensor) -> float:
    target = patches(y, GRID)
    difference = patches(mixer(x, GRID), GRID) - target
    return float(difference.square().sum() / (target - target.mean((0, 1))).square().sum())


@pytest.mark.parametrize("segment", [0, 3])
def test_scan_features_are_mean_scans(segment: int) -> None:
    a = tokens(2, 0).unflatten(1, GRID)
    ones = torch.ones(2, *GRID, 4, DIM)
    y = line_scan_ref(a, ones, torch.zeros(2, *GRID, 4, 1, 3), ones, segment)
    lines = torch.tensor([min(segment, n) if segment else n for n in (5, 5, 7, 7)])
    expected = (y / lines[:, None]).reshape(2, 35, 4 * DIM)
    assert_close("features", expected, scan_features(a, segment), 1e-6)


def test_moments_are_sums_of_products_and_project() -> None:
    scans, shared, y = torch.randn(3, 35, 8) + 1, torch.randn(3, 5), torch.randn(3, 35, 2)
    moments = Moments.empty(8, 5, 2, torch.device("cpu"))
    for part in (slice(0, 1), slice(1, 3)):
        moments.add_gram(scans[part], shared[part])
        moments.add_cross(scans[part], shared[part], y[part])
    wide = torch.cat([scans, shared[:, None].expand(3, 35, 5), torch.ones(3, 35, 1)], -1).flatten(0, 1).double()
    assert_close("gram", wide.T @ wide, moments.gram, 1e-6)
    assert_close("cross", wide.T @ y.flatten(0, 1).double(), moments.cross, 1e-6)

    down = torch.randn(2, 1)
    small = moments.project(down)
    latent = (scans.unflatten(-1, (4, 2)) @ down).flatten(2)
    narrow = torch.cat([latent, shared[:, None].expand(3, 35, 5), torch.ones(3, 35, 1)], -1).flatten(0, 1).double()
    assert_close("projected gram", narrow.T @ narrow, small.gram, 1e-6)
    assert_close("projected cross", narrow.T @ y.flatten(0, 1).double(), small.cross, 1e-6)


def test_ridge_is_the_damage_of_multiplicative_noise() -> None:
    x = torch.cat([torch.randn(400, 3, dtype=torch.float64) + 1, torch.ones(400, 1, dtype=torch.float64)], 1)
    y = torch.randn(400, 2, dtype=torch.float64)
    ours = ridge_solve(x.T @ x, x.T @ y, 0.1)
    # sum over rows and signs of noise: x * (1 + e) with e = +-sqrt(0.1) on each feature but the last.
    noisy = [
        x * (1 + 0.1**0.5 * torch.tensor([*signs, 0.0]))
        for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    ]
    expected = torch.linalg.lstsq(torch.cat(noisy), y.repeat(8, 1)).solution
    assert_close("coefficients", expected, ours, 1e-7)


def test_local_moments_fit_a_depthwise_filter() -> None:
    a = tokens(4, 0).unflatten(1, GRID)
    lpu = torch.nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM, bias=False).requires_grad_(False)
    gram, cross = local_moments(a, lpu(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert_close("filter", lpu.weight.flatten(1).double(), torch.linalg.solve(gram, cross), 1e-4)


def test_proxy_projection_finds_the_latent_directions() -> None:
    down, up = torch.randn(DIM, 3, dtype=torch.float64), torch.randn(4, 3, DIM, dtype=torch.float64)
    x = tokens(50, 0).flatten(0, 1).double()
    second = x.T @ x / len(x)
    found = proxy_projection((down @ up).flatten(0, 1), second, None, 3)
    noise = second.diagonal().mean() * torch.diag(found.square().sum(0))
    assert_close("unit mean square", torch.eye(3, dtype=torch.float64), found.T @ second @ found + noise, 1e-8)
    inside = found @ torch.linalg.lstsq(found, down).solution
    assert_close("span", down, inside, 1e-8)


def test_what_patches_hardly_show_is_no_large_latent() -> None:
    x = tokens(50, 0).flatten(0, 1).double()
    x = x - x.mean(1, keepdim=True)  # as a layer norm leaves it, but for rounding
    second = x.T @ x / len(x) + 1e-9 * torch.eye(DIM)
    found = proxy_projection(torch.eye(DIM, dtype=torch.float64).repeat(4, 1), second, None, DIM)
    squares = (found.T @ second @ found).diagonal().sort().values
    assert squares[0] < 1e-7
    assert 1e-3 < squares[1] < squares[-1] < 1
    change = second.diagonal().mean().sqrt() * torch.randn(10000, DIM, dtype=torch.float64)
    assert (change @ found).square().mean(0).max() < 1.1


@pytest.mark.parametrize(
    ("prefix", "options", "limit"),
    [
        (0, {"lpu": False, "global_branch": False}, 1e-8),
        (2, {"lpu": False, "prefix_gate": False}, 1e-8),
        (1, {"lpu": False, "segment": 3}, 1e-8),
        (1, {"lpu": False, "regions": 2}, 1e-8),
        (1, {}, 1e-2),  # scan and LPU alternate, and close in on each other slowly
    ],
    ids=["scan", "scan and global", "segments and gate", "regions", "all parts"],
)
def test_fit_recovers_a_mixer_from_its_outputs(prefix: int, options: dict[str, int | bool], limit: float) -> None:
    truth = make_mixer(prefix, **options)
    for part in (truth.proj, truth.shared, truth.lpu):
        if part is not None:
            part.weight.normal_(generator=torch.Generator().manual_seed(3))
    mixer = copy.deepcopy(truth)
    mixer.reset_parameters()
    calibration = [tokens(20, prefix, seed) for seed in (1, 2)]
    # The truth's own share of the prefix tokens, so that the gate has nothing left to be wrong about.
    gate = make_mixer(prefix, **options)
    samples = lambda: ((x, truth(x, GRID)) for x in calibration)  # noqa: E731
    second = fit_gate(gate, samples, GRID)
    if gate.prefix is not None and gate.prefix.log_sum is not None:
        for each in (truth, mixer):
            each.prefix.log_sum.load_state_dict(gate.prefix.log_sum.state_dict())
    fit_closed_form(mixer, samples, GRID, None, second, ridge=0.0, rounds=8)
    unseen = tokens(10, prefix, seed=7)
    assert relative_error(mixer, unseen, truth(unseen, GRID)) < limit


def test_gate_predicts_the_log_sum_of_the_scores() -> None:
    mixer, calibration = make_mixer(1), [tokens(40, 1, seed) for seed in (1, 2)]
    assert mixer.prefix is not None
    assert mixer.prefix.log_sum is not None

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        return ((x, x) for x in calibration)

    second = fit_gate(mixer, samples, GRID)
    a = torch.cat([patches(x, GRID) for x in calibration]).flatten(0, 1).double()
    assert_close("second moment", a.T @ a / len(a), second, 1e-6)
    unseen = tokens(20, 1, seed=5)
    truth, guess = mixer.prefix.log_sum_exp(unseen, 1), mixer.prefix.log_sum(patches(unseen, GRID))
    assert float((guess - truth).square().sum() / (truth - truth.mean((0, 1))).square().sum()) < 0.1


def test_svd_initialisation_is_the_value_projection_of_the_mean_line() -> None:
    mixer = make_mixer(0, proxy_dim=DIM, lpu=False, global_branch=False)
    attention = make_mixer(1).prefix
    assert attention is not None
    fit_svd(mixer, attention, torch.eye(DIM, dtype=torch.float64))
    x = tokens(3, 0)
    mean = scan_features(x.unflatten(1, GRID), 0).unflatten(-1, (4, DIM)).mean(2)
    value = mean @ attention.qkv.weight[2 * DIM :].T + attention.qkv.bias[2 * DIM :]
    assert_close("svd", attention.proj(value), mixer(x, GRID), 1e-5)


def test_svd_initialisation_beside_regions_is_what_is_read_of_them() -> None:
    mixer, x = make_mixer(1, regions=2, lpu=False, global_branch=False), tokens(3, 1)
    attention = make_mixer(1).prefix
    assert attention is not None
    assert mixer.prefix is not None
    fit_svd(mixer, attention, torch.eye(DIM, dtype=torch.float64))
    _, share, values = mixer.prefix(x, GRID)
    assert_close("svd", share @ values + attention.proj.bias, patches(mixer(x, GRID), GRID), 1e-6)


def test_svd_initialisation_on_patches_that_are_all_zero() -> None:
    mixer, attention = make_mixer(0, lpu=False, global_branch=False), make_mixer(1).prefix
    assert attention is not None
    fit_svd(mixer, attention, torch.zeros(DIM, DIM, dtype=torch.float64))
    x = torch.zeros(2, GRID[0] * GRID[1], DIM)
    value = attention.proj(x @ attention.qkv.weight[2 * DIM :].T + attention.qkv.bias[2 * DIM :])
    assert_close("a constant", value, mixer(x, GRID), 1e-5)
