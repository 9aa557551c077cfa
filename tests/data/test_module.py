import math
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastroute.data.sources import UnreadableImage
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
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'; it must be one of 'stop', 'skip'"),
        ({"train_crop_mode": "full"}, "train_crop_mode is 'full'; it must be one of 'rrc', 'rkrc'"),
        ({"crop_pct": 0}, "crop_pct is 0; it must be between 0 and 1"),
        ({"reprob": -0.1}, "reprob is -0.1; it must be between 0 and 1"),
        ({"mixup": -1}, "mixup is -1; it must be at least 0"),
        ({"mixup": math.nan}, "mixup is nan; it must be at least 0, and from 0.001 to 1,000,000 if it is not 0"),
        ({"cutmix": math.inf}, "cutmix is inf; it must be at least 0"),
        ({"cutmix": 1e-30}, "cutmix is 1e-30; it must be at least 0"),
        ({"reprob": math.nan}, "reprob is nan; it must be between 0 and 1"),
        ({"crop_pct": math.nan}, "crop_pct is nan; it must be between 0 and 1"),
        ({"scale": (1, 0.5)}, r"scale is \(1, 0.5\); it must be two numbers above 0 and at most 1, the smaller first"),
        ({"ratio": (math.nan, 1)}, r"ratio is \(nan, 1\); it must be two numbers"),
        ({"img_size": 100_000}, "img_size is 100000 and crop_pct 0.875; .* must be at most 9,459"),
        ({"aa": "rand-m9-n99999999"}, "aa is 'rand-m9-n99999999'; it must be one of"),
        ({"dataset": "webdataset"}, "data_dir is None; the dataset 'webdataset' needs a folder with tar shards"),
        ({"dataset": "webdataset", "data_dir": ".", "in_memory": True}, "in_memory is True; it can be chosen for"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**arguments)


def test_first_classes(image_folder):
    data = prepared(first_classes=3)
    assert data.num_classes == 3 and data.images.train.labels.max() == data.images.val.labels.max() == 2
    for options in ({}, {"in_memory": False}):
        data = prepared(dataset="imagefolder", data_dir=image_folder, img_size=8, first_classes=2, **options)
        assert data.classes == ["ant", "bee"]
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 8


def test_an_imagefolder_is_in_memory_up_to_a_size_or_as_asked(image_folder):
    for options, in_memory in (({}, True), ({"img_size": 65}, False), ({"in_memory": False}, False)):
        data = prepared(dataset="imagefolder", data_dir=image_folder, batch_size=8, num_workers=1, **options)
        assert (data.images is not None) == in_memory
        images, labels = next(iter(data.train_dataloader()))
        size = options.get("img_size", 32 if in_memory else 224)
        assert images.shape == (8, 3, size, size) and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and data.num_classes == 3


def test_shards_are_streamed(image_folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(image_folder / split, split)
    shards = prepared(dataset="webdataset", data_dir=tmp_path, img_size=8, crop_pct=1.0, num_workers=1)
    files = prepared(dataset="imagefolder", data_dir=image_folder, img_size=8, in_memory=False, crop_pct=1.0)
    assert shards.classes == files.classes == ["ant", "bee", "cat"]
    ours, theirs = (
        {
            (int(label), image.sum().item())
            for images, labels in d.val_dataloader()
            for image, label in zip(images, labels, strict=True)
        }
        for d in (shards, files)
    )
    assert ours == theirs and len(ours) == 12


def test_mixed_batches_have_labels_of_two_classes_and_the_same_images_every_time():
    data = prepared(batch_size=1437, mixup=1.0, cutmix=1.0, reprob=0.5)
    images, labels = next(iter(data.train_dataloader()))
    assert labels.shape == (1437, 10) and torch.allclose(labels.sum(1), torch.ones(1437))
    assert 0 < ((labels > 0).sum(1) == 2).float().mean() <= 1
    assert torch.equal(next(iter(data.train_dataloader()))[0], images)
    assert next(iter(data.val_dataloader()))[1].dtype == torch.int64


def test_torchvisions_sets_are_read_into_memory(monkeypatch, tmp_path):
    class Fake:
        classes = ("a", "b")

        def __init__(self, root, download, train=True):
            assert (root, download) == (tmp_path, True)
            count = 6 if train else 4
            self.data = np.arange(count * 32 * 32 * 3, dtype=np.uint8).reshape(count, 32, 32, 3)
            self.targets = [0, 1] * (count // 2)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = prepared(dataset="cifar10", data_dir=tmp_path, download=True)
    assert data.images.train.images.shape == (6, 32, 32, 3) and data.images.val.labels.tolist() == [0, 1, 0, 1]
    assert (data.images.pad, data.images.flip, data.num_classes) == (4, True, 2)
    data = prepared(dataset="cifar10", data_dir=tmp_path, download=True, img_size=16)
    assert data.images.train.images.shape == (6, 16, 16, 3)


def test_mnist_and_stl10_are_read_into_memory(monkeypatch):
    class Mnist:
        def __init__(self, root, download, train):
            self.data = torch.zeros(5, 28, 28, dtype=torch.uint8) + train
            self.targets = torch.arange(5)

    class Stl:
        classes = ("a", "b", "c")

        def __init__(self, root, download, split):
            self.data = np.zeros((4, 3, 96, 96), np.uint8) + (split == "train")
            self.labels = np.array([0, 1, 2, 0], np.uint8)

    monkeypatch.setattr("fastroute.data.in_memory.MNIST", Mnist)
    monkeypatch.setattr("torchvision.datasets.STL10", Stl)
    for name, shape, pad, flip in (("mnist", (5, 28, 28, 1), 3, False), ("stl10", (4, 96, 96, 3), 12, True)):
        images = prepared(dataset=name).images
        assert images.train.images.shape == images.val.images.shape == shape
        assert (images.train.images == 1).all() and (images.val.images == 0).all()
        assert (images.pad, images.flip) == (pad, flip) and images.train.labels.dtype == torch.int64


@pytest.mark.filterwarnings("ignore:.*it is skipped")
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_readable_image_is_an_error(image_folder, in_memory, split):
    for path in image_folder.glob(f"{split}/*/*"):
        path.write_bytes(b"no image")
    options = {"img_size": 8, "in_memory": in_memory, "on_bad_image": "skip", "num_workers": 1}
    with pytest.raises(
        UnreadableImage, match=r"none of the \d+ images .*can be read: .*\w/\d.png cannot be read"
    ) as error:
        data = prepared(dataset="imagefolder", data_dir=image_folder, **options)
        list(data.train_dataloader() if split == "train" else data.val_dataloader())
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*it is skipped")
def test_images_skipped_in_memory_are_counted_once_for_all_processes(monkeypatch, image_folder):
    (image_folder / "train" / "ant" / "0.png").write_bytes(b"")
    data = prepared(dataset="imagefolder", data_dir=image_folder, img_size=8, on_bad_image="skip")
    assert data.skipped == 1
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert data.skipped == 0


@pytest.mark.parametrize("in_memory", [True, False])
def test_mirroring_colours_and_no_augmentation(image_folder, in_memory):
    def batch(**options):
        data = ImageDataModule(
            "imagefolder",
            image_folder,
            100,
            8,
            1,
            in_memory=in_memory,
            scale=(1, 1),
            ratio=(1, 1),
            crop_pct=1.0,
            **options,
        )
        data.setup()
        if in_memory:
            data.images = data.images._replace(pad=0)
        return next(iter(data.train_dataloader()))[0]

    plain = batch(hflip=0.0)
    torch.testing.assert_close(batch(hflip=1.0), plain.flip(3))
    torch.testing.assert_close(batch(hflip=0.0, vflip=1.0), plain.flip(2))
    assert not torch.equal(batch(hflip=0.0, color_jitter=0.5), plain)
    torch.testing.assert_close(batch(no_aug=True, aa="rand-m9-n2", mixup=0.2, reprob=1.0, vflip=1.0), plain)
    with pytest.raises(ValueError, match=r"hflip is 1\.5; it must be between 0 and 1"):
        batch(hflip=1.5)
