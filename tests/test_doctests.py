"""The examples in the docstrings of the public interface run, and print what they say."""

import doctest
import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastroute
from fastroute import clustering, data, diagnostics, inference, models, ops, visualize
from fastroute.nn import CrossConnection, GateClusteringLoss, ParallelPaths

MODULES = (ops, fastroute.nn, models, clustering, data, diagnostics, inference, visualize)
OBJECTS = {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__}
EXAMPLES = {
    name: test
    for name, value in OBJECTS.items()
    for test in doctest.DocTestFinder(recurse=False).find(value, name)
    if test.examples and name != "fastroute.inference.load"  # it shows a checkpoint of the reader's own
}


class TwoPaths(nn.Module):
    """What examples call `model`: a network with one router."""

    def __init__(self):
        super().__init__()
        self.router, self.paths = CrossConnection(3, 1, 2), ParallelPaths([nn.Flatten(), nn.Flatten()])
        self.head = nn.LazyLinear(10)

    def forward(self, images, return_routing=False):
        xs, routing = self.router([images], return_routing=True)
        logits = self.head(sum(self.paths(xs)))
        return (logits, {"router": routing}) if return_routing else logits


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, monkeypatch):
    for registered in ("_MODELS", "_BUILDERS"):  # an example adds a network
        monkeypatch.setattr(models.registry, registered, dict(getattr(models.registry, registered)))
    torch.manual_seed(0)
    torchvision = pytest.importorskip("torchvision") if "torchvision" in EXAMPLES[name].docstring else None
    names = {key: value for module in MODULES for key, value in vars(module).items()}
    names |= {
        "torch": torch,
        "nn": nn,
        "torchvision": torchvision,
        "fastroute": fastroute,
        "cross_entropy": cross_entropy,
        "gate_clustering": GateClusteringLoss(),
        "model": TwoPaths(),
        "network": nn.Linear(8, 10),
        "augment": lambda x: x + 0.1 * torch.randn_like(x),
        "x": torch.randn(32, 8),
        "X": torch.randn(120, 4).numpy(),
        "images": torch.randn(4, 3, 8, 8),
        "labels": torch.arange(4),
    }
    test = EXAMPLES[name]
    test.globs = names
    printed = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=printed.append).failed == 0, "".join(printed)


def test_the_main_classes_and_functions_have_examples():
    main = "ops.cross_connect ops.mix ops.mixture_em_loss nn.CrossConnection nn.CrossPrediction2d nn.CrossStitch"
    main += " nn.SparseRouter nn.MixtureEMLoss nn.GateClusteringLoss models.multipath models.create_model"
    for name in [*main.split(), "clustering.NeuralMixture"]:
        assert f"fastroute.{name}" in EXAMPLES, name


@pytest.mark.parametrize("name", [name for name, value in OBJECTS.items() if inspect.isfunction(value)])
def test_functions_say_what_they_take_and_return(name):
    text = inspect.getdoc(OBJECTS[name])
    takes = list(inspect.signature(OBJECTS[name]).parameters)
    missing = [parameter for parameter in takes if parameter not in text]
    assert not missing, f"{name} does not document {', '.join(missing)}"
