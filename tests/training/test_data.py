from types import SimpleNamespace

import pytest
import torch

from fastroute.training import ImageDataModule


def prepared(**options):
    data = ImageDataModule(**options)
    data.setup()
    return data


def at_epoch(data, epoch):
    data.trainer = SimpleNamespace(current_epoch=epoch, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    return [torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True)]


def test_digits_come_in_batches_that_hold_every_image_once():
    data = prepared(batch_size=100)
    assert (data.num_classes, data.in_chans, data.img_size) == (10, 1, 8)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 15
    assert [len(labels) for _, labels in batches] == [100] * 14 + [37]
    images, labels = batches[0]
    assert images.shape == (100, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    counts = torch.bincount(torch.cat([labels for _, labels in batches]))
    assert torch.equal(counts, torch.bincount(data.images.train.labels))


def test_validation_images_come_in_order_as_they_are():
    data = prepared(batch_size=100)
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(labels, data.images.val.labels)
    restored = (images * data.std[:, None, None] + data.mean[:, None, None]).round()
    assert torch.equal(restored.to(torch.uint8).permute(0, 2, 3, 1), data.images.val.images)


def test_order_and_augmentation_follow_from_seed_and_epoch():
    images, labels = at_epoch(prepared(seed=1), 0)
    again, _ = at_epoch(prepared(seed=1), 0)
    assert torch.equal(images, again)
    for data, epoch in ((prepared(seed=1), 1), (prepared(seed=0), 1), (prepared(seed=2), 0)):
        assert not torch.equal(labels, at_epoch(data, epoch)[1])


def test_digits_are_shifted_by_at_most_a_pixel_and_never_mirrored():
    data = prepared()
    images, _ = at_epoch(data, 0)
    pixels = (images * data.std[:, None, None] + data.mean[:, None, None]).round().to(torch.uint8)[:, 0]
    padded = torch.nn.functional.pad(data.images.train.images[..., 0], (1, 1, 1, 1))
    shifted = {
        padded[i, y : y + 8, x : x + 8].numpy().tobytes() for i in range(1437) for y in range(3) for x in range(3)
    }
    assert all(image.numpy().tobytes() in shifted for image in pixels)


def test_folder_images_are_mirrored(image_folder):
    data = prepared(dataset="imagefolder", data_dir=image_folder, img_size=8)
    ramp = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 3)
    data.images.train.images.copy_(ramp.expand_as(data.images.train.images))
    images, _ = at_epoch(data, 0)
    middle = images[:, 0, 4]
    falling = (middle[:, 5] < middle[:, 2]).float().mean()
    assert 0.2 < falling < 0.8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataset": "digit"}, "dataset is 'digit'; it must be one of 'digits', 'cifar10'"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"img_size": -8}, "img_size is -8; it must be at least 1"),
        ({"num_workers": 0}, "num_workers is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**arguments)
