import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastroute.data.decode import UnreadableImage
from fastroute.data.transforms import eval_transform, pixels, policy, resize_size, train_transform, variation


def ramp(height, width):
    values = np.add.outer(np.arange(height) * 2, np.arange(width) * 3) % 256
    return Image.fromarray(np.stack([values] * 3, -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["rrc", "rkrc", "rkrr", "random"])
def test_training_crops_are_of_the_size_and_vary(mode):
    transform = train_transform(16, mode, (0.25, 1), (0.75, 1.33), 0.8, None)
    torch.manual_seed(0)
    crops = [pixels(transform(ramp(30, 50))) for _ in range(8)]
    assert all(crop.shape == (16, 16, 3) and crop.dtype == np.uint8 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 8
    torch.manual_seed(0)
    assert np.array_equal(pixels(transform(ramp(30, 50))), crops[0])


def test_random_is_a_window_of_the_image_scaled_on_its_shorter_side():
    image = ramp(40, 60)
    scaled = np.asarray(v2.Resize(20)(image))
    assert scaled.shape == (20, 30, 3)
    crop = pixels(train_transform(16, "random", None, None, 0.8, None)(image))
    windows = (scaled[y : y + 16, x : x + 16] for y in range(5) for x in range(15))
    assert any(np.array_equal(w, crop) or np.array_equal(w[:, ::-1], crop) for w in windows)


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (16, 16)])
@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_rkrc_and_rkrr_are_timms(mode, shape):
    """With one scale and one ratio an image is enlarged or not, stretched or not, and cropped as by timm."""
    timm = pytest.importorskip("timm.data.transforms")
    random.seed(0)  # timm cuts at random; 3,000 times, all of its up to 150 places are among them
    image, scale, ratio = ramp(*shape), 0.64, 1.3
    expected = []
    for scale_prob, ratio_prob in ((0, 0), (0, 1), (1, 0), (1, 1)):
        resize = timm.ResizeKeepRatio(
            16,
            interpolation="bicubic",
            random_scale_prob=scale_prob,
            random_scale_range=(scale, scale),
            random_scale_area=True,
            random_aspect_prob=ratio_prob,
            random_aspect_range=(ratio, ratio),
        )
        cut = timm.CenterCropOrPad if mode == "rkrc" else timm.RandomCropOrPad
        crops = [
            np.asarray(cut(16, padding_mode="reflect")(resize(image))) for _ in range(1 if mode == "rkrc" else 3000)
        ]
        expected.append({part.tobytes() for crop in crops for part in (crop, crop[:, ::-1])})
    torch.manual_seed(0)
    transform = train_transform(16, mode, (scale, scale), (ratio, ratio), 0.8, None, "bicubic")
    ours = [pixels(transform(image)).tobytes() for _ in range(60)]
    assert all(any(crop in of for of in expected) for crop in ours)
    assert all(any(crop in of for crop in ours) for of in expected)


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
    assert policy("rand-m30-n16").magnitude == 30 and policy("rand-m0-n1").magnitude == 0


@pytest.mark.parametrize(
    "name",
    [
        *("rand-m31", "rand-m-1", "rand-mnan", "rand-m" + "9" * 5000, "rand-m٣"),
        *("rand-n0", "rand-n17", "rand-m9-n99999999", "rand-n2-m9"),
        *("rand-m9-mstd0.5", "rand-m9-mstdnan", "rand-m9-inc1", "augmix-m5-w999999", "original", "auto", ""),
    ],
)
def test_unknown_policies(name):
    message = (
        f"aa is '{name}'; it must be one of 'imagenet', .* or such as 'rand-m9-n2' with m from 0 to 30 and n from 1"
    )
    with pytest.raises(ValueError, match=message):
        policy(name)


@pytest.mark.parametrize(
    "values", [(np.nan, 1), (0.5, np.nan), (0.5, np.inf), (1, 0.5), (0, 1), (-1, 1), (0.5,), ("a", "b")]
)
def test_ranges_of_crops_are_two_numbers_the_smaller_first(values):
    with pytest.raises(
        ValueError, match=r"scale is .*; it must be two numbers above 0 and at most 1, the smaller first"
    ):
        train_transform(16, "rrc", values, (0.75, 1.33), 0.8, None)
    with pytest.raises(
        ValueError, match=r"ratio is .*; it must be two numbers at least 0.001 and at most 1000, the sm"
    ):
        train_transform(16, "rrc", (0.25, 1), values, 0.8, None)


@pytest.mark.parametrize("crop_pct", [0, -1, np.nan, np.inf, 1.1])
def test_a_crop_is_a_share_of_the_scaled_image(crop_pct):
    with pytest.raises(ValueError, match=r"crop_pct is .*; it must be above 0 and at most 1"):
        eval_transform(16, crop_pct)


@pytest.mark.parametrize("size, crop_pct", [(100_000, 1), (224, 1e-9), (224, 1e-300)])
def test_scaled_images_have_no_more_pixels_than_images_may(size, crop_pct):
    with pytest.raises(ValueError, match=rf"img_size is {size} and crop_pct {crop_pct}; .* must be at most 9,459"):
        eval_transform(size, crop_pct)


@pytest.mark.parametrize("shape", [(1, 200_000), (200_000, 1)])
def test_an_image_too_long_to_be_scaled_is_unreadable(shape):
    crops = [train_transform(256, mode, None, None, 1, None) for mode in ("random", "rkrc", "rkrr")]
    for transform in (eval_transform(224, 0.875), *crops):
        with pytest.raises(UnreadableImage, match=r" scaled (to|for) 256 are .* pixels, and at most 89,478,485 are"):
            transform(Image.new("RGB", [2 * side for side in shape]))


def test_augmix_draws_on_the_cpu():
    params = SimpleNamespace(cpu=lambda: torch.ones(1, 2), device=torch.device("meta"))
    assert policy("augmix")._sample_dirichlet(params).device.type == "meta"


def test_colours_vary_in_brightness_contrast_and_saturation():
    (jitter,) = variation(0, 0, 0.5)
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.5, 1.5) and jitter.hue is None


def test_rkrr_cuts_at_every_place():
    image, cut = ramp(16, 18), train_transform(16, "rkrr", (1.0, 1.0), (1.0, 1.0), 1.0, None, variation=())
    torch.manual_seed(0)
    found = {pixels(cut(image)).tobytes() for _ in range(60)}
    assert found == {np.asarray(image)[:, left : left + 16].tobytes() for left in range(3)}


def test_the_scaled_side_is_rounded_down():
    assert resize_size(224, 0.875) == 256 and resize_size(224, 0.95) == 235  # as in timm
