import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from fastroute.clustering.autoencoder import Autoencoder, autoencoder, gaussian_divergence, gaussian_loss, sparsity
from fastroute.clustering.build import ClusteringRun, build


@pytest.mark.parametrize("architecture", ["C4 M C8 F6", "M C3 M", "C4 C4", "F6", "M F6", "mnist"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
def test_the_decoder_mirrors_the_encoder(architecture, shape):
    encoder, decoder = autoencoder(architecture, torch.Size(shape), 5, 5)
    code = encoder(torch.rand(2, *shape))
    assert code.shape == (2, 5) and decoder(code).shape == (2, *shape)
    weights = (sum(p.numel() for p in part.parameters() if p.dim() > 1) for part in (encoder, decoder))
    assert len(set(weights)) == 1
    assert (decoder(100 * torch.randn(8, 5)) < 0).any()  # no activation at the end


def test_penalties_by_their_distributions():
    mean, log_variance = torch.randn(6, 3), torch.randn(6, 3)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(gaussian_divergence(mean, log_variance), expected)
    active = torch.rand(6, 3)
    expected = kl_divergence(Bernoulli(torch.tensor(0.05)), Bernoulli(active.mean(0))).sum()
    torch.testing.assert_close(sparsity(active, 0.05), expected)
    assert sparsity(torch.zeros(4, 2), 0.05).isfinite()


def test_the_likelihood_of_pixels_has_their_own_variance():
    means, images = torch.randn(2, 5, 1, 3, 3)
    losses = {scale: -Normal(means, scale).log_prob(images).sum() / 5 for scale in (0.5, 1.0, 1.5, 2.0)}
    assert gaussian_loss(means, images) < min(losses.values())
    assert gaussian_loss(images, images).isfinite()


@pytest.mark.parametrize("variant", ["ae", "sparse-ae", "denoising-ae", "vae"])
def test_the_loss_of_each_variant(variant):
    torch.manual_seed(0)
    module = Autoencoder("C4 F6", torch.Size((1, 8, 8)), 3, variant=variant, batch_norm=False)
    module.encoder[-1].weight.data *= 30  # so that the code depends on each pixel
    images = torch.rand(20, 1, 8, 8)
    torch.manual_seed(1)
    loss = module.step(images, None)
    torch.manual_seed(1)
    penalty = 0
    if variant == "vae":
        mean, log_variance = module.encoder(images).split(10, 1)
        code = Normal(mean, (log_variance / 2).exp()).loc + torch.randn(20, 10) * (log_variance / 2).exp()
        penalty = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum() / 20
        torch.testing.assert_close(module.features(images), mean)
    elif variant == "sparse-ae":
        code = module.encoder(images).sigmoid()
        assert code.shape == (20, 128)
        penalty = 3 * sparsity(code, 0.05)
        torch.testing.assert_close(module.features(images), code)
    else:
        seen = images * (torch.rand(images.shape) >= 0.25) if variant == "denoising-ae" else images
        code = module.encoder(seen)
        torch.testing.assert_close(module.features(images), module.encoder(images))
    made = module.decoder(code)
    if variant == "vae":
        made = made.sigmoid()
        scale = (made - images).square().mean().sqrt()
        expected = -Normal(made, scale).log_prob(images).sum() / 20 + penalty
    else:
        expected = F.binary_cross_entropy(made.sigmoid(), images, reduction="sum") / 20 + penalty
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)


def test_the_divergence_warms_up():
    """In equal steps from none; all else of the loss stays."""
    module = Autoencoder("C4 F6", torch.Size((1, 8, 8)), 3, variant="vae", warm_up=4)
    images, losses = torch.rand(20, 1, 8, 8), []
    for epoch in (0, 1, 2, 4, 9):
        type(module).current_epoch = epoch
        torch.manual_seed(0)
        losses.append(module.step(images, None))
    del type(module).current_epoch
    weighted = torch.stack(losses) - losses[0]
    divergence = gaussian_divergence(*module.encoder(images).split(10, 1))
    torch.testing.assert_close(weighted, divergence * torch.tensor([0, 0.25, 0.5, 1, 1]), rtol=1e-3, atol=1e-5)
    assert (
        build(
            ClusteringRun(dataset="digits", method="vae", clusters=3, heads=1, batch_norm=True), (1, 8, 8), epochs=60
        ).warm_up
        == 20
    )


def test_bad_input():
    shape = torch.Size((1, 8, 8))
    with pytest.raises(ValueError, match="variant is 'pca'; it must be one of ae, sparse-ae, denoising-ae, vae"):
        Autoencoder("C4", shape, 3, variant="pca")
    with pytest.raises(ValueError, match="lr is 0; it must be greater than 0"):
        Autoencoder("C4", shape, 3, lr=0)
    with pytest.raises(ValueError, match="warm_up is -1; it must be at least 0"):
        Autoencoder("C4", shape, 3, warm_up=-1)
    with pytest.raises(ValueError, match="img_size is 8; it is too small for the pools of 'M M M M'"):
        Autoencoder("M M M M", shape, 3)
