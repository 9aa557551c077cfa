"""Synthesise images to which a gate, a cluster or a filter responds, by gradient ascent (Fig. 3.8, 4.8, 4.9)."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastroute.nn import forward_with_routing
from fastroute.visualize.collect import Gate, frozen, matrix

# The square root of the covariance of natural images' colours (Olah et al., 2017), its longest column scaled to 1.
_COLOURS = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
_COLOURS = _COLOURS / _COLOURS.norm(dim=0).max()


def synthesize(
    objective: Callable[[Tensor], Tensor],
    count: int,
    size: Sequence[int],
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    *,
    steps: int = 200,
    lr: float = 0.05,
    jitter: float = 0.06,
    blur: float = 0.75,
    total_variation: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Synthesise images that each maximise an objective, by Adam on their Fourier coefficients.

    The coefficients are scaled by 1/frequency, as in natural images, and the colours are decorrelated. Each step shifts
    and blurs the images at random and penalises their total variation (Olah et al., 2017). Without this, images would
    look like noise.

    Args:
        objective: normalised images (count, C, H, W) → (count,); image k maximises element k.
        count: the number of images.
        size: (C, H, W), in pixels.
        mean, std: (C,), of the network's normalisation, for values from 0 to 1.
        steps: the number of Adam's steps.
        lr: Adam's learning rate.
        jitter: the largest shift, as a share of the image's shorter side.
        blur: the largest standard deviation of the blur, in pixels.
        total_variation: the weight of the mean difference between neighbouring pixels.
        seed: of the initial images, shifts and blurs.

    Returns:
        (count, C, H, W), values from 0 to 1.

    Raises:
        ValueError: count or steps is less than 1.

    Example:
        >>> red = synthesize(lambda images: images[:, 0].mean((1, 2)), 1, (3, 8, 8), steps=20)
        >>> red.shape, bool(red[0, 0].mean() > red[0, 2].mean())
        (torch.Size([1, 3, 8, 8]), True)
    """
    for name, value in (("count", count), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    channels, height, width = size
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))
    device = mean.device
    random = torch.Generator().manual_seed(seed)
    frequencies = torch.fft.fftfreq(height)[:, None].hypot(torch.fft.rfftfreq(width)).to(device)
    scale = math.sqrt(height * width) / frequencies.clamp(min=1 / max(height, width)) / 4
    spectrum = 0.01 * torch.randn(count, channels, *frequencies.shape, 2, generator=random)
    spectrum = spectrum.to(device).requires_grad_()
    optimizer = torch.optim.Adam([spectrum], lr)

    def decode(sigma: float = 0.0) -> Tensor:
        blurred = scale * torch.exp(-2 * (math.pi * sigma * frequencies) ** 2)
        x = torch.fft.irfft2(torch.view_as_complex(spectrum) * blurred, s=(height, width))
        if channels == 3:
            x = torch.einsum("rc,nchw->nrhw", _COLOURS.to(device), x)
        return torch.sigmoid(x)

    reach = max(1, round(jitter * min(height, width)))
    with torch.enable_grad():
        for _ in range(steps):
            shift = torch.randint(-reach, reach + 1, (2,), generator=random).tolist()
            images = decode(blur * torch.rand((), generator=random).item()).roll(shift, (2, 3))
            variation = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
            loss = total_variation * count * variation - objective((images - mean) / std).sum()
            (spectrum.grad,) = torch.autograd.grad(loss, [spectrum])
            optimizer.step()
    with torch.no_grad():
        return decode().cpu()


def synthesize_gates(model: nn.Module, gates: Sequence[Gate], size: Sequence[int], mean, std, **options) -> Tensor:
    """Synthesise an image for each gate that maximises its score before the softmax (§3.5.2).

    Args:
        model: from images to logits, with routers; see `nn.forward_with_routing`.
        gates: the gates.
        size, mean, std, options: as in `synthesize`.

    Returns:
        (gates, C, H, W), values from 0 to 1.
    """

    def scores(images: Tensor) -> Tensor:
        routing = forward_with_routing(model, images)[1]
        return torch.stack([matrix(routing[gate.router].scores)[k, gate.i, gate.j] for k, gate in enumerate(gates)])

    with frozen(model):
        return synthesize(scores, len(gates), size, mean, std, **options)


def synthesize_outputs(model: nn.Module, nodes: Sequence[int], size: Sequence[int], **options) -> Tensor:
    """Synthesise an image for each of some outputs of a network that maximises its response (Fig. 4.8).

    Args:
        model: images (N, C, H, W) → responses (N, K).
        nodes: indices of outputs, 0 to K - 1.
        size, options: as in `synthesize`.

    Returns:
        (nodes, C, H, W), values from 0 to 1.
    """
    nodes = torch.as_tensor(nodes)

    def responses(images: Tensor) -> Tensor:
        return model(images).gather(1, nodes[:, None].to(images.device))[:, 0]

    with frozen(model):
        return synthesize(responses, len(nodes), size, **options)


def synthesize_filters(
    model: nn.Module, layer: nn.Module, filters: Sequence[int], size: Sequence[int], **options
) -> Tensor:
    """Synthesise an image for each of some filters of a convolution that maximises its mean output (Fig. 4.9).

    Args:
        model: a network.
        layer: a convolution in it.
        filters: indices of its output channels.
        size, options: as in `synthesize`.

    Returns:
        (filters, C, H, W), values from 0 to 1.
    """
    filters = torch.as_tensor(filters)
    with frozen(model), _output_of(layer) as kept:

        def responses(images: Tensor) -> Tensor:
            model(images)
            return kept[0].mean((2, 3)).gather(1, filters[:, None].to(images.device))[:, 0]

        return synthesize(responses, len(filters), size, **options)


@contextlib.contextmanager
def _output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    kept = [None]

    def keep(module, args, output):
        kept[0] = output

    hook = layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()
