import math

import pytest
import torch
from torch.nn import functional as F

from fastroute.clustering.augment import Augmentation
from fastroute.clustering.build import ClusteringRun, build
from fastroute.clustering.networks import clustering_network
from fastroute.clustering.self_label import SelfLabelling, cut_out, restart, self_label_loss
from fastroute.clustering.two_fold import TwoFoldClustering


def test_confident_images_teach_by_the_inverse_of_their_clusters_size():
    posterior = torch.tensor([[0.995, 0.005], [0.99, 0.01], [0.2, 0.8], [0.78, 0.22], [0.55, 0.45]])
    augmented = torch.randn(5, 2, requires_grad=True)
    loss = self_label_loss(posterior.log(), augmented, threshold=0.75)
    each = F.cross_entropy(augmented, torch.tensor([0, 0, 1, 0, 0]), reduction="none")
    torch.testing.assert_close(loss, (each[[0, 1, 3]].mean() + each[2]) / 2)


def test_the_upper_half_is_confident_where_fewer_reach_the_threshold():
    posterior = torch.tensor([[0.7, 0.3], [0.65, 0.35], [0.6, 0.4], [0.55, 0.45]])
    augmented = torch.randn(4, 2)
    each = F.cross_entropy(augmented, torch.zeros(4, dtype=torch.long), reduction="none")
    torch.testing.assert_close(self_label_loss(posterior.log(), augmented), each[:2].mean())


def test_each_cluster_teaches_by_its_own_upper_half():
    """Also one whose images are all less certain than those of another."""
    posterior = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.85, 0.15], [0.7, 0.3], [0.45, 0.55], [0.4, 0.6]])
    augmented = torch.randn(6, 2)
    each = F.cross_entropy(augmented, torch.tensor([0, 0, 0, 0, 1, 1]), reduction="none")
    expected = (each[[0, 2]].mean() + each[5]) / 2
    torch.testing.assert_close(self_label_loss(posterior.log(), augmented), expected)


@pytest.mark.parametrize(("kind", "rate"), [("Adam", 1e-4), ("RMSprop", 1e-4), ("Adadelta", 0.5)])
def test_the_optimiser_forgets_the_gradients_of_the_method(kind, rate):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, kind)([weight], lr=0.5)
    weight.grad = torch.full((3,), 1e-6)
    optimizer.step()
    restart(optimizer)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == rate
    low = torch.optim.Adam([weight], lr=1e-5)
    restart(low)
    assert low.param_groups[0]["lr"] == 1e-5


def test_no_gradient_flows_to_the_labels():
    responses = torch.randn(6, 3, requires_grad=True)
    loss = self_label_loss(responses, torch.randn(6, 3, requires_grad=True))
    assert torch.autograd.grad(loss, [responses], allow_unused=True) == (None,)


def test_a_square_is_cut_out():
    torch.manual_seed(0)
    cut = cut_out(torch.ones(50, 2, 20, 20), 0.3)
    assert (cut[:, 0] == cut[:, 1]).all()
    black = (cut[:, 0] == 0).sum((1, 2))
    assert black.max() == 36 and black.min() >= 9 and black.unique().numel() > 1  # at a corner, a quarter of it
    assert len({tuple(image.flatten().tolist()) for image in cut}) > 40


def test_its_augmentation_is_stronger():
    last = SelfLabelling.after(7, Augmentation(flip=True))
    assert last.start == 7 and last.augmentation.flip
    assert (last.augmentation.degrees, last.augmentation.contrast) == (30, 0.4)
    images = torch.rand(3, 1, 8, 8)
    assert last.strong(images).shape == images.shape and not math.isnan(last.strong(images).sum())


@pytest.mark.parametrize("method", ["two-fold", "iic"])
def test_only_the_last_epochs_label(method, monkeypatch):
    from fastroute.clustering import module as base
    from fastroute.clustering.build import ClusteringRun, build
    from tests.clustering.test_two_fold import digits, fit

    run = ClusteringRun(
        dataset="digits", method=method, clusters=3, heads=1, batch_norm=True, architecture="F8", self_label=1
    )
    trained = build(run, (1, 8, 8), epochs=3)
    calls, loss, restarts = [], base.self_label_loss, []
    monkeypatch.setattr(base, "restart", lambda optimizer: restarts.append(trained.current_epoch))
    monkeypatch.setattr(base, "self_label_loss", lambda *args: calls.append(trained.current_epoch) or loss(*args))
    before = {}
    real = type(trained).on_validation_epoch_end

    def after_each(self):
        real(self)
        before[self.current_epoch] = [p.clone() for p in self.network.parameters()]

    monkeypatch.setattr(type(trained), "on_validation_epoch_end", after_each)
    fit(trained, *digits(128), epochs=3)
    assert calls == restarts == [2]
    assert any((a != b).any() for a, b in zip(before[1], before[2], strict=True))  # the last step trains


@pytest.mark.parametrize(("method", "heads"), [("two-fold", 2), ("iic-own", 1)])
def test_the_head_that_learns_stays_the_chosen_one(method, heads):
    run = ClusteringRun(
        dataset="digits", method=method, clusters=3, heads=heads, batch_norm=True, architecture="F8", self_label=1
    )
    module = build(run, (1, 8, 8), epochs=1)
    module.head.fill_(1)
    module.on_validation_epoch_start()  # without a trainer, whose images a choice would need
    assert module.head == 1


def test_the_statistics_of_scores_follow_self_labelling():
    from fastroute.clustering.build import ClusteringRun, build
    from tests.clustering.test_two_fold import digits, fit

    run = ClusteringRun(
        dataset="digits", method="em", clusters=3, heads=1, batch_norm=True, architecture="F8", self_label=3
    )
    torch.manual_seed(0)
    trained = build(run, (1, 8, 8), epochs=3)
    images, labels = digits(512)
    fit(trained, images, labels, epochs=3)
    scores = trained.eval().scores(images).detach()[:, 0]
    mean, std = (value[0] for value in (trained.normalize.running_mean, trained.normalize.running_std))
    assert ((scores.mean(0) - mean) / std).abs().max() < 0.5  # of those of an untrained network, 0 and 1, it is 1.1
    before = trained.normalize.running_mean.clone()
    trained.responses(images)
    assert torch.equal(trained.normalize.running_mean, before)


def test_responses_to_augmented_images_leave_the_statistics():
    module = TwoFoldClustering(clustering_network("F8", 3, 8), 3)
    images = torch.rand(64, 1, 8, 8)
    module.train().responses(images)
    assert module.normalize.num_batches_tracked == 0
    module.label_responses(images)
    assert module.normalize.num_batches_tracked == 1


def test_a_longer_run_labels_from_where_it_began_to():
    run = ClusteringRun(
        dataset="digits", method="em", clusters=3, heads=1, batch_norm=True, architecture="F8", self_label=1
    )
    longer = build(run, (1, 8, 8), epochs=9)
    assert longer.self_labelling.start == 8
    longer.on_load_checkpoint({"self_label_start": 2})  # of a run of 3 epochs
    assert longer.self_labelling.start == 2


def test_of_an_odd_number_the_middle_image_is_confident_too():
    """Else a cluster with a single image in the batch would teach nothing, and become empty."""
    posterior = torch.tensor([[0.7, 0.3], [0.65, 0.35], [0.6, 0.4], [0.45, 0.55]])
    augmented = torch.randn(4, 2)
    each = F.cross_entropy(augmented, torch.tensor([0, 0, 0, 1]), reduction="none")
    torch.testing.assert_close(self_label_loss(posterior.log(), augmented), (each[:2].mean() + each[3]) / 2)
