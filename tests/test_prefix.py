"""The prefix read against the teacher's own attention on the same tokens."""

import pytest
import torch
from timm.layers import Attention, LayerNorm
from torch import Tensor

from gspn2convert.prefix import PrefixRead

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
    out, *_ = PrefixRead(attention, exact=True, gate=False)(x, prefix)
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
    _, share, values = read(x, prefix)

    q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
    weights = (attention.q_norm(q) @ attention.k_norm(k).mT * attention.scale).softmax(-1)
    weights[..., prefix:] = 0
    expected = (weights @ v).transpose(1, 2).flatten(2)[:, prefix:] @ attention.proj.weight.T
    torch.testing.assert_close(share @ values, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooling_reads_the_mean_value() -> None:
    attention, x = make_attention(), make_tokens(1)
    out, share, values = PrefixRead(attention, exact=False, gate=False)(x, 1)
    value = attention.qkv(x)[..., 2 * DIM :].mean(1, keepdim=True)
    torch.testing.assert_close(out, attention.proj(value))
    assert share is values is None


@torch.no_grad()
def test_half_precision_follows_single() -> None:
    attention, x = make_attention(), make_tokens(5)
    read = PrefixRead(attention, exact=True, gate=True)
    single = read(x, 5)
    half = read.to(torch.bfloat16)(x.bfloat16(), 5)
    for ours, reference in ((half[0], single[0]), (half[1] @ half[2], single[1] @ single[2])):
        assert (ours.float() - reference).norm() < 0.03 * reference.norm()


def test_cost_is_linear_in_the_tokens() -> None:
    read, counts = PrefixRead(make_attention(), exact=True, gate=True), []
    for patches in (100, 200, 400):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            read(make_tokens(1, patches), 1)
        counts.append(counter.get_total_flops())
    # Doubling the patches adds as much as they brought; what is left over does not depend on them.
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
