"""Networks whose routers have another temperature than 1 are the same networks."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastroute import create_model
from fastroute.inference import load
from fastroute.inference.export import export
from fastroute.inference.predictor import Predictor
from fastroute.inference.preprocessing import Preprocessing
from fastroute.models.specification import specification_of
from fastroute.models.weights import load_pretrained, misfit
from fastroute.nn import CrossConnection
from fastroute.training import RoutingClassifier


@pytest.fixture
def cooled():
    network = create_model("resnet20_cc2", 7)
    network.stem_router.temperature = 2.0
    return network


def test_they_keep_their_specification(cooled):
    assert specification_of(cooled) is not None
    assert RoutingClassifier(cooled, num_classes=7).hparams.specification is not None
    cooled.reset_classifier(5)
    assert cooled.specification.num_classes == 5


def test_their_weights_start_others_with_the_temperature(cooled, tmp_path):
    torch.save(cooled.state_dict(), tmp_path / "w.pth")
    network = create_model("resnet20_cc2", 7, pretrained_path=tmp_path / "w.pth")
    assert network.stem_router.temperature == 2 and network.stack1_router.temperature == 1
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(x), cooled.eval()(x))
    load_pretrained(cooled, create_model("resnet20_cc2", 7).state_dict(), "weights is given")  # which lack it


def test_they_are_exported(cooled, tmp_path):
    pytest.importorskip("safetensors")
    levels = torch.zeros(3), torch.ones(3)
    images = Preprocessing(32, mean=levels[0], std=levels[1])
    names = [f"class {i}" for i in range(7)]
    predictor = Predictor(cooled.eval(), names, images, torch.device("cpu"), cooled.specification)
    assert export(predictor, "safetensors", tmp_path / "w.safetensors")["difference"] == 0
    again = load(tmp_path / "w.safetensors", device="cpu")
    assert again.model.stem_router.temperature == 2
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.model(x), cooled(x))


def test_their_weights_may_be_without_memory(cooled):
    weights = {name: value.to("meta") for name, value in cooled.state_dict().items()}
    cooled.load_state_dict(weights, assign=True)
    assert next(cooled.parameters()).is_meta


def test_they_may_be_in_activation_checkpoints(cooled):
    specification, state = specification_of(cooled), cooled.state_dict()
    for name, layer in list(cooled.named_children()):
        if isinstance(layer, CrossConnection):
            setattr(cooled, name, checkpoint_wrapper(layer))
    assert any(name.endswith("temperature") for name in state)
    assert misfit(cooled, state) is None and specification is not None
