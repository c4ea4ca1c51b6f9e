"""The mixer against its formula, written out with the reference scan."""

import importlib

import pytest
import torch
from timm.layers import Attention, LayerNorm
from torch import Tensor

from gspn2_kernels import line_scan_ref
from gspn2_kernels.testing import assert_close
from gspn2convert.mixer import Gspn2Mixer

DIM, HEADS = 32, 4


def make_mixer(*, has_prefix: bool = True, **options: int | bool | str) -> Gspn2Mixer:
    torch.manual_seed(0)
    attention = Attention(DIM, HEADS, qkv_bias=True, norm_layer=LayerNorm)
    mixer = Gspn2Mixer(attention, has_prefix=has_prefix, **{"proxy_dim": 6, **options}).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def take_kernels(monkeypatch: pytest.MonkeyPatch, *modules: str) -> str:
    """Have ops of these modules take their kernels, on a CPU in Triton's interpreter; tell where they run."""
    pytest.importorskip("triton")
    for module in modules:
        monkeypatch.setattr(importlib.import_module(f"gspn2_kernels.{module}"), "by_triton", lambda _: True)
    return "cuda" if torch.cuda.is_available() else "cpu"


def reference(mixer: Gspn2Mixer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mixer's formula for patches, one direction after the other."""
    height, width = grid
    prefix = x.shape[1] - height * width
    a = x[:, prefix:].reshape(len(x), height, width, DIM)
    r, g = mixer.proxy_dim, mixer.groups
    z = a @ mixer.down.weight.T
    control = mixer.control(z if mixer.from_latent else a)
    lam, u = (control[..., i * 4 * r : (i + 1) * 4 * r].reshape(*a.shape[:3], 4, r) for i in range(2))
    logits = control[..., 8 * r :].reshape(*a.shape[:3], 4, g, 3)
    y = line_scan_ref(z, lam, logits, u, mixer.segment)
    out = mixer.proj.bias.expand(a.shape)
    for direction, lines in enumerate((height, height, width, width)):
        lines = min(mixer.segment, lines) if mixer.segment else lines
        out = out + y[..., direction, :] @ mixer.proj.weight[:, direction * r : (direction + 1) * r].T / lines
    if mixer.lpu is not None:
        out = out + mixer.lpu(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    out = out.reshape(len(x), -1, DIM)
    if mixer.shared is not None:
        out = out + a.mean((1, 2))[:, None] @ mixer.shared.weight[:, :DIM].T
        if prefix:
            out = out + x[:, :1] @ mixer.shared.weight[:, DIM:].T
    if mixer.prefix is None:
        return out
    prefix_out, share, values = mixer.prefix(x, grid)
    out = out if share is None else out + share @ values
    return out if prefix_out is None else torch.cat([prefix_out, out], 1)


@pytest.mark.parametrize("grid", [(1, 1), (7, 4), (5, 14)], ids=str)
@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        (1, {}),
        (5, {"groups": 3}),
        (0, {"segment": 3}),
        (1, {"proxy_dim": 1, "lpu": False, "global_branch": False, "prefix_gate": False}),
        (2, {"prefix": "pool", "segment": 20}),
        (2, {"regions": 3}),
        (0, {"regions": 2}),
        (1, {"regions": 2, "prefix": "pool", "prefix_gate": False}),
    ],
    ids=[
        "all parts",
        "groups",
        "no prefix, segments",
        "paper",
        "pooled prefix",
        "regions",
        "regions, no prefix",
        "only",
    ],
)
@torch.no_grad()
def test_mixer_follows_its_formula(prefix: int, options: dict[str, int | bool | str], grid: tuple[int, int]) -> None:
    mixer = make_mixer(has_prefix=prefix > 0, **options)
    x = torch.randn(2, prefix + grid[0] * grid[1], DIM) + 0.5
    assert_close("mixer", reference(mixer, x, grid), mixer(x, grid), 1e-5)


@pytest.mark.parametrize("by_kernels", [False, True], ids=["torch", "Triton"])
@pytest.mark.parametrize("gamma", [True, False], ids=["LayerScale", "none"])
@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        (0, {}),
        (2, {}),
        (1, {"proxy_dim": 1, "lpu": False, "global_branch": False, "prefix_gate": False}),
        (2, {"prefix": "pool", "groups": 3}),
        (1, {"regions": 8}),
        (0, {"regions": 2}),
    ],
    ids=["no prefix", "prefix", "paper", "pooled prefix", "regions", "regions, no prefix"],
)
@torch.no_grad()
def test_adding_to_the_stream_is_the_mixer_and_a_sum(
    prefix: int,
    options: dict[str, int | bool | str],
    gamma: bool,
    by_kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = take_kernels(monkeypatch, "norm", "gated") if by_kernels else "cpu"
    mixer = make_mixer(has_prefix=prefix > 0, **options).to(device)
    norm = torch.nn.LayerNorm(DIM, device=device)
    norm.weight.normal_()
    norm.bias.normal_()
    stream = torch.randn(2, prefix + 15, DIM, device=device) + 0.5
    scale = torch.randn(DIM, device=device) if gamma else None
    expected = stream + mixer(norm(stream), (5, 3)) * (1 if scale is None else scale)
    assert_close("stream", expected, mixer.add_to(stream, norm, (5, 3), scale), 1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_kernels_compile_as_one_graph(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = take_kernels(monkeypatch, "norm", "gated", "local")
    mixer, norm = make_mixer().to(device), torch.nn.LayerNorm(DIM, device=device)
    ops, stream = set(), torch.randn(2, 1 + 15, DIM, device=device) + 0.5

    def run(x: Tensor) -> Tensor:
        return x + mixer(norm(x), (5, 3)) if trained else mixer.add_to(x, norm, (5, 3), None)

    def traced(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        ops.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.set_grad_enabled(trained):
        assert_close("stream", run(stream), torch.compile(run, fullgraph=True, backend=traced)(stream), 1e-6)
    wanted = {"local_perception"} if trained else {"norm_statistics", "gated_scan", "read_prefix", "merge"}
    assert {f"gspn2.{name}" for name in wanted} <= ops


def test_a_narrow_proxy_is_controlled_by_the_tokens() -> None:
    assert make_mixer(proxy_dim=2).from_latent
    assert not make_mixer(proxy_dim=1).from_latent
    assert make_mixer(proxy_dim=1).control.in_features == DIM


@torch.no_grad()
def test_a_fresh_mixer_averages_over_diffusing_lines() -> None:
    attention = Attention(DIM, HEADS)
    mixer = Gspn2Mixer(attention, has_prefix=False, proxy_dim=6)
    constant = torch.randn(1, 1, DIM).expand(2, 12, DIM)
    out = mixer(constant, (3, 4)).unflatten(1, (3, 4))
    # Of a constant image, a scan over i + 1 of T lines is the constant times (i + 1) / T, in every direction.
    latent = mixer.down(constant[:, :1])
    up = mixer.proj.weight.unflatten(1, (4, -1))
    for i in range(3):
        for j in range(4):
            shares = torch.tensor([(i + 1) / 3, (3 - i) / 3, (j + 1) / 4, (4 - j) / 4])
            expected = torch.einsum("cdr,d,bnr->bc", up, shares, latent) + mixer.proj.bias
            torch.testing.assert_close(out[:, i, j], expected, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    mixer = make_mixer()
    mixer(torch.randn(2, 1 + 12, DIM), (3, 4)).square().sum().backward()
    silent = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize(
    ("prefix", "options"),
    [(1, {"groups": 2}), (0, {"segment": 3}), (2, {"proxy_dim": 1})],
    ids=["groups", "segments", "from the tokens"],
)
def test_gradients_are_those_of_the_formula(prefix: int, options: dict[str, int | bool | str]) -> None:
    mixer = make_mixer(has_prefix=prefix > 0, **options)
    x = torch.randn(2, prefix + 35, DIM, requires_grad=True)
    dy = torch.randn_like(x) + 0.5
    variables = [x, *mixer.parameters()]
    expected, out = (
        torch.autograd.grad(y, variables, dy, allow_unused=True)
        for y in (reference(mixer, x, (5, 7)), mixer(x, (5, 7)))
    )
    for name, one, other in zip(["x", *dict(mixer.named_parameters())], expected, out, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert_close(name, one, other, 1e-5)


def test_backward_keeps_neither_gates_nor_logits() -> None:
    mixer = make_mixer()
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = mixer(torch.randn(2, 1 + 12, DIM), (3, 4))
    scans = 2 * 12 * 4 * mixer.proxy_dim
    assert list(saved.values()).count(scans) == 1  # y, for the merge
    assert out.requires_grad
