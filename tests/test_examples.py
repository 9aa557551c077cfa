"""The scripts and notebooks in examples/ run, and reach the results that they state."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from fastroute.clustering.images import Loaded

EXAMPLES = Path(__file__).parents[1] / "examples"


def main(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_routing_layer_learns_the_digits():
    assert main("routing_layer") > 0.9


def test_multipath_starts_as_the_network_and_is_fine_tuned():
    before, converted, after = main("multipath_finetune")
    assert abs(converted - before) < 0.03 and after > before - 0.02 and after > 0.7


def test_neural_mixture_clusters_a_matrix_better_than_k_means():
    accuracies = main("cluster_matrix")
    assert accuracies["NeuralMixture"] > accuracies["k-means"]


def test_neural_mixture_clusters_rings_by_spectral_features():
    accuracies = main("cluster_rings")
    assert accuracies["the points"] < 0.7 and accuracies["spectral features"] > 0.98


def test_mixture_em_loop_finds_clusters():
    assert main("mixture_em_loop") > 0.55


def test_gates_differ_between_images():
    spread = main("gates")
    assert set(spread) == {0.0, 0.01} and all(0.001 < value < 0.5 for value in spread.values())


def test_domains_are_joined_and_told_by_gates(tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(EXAMPLES / "domains.py"))

    def load_images(dataset, place, img_size):
        labels = torch.arange(10) % 2
        classes = ["cat", "dog"] if dataset == "imagefolder" else ["0", "1"]
        return Loaded(torch.rand(10, 3 if dataset == "imagefolder" else 1, img_size, img_size), labels, classes, [])

    monkeypatch.setitem(example["join"].__globals__, "load_images", load_images)
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    example["main"](["join", str(tmp_path / "joined"), "--mnist", "data", "--cifar10", str(tmp_path / "cifar10")])
    images = sorted(file.relative_to(tmp_path / "joined") for file in tmp_path.glob("joined/*/*/*.png"))
    assert len(images) == 30 and {image.parts[1] for image in images} == {"0", "1", "cat", "dog"}
    assert sum(image.parts[0] == "val" for image in images) == 6

    rows = ["path,class_1,probability_1,stem_router_g11,stem_router_g12"]
    for domain, number, own in (("digits", 0, 0.0), ("digits", 1, 1.0), ("mnist", 0, 0.0), ("mnist", 1, 1.0)):
        rows.append(f"val/{number}/{domain}-0000.png,0,0.9,{own},{0.25 if domain == 'mnist' else 0.75}")
    (tmp_path / "gates.csv").write_text("\n".join(rows))
    shares = example["gates"](tmp_path / "gates.csv")
    assert shares["stem_router_g11"] == pytest.approx((0, 1)) and shares["stem_router_g12"] == pytest.approx((1, 0))
    assert "mnist: 50.00 % error of 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "least"), [("routing", 0.8), ("clustering", 0.7)])
def test_notebooks_run_from_top_to_bottom(name, least):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    variables = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "notebooks are kept without outputs"
            exec("".join(cell["source"]), variables)
    assert variables["accuracy"] > least
    if name == "routing":
        assert isinstance(variables["figure"], Figure)
        gates = variables["routing"]["mix"].gates
        torch.testing.assert_close(gates.sum(2), torch.ones_like(gates[..., 0]))
    else:
        assert variables["found"].n_clusters_ == 4


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"[{path.name}]({path.name})" in listed
