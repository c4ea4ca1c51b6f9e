"""The library that runs `ai.gspn2` nodes, LineScan and AddNorm, in ONNX Runtime, for a session's options.

    options = onnxruntime.SessionOptions()
    onnx_op.register(options)
    session = onnxruntime.InferenceSession("student.onnx", options, providers=["CPUExecutionProvider"])

Without it the same file runs through the function bodies that it carries, which is slower.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_kernels.build import has_cuda, is_whole, library_path

if TYPE_CHECKING:
    import onnxruntime

_log = logging.getLogger(__name__)

_OLDEST = (1, 18)
_MARK = "gspn2.registered"


class LibraryMissing(Exception):
    """There is no library of the ONNX op; the message says how to get it."""


def get_library_path() -> str:
    """Find the library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        LibraryMissing: It is not built, or GSPN2_ORT_LIBRARY names something else than a whole library.
    """
    path = library_path()
    if path is None:
        raise LibraryMissing("the ONNX Runtime library of gspn2_kernels is not built; run `gspn2convert build-ops`")
    if not path.exists():
        raise LibraryMissing(
            f"GSPN2_ORT_LIBRARY names {path}, which does not exist; unset it and run `gspn2convert build-ops`"
        )
    if not is_whole(path):
        raise LibraryMissing(
            f"{path} is no library, or not all of one; delete it, or unset GSPN2_ORT_LIBRARY if that names it, and run "
            "`gspn2convert build-ops`"
        )
    return str(path)


def register(
    options: "onnxruntime.SessionOptions",
    providers: Sequence[str | tuple[str, dict[str, Any]]] = ("CPUExecutionProvider",),
) -> bool:
    """Let sessions with these options run `ai.gspn2` nodes by the library; a second call on them changes nothing.

    A library that knows the op keeps ONNX Runtime from the function body, even where it has no kernel for the
    provider. So one without CUDA kernels is not registered for a session on CUDA.

    Args:
        options: A session's options, before the session is made.
        providers: What the session is going to be made with.

    Returns:
        True if the library is registered; False, with a warning in the log, if it does not fit.

    Raises:
        LibraryMissing: There is no library.
    """
    if _is_registered(options):
        return True
    library = get_library_path()
    version = _runtime_version()
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        _log.warning("LineScan runs without its library: onnxruntime is %s, expected 1.18 or newer", version)
        return False
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if "CUDAExecutionProvider" in names and not has_cuda(Path(library)):
        _log.warning(
            "LineScan runs without its library: %s has no CUDA kernels; `gspn2convert build-ops --cuda`", library
        )
        return False
    options.register_custom_ops_library(library)
    options.add_session_config_entry(_MARK, "1")
    return True


def _is_registered(options: "onnxruntime.SessionOptions") -> bool:
    """ONNX Runtime refuses a second library of the same domain, and an entry that is missing is an error."""
    try:
        return bool(options.get_session_config_entry(_MARK) == "1")
    except RuntimeError:
        return False


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
