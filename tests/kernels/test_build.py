"""Building and finding the library of the ONNX op, and registering it."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from gspn2_kernels import build as builds
from gspn2_kernels import build_tools, onnx_op
from gspn2_kernels.build import BuildError, build, has_cuda, library_path
from helpers.processes import environment
from helpers.sessions import LIBRARY


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing that the environment names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GSPN2_ORT_LIBRARY", raising=False)
    return tmp_path / "cache" / "gspn2convert"


def fake_headers(folder: Path, version: int = 21) -> Path:
    folder.mkdir(parents=True)
    (folder / "onnxruntime_cxx_api.h").touch()
    (folder / "onnxruntime_c_api.h").write_text(f"#define ORT_API_VERSION {version}\n")
    return folder


def test_two_processes_build_once(built_library: Path, cache: Path) -> None:
    # One that was cut off is none.
    damaged = cache / built_library.parent.name / built_library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(built_library.read_bytes()[:20000])
    shutil.copy(built_library.with_suffix(".json"), damaged.with_suffix(".json"))
    assert library_path() is None
    code = "from gspn2_kernels.build import build; print(build(report=print))"
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    printed = [worker.communicate()[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert printed[0][-1] == printed[1][-1]
    assert sum(line.startswith("building with") for lines in printed for line in lines) == 1
    library = Path(printed[0][-1])
    assert library.parent.name == built_library.parent.name
    assert sorted(path.name for path in cache.iterdir()) == [library.parent.name, f"{library.parent.name}.lock"]
    assert sorted(path.name for path in library.parent.iterdir()) == ["libgspn2_ort.json", "libgspn2_ort.so"]
    assert library_path() == library
    assert not has_cuda(library)
    assert json.loads(library.with_suffix(".json").read_text())["onnxruntime_api"] >= 18


def test_failed_build_leaves_nothing(built_library: Path, cache: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(BuildError, match="the build failed: .*cmake --build (.|\n)*onnx_op.h.*error:"):
        build(include=fake_headers(tmp_path / "headers"), report=lines.append)
    assert [line.split(" with ")[0] for line in lines] == ["building"]
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert library_path() is None


def test_compiler_that_makes_nothing_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/bin/true")
    with pytest.raises(BuildError, match="ended without a library: .*set CXX to one that works"):
        build(include=fake_headers(tmp_path / "headers"))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot build in .*file/gspn2convert: Not a directory; set XDG_CACHE_HOME"):
        build(include=fake_headers(tmp_path / "headers"))


def test_missing_headers_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ORT_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(build_tools, "_usual_places", lambda: [tmp_path / "usual"])
    monkeypatch.setattr(build_tools, "_from_pkg_config", lambda: [])
    with pytest.raises(BuildError, match=r"onnxruntime_cxx_api.h is not in .*usual; .*apt install libonnxruntime-dev"):
        build()
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path / "named"))
    with pytest.raises(BuildError, match=r"is not in .*named; .*by --include or ORT_INCLUDE_DIR"):
        build()
    with pytest.raises(BuildError, match="is not in .*given; "):
        build(include=tmp_path / "given")
    with pytest.raises(BuildError, match=r"are of ONNX Runtime 1.17, expected 1.18 or newer; install them"):
        build(include=fake_headers(tmp_path / "old", 17))


@pytest.mark.parametrize("below", ["", "onnxruntime", "onnxruntime/core/session", "include"])
def test_headers_are_found(below: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = fake_headers(tmp_path / "prefix" / below)
    assert build_tools.find_headers(tmp_path / "prefix") == headers
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path / "prefix"))
    assert build_tools.find_headers() == headers
    monkeypatch.delenv("ORT_INCLUDE_DIR")
    monkeypatch.setattr(build_tools, "_from_pkg_config", lambda: [])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    in_prefix = fake_headers(tmp_path / "conda" / "include" / "onnxruntime")
    assert build_tools.find_headers() == in_prefix


def test_missing_programs_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = fake_headers(tmp_path / "headers")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_tools, "_CUDA", str(tmp_path))
    for program, message in [
        ("c++", r"no C\+\+ compiler: c\+\+, g\+\+, clang\+\+ not found; apt install g\+\+"),
        ("cmake", "cmake not found; pip install cmake"),
        ("make", "neither ninja nor make found; pip install ninja"),
        ("nvcc", "nvcc not found in PATH, CUDA_HOME or .*; install the CUDA toolkit"),
    ]:
        with pytest.raises(BuildError, match=message):
            build(include=headers, cuda=True)
        (tmp_path / program).touch(mode=0o755)
    assert build_tools.find_nvcc() == str(tmp_path / "nvcc")


def test_which_library_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert library_path() is None
    found = []
    kinds = [("cut", "now"), ("new", "now"), ("old", "now"), ("other", "before"), ("broken", "")]
    for age, (key, sources) in enumerate(kinds):
        library = cache / f"ort-{key}" / "libgspn2_ort.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(LIBRARY[: 40 if key == "cut" else None])
        os.utime(library, (1e9 - age, 1e9 - age))
        metadata = json.dumps({"sources": sources, "cuda": key == "new"})
        library.with_suffix(".json").write_text(metadata if sources else "{")
        found.append(library)
    monkeypatch.setattr(builds, "_source_hash", lambda: "now")
    assert library_path() == found[1]
    assert [has_cuda(path) for path in found] == [False, True, False, False, False]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", "mine.so")
    assert library_path() == tmp_path / "mine.so"


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(onnx_op.LibraryMissing, match="is not built; run `gspn2convert build-ops`"):
        onnx_op.register(onnxruntime.SessionOptions())
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(tmp_path / "mine.so"))
    with pytest.raises(onnx_op.LibraryMissing, match="names .*mine.so, which does not exist; .*build-ops`"):
        onnx_op.get_library_path()
    for content in (b"", b"no library", LIBRARY[:40], LIBRARY[:40] + b"\x99" + LIBRARY[41:]):
        (tmp_path / "mine.so").write_bytes(content)
        with pytest.raises(onnx_op.LibraryMissing, match=r"mine.so is no library, or not all of one; .*build-ops`"):
            onnx_op.get_library_path()


def test_registering_twice_is_once(library: Path) -> None:
    options = onnxruntime.SessionOptions()
    assert onnx_op.get_library_path() == str(library)
    assert onnx_op.register(options)
    assert onnx_op.register(options, [("CPUExecutionProvider", {})])


def test_library_that_does_not_fit_is_not_registered(
    library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = onnxruntime.SessionOptions()
    with caplog.at_level(logging.WARNING):
        assert not onnx_op.register(options, [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"])
        monkeypatch.setattr(onnx_op, "_runtime_version", lambda: "1.17.3")
        assert not onnx_op.register(options)
    assert "has no CUDA kernels; `gspn2convert build-ops --cuda`" in caplog.text
    assert "onnxruntime is 1.17.3, expected 1.18 or newer" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(library))
    assert onnx_op.register(options)
