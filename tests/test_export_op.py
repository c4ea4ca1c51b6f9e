"""The ONNX op against the reference of the line scan, and other parts of a file against timm's."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from gspn2_kernels import line_scan_ref
from gspn2_kernels.testing import assert_close, random_inputs
from gspn2convert import embedding as module
from gspn2convert import onnx_graph
from gspn2convert.embedding import PatchConv2d, embed_by_product, make_embedding_portable, resample_position
from gspn2convert.onnx_function import DOMAIN, NAME, line_scan_function
from helpers.onnx_runs import run_evaluator, run_onnxruntime

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
OPERANDS = ("x", "lam", "logits", "u")
RUNTIMES = {"onnxruntime": run_onnxruntime, "evaluator": run_evaluator}
every_runtime = pytest.mark.parametrize("run", RUNTIMES.values(), ids=RUNTIMES)


def one_node(dtype: torch.dtype, segment: int, opset: int = onnx_graph.OPSET) -> onnx.ModelProto:
    """A model of one LineScan in a dtype, with fp32 inputs and output, for numpy has no bf16."""
    shapes = [["B", "H", "W", "C"], ["B", "H", "W", 4, "C"], ["B", "H", "W", 4, "G", 3], ["B", "H", "W", 4, "C"]]
    casts = [helper.make_node("Cast", [name], [f"{name}_cast"], to=ONNX_TYPES[dtype]) for name in OPERANDS]
    scan = helper.make_node(NAME, [f"{name}_cast" for name in OPERANDS], ["y_cast"], domain=DOMAIN, segment=segment)
    graph = helper.make_graph(
        [*casts, scan, helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT)],
        "one_node",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(OPERANDS, shapes, strict=True)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[1])],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[line_scan_function(opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def feed(inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in zip(OPERANDS, inputs, strict=True)}


@every_runtime
@pytest.mark.parametrize(
    ("shape", "groups", "segment", "dtype"),
    [
        ((2, 5, 7, 6), 1, 0, torch.float32),  # the paper's form
        ((1, 14, 37, 8), 2, 4, torch.float32),  # last segments shorter than the others
        ((2, 7, 3, 6), 6, 1, torch.float32),  # nothing is propagated
        ((1, 3, 5, 4), 1, 4, torch.float32),  # segment between the two counts of lines
        ((3, 7, 1, 3), 3, 3, torch.float32),  # lines of one position
        ((1, 1, 1, 2), 1, 0, torch.float32),
        ((0, 3, 4, 2), 1, 0, torch.float32),  # no image
        ((2, 5, 7, 6), 2, 3, torch.float16),
        ((2, 5, 7, 6), 2, 0, torch.bfloat16),
    ],
)
def test_function_body_is_the_reference(
    run: Callable[..., Tensor], shape: tuple[int, int, int, int], groups: int, segment: int, dtype: torch.dtype
) -> None:
    inputs = random_inputs(shape, groups, dtype)
    want = line_scan_ref(*inputs, segment)
    got = run(one_node(dtype, segment), feed(inputs))
    assert_close("y", want.float(), got.to(dtype))


@pytest.mark.parametrize("opset", [18, 21])
def test_function_body_is_built_for_other_opsets(opset: int) -> None:
    inputs = random_inputs((1, 4, 5, 4), 2)
    got = run_onnxruntime(one_node(torch.float32, 3, opset), feed(inputs))
    assert_close("y", line_scan_ref(*inputs, 3), got)


@every_runtime
def test_weights_stay_finite_where_every_sigmoid_underflows(run: Callable[..., Tensor]) -> None:
    x, lam, logits, u = random_inputs((1, 5, 6, 4), 2)
    inputs = x, lam, 100 * logits - 200, u
    assert_close("y", line_scan_ref(*inputs), run(one_node(torch.float32, 0), feed(inputs)))


@every_runtime
def test_infinity_does_not_cross_a_restart(run: Callable[..., Tensor]) -> None:
    inputs = random_inputs((1, 6, 7, 2))
    inputs[0][0, 1, 3, 0] = torch.inf
    want = line_scan_ref(*inputs, 2)
    got = run(one_node(torch.float32, 2), feed(inputs))
    assert torch.equal(got.isfinite(), want.isfinite())
    assert_close("finite part", want[want.isfinite()], got[want.isfinite()])


@pytest.mark.parametrize("exporting", [False, True], ids=["", "exporting"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("new", [(14, 14), (7, 7), (1, 3), (12, 20), (32, 23), (64, 5)])
@pytest.mark.parametrize("old", [(14, 14), (12, 20)])
def test_position_embedding_is_resampled_as_timm_does(
    old: tuple[int, int],
    new: tuple[int, int],
    prefix: int,
    dtype: torch.dtype,
    exporting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    embedding = (torch.randn(1, prefix + old[0] * old[1], 8) + 0.5).to(dtype).requires_grad_()
    want = resample_abs_pos_embed(embedding, list(new), list(old), num_prefix_tokens=prefix)
    got = resample_position(embedding, new, old, num_prefix_tokens=prefix)
    if old == new:
        assert torch.equal(got, embedding)
    # fp32 rounds positions of about 20 to 1e-6, in timm's weights and in these.
    tolerance = 5e-6 if dtype == torch.float32 else None
    assert_close("embedding", want, got, tolerance)
    upstream = torch.randn(want.shape).to(dtype)
    want_grad, got_grad = (torch.autograd.grad(result, embedding, upstream)[0] for result in (want, got))
    assert_close("gradient", want_grad, got_grad, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_position(embedding, new, old, num_prefix_tokens=prefix), got)


@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_embedding_of_the_copy_alone_is_by_products(make_teacher: Callable[..., nn.Module], reg_tokens: int) -> None:
    teacher, copy = (make_teacher(reg_tokens=reg_tokens) for _ in range(2))
    untouched = vars(teacher).keys(), vars(teacher.patch_embed.proj).keys()
    make_embedding_portable(copy)
    for size in ((32, 48), (56, 24)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            # As the position embedding alone, see above.
            assert_close(str(size), teacher(images), copy(images), 5e-6)
    assert (vars(teacher).keys(), vars(teacher.patch_embed.proj).keys()) == untouched


@pytest.mark.parametrize(("kernel", "bias"), [((4, 4), True), ((2, 6), False), ((1, 1), True)])
def test_patches_by_a_product(kernel: tuple[int, int], bias: bool) -> None:
    convolution = torch.nn.Conv2d(3, 5, kernel, stride=kernel, bias=bias)
    images = torch.randn(2, 3, 3 * kernel[0], 7 * kernel[1]) + 0.5
    assert_close("patches", convolution(images).detach(), embed_by_product(convolution, images).detach())


@pytest.mark.parametrize("kernel", [(4, 4), (2, 6), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_are_cut_by_eight_bytes(
    kernel: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels run and the layout allows it; the same patches in any case."""
    convolution = torch.nn.Conv2d(1, 5, kernel, stride=kernel).to(dtype)
    size = (2, 1, 3 * kernel[0], 8 * kernel[1])
    images = (torch.randn(size) + 0.5).to(dtype)
    expected = embed_by_product(convolution, images).detach()
    monkeypatch.setattr(module, "by_triton", lambda _: True)
    cut, taken = module._cut, []
    monkeypatch.setattr(module, "_cut", lambda t, *patch: (taken.append(t.dtype), cut(t, *patch))[1])
    wide = torch.int64 if kernel[1] * dtype.itemsize % 8 == 0 else dtype
    flat = torch.cat([images.new_zeros(1), images.flatten()])
    layouts = {
        "contiguous": (images, wide),
        "cropped": (nn.functional.pad(images, (8, 8))[..., 8:-8], wide),
        "at an odd place": (flat[1:].view(size), dtype),
        "one channel, last": (images.to(memory_format=torch.channels_last), dtype),
        "columns apart": (images.repeat_interleave(2, -1)[..., ::2], dtype),
    }
    with torch.no_grad():
        for name, (layout, by) in layouts.items():
            assert_close(name, expected, embed_by_product(convolution, layout))
            assert taken.pop() == by, name
    assert_close("with gradients", expected, embed_by_product(convolution, images.requires_grad_()))
    assert taken == [dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_position_embedding_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    embedding = torch.randn(1, 9, 4)
    expected = resample_position(embedding, (4, 5), (3, 3), num_prefix_tokens=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(resample_position(embedding, (4, 5), (3, 3), num_prefix_tokens=0), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [(4, 6), (3, 6)], ids=["patches", "overlapping ones"])
def test_patch_embedding_on_a_gpu_is_the_convolution(stride: tuple[int, int]) -> None:
    convolution = torch.nn.Conv2d(3, 5, (4, 6), stride=stride).double().cuda()
    images = torch.randn(2, 3, 19, 43, dtype=torch.float64, device="cuda") + 0.5
    expected = convolution(images).detach()
    convolution.__class__ = PatchConv2d
    assert_close("patches", expected, convolution(images).detach())
