"""The prefix read against the teacher's own attention on the same tokens."""

import pytest
import torch
from timm.layers import Attention, LayerNorm
from torch import Tensor

from gspn2_kernels.testing import relative_rms
from gspn2convert.prefix import PrefixRead
from gspn2convert.regions import region_means

DIM, HEADS = 24, 3


def make_attention(**options: bool) -> Attention:
    torch.manual_seed(0)
    attention = Attention(DIM, HEADS, norm_layer=LayerNorm, **{"qkv_bias": True, **options}).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0, DIM**-0.5)
    return attention


def make_tokens(prefix: int, patches: int = 35) -> Tensor:
    return torch.randn(2, prefix + patches, DIM, generator=torch.Generator().manual_seed(1)) + 0.5


VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": False}, {"qk_norm": True}, {"proj_bias": False}],
    ids=["plain", "no qkv bias", "qk norm", "no proj bias"],
)


@VARIANTS
@pytest.mark.parametrize("prefix", [1, 2, 5])
@torch.no_grad()
def test_prefix_tokens_read_exactly_what_the_teacher_reads(options: dict[str, bool], prefix: int) -> None:
    attention, x = make_attention(**options), make_tokens(prefix)
    out, *_ = PrefixRead(attention, exact=True, gate=False)(x, (5, 7))
    torch.testing.assert_close(out, attention(x)[:, :prefix], rtol=1e-5, atol=1e-5)


@VARIANTS
@pytest.mark.parametrize("prefix", [1, 5])
@torch.no_grad()
def test_gate_is_the_share_of_the_prefix_when_the_log_sum_is_true(options: dict[str, bool], prefix: int) -> None:
    # So few patches that a linear map predicts the log-sum-exp of each exactly.
    attention, x = make_attention(**options).double(), make_tokens(prefix, patches=12).double()
    read = PrefixRead(attention, exact=True, gate=True)
    patches = torch.nn.functional.pad(x[:, prefix:], (0, 1), value=1.0).flatten(0, 1)
    solution = torch.linalg.lstsq(patches, read.log_sum_exp(x, prefix).flatten(0, 1)).solution
    read.log_sum.weight.copy_(solution[:-1].T)
    read.log_sum.bias.copy_(solution[-1])
    _, share, values = read(x, (3, 4))

    q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
    weights = (attention.q_norm(q) @ attention.k_norm(k).mT * attention.scale).softmax(-1)
    weights[..., prefix:] = 0
    expected = (weights @ v).transpose(1, 2).flatten(2)[:, prefix:] @ attention.proj.weight.T
    torch.testing.assert_close(share @ values, expected, rtol=1e-5, atol=1e-5)


@VARIANTS
@pytest.mark.parametrize("prefix", [0, 1, 5])
@torch.no_grad()
def test_regions_of_one_patch_are_the_attention(options: dict[str, bool], prefix: int) -> None:
    attention, x = make_attention(**options), make_tokens(prefix, patches=16)
    out, share, values = PrefixRead(attention, has_prefix=prefix > 0, exact=True, gate=True, regions=4)(x, (4, 4))
    bias = 0 if attention.proj.bias is None else attention.proj.bias
    torch.testing.assert_close(share @ values + bias, attention(x)[:, prefix:], rtol=1e-5, atol=1e-5)
    assert out is None if prefix == 0 else torch.allclose(out, attention(x)[:, :prefix], rtol=1e-5, atol=1e-5)


@VARIANTS
@pytest.mark.parametrize("grid", [(6, 4), (4, 10)], ids=str)
@torch.no_grad()
def test_regions_of_equal_patches_are_the_attention(options: dict[str, bool], grid: tuple[int, int]) -> None:
    """What a region stands for is seen where all of its patches are alike."""
    attention = make_attention(**options)
    few = torch.randn(2, 2, 2, DIM, generator=torch.Generator().manual_seed(2)) + 0.5
    alike = few.repeat_interleave(grid[0] // 2, 1).repeat_interleave(grid[1] // 2, 2).flatten(1, 2)
    x = torch.cat([make_tokens(1, patches=0), alike], 1)
    _, share, values = PrefixRead(attention, exact=True, gate=True, regions=2)(x, grid)
    bias = 0 if attention.proj.bias is None else attention.proj.bias
    torch.testing.assert_close(share @ values + bias, attention(x)[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 4), (5, 7), (2, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("regions", [1, 2, 3, 5])
def test_regions_are_equal_parts_of_the_image(grid: tuple[int, int], regions: int) -> None:
    patches = torch.randn(2, *grid, DIM, generator=torch.Generator().manual_seed(3)) + 0.5
    # Cut in so many pieces, each patch falls into whole pieces for each region.
    pieces = patches.repeat_interleave(regions, 1).repeat_interleave(regions, 2)
    expected = pieces.unflatten(2, (regions, -1)).unflatten(1, (regions, -1)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(region_means(patches, regions), expected)


@torch.no_grad()
def test_patches_may_read_regions_alone() -> None:
    attention, x = make_attention(), make_tokens(2, patches=16)
    _, share, values = PrefixRead(attention, exact=True, gate=False, regions=4)(x, (4, 4))
    expected = attention(x[:, 2:]) - attention.proj.bias
    torch.testing.assert_close(share @ values, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooling_reads_the_mean_value() -> None:
    attention, x = make_attention(), make_tokens(1)
    out, share, values = PrefixRead(attention, exact=False, gate=False)(x, (5, 7))
    value = attention.qkv(x)[..., 2 * DIM :].mean(1, keepdim=True)
    torch.testing.assert_close(out, attention.proj(value))
    assert share is values is None


@pytest.mark.parametrize("regions", [0, 3])
@torch.no_grad()
def test_half_precision_follows_single(regions: int) -> None:
    attention, x = make_attention(), make_tokens(5)
    read = PrefixRead(attention, exact=True, gate=True, regions=regions)
    single = read(x, (5, 7))
    half = read.to(torch.bfloat16)(x.bfloat16(), (5, 7))
    for ours, reference in ((half[0], single[0]), (half[1] @ half[2], single[1] @ single[2])):
        assert (ours.float() - reference).norm() < 0.03 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_regions_of_more_patches_than_half_precision_counts(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1 + 260 * 256, DIM, generator=torch.Generator().manual_seed(1)) + 0.5
    _, expected, _ = PrefixRead(make_attention(), exact=True, gate=True, regions=8)(x, (260, 256))
    _, share, _ = PrefixRead(make_attention(), exact=True, gate=True, regions=8).to(dtype)(x.to(dtype), (260, 256))
    assert relative_rms(expected, share) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("regions", [0, 4])
def test_cost_is_linear_in_the_tokens(regions: int) -> None:
    read, counts = PrefixRead(make_attention(), exact=True, gate=True, regions=regions), []
    for patches in (100, 200, 400):
        with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            read(make_tokens(1, patches), (10, patches // 10))
        counts.append(counter.get_total_flops())
    # Doubling the patches adds as much as they brought; what is left over does not depend on them.
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
