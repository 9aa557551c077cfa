import pytest
import torch
from torch import nn

from fastroute import models, multipath
from fastroute.models import Ensemble
from fastroute.models.cifar_resnet import cifar_resnet


def checkpoint(path, name, **sizes):
    """Write the fields of a checkpoint that an ensemble reads."""
    sizes = {"num_classes": 10, "in_chans": 3, "img_size": 32, **sizes}
    model = models.create_model(name, **sizes).eval()
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save(
        {"state_dict": {**weights, "val_error.tp": torch.zeros(1)}, "hyper_parameters": {"model": name, **sizes}}, path
    )
    return model


def test_averages_probabilities():
    members = [cifar_resnet(8), cifar_resnet(8, 2)]
    ensemble, x = Ensemble(members).eval(), torch.randn(4, 3, 8, 8)
    logits, routing = ensemble(x, return_routing=True)
    torch.testing.assert_close(logits.softmax(1), (members[0](x).softmax(1) + members[1](x).softmax(1)) / 2)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(4))
    assert list(routing) == [f"members.1.{name}_router" for name in ("stem", "stack1", "stack2", "stack3")]
    with pytest.raises(ValueError, match="members is empty"):
        Ensemble([])


def test_loads_networks_that_were_trained_one_by_one(tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    members = [checkpoint(path, "base_cnn", num_classes=7, in_chans=1, img_size=8) for path in paths]
    ensemble, x = models.create_model("base_cnn_ensemble", checkpoints=paths).eval(), torch.randn(2, 1, 8, 8)
    expected = sum(member(x).softmax(1) for member in members) / 3
    torch.testing.assert_close(ensemble(x).softmax(1), expected)


def test_wrong_checkpoints(tmp_path):
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="it must be one of a named network, written by `fastroute train`"):
        Ensemble.from_checkpoints([path])
    with pytest.raises(ValueError, match="checkpoints has 1 files; it must have one for each of base_cnn, wide_cnn"):
        models.create_model("all_ensemble", checkpoints=[path])
    checkpoint(path, "base_cnn", img_size=8)
    with pytest.raises(ValueError, match=r"weights.ckpt is of 'base_cnn'; .* 'wide_cnn'"):
        models.create_model("all_ensemble", checkpoints=[path] * 3)


def test_features_need_not_have_the_width_of_the_classifiers():
    def member():
        layers = (
            nn.Conv2d(3, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        )
        return multipath(nn.Sequential(*layers), 2, ["0"], input_size=(3, 8, 8))

    network, x = Ensemble([member(), member()]).eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network.forward_head(network.forward_features(x)), network(x))


def test_members_may_be_plain_networks():
    members = [nn.Sequential(nn.Flatten(), nn.Linear(48, 5)) for _ in range(2)]
    logits, routing = Ensemble(members)(torch.randn(2, 3, 4, 4), return_routing=True)
    assert logits.shape == (2, 5) and routing == {}


def test_an_ensemble_from_checkpoints_has_their_sizes(tmp_path):
    paths, sizes = [tmp_path / f"{i}.ckpt" for i in range(3)], {"num_classes": 7, "in_chans": 1, "img_size": 8}
    for path in paths:
        checkpoint(path, "base_cnn", **sizes)
    for options in ({}, {"num_classes": 7}):
        ensemble = models.create_model("base_cnn_ensemble", checkpoints=paths, **options)
        specification = models.specification_of(ensemble)
        assert {name: getattr(specification, name) for name in sizes} == sizes
        specification.build().load_state_dict(ensemble.state_dict())
    with pytest.raises(ValueError, match="num_classes is 10; the networks of checkpoints have 7: leave it out"):
        models.create_model("base_cnn_ensemble", 10, checkpoints=paths)
    checkpoint(paths[2], "base_cnn", **sizes | {"num_classes": 6})
    with pytest.raises(ValueError, match=r"2.ckpt has num_classes=6; .*0.ckpt has 7: they must agree"):
        models.create_model("base_cnn_ensemble", checkpoints=paths)


def test_ensembles_compile_as_one_graph():
    members = [models.create_model(name) for name in ("base_cnn", "base_cnn_cc2")]
    ensemble, x = Ensemble(members).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), ensemble(x))
        ensemble.reset_classifier(0)
        assert ensemble(x).shape == (2, ensemble.num_features)


def test_members_have_the_moving_average_of_their_checkpoints(tmp_path):
    path = tmp_path / "w.ckpt"
    averaged = checkpoint(path, "base_cnn", img_size=8)
    saved = torch.load(path)
    saved["current_model_state"] = {name: torch.zeros_like(value) for name, value in saved["state_dict"].items()}
    torch.save(saved, path)
    (member,) = Ensemble.from_checkpoints([path]).members
    assert all(torch.equal(value, member.state_dict()[name]) for name, value in averaged.state_dict().items())
