import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastroute
from tests.cli.commands import run


@pytest.fixture(params=["two-fold", "dec", "kmeansnet", "ae"])
def clustered(tmp_path, request):
    """A run on images of several sizes, and their posteriors by name."""
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        pixels = generator.integers(0, 256, (9 + i % 3, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02}.png")
    options = ["--img-size", 8, "-k", 3, "-b", 6, "--epochs", 2, "--architecture", "C4 M F8", "--method", request.param]
    done = run("cluster", "--data-dir", tmp_path / "photos", *options, "--output", tmp_path, "--experiment", "run")
    assert done.exit_code == 0, done.output
    with (tmp_path / "run" / "assignments.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    return tmp_path / "run" / "last.ckpt", rows


def test_predicts_the_clusters_of_images(clustered):
    checkpoint, rows = clustered
    predictor = fastroute.load(checkpoint, device="cpu")
    assert predictor.classes == ["0", "1", "2"] and not predictor.model.training
    found = predictor(list(rows))
    expected = torch.tensor([[float(row[f"posterior_{k}"]) for k in range(3)] for row in rows.values()])
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-6)
    assert found.labels == [row["cluster"] for row in rows.values()]
    done = run("predict", checkpoint, checkpoint.parent.parent / "photos", "--format", "json")
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert {row["path"]: row["top"][0]["class"] for row in listed} == {p: row["cluster"] for p, row in rows.items()}


@pytest.mark.parametrize("clustered", ["two-fold"], indirect=True)
def test_refuses_what_a_clustering_has_no_use_for(clustered):
    checkpoint, _ = clustered
    for name, value in {"model": "resnet20", "img_size": 16, "crop_pct": 0.9, "mean": [0.0], "std": [1.0]}.items():
        with pytest.raises(ValueError, match=f"{name} is given, but .*last.ckpt is a clustering, .*leave it out"):
            fastroute.load(checkpoint, **{name: value})
    refused = run("export", checkpoint, "--to", "safetensors")
    assert refused.exit_code == 2 and "predictor is of a clustering, which cannot be exported" in refused.output
    refused = run("predict", checkpoint, checkpoint.parent.parent / "photos", "--gates")
    assert refused.exit_code == 2 and "the network has no routers" in refused.output
    saved = torch.load(checkpoint)
    for shape in (None, [3, 8], [3, 8, 0], "3"):
        torch.save(saved | {"shape": shape}, checkpoint)
        with pytest.raises(ValueError, match="it does not say of which shape its images are"):
            fastroute.load(checkpoint)
    torch.save({name: value for name, value in saved.items() if name != "shape"}, checkpoint)
    with pytest.raises(ValueError, match="resume the run"):
        fastroute.load(checkpoint)


@pytest.mark.parametrize("clustered", ["dec", "ae"], indirect=True)
def test_refuses_a_run_that_has_no_clusters_yet(clustered):
    checkpoint, _ = clustered
    saved = torch.load(checkpoint)
    saved["state_dict"]["centers"].zero_()
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match="its run has stopped before it placed the clusters: resume it"):
        fastroute.load(checkpoint)
