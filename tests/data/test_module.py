import math
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastroute.data.decode import UnreadableImage
from fastroute.data.loaders import PlaceMismatch
from fastroute.data.module import imagenet_statistics
from fastroute.training import ImageDataModule
from fastroute.training.evaluation import validation_loader


def prepared(**options):
    data = ImageDataModule(**options)
    data.setup()
    return data


DEVICE = SimpleNamespace(root_device=torch.device("cpu"))


def at_epoch(data, epoch):
    data.trainer = SimpleNamespace(current_epoch=epoch, state=SimpleNamespace(status="running"), strategy=DEVICE)
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


def test_a_loop_without_a_trainer_has_new_epochs(image_folder):
    folder = {"dataset": "imagefolder", "data_dir": image_folder, "img_size": 8, "num_workers": 1}
    for options in ({}, folder | {"in_memory": False}):
        data = prepared(seed=1, **options)
        loader = data.train_dataloader()
        wanted = [at_epoch(prepared(seed=1, **options), epoch) for epoch in range(3)]
        passes = [loader, loader, data.train_dataloader()]  # a loop may ask for the loader anew
        for epoch, batches in enumerate(passes):
            list(data.val_dataloader())  # which is no pass over training batches
            found = [torch.cat(parts) for parts in zip(*batches, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted[epoch], strict=True))
    data.trainer = SimpleNamespace(current_epoch=9, state=SimpleNamespace(status="interrupted"), strategy=DEVICE)
    assert not torch.equal(next(iter(loader))[0], next(iter(loader))[0])


def test_a_loop_without_a_trainer_resumes_within_an_epoch():
    whole = prepared(seed=1, batch_size=300)
    first, second, third = (list(whole.train_dataloader()) for _ in range(3))
    stopped = prepared(seed=1, batch_size=300)
    loader = stopped.train_dataloader()
    for _ in loader:
        pass
    batches = iter(loader)
    next(batches), next(batches)
    for place in (stopped, loader):  # the module's place, or that of a loader given to a trainer
        resumed = prepared(seed=1, batch_size=300)
        to = resumed if place is stopped else resumed.train_dataloader()
        to.load_state_dict(place.state_dict())
        loader_of = resumed.train_dataloader() if place is stopped else to
        for epoch, wanted in enumerate((second[2:], third)):
            found = list(loader_of)
            assert len(found) == len(wanted), epoch
            assert all(torch.equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True)), epoch
    old = {"done": 2, "batches": len(loader)}  # written before epochs were counted
    to = prepared(seed=1, batch_size=300).train_dataloader()
    to.load_state_dict(old)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(list(to), first[2:], strict=True))


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
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'; it must be one of 'stop', 'skip'"),
        ({"train_crop_mode": "full"}, "train_crop_mode is 'full'; it must be one of 'rrc', 'rkrc', 'rkrr', 'random'"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; it must be one of 'bilinear', 'bicubic', 'nearest'"),
        ({"in_chans": 2}, "in_chans is 2; it must be one of None, 1, 3"),
        ({"val_split": 1}, "val_split is 1; it must be at least 0 and below 1"),
        ({"val_split": math.nan}, "val_split is nan; it must be at least 0 and below 1"),
        (
            {"mean": (0.5, 0.5)},
            r"mean is \(0.5, 0.5\); it must be one number, or three, from -100 to 100, where images",
        ),
        ({"std": 0}, "std is 0; it must be one number, or three, from 1e-06"),
        (
            {"dataset": "digits", "data_dir": "."},
            "data_dir is .; the dataset 'digits' is scikit-learn's own and reads no",
        ),
        ({"class_map": "map.txt"}, "class_map is map.txt; the classes of 'digits' have names of their own"),
        ({"input_key": "png"}, "input_key is 'png'; it is for tar shards, not 'digits'"),
        ({"crop_pct": 0}, "crop_pct is 0; it must be between 0 and 1"),
        ({"seed": -1}, "seed is -1; it must be from 0 to"),
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


def test_an_imagefolder_is_in_memory_up_to_a_size_or_as_given(image_folder):
    for options, in_memory in (({}, True), ({"img_size": 65}, False), ({"in_memory": False}, False)):
        data = prepared(dataset="imagefolder", data_dir=image_folder, batch_size=8, num_workers=1, **options)
        assert (data.images is not None) == in_memory
        assert data.description.endswith("in memory" if in_memory else "decoded by workers")
        images, labels = next(iter(data.train_dataloader()))
        size = options.get("img_size", 32 if in_memory else 224)
        assert images.shape == (8, 3, size, size) and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and data.num_classes == 3


def pack_shards(images, folder):
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(images / split, split)


def test_without_workers_images_are_those_of_workers(image_folder, tmp_path):
    pack_shards(image_folder, tmp_path)
    folder = {"dataset": "imagefolder", "data_dir": image_folder}
    for options in (folder | {"in_memory": True}, folder, {"dataset": "webdataset", "data_dir": tmp_path}):
        one, none = (
            prepared(**{"in_memory": False} | options, img_size=8, seed=1, num_workers=workers) for workers in (1, 0)
        )
        for ours, theirs in (
            (none.train_dataloader(), one.train_dataloader()),
            (none.val_dataloader(), one.val_dataloader()),
        ):
            for (images, labels), (expected, classes) in zip(ours, theirs, strict=True):
                assert torch.equal(images, expected) and torch.equal(labels, classes)


def test_shards_are_streamed(image_folder, tmp_path):
    pack_shards(image_folder, tmp_path)
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
    options = {"batch_size": 1437, "mixup": 1.0, "cutmix": 1.0, "reprob": 0.5}
    data = prepared(**options)
    images, labels = next(iter(data.train_dataloader()))
    assert labels.shape == (1437, 10) and torch.allclose(labels.sum(1), torch.ones(1437))
    assert 0 < ((labels > 0).sum(1) == 2).float().mean() <= 1
    assert torch.equal(next(iter(prepared(**options).train_dataloader()))[0], images)
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


def test_the_dataset_is_what_the_folder_holds(image_folder, tmp_path):
    for dataset in (None, "auto"):
        data = prepared(data_dir=image_folder, dataset=dataset)
        assert data.dataset == "imagefolder" and data.classes == ["ant", "bee", "cat"]
        assert data.description == (
            f"imagefolder in {image_folder}: 24 images to train and 12 to validate on; 3 classes, colour, 32×32, "
            "in memory"
        )
    assert ImageDataModule().dataset == ImageDataModule("auto").dataset == "digits"
    (tmp_path / "notes").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"data_dir is .*notes; it holds nothing, and must hold train/ and val/"
    ):
        ImageDataModule(data_dir=tmp_path / "notes")
    with pytest.raises(
        ValueError, match="it holds class folders under train/ and val/, for the dataset 'imagefolder', not"
    ):
        prepared(dataset="webdataset", data_dir=image_folder)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_flat_folder_is_split_by_the_seed(image_folder, in_memory):
    def of(loader):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        return images, labels

    options = {"data_dir": image_folder / "train", "img_size": 8, "in_memory": in_memory, "num_workers": 1}
    with pytest.raises(ValueError, match="it holds 3 folders of images, and no images for val"):
        ImageDataModule(**options)
    data = prepared(**options, val_split=0.25, seed=3)
    assert "18 images to train and 6 to validate on, 25% of each class set aside by seed 3" in data.description
    state = data.state_dict()
    assert (state["val_split"], state["split_seed"], state["data_dir"]) == (0.25, 3, str(image_folder / "train"))
    loader, classes, _ = validation_loader(
        state["dataset"],
        image_folder / "train",
        img_size=8,
        crop_pct=state["crop_pct"],
        mean=state["mean"],
        std=state["std"],
        val_split=state["val_split"],
        split_seed=state["split_seed"],
        num_workers=0,
    )
    assert classes == data.classes
    for ours, theirs in zip(of(loader), of(data.val_dataloader()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for other in ({"val_split": 0.5, "seed": 3}, {"val_split": 0.25, "seed": 4}):
        with pytest.raises(PlaceMismatch, match=r"the run set val_split=0.25 aside by seed 3, but now val_split is"):
            ImageDataModule(**options, **other).load_state_dict(state)
    same = {"val_split": 0.25, "seed": 3}
    ImageDataModule(**options, **same).load_state_dict(state)
    with pytest.raises(PlaceMismatch, match=r"the run normalised images by mean .*, but now mean is 0.100, 0.100, 0.1"):
        ImageDataModule(**options, **same, mean=0.1).load_state_dict(state)
    with pytest.raises(PlaceMismatch, match=r"the run had the classes .* \(3\), but now they are .* \(2\): resume"):
        ImageDataModule(**options, **same, first_classes=2).load_state_dict(state)
    for image in list((image_folder / "train" / data.classes[0]).iterdir()):
        shutil.copy(image, image.with_name(f"more_{image.name}"))
    with pytest.raises(PlaceMismatch, match=r"the run trained on 18 images and set 6 aside, but now these are .*: "):
        ImageDataModule(**options, **same).load_state_dict(state)


def test_a_place_that_was_loaded_is_saved_until_training_goes_on(image_folder):
    options = {"data_dir": image_folder, "img_size": 8, "batch_size": 4}
    data = prepared(**options)
    batches = iter(data.train_dataloader())
    next(batches)
    state = data.state_dict()
    assert state["place"]["done"] == 1
    again = prepared(**options)
    again.load_state_dict(state)
    assert again.state_dict()["place"] == state["place"]
    loader = again.train_dataloader()
    assert again.state_dict()["place"] == state["place"]
    next(iter(loader))
    assert again.state_dict()["place"]["done"] == 2


def test_digits_may_be_split_otherwise():
    data = prepared(val_split=0.1)
    assert len(data.images.train.labels) + len(data.images.val.labels) == 1437
    assert 140 <= len(data.images.val.labels) <= 148


def test_mnist_without_its_test_images_is_split(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(
        bytes((0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28)) + bytes(20 * 784)
    )
    (raw / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 20)) + bytes(range(10)) * 2)
    for folder in (tmp_path, tmp_path / "MNIST"):
        data = prepared(data_dir=folder, val_split=0.5)
        assert data.dataset == "mnist" and sorted(data.images.val.labels.tolist()) == list(range(10))


@pytest.mark.parametrize("in_memory", [True, False])
def test_levels_channels_and_interpolation_are_as_given(image_folder, in_memory):
    options = {"data_dir": image_folder, "img_size": 16, "in_memory": in_memory, "crop_pct": 1.0, "num_workers": 1}

    def first(**more):
        data = prepared(**options, **more)
        return data, next(iter(data.val_dataloader()))[0]

    data, images = first(mean=0.5, std=(0.5, 0.25, 1.0))
    assert data.mean.tolist() == [127.5] * 3 and data.std.tolist() == [127.5, 63.75, 255]
    assert images.shape[1] == 3 and images[:, 0].abs().max() <= 1 and images[:, 2].abs().max() <= 0.5
    data, grey = first(in_chans=1, mean=0.0, std=1.0)
    assert data.in_chans == 1 and grey.shape == (12, 1, 16, 16) and len(data.mean) == 1 and "grey" in data.description
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    colour = first(mean=0.0, std=1.0)[1]
    assert ((colour * luma).sum(1) - grey[:, 0]).abs().max() < 2.5 / 255
    nearest = first(mean=0.0, std=1.0, interpolation="nearest")[1]
    assert torch.equal(nearest[..., ::2, ::2], nearest[..., 1::2, 1::2]) and not torch.equal(nearest, colour)
    with pytest.raises(ValueError, match="mean has 3 numbers; the images have 1 channels"):
        first(in_chans=1, mean=(0.5, 0.5, 0.5))


def test_digits_become_colour_and_photographs_grey(monkeypatch):
    data = prepared(in_chans=3)
    assert data.images.train.images.shape == (1437, 8, 8, 3) and data.in_chans == 3 and len(data.mean) == 3

    class Fake:
        classes = ("a", "b")

        def __init__(self, root, download, train=True):
            self.data, self.targets = np.full((4, 32, 32, 3), (10, 100, 200), np.uint8), [0, 1] * 2

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    assert (prepared(dataset="cifar10", in_chans=1).images.train.images == 84).all()


def test_a_class_map_names_the_classes(image_folder, tmp_path):
    (tmp_path / "map.txt").write_text("cat\nbee\nant\n")
    data = prepared(data_dir=image_folder, img_size=8, class_map=tmp_path / "map.txt")
    assert data.classes == ["cat", "bee", "ant"] and data.images.val.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.state_dict()["class_map"]


def test_unaugmented_images_are_scaled_as_given(image_folder):
    options = {"data_dir": image_folder, "img_size": 16, "in_memory": False, "no_aug": True, "num_workers": 1}
    images, _ = next(iter(prepared(**options, crop_pct=1.0, interpolation="nearest").train_dataloader()))
    assert torch.equal(images[..., ::2, ::2], images[..., 1::2, 1::2])


def test_a_loop_without_a_trainer_goes_on_after_a_whole_epoch():
    first, resumed = (ImageDataModule("digits", batch_size=600) for _ in range(2))
    for data in (first, resumed):
        data.setup()
    loader = first.train_dataloader()
    list(loader)
    resumed.load_state_dict(first.state_dict())
    expected, found = next(iter(loader)), next(iter(resumed.train_dataloader()))
    assert torch.equal(expected[1], found[1])


def test_images_must_be_read_before_their_loaders_are_made():
    data = ImageDataModule("digits")
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(RuntimeError, match=r"the images are not read yet: call setup\(\) first"):
            loader()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_batches_are_mixed_by_the_given_alpha(name):
    loader = prepared(batch_size=64, **{name: 1e6}).train_dataloader()
    largest = torch.cat([labels.amax(1) for _, labels in loader])
    if name == "mixup":  # halves of two images
        assert ((largest < 0.51) | (largest > 0.99)).all() and (largest < 0.51).any()
    else:  # boxes of 4×4 pixels of 8×8 at most
        assert (largest >= 0.75).all() and (largest < 0.99).any()


def test_grey_images_have_imagenet_s_mean_over_colours():
    mean, std = imagenet_statistics(1)
    assert mean.tolist() == pytest.approx([114.495], abs=1e-3) and std.tolist() == pytest.approx([57.63], abs=1e-3)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_images_of_a_resumed_run_are_normalised_alike_in_every_channel(image_folder, name):
    options = {"data_dir": image_folder, "img_size": 8, "mean": 0.5, "std": 0.25}
    state = prepared(**options).state_dict()
    with pytest.raises(PlaceMismatch, match=f"the run normalised images by {name} "):
        prepared(**options | {name: (options[name], options[name], 0.3)}).load_state_dict(state)
