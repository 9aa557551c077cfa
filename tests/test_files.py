import os

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.saved_runs import write_result
from fastroute import _files
from fastroute._files import check_writable, replacing, text_output
from fastroute.bench import plots
from fastroute.bench.results import Result, Row
from fastroute.clustering import two_dimensional
from fastroute.visualize.page import Report
from fastroute.visualize.style import save


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


def test_errors_name_the_file(tmp_path, monkeypatch):
    gone = tmp_path / "gone" / "x.csv"
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/gone/x\.csv'$"), replacing(gone):
        pass
    with pytest.raises(FileNotFoundError, match=r"'other'$"), replacing(tmp_path / "x.csv"):
        os.stat("other")  # another file's error keeps its name
    monkeypatch.setattr(_files, "_temporary", lambda path: path.with_name("full"))
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/x\.csv'$"), replacing(tmp_path / "x.csv") as file:
        file.write("text")
    assert os.listdir(tmp_path) == []


def draw_points(folder):
    points, labels = torch.rand(20, 2), torch.arange(20) % 3
    clustering = two_dimensional.cluster_points(points, 3, True, steps=1)
    two_dimensional.draw(points, labels, clustering, clustering, folder)


def draw_times(folder):
    labels = {"network": "resnet20_cc2", "direction": "forward+backward+optimiser", "dtype": "float32"}
    labels |= {"layout": "contiguous", "batch": 2, "paths": 2}
    plots.draw(Result({}, {}, None, {}, [Row("networks", labels, {"fastroute": 30.0, "eager": 45.0})]), folder, "x")


@pytest.mark.parametrize(
    "name, write",
    [
        ("report.html", lambda folder: Report(folder, "title", {}).write()),
        ("x.png", lambda folder: save(Figure(), folder, "x")),
        ("x.svg", lambda folder: save(Figure(), folder, "x")),
        ("points.svg", draw_points),
        ("x_steps.svg", draw_times),
        ("x.json", lambda folder: write_result(folder / "x.json", [{}])),
    ],
)
def test_files_are_never_half_written(tmp_path, monkeypatch, name, write):
    (tmp_path / name).write_text("earlier")
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == name:
            raise OSError("refused")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"):
        write(tmp_path)
    assert (tmp_path / name).read_text() == "earlier"
