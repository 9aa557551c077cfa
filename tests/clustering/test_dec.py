import pytest
import torch
from torch.nn import functional as F

from fastroute.clustering.dec import DCN, DEC, IDEC, student_t, target_distribution
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of

TINY = {"features": 64, "num_clusters": 3, "pretrain_epochs": 1, "widths": (8, 4)}


def vectors(images):
    x = images.flatten(1)
    return 8 * x / x.norm(dim=1, keepdim=True)


def second_part(kind):
    """A module in its second part, with centres, and a batch of 32 of 64 images."""
    torch.manual_seed(0)
    module = kind(**TINY)
    module.centers.data.normal_()
    module.pretrain_epochs = 0
    images, _ = digits(64)
    return module, images[32:], torch.arange(32, 64)


def test_responses_are_the_logarithms_of_assignments():
    module, images, _ = second_part(DEC)
    torch.testing.assert_close(module.responses(images).softmax(1), module(images))


@pytest.mark.parametrize("kind", [DEC, IDEC, DCN])
def test_the_first_part_reproduces_the_pixels(kind):
    module, images, index = second_part(kind)
    module.pretrain_epochs = 1
    x = vectors(images)
    torch.testing.assert_close(module.step(images, index), (module.decoder(module.encoder(x)) - x).square().mean())


def test_idec_adds_the_pixels_to_targets_of_all_images():
    module, images, index = second_part(IDEC)
    targets = target_distribution(torch.rand(64, 3))
    module.kept["targets"] = targets
    x = vectors(images)
    z = module.encoder(x)
    q, p = student_t(z, module.centers), targets[32:]
    expected = (module.decoder(z) - x).square().mean() + 0.1 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(module.step(images, index), expected)


def test_idec_updates_its_targets_before_each_epoch_of_the_second_part():
    torch.manual_seed(0)
    module, seen = IDEC(**TINY), []
    images, labels = digits(64)
    real = module.on_train_epoch_start

    def watch():
        real()
        seen.append(module.kept.get("targets"))
        if module.current_epoch:
            torch.testing.assert_close(seen[-1], target_distribution(module(images)))

    module.on_train_epoch_start = watch
    trainer_of(3).fit(module, Batches(images, labels, 16, 0), Batches(images, labels, 40))
    assert seen[0] is None and not torch.equal(seen[1], seen[2])


def test_dcn_pulls_codes_to_their_centres_which_move_to_the_mean():
    module, images, index = second_part(DCN)
    module.counts += 5
    module.centers.data *= 0.1
    centers, x = module.centers.clone(), vectors(images)
    z = module.encoder(x)
    nearest = (z[:, None] - centers).square().sum(-1).argmin(1)
    expected = F.mse_loss(module.decoder(z), x) * 64 + 0.025 * (z - centers[nearest]).square().sum(1).mean()
    torch.testing.assert_close(module.step(images, index), expected)
    counts = torch.full((3,), 5)
    for code, k in zip(z.detach(), nearest.tolist(), strict=True):  # one code at a time, as in the paper
        counts[k] += 1
        centers[k] -= (centers[k] - code) / counts[k]
    torch.testing.assert_close(module.centers.data, centers)
    torch.testing.assert_close(module.counts, counts.float())
    assert len(set(nearest.tolist())) > 1


def test_centres_are_those_of_k_means_after_the_first_part():
    torch.manual_seed(0)
    module = DCN(**TINY)
    images, labels = digits(64)
    trainer_of(1).fit(module, Batches(images, labels, 16, 0), Batches(images, labels, 40))
    z = module.encoder(vectors(images))
    nearest = torch.cdist(z, module.centers).argmin(1)
    for k in range(3):
        torch.testing.assert_close(z[nearest == k].mean(0), module.centers[k], rtol=1e-4, atol=1e-4)
    assert module.counts.tolist() == torch.bincount(nearest, minlength=3).tolist()


def test_dcn_moves_centres_in_float32_under_autocast():
    module, images, index = second_part(DCN)
    images = images.repeat(10, 1, 1, 1)  # bfloat16 has no odd numbers above 256
    with torch.autocast("cpu", torch.bfloat16):
        module.step(images[:301], index).backward()
        assert module.counts.sum() == 301
        module.centers.data.fill_(100)
        module.counts.fill_(99)
        module._move(torch.full((3, 4), 101.0), torch.arange(3))
    torch.testing.assert_close(module.centers.data, torch.full((3, 4), 100.01))


def test_what_a_method_keeps_follows_it_to_the_device():
    module = IDEC(4, 2, pretrain_epochs=1, widths=(3,))
    module.on_load_checkpoint({"kept": {"targets": torch.ones(5, 2)}, "pretrain_epochs": 1})
    assert module.to("meta").kept["targets"].is_meta


def test_targets_are_more_certain_and_favour_small_clusters():
    q = torch.tensor([[0.8, 0.2], [0.5, 0.5]])  # clusters of sizes 1.3 and 0.7
    p = torch.tensor([[0.64 / 1.3, 0.04 / 0.7], [0.25 / 1.3, 0.25 / 0.7]])
    torch.testing.assert_close(target_distribution(q), p / p.sum(1, keepdim=True))


@pytest.mark.parametrize(("kind", "rate"), [(DEC, 1e-4), (IDEC, 1e-3), (DCN, 1e-4)])
def test_the_second_part_has_its_own_learning_rate(kind, rate):
    [optimizer], [schedule] = kind(**TINY).configure_optimizers()
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(rate)]
