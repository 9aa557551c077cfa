import torch

from fastroute.clustering.augment import Augmentation

NOTHING = {"shift": 0, "degrees": 0, "scale": 0, "brightness": 0, "contrast": 0}


def test_identity_without_changes():
    images = torch.rand(3, 2, 8, 8)
    torch.testing.assert_close(Augmentation(**NOTHING)(images), images, atol=1e-5, rtol=0)


def test_mirrors_half():
    images = torch.rand(200, 1, 4, 4)
    result = Augmentation(**NOTHING, flip=True)(images)
    close = (result - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (result - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert (close ^ mirrored).all() and 70 < mirrored.sum() < 130


def test_shifts_by_no_more_than_asked():
    images = torch.zeros(300, 1, 21, 21)
    images[:, :, 10, 10] = 1
    moved = Augmentation(**NOTHING | {"shift": 0.2})(images)[:, 0]
    place = torch.arange(21.0)
    for dim in (1, 2):
        center = (moved.sum(dim) * place).sum(-1) / moved.sum((1, 2))
        assert 3 < (center - 10).abs().max() <= 0.2 * 21 + 1e-3


def test_turns_and_grows_by_no_more_than_asked():
    images = torch.zeros(300, 1, 33, 33)
    images[:, :, 16, 26] = 1  # ten pixels to the right
    place = torch.arange(33.0) - 16
    for options, least, most in (({"degrees": 30}, 0.4, 0.53), ({"scale": 0.3}, 0.0, 0.02)):
        moved = Augmentation(**NOTHING | options)(images)[:, 0]
        x, y = ((moved.sum(dim) * place).sum(-1) / moved.sum((1, 2)) for dim in (1, 2))
        angle, radius = torch.atan2(y, x).abs(), torch.hypot(x, y)
        assert least < angle.max() + 1e-6 and angle.max() <= most
        spread = 0.3 if "scale" in options else 0
        assert (radius >= 10 * (1 - spread) - 0.3).all() and (radius <= 10 * (1 + spread) + 0.3).all()
        assert (radius.max() - radius.min() > 4) == bool(spread)


def test_depends_on_its_generator_and_stays_in_range():
    images = torch.rand(20, 3, 8, 8)
    first, second = (Augmentation()(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first, Augmentation()(images, torch.Generator().manual_seed(2)))


def test_places_are_exact_in_mixed_precision():
    images = torch.rand(4, 1, 16, 16)
    exact = Augmentation()(images, torch.Generator().manual_seed(0))
    with torch.autocast("cpu"):
        torch.testing.assert_close(Augmentation()(images, torch.Generator().manual_seed(0)), exact, rtol=0, atol=0)
