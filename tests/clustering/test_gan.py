import pytest
import torch
from torch.nn import functional as F

from fastroute.clustering.gan import GAN, LATENT
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


@pytest.mark.parametrize(
    ("shape", "dims"), [((1, 8, 8), 64 * 16 + 128 * 4), ((3, 9, 7), 64 * 12), ((1, 28, 28), (64 + 128) * 16 + 256 * 9)]
)
def test_the_generator_mirrors_the_discriminator(shape, dims):
    module = GAN(torch.Size(shape), 3)
    made = module.generator(torch.randn(2, LATENT))
    assert made.shape == (2, *shape) and (made > 0).all() and (made < 1).all()
    assert module.discriminator(made).shape == (2,)
    assert module.features(made).shape == (2, dims) and module.centers.shape == (3, dims)


def test_a_step_trains_both_networks_against_each_other():
    torch.manual_seed(0)
    module = GAN(torch.Size((1, 8, 8)), 3)
    images, labels = digits(32)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    noise = {}
    real = module.step

    def watch(images, index):
        torch.manual_seed(1)
        made = module.generator(torch.randn(len(images), LATENT))
        scores = module.discriminator(images), module.discriminator(made)
        expected = sum(
            F.binary_cross_entropy_with_logits(score, torch.full_like(score, target))
            for score, target in zip(scores, (1.0, 0.0), strict=True)
        )
        module.load_state_dict(before)  # the statistics of batch norm
        torch.manual_seed(1)
        noise["expected"] = expected.item()
        return real(images, index)

    module.step = watch
    trainer = trainer_of(1)
    trainer.fit(module, Batches(images, labels, 32, 0), Batches(images, labels, 32))
    assert trainer.callback_metrics["discriminator_loss"].item() == pytest.approx(noise["expected"], rel=1e-4)
    for network in ("discriminator", "generator"):
        moved = [name for name, value in module.named_parameters() if not torch.equal(value, before[name])]
        assert any(name.startswith(network) for name in moved)


def test_the_generator_learns_to_be_taken_for_real():
    """A step along its gradient raises the discriminator's score of what it makes."""
    torch.manual_seed(0)
    module = GAN(torch.Size((1, 8, 8)), 3)
    noise, losses = torch.randn(16, LATENT), []
    module.optimizers = module.configure_optimizers
    module.descend = lambda optimizer, loss: losses.append(loss)
    module.log_dict = lambda *args, **options: None
    torch.manual_seed(2)
    module.step(torch.rand(16, 1, 8, 8), None)
    weights = list(module.generator.parameters())
    gradients = torch.autograd.grad(losses[1], weights)
    scores = []
    for _ in range(2):
        scores.append(module.discriminator(module.generator(noise)).mean().item())
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.data -= 0.5 * gradient
    assert scores[1] > scores[0]


def test_bad_input():
    with pytest.raises(ValueError, match="img_size is 3; the method 'gan' needs images of at least 4 × 4 pixels"):
        GAN(torch.Size((1, 3, 8)), 3)
    with pytest.raises(ValueError, match="lr is 0; it must be greater than 0"):
        GAN(torch.Size((1, 8, 8)), 3, lr=0)
