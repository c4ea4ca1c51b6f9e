"""What a build of the ONNX Runtime library needs, and where it is found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_HEADER = "onnxruntime_cxx_api.h"
_OLDEST_API = 18
_CUDA = "/usr/local/cuda"
_INSTALL_HEADERS = (
    "install them (Debian and Ubuntu: apt install libonnxruntime-dev; conda: conda install -c conda-forge "
    "onnxruntime-cpp; else unpack an archive of https://github.com/microsoft/onnxruntime/releases) and, where they "
    "lie elsewhere, name the folder that holds it by --include or ORT_INCLUDE_DIR"
)


class BuildError(Exception):
    """The library cannot be built; the message says what is missing and how to get it."""


def find_headers(include: Path | None = None) -> Path:
    """Find ONNX Runtime's C++ headers: the folder given, else ORT_INCLUDE_DIR, pkg-config, the usual places.

    Raises:
        BuildError: They are not there, or older than ONNX Runtime 1.18.
    """
    named = include or os.environ.get("ORT_INCLUDE_DIR")
    places = [Path(named)] if named else [*_from_pkg_config(), *_usual_places()]
    for place in places:
        for folder in (place, place / "onnxruntime", place / "onnxruntime" / "core" / "session", place / "include"):
            if (folder / _HEADER).is_file():
                if api_version(folder) < _OLDEST_API:
                    raise BuildError(
                        f"the headers in {folder} are of ONNX Runtime 1.{api_version(folder)}, expected 1.{_OLDEST_API}"
                        f" or newer; {_INSTALL_HEADERS}"
                    )
                return folder.resolve()
    looked = ", ".join(map(str, places))
    raise BuildError(f"no ONNX Runtime headers: {_HEADER} is not in {looked}; {_INSTALL_HEADERS}")


def api_version(headers: Path) -> int:
    """Read the API version of a folder of headers: 21 for ONNX Runtime 1.21; 0 if they do not tell."""
    header = headers / "onnxruntime_c_api.h"
    found = header.is_file() and re.search(r"#define ORT_API_VERSION (\d+)", header.read_text(errors="replace"))
    return int(found[1]) if found else 0


def find_compiler() -> str:
    """Find a C++ compiler: CXX, else the first of c++, g++ and clang++.

    Raises:
        BuildError: There is none.
    """
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: {', '.join(names)} not found; apt install g++ (or conda install gxx)")


def find_cmake() -> tuple[str, str]:
    """Find cmake and name the generator to use with it.

    Raises:
        BuildError: cmake is missing, or both ninja and make are.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BuildError("cmake not found; pip install cmake (or apt install cmake)")
    if shutil.which("ninja"):
        return cmake, "Ninja"
    if shutil.which("make"):
        return cmake, "Unix Makefiles"
    raise BuildError("neither ninja nor make found; pip install ninja (or apt install make)")


def find_nvcc() -> str:
    """Find CUDA's compiler.

    Raises:
        BuildError: There is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _CUDA]
    places = [None, *(os.path.join(home, "bin") for home in homes if home)]
    found = next((path for place in places if (path := shutil.which("nvcc", path=place))), None)
    if found is None:
        raise BuildError(
            f"nvcc not found in PATH, CUDA_HOME or {_CUDA}; install the CUDA toolkit (apt install "
            "nvidia-cuda-toolkit, or https://developer.nvidia.com/cuda-downloads), or build without CUDA"
        )
    return found


def version(program: str) -> str:
    """What a program prints about its version."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return done.stdout.strip()


def _from_pkg_config() -> list[Path]:
    if shutil.which("pkg-config") is None:
        return []
    command = ["pkg-config", "--cflags-only-I", "libonnxruntime"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [Path(word.removeprefix("-I")) for word in done.stdout.split() if done.returncode == 0]


def _usual_places() -> list[Path]:
    prefixes = [os.environ.get("CONDA_PREFIX"), sys.prefix, "/usr/local", "/usr"]
    return list(dict.fromkeys(Path(prefix) / "include" / "onnxruntime" for prefix in prefixes if prefix))
