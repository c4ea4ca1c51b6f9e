"""The doctor's findings here, and on machines that lack something."""

import json
from importlib.metadata import version

import onnxruntime
import pytest
import torch

import gspn2_kernels
from gspn2convert import doctor
from helpers.sessions import LIBRARY


def checks():
    return {check.name: check for check in doctor.report()}


def test_a_healthy_machine_has_nothing_required_to_mend():
    found = checks()
    assert all(check.ok for check in found.values() if check.required)
    assert found["torch"].value == version("torch")
    assert found["line scan on cpu"].value == gspn2_kernels.backend("cpu")
    assert "CPUExecutionProvider" in found["onnxruntime"].value


@pytest.mark.parametrize(
    ("versions", "name", "value", "remedy"),
    [
        ({"timm": None}, "timm", "missing", 'pip install "timm"'),
        ({"timm": "1.0.3"}, "timm", "1.0.3", 'pip install --upgrade "timm>=1.0.29"'),
        ({"torch": "2.7.1+cu128"}, "torch", "2.7.1+cu128", 'pip install --upgrade "torch>=2.8"'),
        ({"onnxscript": None}, "onnx export", "onnxscript missing", 'pip install "gspn2convert[onnx,ort]"'),
        ({"onnxruntime": None, "onnxruntime-gpu": None}, "onnxruntime", "missing", 'pip install "gspn2convert[ort]"'),
        ({"onnxruntime-gpu": "1.30.0"}, "onnxruntime", "overwrite each other", "pip uninstall -y onnxruntime onnx"),
    ],
)
def test_what_is_missing_comes_with_the_command_that_mends_it(monkeypatch, versions, name, value, remedy):
    real = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda package: versions.get(package, real(package)))
    check = checks()[name]
    assert not check.ok
    assert value in check.value
    assert check.remedy.startswith(remedy)


GPU_WHEEL = {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}


def fake_versions(monkeypatch, versions):
    real = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda package: versions.get(package, real(package)))


def test_gpu_wheel_without_cuda_is_noticed(monkeypatch):
    fake_versions(monkeypatch, GPU_WHEEL)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    check = checks()["onnxruntime"]
    assert check.value == "onnxruntime-gpu 1.31.1; CPUExecutionProvider: no CUDA provider"
    assert check.remedy.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert checks()["onnxruntime"].ok


@pytest.mark.parametrize(
    ("exists", "cuda", "device", "value", "remedy"),
    [
        (None, False, False, "not built; exported files run without it", ""),
        (None, False, True, "not built", "gspn2convert build-ops"),
        (True, False, False, "CPU alone: ", ""),
        (True, False, True, "CPU alone: ", "gspn2convert build-ops --cuda"),
        (True, True, True, "CPU and CUDA: ", ""),
        (False, False, False, "library.so: no such file", "unset GSPN2_ORT_LIBRARY"),
        ("cut", True, True, "library.so: no library, or not all of one", "unset GSPN2_ORT_LIBRARY"),
    ],
)
def test_library_of_line_scan(monkeypatch, tmp_path, exists, cuda, device, value, remedy):
    path = tmp_path / "library.so"
    if exists:
        path.write_bytes(b"cut" if exists == "cut" else LIBRARY)
        path.with_suffix(".json").write_text(json.dumps({"cuda": cuda}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", "" if exists is None else str(path))
    fake_versions(monkeypatch, GPU_WHEEL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    check = doctor._library()
    assert value in check.value
    assert (check.ok, check.remedy) == (not remedy, remedy)


@pytest.mark.parametrize("good", ["2.8.0", "2.8", "2.11.0a0+git123", "2.14.1+cpu", "3.0"])
def test_new_enough_versions_are_fine(monkeypatch, good):
    real = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda package: good if package == "torch" else real(package))
    assert checks()["torch"].ok
