"""An exported file in ONNX Runtime: on the right provider, with the LineScan library where there is one.

Shape letters: B batch, C channels, H W image size.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspn2convert.errors import UserError
from gspn2convert.onnx_function import DOMAIN
from gspn2convert.onnx_function import NAME as LINE_SCAN
from gspn2convert.providers import CPU, CUDA, pick_providers, settings

OLDEST = (1, 18)
KERNEL, BODY = "kernel of the library", "function body in the file"

_DTYPES = {"tensor(float)": ("fp32", np.float32), "tensor(float16)": ("fp16", np.float16)}

_log = logging.getLogger(__name__)


class OnnxSession:
    """One file, open in ONNX Runtime; made by `onnx_session`.

    Attributes:
        path: the file.
        metadata: texts that the file carries; what `export` writes is listed there.
        output_names: names of what `run` returns.
        batch: images that a call must have, None where any number will do.
        input_size: channels, height and width of the images; None where height or width may change.
    """

    def __init__(self, path: Path, session: Any, *, version: str, library: Path | None) -> None:  # noqa: ANN401
        """Wrap a session of ONNX Runtime.

        Args:
            path: the file.
            session: the `onnxruntime.InferenceSession`.
            version: of ONNX Runtime.
            library: the registered library, None without one.

        Raises:
            UserError: the model does not take one tensor of images.
        """
        self._session, self._version, self._library = session, version, library
        self.path = path
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        self.output_names: list[str] = [output.name for output in session.get_outputs()]
        inputs = session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or not isinstance(shape[1], int) or inputs[0].type not in _DTYPES:
            found = ", ".join(map(_signature, inputs)) or "nothing"
            raise UserError(f"{path}: no image model; it takes {found}, expected one fp32 or fp16 tensor (B, C, H, W)")
        batch, height, width = (one if isinstance(one, int) else None for one in (shape[0], *shape[2:]))
        self.batch: int | None = batch
        self.input_size: tuple[int, int | None, int | None] = (shape[1], height, width)
        self._input, (self._dtype_name, self._dtype) = inputs[0].name, _DTYPES[inputs[0].type]

    def run(self, images: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        """Run the model on normalised images.

        Args:
            images: (B, C, H, W), floating-point; cast to the file's dtype.

        Returns:
            The output, or a tuple of them where the model has several.

        Raises:
            UserError: the images do not have the shape or the type that the model takes, or ONNX Runtime fails.
        """
        self._check(images)
        feed = {self._input: np.ascontiguousarray(images, dtype=self._dtype)}
        try:
            outputs: list[np.ndarray] = self._session.run(None, feed)
        except Exception as error:  # ONNX Runtime's errors share no other class
            raise UserError(
                f"{self.path}: ONNX Runtime failed on images of shape {images.shape}: {_said(error)}"
            ) from error
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def describe(self) -> dict[str, Any]:
        """Say what runs where, fit for JSON.

        Returns:
            `file`, `onnxruntime` (version), `providers` (in use, first choice first), `line_scan` (the library's
            kernel, the body in the file, or None for a file without LineScan), `line_scan_provider`, `library`
            (path, None where it is not in use), `dtype`, `inputs` and `outputs`.
        """
        providers: list[str] = self._session.get_providers()
        runs = (KERNEL if self._library else BODY) if _has_line_scans(self.path) else None
        return {
            "file": str(self.path),
            "onnxruntime": self._version,
            "providers": providers,
            "line_scan": runs,
            "line_scan_provider": providers[0] if runs else None,
            "library": str(self._library) if self._library else None,
            "dtype": self._dtype_name,
            "inputs": [_signature(one) for one in self._session.get_inputs()],
            "outputs": [_signature(one) for one in self._session.get_outputs()],
        }

    def _check(self, images: np.ndarray) -> None:
        if not isinstance(images, np.ndarray):
            raise UserError(f"images are a {type(images).__name__}, expected a NumPy array (B, C, H, W)")
        channels, *size = self.input_size
        multiple = self.size_multiple
        wanted = (self.batch, channels, *size)
        fits = images.ndim == 4 and all(want in (None, have) for want, have in zip(wanted, images.shape, strict=True))
        if not fits or any(not have or have % step for have, step in zip(images.shape[2:], multiple, strict=True)):
            names = zip(wanted, ("B", "C", "H", "W"), strict=True)
            takes = ", ".join(name if want is None else str(want) for want, name in names)
            steps = "" if multiple == (1, 1) else f", H in multiples of {multiple[0]} and W of {multiple[1]}"
            raise UserError(f"images of shape {images.shape}: {self.path.name} takes ({takes}){steps}")
        if not np.issubdtype(images.dtype, np.floating):
            raise UserError(f"images of type {images.dtype}: {self.path.name} takes normalised floating-point images")

    def value(self, name: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Read a value of the metadata, None where the file has none.

        Raises:
            UserError: it is no JSON.
        """
        try:
            return json.loads(self.metadata.get(name, "null"))
        except ValueError as error:
            raise UserError(
                f"{self.path}: its metadata {name!r} is damaged ({error}); export the model again"
            ) from error

    @property
    def size_multiple(self) -> tuple[int, int]:
        """Height and width come in multiples of this."""
        found = self.value("size_multiple")
        return (int(found[0]), int(found[1])) if found else (1, 1)


def onnx_session(
    path: str | Path, providers: str | Sequence[str] | None = None, *, library: bool | None = None
) -> OnnxSession:
    """Open an exported file in ONNX Runtime.

    Args:
        path: the `.onnx` file.
        providers: where to run, one or more, first choice first: `cpu`, `cuda` or ONNX Runtime's own names. By default
            CUDA where ONNX Runtime and this machine have it, then the CPU.
        library: whether LineScan runs in the library that `gspn2convert build-ops` compiles: True insists on it,
            False leaves it out, None takes it where it is there and has kernels for the provider. Without it the
            body inside the file runs: the same numbers, more slowly.

    Raises:
        UserError: ONNX Runtime is missing or too old, the file is none, a provider is unknown or does not start, or
            the library is asked for and cannot be used.
    """
    path = Path(path)
    runtime = _onnxruntime()
    if not path.is_file():
        raise UserError(f"{path}: no such file; gspn2convert export writes one")
    wanted = pick_providers(runtime.get_available_providers(), providers)
    if CUDA in wanted:
        _preload(runtime)
    session, registered = _start(runtime, path, wanted, library)
    missing = [name for name in wanted if name not in session.get_providers()]
    if missing:
        message = (
            f"{missing[0]} did not start; ONNX Runtime's message above says why, often a library of CUDA is missing"
        )
        if providers is not None:
            raise UserError(message)
        _log.warning("%s; %s runs instead", message, CPU)
        # This one runs there, but with what suits CUDA. It goes before another takes as much memory.
        del session
        session, registered = _start(runtime, path, [CPU], library)
    return OnnxSession(path, session, version=runtime.__version__, library=registered)


def _onnxruntime() -> Any:  # noqa: ANN401 - a module without types
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX Runtime is not installed: pip install 'gspn2convert[ort]'") from error
    numbers = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} is too old: pip install --upgrade 'onnxruntime>={oldest}'"
        )
    return onnxruntime


def _preload(runtime: Any) -> None:  # noqa: ANN401
    """Load CUDA's libraries from NVIDIA's Python packages, where ONNX Runtime does not look for them by itself."""
    preload = getattr(runtime, "preload_dlls", None)  # since 1.21
    if preload is None:
        return
    # It prints what it does not find; if that is needed, the session says so.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        preload()
    _log.debug("onnxruntime.preload_dlls: %s", printed.getvalue())


def _start(runtime: Any, path: Path, providers: list[str], library: bool | None) -> tuple[Any, Path | None]:  # noqa: ANN401 - no types there
    """Open a file with what suits the providers; the session, and the library that it has."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    registered = None if library is False else _register(options, providers, insist=bool(library))
    static = CUDA in providers and _takes_one_shape(path)
    return _open(runtime, path, options, settings(providers, runtime.__version__, static=static)), registered


def _register(options: Any, providers: Sequence[str], *, insist: bool) -> Path | None:  # noqa: ANN401
    """Register the library; None where there is none, or it cannot serve the providers."""
    from gspn2_kernels.build import library_path
    from gspn2_kernels.onnx_op import LibraryMissing, register

    path = library_path()
    if path is None and not insist:
        return None
    try:
        done = register(options, tuple(providers))
    except LibraryMissing as error:
        raise UserError(str(error)) from error
    except Exception as error:  # ONNX Runtime's errors share no other class
        raise UserError(
            f"{path}: ONNX Runtime cannot load this library ({_said(error)}); rebuild it or leave it out"
        ) from error
    if insist and not done:
        raise UserError(f"{path} has no kernels for {providers[0]}; run gspn2convert build-ops --cuda, or use cpu")
    return path if done else None


def _takes_one_shape(path: Path) -> bool:
    """Tell whether no input has a free dimension; False also for what ONNX Runtime will refuse to open."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        _log.warning("without the package onnx a file of one shape runs slower on CUDA: pip install onnx")
        return False
    try:
        inputs = onnx.load(path, load_external_data=False).graph.input
    except (OSError, DecodeError):
        return False
    return all(size.HasField("dim_value") for one in inputs for size in one.type.tensor_type.shape.dim)


def _open(runtime: Any, path: Path, options: Any, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - no types there
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it would say that a provider does not start
            session = runtime.InferenceSession(str(path), options, **arguments)
    except Exception as error:  # ONNX Runtime's errors share no other class
        said = _said(error)
        if "PROTOBUF" in said or "No graph was found" in said:
            raise UserError(f"{path}: no ONNX file, or not all of it; gspn2convert export writes one") from error
        if f"{DOMAIN}:" in said and "not a registered" in said:
            raise UserError(
                f"{path}: a tool took the bodies of `ai.gspn2` out; run gspn2convert build-ops, or export again"
            ) from error
        raise UserError(f"{path}: ONNX Runtime {runtime.__version__} cannot open it: {said}") from error
    session.disable_fallback()  # a run that fails on CUDA would go on on the CPU
    return session


def _said(error: Exception) -> str:
    """One line of what ONNX Runtime says."""
    return " ".join(str(error).split())


def _has_line_scans(path: Path) -> bool:
    """Look for the operator's name, which every node of it has before the weights follow."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(LINE_SCAN.encode()) >= 0


def _signature(value: Any) -> str:  # noqa: ANN401
    """Write an input or output as `image: fp32 (batch, 3, height, width)`."""
    dtype = _DTYPES[value.type][0] if value.type in _DTYPES else value.type
    return f"{value.name}: {dtype} ({', '.join('?' if size is None else str(size) for size in value.shape)})"
