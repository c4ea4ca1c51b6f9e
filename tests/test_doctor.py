"""The doctor's findings here, and on machines that lack something."""

from importlib.metadata import version

import pytest

import gspn2_kernels
from gspn2convert import doctor


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


@pytest.mark.parametrize("good", ["2.8.0", "2.8", "2.11.0a0+git123", "2.14.1+cpu", "3.0"])
def test_new_enough_versions_are_fine(monkeypatch, good):
    real = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda package: good if package == "torch" else real(package))
    assert checks()["torch"].ok
