import os

import pytest

from fastroute._files import check_writable, text_output


def test_where_a_file_can_be_written(tmp_path):
    (tmp_path / "link").symlink_to("missing/x.csv")
    for path, error, message in (
        (tmp_path / "none" / "x.csv", FileNotFoundError, "output is .*; there is no such folder: make it first"),
        (tmp_path / "link", FileNotFoundError, "output is .*; there is no such folder: make it first"),
        (tmp_path, IsADirectoryError, "output is .*; it is a folder: name a file"),
    ):
        with pytest.raises(error, match=message):
            check_writable(path, "output")
    for path in (tmp_path / "x.csv", "/dev/null"):
        check_writable(tmp_path / path, "output")


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "x.csv").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path / "x.csv")  # root may write everywhere
    check_writable(tmp_path / "x.csv", "output")
    with text_output(tmp_path / "x.csv") as file:  # itself, as its folder takes no other
        file.write("text")
        file.flush()
        assert (tmp_path / "x.csv").read_text() == "text"
    with pytest.raises(PermissionError, match=r"output is .*; this user cannot write there"):
        check_writable(tmp_path / "y.csv", "output")


def test_a_file_keeps_its_mode_and_is_whole(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("earlier")
    path.chmod(0o600)
    with pytest.raises(ValueError, match="stop"), text_output(path) as file:
        file.write("half")
        raise ValueError("stop")
    assert path.read_text() == "earlier"
    with text_output(path) as file:
        file.write("whole")
    assert path.read_text() == "whole" and path.stat().st_mode & 0o777 == 0o600
