"""The names of the package, and processes that import it."""

import os
import subprocess
import sys

import pytest

from gspn2convert.artifact import load
from gspn2convert.teachers import load_teacher


def test_names_of_the_package():
    import gspn2convert.convert
    import gspn2convert.distill

    assert gspn2convert.convert.__name__ == "convert", "the function, though the submodule has been imported"
    assert callable(gspn2convert.distill)
    assert gspn2convert.load is load
    assert gspn2convert.load_teacher is load_teacher
    assert all(getattr(gspn2convert, name) is not None for name in gspn2convert.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        _ = gspn2convert.loda


def run_python(*arguments, cwd):
    path = os.pathsep.join([str(cwd), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_the_command_line_starts_without_torch(tmp_path):
    script = "import sys; sys.argv = ['/usr/bin/gspn2convert']; import gspn2convert; print('torch' in sys.modules)"
    assert run_python("-c", script, cwd=tmp_path).stdout == "False\n"
    imported = run_python("-X", "importtime", "-m", "gspn2convert", "--help", cwd=tmp_path).stderr
    assert "| click" in imported.replace("  ", "")
    assert "| torch" not in imported.replace("  ", "")


def test_a_module_of_someone_else_registers(tmp_path):
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("import gspn2convert, timm; print(timm.is_model('gspn2_vit'))\n")
    (package / "train.py").touch()
    assert run_python("-m", "theirs.train", cwd=tmp_path).stdout == "True\n"
