"""Export of a student: one checked `.onnx` file, or its weights as safetensors."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gspn2_kernels.testing import relative_rms
from gspn2convert import __version__, onnx_graph
from gspn2convert.artifact import write_atomic
from gspn2convert.embedding import make_embedding_portable
from gspn2convert.errors import UserError, is_disk_full
from gspn2convert.export_sizes import Sizes, free_sizes, static_sizes
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.vit import has_head, public_cfg

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger(__name__)

INPUT = "image"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Relative RMS error of the outputs against PyTorch in fp32.
PARITY = {"fp32": 1e-4, "fp16": 5e-3}


class ParityError(UserError):
    """The exported file does not compute what the model computes; no file is left."""


def export_onnx(
    student: VisionTransformer,
    path: str | Path,
    *,
    dtype: str = "fp32",
    size: tuple[int, int] | None = None,
    static: tuple[int, int, int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a student as one ONNX file that any ONNX Runtime >= 1.18 runs without a further library.

    Input `image` (batch, channels, height, width), normalised as the file's metadata say. Output `logits`
    (batch, classes), or `features` for a model without a head: what its `forward` returns, pooled features or,
    where the model does not pool, all tokens. Both are in the dtype of the file. Batch, height and width are
    free, the latter two in multiples of the patch; a model that takes one size alone keeps it. Every mixer's scan
    is a node `ai.gspn2::LineScan`, a residual sum with the norm after it `ai.gspn2::AddNorm`; their bodies of
    standard operators are in the file. Near 2 GiB the weights go to a second file, `<name>.data`.

    The file is compared with PyTorch on the CPU before it gets its name: it appears complete, or not at all.

    Args:
        student: the model; it is not changed.
        path: where to write; nothing may be there.
        dtype: "fp32" or "fp16".
        size: height and width to compare at; the model's own by default.
        static: the one shape (batch, channels, height, width) that the file takes, for runtimes that need it fixed,
            as CUDA graphs do; `size` is not looked at.
        metadata: further texts for the file's metadata, such as the teacher and the recipe.

    Returns:
        Fit for JSON: path, bytes, dtype, opset, line_scans (nodes), input and output (names), dynamic (axes) and
        parity, a list of shape, max_abs, relative_rms and, for logits, top1_agreement.

    Raises:
        UserError: a missing package, an existing file, an unknown dtype, a size or shape that does not fit, a full
            disk.
        ParityError: the file computes something else than the model.
    """
    path = Path(path)
    _check_packages()
    _check_target(path, dtype)
    logger.info("translating and comparing, which can take a minute")
    model = copy.deepcopy(student).cpu().float().eval().requires_grad_(False)
    model.set_grad_checkpointing(False)
    sizes = free_sizes(model, size) if static is None else static_sizes(model, static)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in sizes.checked()]
    wanted = [model(image.float()) for image in images]
    output = "logits" if has_head(model) else "features"
    graph = _translate(model.to(DTYPES[dtype]), torch.zeros(sizes.traced(), dtype=DTYPES[dtype]), sizes, output)
    graph.metadata_props.update({**_metadata(model, sizes, dtype), **(metadata or {})})
    with _new_files(path) as part:
        onnx_graph.save(graph, part)
        parity = _compare(part, images, wanted, dtype, top1=has_head(model))
        graph.metadata_props["parity"] = json.dumps(parity)
        onnx_graph.save(graph, part)
        written = sum(file.stat().st_size for file in part.parent.iterdir())
    return {
        "path": str(path),
        "bytes": written,
        "dtype": dtype,
        "opset": onnx_graph.OPSET,
        "line_scans": onnx_graph.count_line_scans(graph),
        "input": INPUT,
        "output": output,
        "dynamic": list(sizes.free().values()),
        "parity": parity,
    }


def export_safetensors(student: VisionTransformer, path: str | Path, *, dtype: str = "fp32") -> dict[str, Any]:
    """Write a student's weights, under timm's names, as one safetensors file.

    Args:
        student: the model; it is not changed.
        path: where to write; nothing may be there.
        dtype: "fp32" or "fp16", for every floating-point tensor.

    Returns:
        Fit for JSON: path, bytes, dtype and tensors (their number).

    Raises:
        UserError: an existing file, an unknown dtype, a weight that is too large for it, a full disk.
    """
    path = Path(path)
    _check_target(path, dtype)
    tensors = {
        name: (tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in student.state_dict().items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} has a number that does not fit into {dtype}; use --dtype fp32")
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(path, data)
    return {"path": str(path), "bytes": len(data), "dtype": dtype, "tensors": len(tensors)}


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX export needs {", ".join(missing)}: pip install "gspn2convert[onnx,ort]"')


def _check_target(path: Path, dtype: str) -> None:
    if dtype == "bf16":
        raise UserError("dtype bf16 given, but ONNX Runtime has no bf16 convolution on the CPU; use fp32 or fp16")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} given, expected one of {', '.join(DTYPES)}")
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} does not exist; create it or name another output")
    for existing in (path, onnx_graph.weights_file(path)):
        if existing.exists():
            raise UserError(f"{existing} exists; remove it or name another output")


def _translate(model: VisionTransformer, example: Tensor, sizes: Sizes, output: str) -> onnx_ir.Model:
    """Translate the export's own copy of a student, whose embedding is changed for it."""
    make_embedding_portable(model)
    try:
        graph = onnx_graph.translate(model, example, free=sizes.free(), input_name=INPUT, output_name=output)
    except torch.onnx.OnnxExporterError as error:
        if not (sizes.free() and model.patch_embed.dynamic_img_pad):
            raise
        raise UserError(
            "PyTorch cannot export a model that pads images of any size and has register tokens; give the one shape"
            " that the file shall take: --static N,C,H,W"
        ) from error
    assert onnx_graph.count_line_scans(graph) == sum(isinstance(module, Gspn2Mixer) for module in model.modules())
    assert not onnx_graph.count_nodes(graph, "Resize")
    return graph


def _metadata(model: VisionTransformer, sizes: Sizes, dtype: str) -> dict[str, str]:
    """What a user of the file needs to know; texts, everything else as JSON."""
    config = resolve_model_data_config(model)
    texts = {
        "gspn2convert": __version__,
        "dtype": dtype,
        "interpolation": config["interpolation"],
        "crop_mode": config["crop_mode"],
    }
    values = {
        "input_size": [sizes.channels, *sizes.native],
        "size_multiple": list(sizes.patch) if sizes.dynamic and not sizes.padded else None,
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        "label_names": public_cfg(model).get("label_names"),
    }
    return texts | {name: json.dumps(value) for name, value in values.items()}


@contextmanager
def _new_files(path: Path) -> Iterator[Path]:
    """Give a path of that name in a temporary folder beside; at a good end, move what lies there into place.

    Raises:
        UserError: the files cannot be written, for example for want of space.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder) / path.name
            # The weights of a large file, which sort after it, come before the file that needs them.
            for file in sorted(Path(folder).iterdir(), reverse=True):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                file.replace(path.parent / file.name)
    except OSError as error:
        remedy = "make room, or name another output" if is_disk_full(error) else "name another output"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def _compare(part: Path, images: list[Tensor], wanted: list[Tensor], dtype: str, *, top1: bool) -> list[dict[str, Any]]:
    """Run the file in plain ONNX Runtime and compare it with what the model gave.

    Raises:
        ParityError: an output is not finite or too far off.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
    figures = []
    for image, want in zip(images, wanted, strict=True):
        got = torch.from_numpy(session.run(None, {INPUT: image.numpy()})[0]).float()
        shape = "x".join(map(str, image.shape))
        if got.shape != want.shape:
            raise ParityError(f"at {shape} the file gives {tuple(got.shape)} and the model {tuple(want.shape)}")
        error = relative_rms(want, got)
        # Not `error > limit`, which is false for NaN.
        if not error <= PARITY[dtype]:
            remedy = "; use --dtype fp32" if dtype == "fp16" else ""
            raise ParityError(f"at {shape} the file is off by {error:.1e}, {PARITY[dtype]:.0e} is allowed{remedy}")
        figure = {"shape": list(image.shape), "max_abs": (got - want).abs().max().item(), "relative_rms": error}
        if top1:
            figure["top1_agreement"] = (got.argmax(1) == want.argmax(1)).float().mean().item()
        figures.append(figure)
    return figures
