import pytest
import torch

from fastroute.clustering.dac import DAC, pair_loss
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


def test_pairs_above_the_threshold_are_to_be_similar():
    similar = torch.tensor([[1.0, 0.9, 0.6], [0.9, 1.0, 0.4], [0.6, 0.4, 1.0]])
    augmented = torch.tensor([[0.8, 0.7, 0.5], [0.7, 0.8, 0.3], [0.5, 0.3, 0.8]])
    # Above 0.85: the diagonal and (0, 1).
    expected = (3 * 0.2**2 + 2 * 0.3**2 + 2 * 0.5**2 + 2 * 0.3**2) / 9
    assert pair_loss(similar, augmented, 0.85).item() == pytest.approx(expected, rel=1e-5)
    assert pair_loss(similar, augmented, 0.9).item() == pytest.approx(expected + 2 * (0.7**2 - 0.3**2) / 9, rel=1e-5)


def test_the_threshold_falls_over_the_run():
    module = DAC(torch.nn.Linear(2, 3), 3, epochs=10)
    found = []
    for epoch in (0, 5, 9, 12):
        type(module).current_epoch = epoch
        found.append(module.threshold())
    del type(module).current_epoch
    assert found == pytest.approx([0.9, 0.7, 0.54, 0.5])


def test_label_features_are_of_length_one_and_the_network_learns_from_augmented_images():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    module = DAC(network, 3, epochs=1, augmentation=lambda x: x.flip(-1))
    images = torch.rand(6, 1, 4, 4)
    scores = network(images)
    for _ in range(3):  # the dense layers between are the identity at first
        scores = ((scores - scores.mean(0)) / (scores.var(0, correction=0) + 1e-5).sqrt()).relu()
    scores = scores.exp()
    torch.testing.assert_close(module.label_features(images), scores / scores.norm(dim=1, keepdim=True))
    labels, learns = (module.label_features(x) for x in (images, images.flip(-1)))
    expected = pair_loss((labels @ labels.T).detach(), learns @ learns.T, 0.9)
    assert expected != pair_loss((learns @ learns.T).detach(), learns @ learns.T, 0.9)
    loss = module.step(images, None)
    torch.testing.assert_close(loss, expected)
    weights = list(module.parameters())
    gradients, wanted = (torch.autograd.grad(value, weights) for value in (loss, expected))
    torch.testing.assert_close(gradients, wanted)


def test_a_validation_takes_the_statistics_of_all_images():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    module = DAC(network, 3, epochs=2, lr=0.1)
    images, labels = digits(120)
    trainer_of(2).fit(module, Batches(images, labels, 40, 0), Batches(images, labels, 60))
    norm = module.norm[0]
    torch.testing.assert_close(norm.running_mean, network(images).mean(0))
    assert norm.momentum == 0.1


@pytest.mark.parametrize(("options", "name"), [({"epochs": 0}, "epochs"), ({"epochs": 1, "lr": 0}, "lr")])
def test_bad_input(options, name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be greater than 0"):
        DAC(torch.nn.Linear(2, 3), 3, **options)


def test_bfloat16_compares_pairs_in_float32():
    torch.manual_seed(0)
    module = DAC(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), 3, epochs=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.step(torch.rand(40, 1, 4, 4), None)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in module.parameters())
