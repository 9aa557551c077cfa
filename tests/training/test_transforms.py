import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastroute.training.transforms import eval_transform, pixels, policy, train_transform


def ramp(height, width):
    values = np.add.outer(np.arange(height) * 2, np.arange(width) * 3) % 256
    return Image.fromarray(np.stack([values] * 3, -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["rrc", "rkrc"])
def test_training_crops_are_of_the_size_and_vary(mode):
    transform = train_transform(16, mode, (0.25, 1), (0.75, 1.33), 0.8, None)
    torch.manual_seed(0)
    crops = [pixels(transform(ramp(30, 50))) for _ in range(8)]
    assert all(crop.shape == (16, 16, 3) and crop.dtype == np.uint8 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 8
    torch.manual_seed(0)
    assert np.array_equal(pixels(transform(ramp(30, 50))), crops[0])


def test_rkrc_is_a_window_of_the_image_scaled_on_its_shorter_side():
    image = ramp(40, 60)
    scaled = np.asarray(v2.Resize(20)(image))
    assert scaled.shape == (20, 30, 3)
    crop = pixels(train_transform(16, "rkrc", (1, 1), (1, 1), 0.8, None)(image))
    windows = (scaled[y : y + 16, x : x + 16] for y in range(5) for x in range(15))
    assert any(np.array_equal(w, crop) or np.array_equal(w[:, ::-1], crop) for w in windows)


def test_evaluation_cuts_the_centre_or_ten_crops():
    image = ramp(28, 40)
    scaled = np.asarray(v2.Resize(20)(image))  # 20 × 28
    assert np.array_equal(pixels(eval_transform(16, 0.8)(image)), scaled[2:18, 6:22])
    crops = pixels(eval_transform(16, 0.8, ten_crop=True)(image))
    assert crops.shape == (10, 16, 16, 3)
    corners = (scaled[:16, :16], scaled[:16, -16:], scaled[-16:, :16], scaled[-16:, -16:], scaled[2:18, 6:22])
    assert all(any(np.array_equal(corner, crop) for crop in crops) for corner in corners)
    assert all(any(np.array_equal(corner[:, ::-1], crop) for crop in crops) for corner in corners)


def test_policies():
    assert policy("rand-m7-n3").magnitude == 7 and policy("rand-m7-n3").num_ops == 3
    assert policy("rand").magnitude == 9 and policy("rand").num_ops == 2
    for name in ("imagenet", "cifar10", "svhn", "trivial", "augmix"):
        assert pixels(policy(name)(ramp(8, 8))).shape == (8, 8, 3)
    for name in ("rand-m31", "rand-m9-mstd0.5", "auto", ""):
        with pytest.raises(ValueError, match=f"aa is '{name}'; it must be one of 'imagenet', .* or such as"):
            policy(name)
