import pickle

import pytest
from torch import nn

from fastroute import models
from fastroute.models import registry
from fastroute.models.sources import layout


class Dense(nn.Linear):
    def __init__(self, num_classes=10, in_chans=3, img_size=32):
        super().__init__(in_chans * img_size**2, num_classes)


def test_lists_in_natural_order_by_pattern():
    assert models.list_models("resnet[23]?_cc*") == [f"resnet{depth}_cc{n}" for depth in (20, 32) for n in (2, 3, 4)]
    assert "resnet20" in models.list_models()
    assert models.list_models("nothing*") == []


def test_registers_a_network(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", {})

    @models.register_model
    def dense(num_classes, in_chans, img_size, bias=True):
        return nn.Linear(in_chans * img_size**2, num_classes, bias)

    models.register_model(dense, name="other")
    assert models.list_models() == ["dense", "other"]
    model = models.create_model("dense", num_classes=5, in_chans=1, img_size=4, bias=False)
    assert (model.in_features, model.out_features, model.bias) == (16, 5, None)
    assert models.model_info("dense") == (dense, 10, 32, "", "")
    with pytest.raises(ValueError, match="name is 'dense'; a network of that name is registered already"):
        models.register_model(dense)


def test_every_network_is_a_documented_function():
    for name in models.list_models():
        function = getattr(models, name)
        assert name in models.__all__ and function is models.model_info(name).builder
        assert function.__name__ == name and function.__doc__.startswith("Build ")


def test_a_function_is_create_model_with_its_name():
    built = models.resnet20_cc2(num_classes=7, routing=None)
    created = models.create_model("resnet20_cc2", 7, routing=None)
    assert built.specification == created.specification and layout(built) == layout(created)
    assert models.resnet20(0).num_classes == 0 and models.resnet20().num_classes == 10


def test_positional_arguments_have_the_order_of_the_builder(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", {})

    @models.register_model
    def dense(width, img_size=4, *, num_classes=10, in_chans=3):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size**2, width), nn.Linear(width, num_classes))

    model = dense(5, 2, num_classes=7)
    assert (model[1].in_features, model[1].out_features, model[2].out_features) == (12, 5, 7)
    assert layout(model) == layout(models.create_model("dense", 7, img_size=2, width=5))
    with pytest.raises(TypeError, match="dense takes at most 2 positional arguments; 3 were given"):
        dense(5, 2, 7)
    with pytest.raises(TypeError, match="multiple values"):
        dense(5, width=6)
    with pytest.raises(ValueError, match="num_classes is 0; dense has no reset_classifier"):
        dense(5, num_classes=0)


def test_a_class_stays_a_class(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", {})
    assert models.register_model(Dense) is Dense
    model = models.create_model("Dense", 7)
    assert isinstance(model, Dense) and isinstance(pickle.loads(pickle.dumps(model)), Dense)
    assert isinstance(models.model_info("Dense").builder(img_size=2), Dense)


def test_defaults_are_those_of_the_network(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", {})

    @models.register_model(num_classes=100, img_size=64, table="3.4", params="1.2")
    def dense(num_classes, in_chans, img_size):
        return nn.Linear(in_chans * img_size, num_classes)

    assert models.model_info("dense") == (dense, 100, 64, "3.4", "1.2")
    model = models.create_model("dense")
    assert (model.in_features, model.out_features) == (3 * 64, 100)
    with pytest.raises(ValueError, match="name is 'dens'; there is no such network: did you mean dense"):
        models.model_info("dens")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "resnet20_c2"}, "name is 'resnet20_c2'; there is no such network: did you mean .*resnet20_cc2"),
        (
            {"name": "???"},
            "no such network: it must be .*timm:NAME, torchvision:NAME or package.module:func",
        ),
        ({"name": "resnet20", "num_classes": -1}, "num_classes is -1; it must be at least 0"),
        ({"name": "resnet20", "in_chans": -3}, "in_chans is -3; it must be at least 1"),
        ({"name": "resnet20", "img_size": 0}, "img_size is 0; it must be at least 1"),
        ({"name": "resnet20_cc2", "routing": "xx"}, "routing is 'xx'; it must be 'cc', 'cp' or None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create_model(**arguments)


def test_several_patterns():
    assert models.list_models(["resnet20", "resnet20_c?2"]) == ["resnet20", "resnet20_cc2", "resnet20_cp2"]
