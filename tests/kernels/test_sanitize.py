"""The CPU kernels under AddressSanitizer and UBSan, on both kinds of processors that it is compiled for."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import gspn2_kernels

SOURCES = Path(gspn2_kernels.__file__).parent / "csrc"
PROGRAM = Path(__file__).parent / "sanitize.cc"
FLAGS = "-std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi".split()
# What CMakeLists.txt adds for a kind of processor.
PROCESSORS = {"generic": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}


def compile_into(output: Path, *arguments: str | Path) -> Path:
    command = [os.environ.get("CXX", "c++"), *FLAGS, "-I", SOURCES, *arguments, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module", autouse=True)
def _compiler(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips without a compiler that has the sanitizers, unless GSPN2_REQUIRE_ORT_OP is set."""
    empty = tmp_path_factory.mktemp("sanitizers") / "empty.cc"
    empty.write_text("int main() {}")
    found = shutil.which(os.environ.get("CXX", "c++"))
    command = [found or "", *FLAGS, empty, "-o", empty.with_suffix("")]
    if not found or subprocess.run(command, capture_output=True).returncode != 0:
        assert not os.environ.get("GSPN2_REQUIRE_ORT_OP")
        pytest.skip("needs a C++ compiler with AddressSanitizer and UBSan")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_no_sanitizer_complains(processor: str, tmp_path: Path) -> None:
    if processor == "avx2" and "avx2" not in cpu_flags():
        pytest.skip("needs a processor with AVX2")
    objects = [
        compile_into(
            tmp_path / f"{task}-{name}.o", "-c", SOURCES / f"{task}.cc", f"-DGSPN2_PROCESSOR={name}", *PROCESSORS[name]
        )
        for name in {"generic", processor}
        for task in ("line_scan_task", "add_norm_task")
    ]
    with_avx2 = ["-DGSPN2_WITH_AVX2"] if processor == "avx2" else []
    program = compile_into(
        tmp_path / "sanitize",
        *with_avx2,
        SOURCES / "line_scan_cpu.cc",
        SOURCES / "add_norm_cpu.cc",
        PROGRAM,
        *objects,
        "-pthread",
    )
    done = subprocess.run([program, "1000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "1000 line scans, 524288 numbers, 1000 sums with norms: passed\n"


def cpu_flags() -> list[str]:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return []
    return Path("/proc/cpuinfo").read_text().split()
