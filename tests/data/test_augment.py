import pytest
import torch
from torch.nn import functional as F

from fastroute.data.augment import channel_statistics, erase, normalize, shift_and_flip


@pytest.mark.parametrize("channels, pad", [(1, 1), (3, 4), (3, 0)])
def test_shift_and_flip_is_crop_then_mirror_of_each_image(channels, pad):
    images = torch.randint(0, 256, (40, 6, 9, channels), dtype=torch.uint8)
    offsets = torch.randint(0, 2 * pad + 1, (40, 2))
    flips = torch.rand(40) < 0.5
    actual = shift_and_flip(images, offsets, flips, pad)
    for image, (top, left), flip, result in zip(images, offsets.tolist(), flips, actual, strict=True):
        window = F.pad(image, (0, 0, pad, pad, pad, pad))[top : top + 6, left : left + 9]
        assert torch.equal(result, window.flip(1) if flip else window)


def test_normalize_gives_mean_0_and_deviation_1_in_channels_last():
    images = (torch.randn(50, 7, 5, 3) * torch.tensor([10, 20, 30]) + torch.tensor([100, 120, 90])).to(torch.uint8)
    normal = normalize(images, *channel_statistics(images))
    assert normal.shape == (50, 3, 7, 5) and normal.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_statistics_of_a_constant_channel_do_not_divide_by_zero():
    _, std = channel_statistics(torch.zeros(2, 4, 4, 1, dtype=torch.uint8))
    assert std == 1


def test_erase_cuts_rectangles_of_the_shares_asked_for():
    torch.manual_seed(0)
    images = torch.ones(400, 2, 30, 40)
    erased = erase(images, 0.5)
    assert (images == 1).all() and torch.equal(erased[:, 0], erased[:, 1])
    holes = erased[:, 0] == 0
    hit = holes.flatten(1).any(1)
    assert 0.4 < hit.float().mean() < 0.6
    for hole in holes[hit]:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    shares = holes[hit].float().mean((1, 2))
    assert 0.01 < shares.min() < 0.05 and 0.25 < shares.max() < 0.36
    assert torch.equal(erase(images, 0.0), images)
    assert erase(torch.ones(3, 1, 1, 1), 1.0).sum() == 0


def test_erase_reaches_every_row_and_column():
    torch.manual_seed(0)
    holes = erase(torch.ones(400, 1, 30, 40), 1.0)[:, 0] == 0
    assert holes.any(2).any(0).all() and holes.any(1).any(0).all()
