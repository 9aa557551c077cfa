import pytest
import torch
from torch import nn

from fastroute.models.cifar_resnet import cifar_resnet
from fastroute.visualize import Gate, synthesize, synthesize_filters, synthesize_gates, synthesize_outputs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_each_image_maximises_its_own_objective():
    def colours(images):
        red, blue = images[0], images[1]
        return torch.stack([red[0].mean() - red[2].mean(), blue[2].mean() - blue[0].mean()])

    images = synthesize(colours, 2, (3, 8, 12), steps=200)
    assert images.shape == (2, 3, 8, 12) and images.min() >= 0 and images.max() <= 1
    red, blue = images.mean((2, 3))
    assert red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2
    assert torch.equal(images, synthesize(colours, 2, (3, 8, 12), steps=200))


def test_gates_answer_more_than_to_any_image():
    model = cifar_resnet(8, paths=2)
    nn.init.normal_(model.stack1_router.w2)
    gates = [Gate("stack1_router", 1, 0), Gate("stack1_router", 0, 1)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = synthesize_gates(model, gates, (3, 8, 8), mean=0.5, std=0.25, steps=60)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def scores(x):
        return model.eval()((x - 0.5) / 0.25, return_routing=True)[1]["stack1_router"].scores

    real = scores(torch.rand(64, 3, 8, 8)).detach()
    for k, gate in enumerate(gates):
        assert scores(made)[k, gate.i, gate.j] > real[:, gate.i, gate.j].max()


def test_outputs_and_filters():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    made = synthesize_outputs(model, [4, 0], (1, 8, 8), total_variation=0, blur=0)
    random = model(torch.rand(64, 1, 8, 8))
    assert model(made)[0, 4] > random[:, 4].max() and model(made)[1, 0] > random[:, 0].max()
    made = synthesize_filters(model, model[0], [2], (1, 8, 8))
    assert model[0](made)[0, 2].mean() > model[0](torch.rand(64, 1, 8, 8))[:, 2].mean((1, 2)).max()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("option", ["count", "steps"])
def test_bad_input(option):
    arguments = {"count": 1, "steps": 1, option: 0}
    with pytest.raises(ValueError, match=f"{option} is 0"):
        synthesize(lambda x: x.mean((1, 2, 3)), size=(1, 4, 4), **arguments)
