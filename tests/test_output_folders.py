"""Folders that are written: which will do, and files that come as a whole."""

import os

import pytest

from gspn2convert.artifact import check_output_folder, write_atomic
from gspn2convert.errors import UserError


def test_output_folders(tmp_path):
    check_output_folder(tmp_path / "new", resume=False)
    check_output_folder(tmp_path, resume=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty; name another, or .* --resume"):
        check_output_folder(tmp_path, resume=False)
    check_output_folder(tmp_path, resume=True)
    with pytest.raises(UserError, match="is a file"):
        check_output_folder(tmp_path / "file", resume=True)


def test_files_are_written_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    write_atomic(file, b"old")
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    write_atomic(tmp_path / "a.bin", b"old")
    (tmp_path / ".a.bin.part").symlink_to("/dev/full")  # every write to it finds the disk full
    with pytest.raises(UserError, match="disk full: .*a.bin of .* MiB could not be written; make room"):
        write_atomic(tmp_path / "a.bin", bytes(size))
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_empty_output_folder_will_do_where_the_one_above_is_closed(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    check_output_folder(tmp_path / "out", resume=False)
    with pytest.raises(UserError, match="other cannot be made: .* is no folder that can be written to$"):
        check_output_folder(tmp_path / "other", resume=False)
