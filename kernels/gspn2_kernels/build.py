"""Builds the ONNX Runtime library `gspn2_ort` from the package's own sources, once for a machine, and finds it.

A build goes to `~/.cache/gspn2convert/ort-<key>/` (`$XDG_CACHE_HOME` counts), where the key stands for everything
that it depends on. It appears there complete or not at all, also when several processes build at once.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspn2_kernels.build_tools import (
    BuildError,
    api_version,
    find_cmake,
    find_compiler,
    find_headers,
    find_nvcc,
    version,
)

__all__ = ["BuildError", "build", "cache_folder", "has_cuda", "is_whole", "library_path"]

_log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "csrc"
_LIBRARY = "libgspn2_ort.so"
_LOG_LINES = 30
_ERROR = re.compile(r"\berror ?[:A-Z0-9]|CMake Error")


def build(*, include: Path | None = None, cuda: bool = False, report: Callable[[str], None] = _log.info) -> Path:
    """Build the library, unless that has been done.

    Args:
        include: Folder of ONNX Runtime's C++ headers; by default it is looked for, see `find_headers`.
        cuda: Whether to build the CUDA kernels too: for all processors from 8.0 on, or those that the environment's
            CUDAARCHS lists, such as `90` alone in a fraction of the time. Only 9.0, an H100, has run them.
        report: Called with a line of text for each step.

    Returns:
        Path of the library.

    Raises:
        BuildError: Something is missing or the compiler fails; the message says what to do.
    """
    headers, compiler, (cmake, generator) = find_headers(include), find_compiler(), find_cmake()
    nvcc, sources = find_nvcc() if cuda else None, _source_hash()
    made_of = {
        "sources": sources,
        "compiler": version(compiler),
        "cmake": version(cmake),
        "nvcc": version(nvcc) if nvcc else None,
        "onnxruntime_api": api_version(headers),
        "cuda": nvcc is not None,
        "processors": os.environ.get("CUDAARCHS") if cuda else None,
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    target = cache_folder() / f"ort-{key}"
    with _locked(target.with_suffix(".lock"), report):
        if not _fits(target / _LIBRARY, sources):
            report(f"building with {compiler}, {f'{nvcc}, ' if nvcc else ''}headers in {headers}")
            options = [f"-DORT_INCLUDE_DIR={headers}", f"-DCMAKE_CXX_COMPILER={compiler}"]
            if nvcc:
                report("the CUDA kernels take minutes, or less for the one processor that CUDAARCHS names")
                options += ["-DGSPN2_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            _build_into(target, [cmake, "-G", generator, *options], made_of)
    report(f"library: {target / _LIBRARY}")
    return target / _LIBRARY


def library_path() -> Path | None:
    """Find the library: GSPN2_ORT_LIBRARY, else the one in the package, else the newest build of these sources.

    The path of GSPN2_ORT_LIBRARY is returned whether or not there is a file.
    """
    if named := os.environ.get("GSPN2_ORT_LIBRARY"):
        return Path(named).absolute()  # without a folder it would be looked for among the system's
    packaged = Path(__file__).parent / "lib" / _LIBRARY
    if packaged.exists():
        return packaged
    sources = _source_hash()
    try:
        built = [path for path in cache_folder().glob(f"ort-*/{_LIBRARY}") if _fits(path, sources)]
    except PermissionError:  # the home of another user
        built = []
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def has_cuda(path: Path) -> bool:
    """Tell from the file beside a library whether it has the CUDA kernels; without that file it counts as without."""
    return _metadata(path).get("cuda") is True


def is_whole(path: Path) -> bool:
    """Tell whether a file is a library from its beginning to its end: to load a part of one kills the process.

    A library (ELF, of 64 bits) ends with the table of its sections, and begins with where that is.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError:
        return False
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    order = "<" if header[5] == 1 else ">"
    (table,), (entry, count) = struct.unpack_from(f"{order}Q", header, 40), struct.unpack_from(f"{order}HH", header, 58)
    return bool(table + entry * count <= path.stat().st_size)


def cache_folder() -> Path:
    """Where builds are kept; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "gspn2convert"


def _build_into(target: Path, configure: list[str], made_of: dict[str, Any]) -> None:
    """Build in a temporary folder beside `target` and move the result there."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as name:
        work, result = Path(name) / "work", Path(name) / "result"
        _run([*configure, "-S", str(_SOURCES), "-B", str(work)])
        _run([configure[0], "--build", str(work), "--parallel"])
        if not is_whole(work / _LIBRARY):
            raise BuildError("the build ended without a library: the compiler made none; set CXX to one that works")
        result.mkdir()
        shutil.copy2(work / _LIBRARY, result / _LIBRARY)
        _beside(result / _LIBRARY).write_text(json.dumps(made_of, indent=1) + "\n")
        # What a process left that was killed here before the library got its name.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(result, target)


def _run(command: list[str]) -> None:
    """Run a step of a build.

    Raises:
        BuildError: It failed; with what it printed from the first error on, or else the end of it.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        lines = done.stdout.splitlines()
        errors = (i for i, line in enumerate(lines) if _ERROR.search(line))
        # A compiler says in a line or two before an error where it is.
        first = max(0, next(errors, len(lines) - _LOG_LINES) - 2)
        # The logs that cmake names are gone with the folder.
        told = "\n".join(line for line in lines[first : first + _LOG_LINES] if not line.startswith("See also "))
        raise BuildError(f"the build failed: {' '.join(command)}\n{told}")


@contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock among processes; it ends with the process, whatever happens to that.

    Raises:
        BuildError: The folder of the lock, or something in it meanwhile, cannot be written.
    """
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("another process is building the same; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BuildError(
            f"cannot build in {path.parent}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that can be "
            "written to and has room"
        ) from error


def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _beside(library: Path) -> Path:
    return library.with_suffix(".json")


def _metadata(library: Path) -> dict[str, Any]:
    try:
        found = json.loads(_beside(library).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fits(library: Path, sources: str) -> bool:
    return _metadata(library).get("sources") == sources and is_whole(library)
