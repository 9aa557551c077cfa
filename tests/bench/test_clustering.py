import json

import pytest
import yaml

from benchmarks import clustering
from fastroute.bench.report import with_section

PAGE = "# Title\n\n<!-- clusterings: r.json -->\nold\n<!-- end of clusterings -->\n\nmore\n"


def write_run(folder, accs, **options):
    folder.mkdir()
    (folder / "args.yaml").write_text(
        yaml.safe_dump({"dataset": "mnist", "epochs": len(accs), "data_dir": "x"} | options)
    )
    rows = "".join(f"{epoch},{acc},0.5,0.25,2.5\n" for epoch, acc in enumerate(accs, 1))
    (folder / "summary.csv").write_text("epoch,acc,nmi,ari,seconds\n" + rows)
    (folder / "assignments.csv").write_text("path,cluster\n" + "mnist:0,1\n" * 4)
    return folder


def test_tables_are_means_of_the_runs_beside_the_thesis(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", [0.2, 0.5], method="dec", seed=0),
        write_run(tmp_path / "b", [0.2, 0.6], method="dec", seed=1),
        write_run(tmp_path / "c", [0.9, 0.8, 0.95], method="two-fold", seed=0, self_label=1, lr_em=1e-3),
        write_run(tmp_path / "d", [0.1], method="kmeans", seed=0, architecture="C4 F8", lr_em=1e-3),
    ]
    result, page = tmp_path / "r.json", tmp_path / "page.md"
    page.write_text(PAGE)
    places = ["--result", str(result), "--page", str(page)]
    clustering.main([*map(str, folders), *places])
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- clusterings: r.json -->\n") and text.endswith("clusterings -->\n\nmore\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    assert lines == [
        ["`two-fold` `--self-label 1` `--lr-em 0.001`", "3", "95.0", "95.0", "50.0", "25.0", "8", "98.9", "96.7"],
        ["`dec`", "2", "55.0", "50.0, 60.0", "50.0", "25.0", "5", "84.3", "77.2"],
        ["`kmeans` `--architecture 'C4 F8'`", "", "10.0", "10.0", "50.0", "25.0", "2", "57.2", "50.0"],
    ]
    runs = json.loads(result.read_text())
    assert [run["acc_before"] for run in runs if "acc_before" in run] == [0.8]
    assert all(run["images"] == 4 and "data_dir" not in run for run in runs)
    # A run of the same options replaces the earlier one, and others stay.
    clustering.main([str(write_run(tmp_path / "e", [0.2, 0.7], method="dec", seed=1)), *places])
    assert len(json.loads(result.read_text())) == 4 and "50.0, 70.0" in page.read_text()
    clustering.main(places)
    assert "50.0, 70.0" in page.read_text()
    folder = str(write_run(tmp_path / "f", [0.3], method="dec", seed=0, dataset="imagefolder"))
    clustering.main([folder, "--images-of", "cifar10", *places])
    assert "**cifar10**, 4 images:" in page.read_text() and "30.1 | 25.7 |" in page.read_text()


def test_runs_what_is_missing(tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command[2:])

    monkeypatch.setattr(clustering.subprocess, "run", run)
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs" / "dec-1", [0.4], method="dec", seed=1)
    found = clustering.run_all("--dataset mnist --limit 4", tmp_path / "runs", ["dec", "vae", "kmeans"], [1])
    assert [place.name for place in found] == ["dec-1", "vae-1", "kmeans-1"]
    common = ["fastroute", "cluster", "--dataset", "mnist", "--limit", "4", "--method"]
    places = ["--output", str(tmp_path / "runs"), "--experiment"]
    assert commands == [
        [*common, "vae", "--seed", "1", *places, "vae-1", "--resume", "auto"],
        [*common, "kmeans", "--seed", "1", *places, "kmeans-1"],
    ]


def test_unfinished_runs_and_other_pages_are_refused(tmp_path):
    folder, page = write_run(tmp_path / "a", [0.5], method="dec", seed=0), tmp_path / "page.md"
    page.write_text("nothing")
    places = ["--result", str(tmp_path / "r.json"), "--page", str(page)]
    with pytest.raises(SystemExit, match="it must have <!-- clusterings: RESULT -->"):
        clustering.main([str(folder), *places])
    (folder / "assignments.csv").unlink()
    with pytest.raises(SystemExit, match=r"assignments\.csv"):
        clustering.main([str(folder), *places])
    assert not (tmp_path / "r.json").exists() and page.read_text() == "nothing"


def test_the_page_is_that_of_the_result():
    runs = json.loads(clustering.RESULT.read_text())
    tables = clustering.tables(clustering.merged(runs, []))
    assert with_section(clustering.PAGE, "clusterings", clustering.RESULT, tables) == clustering.PAGE.read_text()
