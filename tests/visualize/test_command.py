import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.pictures = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href", "xlink:href") if attributes.get(name)]
        if attributes.get("role") == "img":
            self.pictures.append(attributes.get("aria-label"))


def test_a_report_is_of_one_checkpoint(run):
    done = run("report", "a/best.ckpt", "b/best.ckpt")
    assert done.exit_code == 2 and "b/best.ckpt follows; a report takes one: run the command for each" in done.output


def test_the_page_is_whole_in_itself(page):
    text = page.read_text()
    found = Links(text)
    beside = {link for link in found.links if not link.startswith(("data:", "#"))}  # to download, not to view
    assert beside == {path.name for path in page.parent.iterdir() if path.suffix in (".png", ".svg")}
    assert not re.search(r"url\((?!#)", text) and "@import" not in text and len(text) < 8e6
    assert len(found.pictures) >= 9 and all(found.pictures)
    names = {path.stem for path in page.parent.glob("*.svg")}
    assert names == {path.stem for path in page.parent.glob("*.png")} and len(names) == len(found.pictures)
    assert {"routing_flow", "gate_health", "class_histograms", "path_similarity", "learning_curves"} <= names
    assert "accuracy_against_parameters" in names and "360 of digits" in text
    flow = json.loads(re.search(r'<script id="flow-data"[^>]*>(.*?)</script>', text, re.S)[1])
    assert len(flow) == 12 and [layer["name"] for layer in flow[0]["layers"]] == ["stem", "stack1", "stack2", "stack3"]
    assert sum(flow[0]["layers"][1]["gates"][0]) == pytest.approx(1, abs=2e-4)
    with (page.parents[1] / "summary.csv").open() as file:
        accuracy = 100 - float(next(csv.DictReader(file))["val_error"])
    assert f"{accuracy:.2f} % of these images" in text
    assert re.search(r"<p>The paths have (not )?collapsed: .* The last router, stack3, ", text)
    assert "over j they sum to 1" in text and ("brightness explains" in text or "nearly the same gates" in text)


def test_images_of_the_user_s_own(checkpoint, run, tmp_path):
    files = [tmp_path / "a <b>.png", tmp_path / "grey.png"]
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(files[0])
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(files[1])
    done = run(
        *("report", checkpoint, "--gates", 1, "--classes", "3,8", "--output", tmp_path / "out"), "--images", *files
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "report.html").read_text()
    assert "2. grey.png" in text and "a &lt;b&gt;.png" in text and "3. " not in text and "a <b>" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["--classes", "three"], "classes names 'three'; there is no such class: 0, 1"),
        (["--before", "nowhere.ckpt"], "before is nowhere.ckpt; there is no such file"),
        (["--runs", "nowhere"], "there are no folders with best.ckpt"),
        (["--dataset", "imagefolder"], "data_dir is None"),
        (["--limit", 5], "limit is 5, but"),
    ],
)
def test_bad_input(checkpoint, run, tmp_path, arguments, message):
    done = run("report", checkpoint, *arguments, "--gates", 1, "--output", tmp_path)
    assert done.exit_code == 2 and message in done.output, done.output


def test_other_images_than_the_network_s(checkpoint, run, tmp_path):
    for i in range(3):
        (tmp_path / "val" / "ant").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "val" / "ant" / f"{i}.png")
    done = run("report", checkpoint, "--dataset", "imagefolder", "--data-dir", tmp_path)
    assert done.exit_code == 2 and "its images have 3 channels" in done.output


def test_networks_without_routers(run, tmp_path):
    train = run("train", "resnet20", "-b", 512, "--epochs", 1, "--output", tmp_path, "--experiment", "run")
    assert train.exit_code == 0, train.output
    done = run("report", tmp_path / "run" / "best.ckpt")
    assert done.exit_code == 2 and "the network has no routers, so there is no routing to show" in done.output
    done = run("report", tmp_path / "run" / "summary.csv")
    assert done.exit_code == 2 and "it is no checkpoint of a training run" in done.output
    done = run("paths", tmp_path / "run" / "best.ckpt")
    assert done.exit_code == 2 and "the network has no routers, so there is no routing to show" in done.output


def test_how_many_paths_the_gates_need(checkpoint, run, tmp_path):
    done = run("paths", checkpoint)
    assert done.exit_code == 0, done.output
    rows = [line.replace("│", " ").split() for line in done.output.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows if len(row) == 6] == [
        f"{name}_router" for name in ("stem", "stack1", "stack2", "stack3")
    ]
    assert all(row[2] == "2" for row in rows if len(row) == 6) and len(rows) == 7
    for row in rows:
        used, clusters, needed = map(float, row[-3:])
        assert 1 <= clusters <= used <= 2 and needed in (1, 2)  # 1 for gates that hardly differ between images
    done = run("paths", tmp_path / "nowhere.ckpt")
    assert done.exit_code == 2 and "nowhere.ckpt; there is no such file" in done.output


def test_too_few_images(run, tmp_path):
    for split, count in (("train", 8), ("val", 4)):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    data = ("--dataset", "imagefolder", "--data-dir", tmp_path / "data")
    train = run(
        *("train", "resnet20_cc2", "--epochs", 1, "--img-size", 8), *data, "--output", tmp_path, "--experiment", "run"
    )
    assert train.exit_code == 0, train.output
    done = run("report", tmp_path / "run" / "best.ckpt", "--data-dir", tmp_path / "data", "-j", 1)
    assert done.exit_code == 2 and "there are 8 images; a report shows 20 for each gate" in done.output
    (tmp_path / "data" / "val" / "ant" / "0.png").write_bytes(b"no image")
    done = run("report", tmp_path / "run" / "best.ckpt", "--data-dir", tmp_path / "data", "-j", 1)
    assert done.exit_code == 2 and "0.png cannot be read as an image" in done.output


def clustered(run, folder, *method):
    quick = ("--limit", 300, "--architecture", "C8 M F16", "--lr-em", 1e-3, "--clusters", 4, "--epochs", 1)
    done = run("cluster", "--method", *method, *quick, "--output", folder, "--experiment", "run")
    assert done.exit_code == 0, done.output
    return folder / "run" / "last.ckpt"


@pytest.mark.parametrize("method", [("two-fold", "--heads", 2), ("em", "--n-init", 2), ("iic",)])
def test_clusterings(run, tmp_path, method):
    checkpoint = clustered(run, tmp_path, *method)
    done = run("report", checkpoint, "--limit", 300)
    assert done.exit_code == 0, done.output
    assert done.output.index("Responses to all images …") < done.output.index("Clusters …")
    found = {path.stem for path in (tmp_path / "run" / "report").glob("*.png")}
    assert found == {"responses", "clusters", "confusion", "filters", "learning_curves"}
    text = (tmp_path / "run" / "report" / "report.html").read_text()
    assert all(Links(text).pictures) and "300 of digits" in text and "score of each cluster" in text
    sizes = (tmp_path / "run" / "summary.csv").read_text().split(",")[-1].strip()
    assert f"Images in each cluster: {', '.join(sizes.split())}." in text  # the network is the one that was trained


def test_a_clustering_beside_other_runs(run, tmp_path, monkeypatch):
    checkpoint = clustered(run, tmp_path, "em")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.csv").write_text((tmp_path / "run" / "summary.csv").read_text())
    (tmp_path / "unlabelled").mkdir()
    (tmp_path / "unlabelled" / "summary.csv").write_text("seconds,sizes\n0.1,3 4\n")  # as of k-means
    monkeypatch.chdir(checkpoint.parent)
    done = run("report", checkpoint.name, "--limit", 300, "--runs", tmp_path)
    assert "left out: summary is" in done.output and "unlabelled" in done.output
    text = (tmp_path / "run" / "report" / "report.html").read_text()
    assert done.exit_code == 0 and "Learning curves of other, run." in text and "run/last.ckpt" in text


def test_what_a_report_of_a_clustering_refuses(run, tmp_path):
    checkpoint = clustered(run, tmp_path, "em")
    done = run("paths", checkpoint)
    assert done.exit_code == 2 and "last.ckpt; it is no checkpoint of `fastroute train`" in done.output
    done = run("report", checkpoint, "--runs", "nowhere")
    assert (
        done.exit_code == 2
        and "runs is nowhere; there are no folders with learning curves in summary.csv in it" in done.output
    )
    for option, value in (
        *(("--data-dir", tmp_path), ("--images", tmp_path), ("--before", "x.ckpt"), ("--classes", "2")),
        ("--workers", 2),
    ):
        done = run("report", checkpoint, option, value)
        assert done.exit_code == 2 and "leave it out" in done.output, done.output
    done = run("report", checkpoint, "--limit", 5)
    assert done.exit_code == 2 and "there are 5 images; a report shows 10 for each cluster" in done.output


def test_a_dense_autoencoder_has_no_filters(run, tmp_path):
    options = ("--method", "dec", "--limit", 100, "--clusters", 3, "--epochs", 2)
    done = run("cluster", *options, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    done = run("report", tmp_path / "run" / "last.ckpt")
    assert done.exit_code == 0, done.output
    found = {path.stem for path in (tmp_path / "run" / "report").glob("*.png")}
    assert found == {"responses", "clusters", "confusion", "learning_curves"}
    assert "dense autoencoder" in (tmp_path / "run" / "report" / "report.html").read_text()


def test_filters_of_an_autoencoder_are_those_of_its_encoder(run, tmp_path):
    options = ("--method", "ae", "--limit", 60, "--clusters", 3, "--epochs", 1, "--architecture", "C4 M F8")
    done = run("cluster", *options, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    done = run("report", tmp_path / "run" / "last.ckpt")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report" / "filters.png").exists()
