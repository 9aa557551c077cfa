import pytest
import torch
from sklearn.datasets import make_blobs
from typer.testing import CliRunner

from fastroute.cli import app
from fastroute.clustering import cluster_accuracy, two_dimensional
from fastroute.clustering.images import load_images


def test_normalised_scores_cluster_and_others_do_not():
    torch.manual_seed(0)
    X, y = make_blobs(1000, centers=4, cluster_std=0.5, random_state=3)
    points = torch.tensor(X, dtype=torch.float32)
    without, with_norm = (two_dimensional.cluster_points(points, 4, norm, steps=800) for norm in (False, True))
    accuracy = [cluster_accuracy(y, found.scores(points).argmax(1)) for found in (without, with_norm)]
    assert accuracy[1] > 0.9 > accuracy[0]
    # Table 4.1: means of 0.5, or anything.
    assert (with_norm.means - 0.5).abs().max() < 0.02 and (without.means - 0.5).abs().max() > 0.2


def test_points_tell_classes_apart():
    torch.manual_seed(0)
    images, labels, *_ = load_images("digits")
    points = two_dimensional.points_of(images, labels, steps=150)
    assert points.shape == (1797, 2)
    centers = torch.stack([points[labels == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(points, centers).argmin(1) == labels).float().mean() > 0.6


def test_command_prints_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(two_dimensional, "points_of", lambda images, labels: torch.randn(len(images), 2))
    monkeypatch.setattr(two_dimensional, "STEPS", 5)
    small = ["cluster", "--two-dimensional", "--limit", "60", "--img-size", "3", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, small)
    assert done.exit_code == 2 and "images have 3×3 pixels; they must have at least 4×4" in done.output
    arguments = ["cluster", "--two-dimensional", "--limit", "200", "--output", str(tmp_path), "--experiment", "run"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "accuracy with normalisation" in done.output, done.output
    assert all((tmp_path / "run" / f"{name}.svg").read_text().count("<use") >= 400 for name in ("points", "contours"))
    named = ["cluster", "--experiment", "two-dimensional", "--limit", "200", "--output", str(tmp_path)]
    assert "accuracy with normalisation" in CliRunner().invoke(app, named).output
    done = CliRunner().invoke(app, [*arguments, "-k", "2"])
    assert done.exit_code == 2 and "clusters is 2; it must be at least 3" in done.output


def test_steps_are_those_of_ten_epochs_of_mnist():
    assert pytest.approx(10 * 60_000 / two_dimensional.BATCH, rel=1e-3) == two_dimensional.STEPS
