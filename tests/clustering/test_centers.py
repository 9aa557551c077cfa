import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


class Pixels(FeatureClustering):
    """k-means of the pixels: nothing is learnt."""

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)

    def features(self, images):
        return images.flatten(1)

    def step(self, images, index):
        return torch.zeros((), requires_grad=True)


def test_the_nearest_centre_of_k_means_has_the_highest_posterior():
    module = Pixels(4, 64)
    images, labels = digits(200)
    trainer_of(1).fit(module, Batches(images, labels, 100, 0), Batches(images, labels, 64))
    x = images.flatten(1)
    distances = (x[:, None] - module.centers).square().sum(-1)
    nearest = distances.argmin(1)
    posterior = module(images)
    assert adjusted_rand_score(posterior.argmax(1), nearest) == 1 and sum(module.sizes) == 200
    variance = distances.min(1).values.mean() / 64
    torch.testing.assert_close(module.variance, variance, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior, (-distances / (2 * variance)).softmax(1), rtol=1e-2, atol=1e-4)
    for k in range(4):
        torch.testing.assert_close(x[nearest == k].mean(0), module.centers[k], rtol=1e-3, atol=1e-3)


def test_features_that_are_not_finite_end_the_run_in_a_sentence(monkeypatch):
    monkeypatch.setattr(Pixels, "features", lambda self, images: images.flatten(1) / 0)
    images, labels = digits(200)
    with pytest.raises(FloatingPointError, match="features are NaN or infinite at epoch 1: the weights have diverged"):
        trainer_of(1).fit(Pixels(4, 64), Batches(images, labels, 100, 0), Batches(images, labels, 64))


class Modes(Pixels):
    """Look at all images at the start of an epoch, and remember the modes."""

    found = ()

    def on_train_epoch_start(self):
        self.over_images(self.features)

    def features(self, images):
        self.found += (("features", self.training),)
        return super().features(images)

    def step(self, images, index):
        self.found += (("step", self.training),)
        return super().step(images, index)


def test_training_goes_on_in_its_mode_after_a_look_at_all_images():
    module = Modes(4, 64)
    images, labels = digits(100)
    trainer_of(1).fit(module, Batches(images, labels, 50, 0), Batches(images, labels, 100))
    assert set(module.found) == {("features", False), ("step", True)}
