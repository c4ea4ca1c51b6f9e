"""Closed-form fit of one mixer to the attention layer that it replaces (stage 0, no SGD).

Shapes: B batch, N = P + M tokens, P prefix tokens, M = H W patches, C channels, R proxy dimension, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from gspn2_kernels.gated import DIRECTIONS
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.moments import Moments, local_moments, ridge_solve, scan_features

# The gate needs no protection from noise, only a solvable system.
GATE_RIDGE = 1e-3

# One pass over the calibration images: the layer's input and attention output, both (B, N, C).
Samples = Callable[[], Iterator[tuple[Tensor, Tensor]]]
Grid = tuple[int, int]


@torch.no_grad()
def fit_closed_form(
    mixer: Gspn2Mixer,
    samples: Samples,
    grid: Grid,
    gamma: Tensor | None,
    second: Tensor,
    *,
    ridge: float,
    rounds: int,
) -> None:
    """Fit scan, LPU and global branch by least squares, in place.

    Args:
        mixer: as constructed (lam = u = 1, equal neighbours, side branches silent), its gate fitted.
        samples: called once a pass; `1 + 2 * rounds` passes, one without an LPU.
        grid: H, W of the patches.
        gamma: (C,) LayerScale, or None; the rank is spent on the error behind it.
        second: (C, C) second moment of the patches, see `fit_gate`.
        ridge: diagonal ridge, see `moments.ridge_solve`; 0.01 to 0.05 gives a good start for training.
        rounds: alternations of LPU and scan.
    """
    moments = scan_moments(mixer, samples, grid)
    full = ridge_solve(moments.gram, moments.cross, ridge)
    down = proxy_projection(full[: moments.scans], second, gamma, mixer.proxy_dim)
    mixer.down.weight.copy_(down.T)
    projected = moments.project(down)
    install(mixer, ridge_solve(projected.gram, projected.cross, ridge))
    for _ in range(rounds if mixer.lpu is not None else 0):
        fit_lpu(mixer, samples, grid)
        cross = scan_cross_moments(mixer, samples, grid, projected)
        install(mixer, ridge_solve(projected.gram, cross, ridge))


@torch.no_grad()
def fit_gate(mixer: Gspn2Mixer, samples: Samples, grid: Grid) -> Tensor:
    """Regress the log-sum-exp of the patches' scores, which the gate needs, on the patches.

    Returns:
        (C, C) second moment of the patches, float64.
    """
    gram = cross = torch.zeros((), dtype=torch.float64, device=mixer.down.weight.device)
    log_sum = mixer.prefix.log_sum if mixer.prefix is not None else None
    for x, _ in samples():
        a = F.pad(patches(x, grid), (0, 1), value=1.0).flatten(0, 1)
        gram = gram + (a.T @ a).double()
        if mixer.prefix is not None and log_sum is not None:
            target = mixer.prefix.log_sum_exp(x, x.shape[1] - grid[0] * grid[1])
            cross = cross + (a.T @ target.flatten(0, 1)).double()
    if log_sum is not None:
        solution = ridge_solve(gram, cross, GATE_RIDGE)
        log_sum.weight.copy_(solution[:-1].T)
        log_sum.bias.copy_(solution[-1])
    return gram[:-1, :-1] / gram[-1, -1]


def scan_moments(mixer: Gspn2Mixer, samples: Samples, grid: Grid) -> Moments:
    """Moments of the scans of all channels and the global features with the attention output of the patches."""
    dim = mixer.down.in_features
    shared_features = 0 if mixer.shared is None else mixer.shared.in_features
    moments = Moments.empty(DIRECTIONS * dim, shared_features, dim, mixer.down.weight.device)
    for x, y in samples():
        a = patches(x, grid)
        scans = scan_features(a.unflatten(1, grid), mixer.segment)
        shared = _global_features(mixer, x, a)
        moments.add_gram(scans, shared)
        moments.add_cross(scans, shared, _target(mixer, x, y, grid))
    return moments


def scan_cross_moments(mixer: Gspn2Mixer, samples: Samples, grid: Grid, projected: Moments) -> Tensor:
    """Products of the projected features with what the LPU leaves of the attention output: (4R + Q + 1, C)."""
    assert mixer.lpu is not None
    moments = Moments(projected.gram, torch.zeros_like(projected.cross), projected.scans)
    for x, y in samples():
        a = patches(x, grid)
        scans = scan_features(mixer.down(a).unflatten(1, grid), mixer.segment)
        local = mixer.lpu(a.unflatten(1, grid).permute(0, 3, 1, 2)).flatten(2).mT
        moments.add_cross(scans, _global_features(mixer, x, a), _target(mixer, x, y, grid) - local)
    return moments.cross


def fit_lpu(mixer: Gspn2Mixer, samples: Samples, grid: Grid) -> None:
    """Least squares of the 3x3 filter of every channel on what the other parts leave."""
    assert mixer.lpu is not None
    mixer.lpu.weight.zero_()
    gram = cross = torch.zeros((), dtype=torch.float64, device=mixer.down.weight.device)
    for x, y in samples():
        residual = patches(y - mixer(x, grid), grid).unflatten(1, grid)
        batch_gram, batch_cross = local_moments(patches(x, grid).unflatten(1, grid), residual)
        gram, cross = gram + batch_gram, cross + batch_cross
    floor = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean() + torch.finfo(gram.dtype).tiny
    solution = torch.linalg.solve(gram + floor * torch.eye(9).to(gram), cross)
    mixer.lpu.weight.copy_(solution.view_as(mixer.lpu.weight))


def proxy_projection(scans: Tensor, second: Tensor, gamma: Tensor | None, rank: int) -> Tensor:
    """The R latent directions that carry most of the regression's output.

    Args:
        scans: (4C, C) coefficients of the four scans.
        second: (C, C) second moment of the patches.
        gamma: (C,) LayerScale or None.
        rank: R.

    Returns:
        (C, R) projection from the SVD of second^(1/2) [A_1 | .. | A_4] gamma. With white noise as strong as the
        patches added to them, latents would have unit mean square.
    """
    channels = second.shape[0]
    maps = scans.view(DIRECTIONS, channels, channels)
    if gamma is not None:
        maps = maps * gamma.to(maps)
    wide = maps.permute(1, 0, 2).flatten(1)
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    _, singular, right = torch.linalg.svd(root @ wide, full_matrices=False)
    columns = wide @ right[:rank].T
    # Without the noise, what patches hardly show, as the direction that a layer norm takes away, would be as large a
    # latent as any. Trained scans would depend on it, and so on the least change of the norm's weights.
    noise = columns.square().sum(0) * second.diagonal().mean()
    size = (singular[:rank].square() + noise).sqrt()
    latents = columns / size.clamp_min(1e-6 * singular[0] + torch.finfo(singular.dtype).tiny)
    return latents.where(size > 0, 0.0)  # patches that are all zero


def install(mixer: Gspn2Mixer, solution: Tensor) -> None:
    """Write coefficients (4R + Q + 1, C) of [scans | global features | 1] into the mixer."""
    scans = DIRECTIONS * mixer.proxy_dim
    mixer.proj.weight.copy_(solution[:scans].T)
    mixer.proj.bias.copy_(solution[-1])
    if mixer.shared is not None:
        mixer.shared.weight.copy_(solution[scans:-1].T)


@torch.no_grad()
def fit_svd(mixer: Gspn2Mixer, attention: Attention, second: Tensor) -> None:
    """Weight-SVD initialisation: W_o W_v of the attention layer at rank R, the four directions averaged.

    Args:
        mixer: as constructed.
        attention: the teacher's attention layer.
        second: (C, C) second moment of the patches, which whitens the SVD; the identity makes it free of data.
    """
    value = attention.qkv.weight.double().chunk(3)[2]
    out = attention.proj.weight.double()
    mapping = (out @ value).T / DIRECTIONS
    down = proxy_projection(mapping.repeat(DIRECTIONS, 1), second, None, mixer.proxy_dim)
    up = ridge_solve(down.T @ second @ down, down.T @ second @ mapping, 0.0)
    bias = out.new_zeros(out.shape[0])
    if attention.qkv.bias is not None:
        bias = bias + out @ attention.qkv.bias.double().chunk(3)[2]
    if mixer.prefix is not None and mixer.prefix.regions:
        # Their values are in the attention's output already.
        up, bias = torch.zeros_like(up), torch.zeros_like(bias)
    if attention.proj.bias is not None:
        bias = bias + attention.proj.bias
    mixer.down.weight.copy_(down.T)
    mixer.proj.weight.copy_(up.T.repeat(1, DIRECTIONS))
    mixer.proj.bias.copy_(bias)


@torch.no_grad()
def fit_random(mixer: Gspn2Mixer, generator: torch.Generator) -> None:
    """Random proxy and merge, as torch initialises a Linear: uniform within 1 / sqrt(inputs)."""
    for linear in (mixer.down, mixer.proj):
        bound = linear.in_features**-0.5
        noise = torch.rand(linear.weight.shape, generator=generator, dtype=torch.float64)
        linear.weight.copy_((2 * noise - 1) * bound)
    mixer.proj.bias.zero_()


def patches(x: Tensor, grid: Grid) -> Tensor:
    """The last H W of the tokens (B, N, C)."""
    return x[:, x.shape[1] - grid[0] * grid[1] :]


def _global_features(mixer: Gspn2Mixer, x: Tensor, a: Tensor) -> Tensor:
    """What the global branch sees of each image: (B, Q)."""
    if mixer.shared is None:
        return a.new_zeros(a.shape[0], 0)
    parts = [a.mean(1)] + ([x[:, 0]] if mixer.has_prefix else [])
    return torch.cat(parts, -1)


def _target(mixer: Gspn2Mixer, x: Tensor, y: Tensor, grid: Grid) -> Tensor:
    """Attention output of the patches without what they read from the prefix tokens and regions."""
    target = patches(y, grid)
    if mixer.prefix is None:
        return target
    _, share, values = mixer.prefix(x, grid)
    return target if share is None else target - share @ values
