import itertools
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastroute.data import in_memory
from fastroute.data.in_memory import DATASETS, Options, digits, imagefolder, mnist

REPOSITORY = Path(__file__).resolve().parents[2]
TEST_DATA = Path(os.environ.get("FASTROUTE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def test_digits_are_split_once_and_for_all_with_every_class_in_proportion():
    data = digits(Options())
    assert data.train.images.shape == (1437, 8, 8, 1) and data.val.images.shape == (360, 8, 8, 1)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255
    assert data.classes == [str(i) for i in range(10)]
    assert (data.pad, data.flip) == (1, False)
    counts = torch.bincount(data.val.labels)
    assert counts.min() >= 35 and counts.max() <= 37
    assert torch.equal(digits(Options()).val.labels, data.val.labels)
    everything = torch.cat([data.train.images, data.val.images]).flatten(1).unique(dim=0)
    assert len(everything) > 1790  # hardly any image twice, so train and val are apart


def test_digits_can_be_enlarged():
    data = digits(Options(img_size=16))
    assert data.train.images.shape == (1437, 16, 16, 1) and data.pad == 2


def test_image_folder_holds_the_images_as_they_are(image_folder):
    data = imagefolder(Options(image_folder, 8, 2))
    assert data.classes == ["ant", "bee", "cat"]
    assert data.train.images.shape == (24, 8, 8, 3) and data.val.images.shape == (12, 8, 8, 3)
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    with Image.open(image_folder / "val" / "cat" / "3.png") as image:
        assert np.array_equal(data.val.images[11].numpy(), np.asarray(image))


def test_image_folder_scales_the_shorter_side_and_cuts_the_centre(image_folder):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(image_folder / "train" / "ant" / "0.png")
    images = imagefolder(Options(image_folder, 10, 1)).train.images
    assert images.shape == (24, 10, 10, 3)
    assert images[0, :, 1:-1].min() > 200


def test_missing_folders_are_named(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_dir is .*nowhere; .* but .*nowhere is missing"):
        imagefolder(Options(tmp_path / "nowhere", 8, 1))
    shutil.rmtree(image_folder / "val")
    with pytest.raises(FileNotFoundError, match=r"must be a folder with train/ and val/ in it, but .*val is missing"):
        imagefolder(Options(image_folder, 8, 1))
    (image_folder / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="val must hold one folder of images for each class"):
        imagefolder(Options(image_folder, 8, 1))
    (image_folder / "val" / "ant").mkdir()
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes ant"):
        imagefolder(Options(image_folder, 8, 1))


def test_a_folder_of_images_in_the_place_of_cifar_is_recognised(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 is incomplete .* its train/ is for --dataset imagefolder"):
        DATASETS["cifar10"](Options(image_folder, None, 1, False))
    with pytest.raises(FileNotFoundError, match=r"--download fetches it$"):
        DATASETS["cifar10"](Options(tmp_path / "other", None, 1, False))


def test_classes_that_differ_are_named(image_folder):
    (image_folder / "val" / "cat").rename(image_folder / "val" / "dog")
    with pytest.raises(ValueError, match=r"only train/ has \['cat'\] and only val/ has \['dog'\]"):
        imagefolder(Options(image_folder, 8, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_named(image_folder, suffix):
    whole = image_folder / f"whole.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    broken = image_folder / "train" / "bee" / f"broken.{suffix}"
    broken.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"bee/broken.{suffix} cannot be read as an image: "):
        imagefolder(Options(image_folder, 8, 2))
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"bee/broken.{suffix} cannot be read as an image: "):
        imagefolder(Options(image_folder, 8, 2))


def test_images_that_do_not_fit_into_memory_are_refused(image_folder):
    with pytest.raises(ValueError, match=r"its 36 images take .* GB of memory at img_size=100000000"):
        imagefolder(Options(image_folder, 100_000_000, 1))


def test_each_process_of_a_machine_holds_all_images(image_folder, monkeypatch):
    size = 36 * 8 * 8 * 3
    monkeypatch.setattr(in_memory, "machine_memory", lambda: 3 * size)
    assert len(imagefolder(Options(image_folder, 8, 1)).train.labels)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="its 36 images take 0 GB of memory in each of 2 processes at img_size=8, and"):
        imagefolder(Options(image_folder, 8, 1))


def write_mnist(folder, images=(0x803, 4, 28, 28), labels=(0x801, 4), values=range(4), cut=None):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half in ("train", "t10k"):
        for name, header, data in (("images-idx3", images, bytes(4 * 784)), ("labels-idx1", labels, bytes(values))):
            content = b"".join(value.to_bytes(4, "big") for value in header) + data
            (raw / f"{half}-{name}-ubyte").write_bytes(content[:cut])


@pytest.mark.parametrize(
    "files, message",
    [
        ({"cut": 500}, "train-images-idx3-ubyte is damaged or cut short; .* must be of N×28×28 values of uint8"),
        ({"cut": 6}, "train-images-idx3-ubyte is damaged or cut short"),
        ({"cut": 0}, "train-images-idx3-ubyte is damaged or cut short"),
        ({"images": (0x803, 3, 28, 28)}, "train-images-idx3-ubyte is damaged or cut short"),
        ({"images": (0x803, 2**32 - 1, 28, 28)}, "train-images-idx3-ubyte is damaged or cut short"),
        ({"images": (0x803, 4, 14, 56)}, "train-images-idx3-ubyte is damaged or cut short"),
        ({"images": (0xD03, 4, 28, 28)}, "train-images-idx3-ubyte is damaged or cut short"),
        ({"labels": (0x801, 5)}, "train-labels-idx1-ubyte is damaged or cut short; .* must be of N values of uint8"),
        ({"labels": (0x801, 3), "values": range(3)}, "there are 4 images, but 3 labels"),
        ({"values": (0, 1, 2, 200)}, "its labels are 0 to 200; they must be 0 to 9"),
    ],
)
def test_damaged_files_of_mnist_are_named(tmp_path, files, message):
    write_mnist(tmp_path, **files)
    with pytest.raises(ValueError, match=f"data_dir is .*{message}"):
        mnist(Options(tmp_path))


def test_a_set_of_no_images_is_refused(tmp_path):
    write_mnist(tmp_path)
    assert mnist(Options(tmp_path)).train.labels.tolist() == [0, 1, 2, 3]
    for path in tmp_path.glob("MNIST/raw/t10k*"):
        header = 16 if "images" in path.name else 8
        path.write_bytes(path.read_bytes()[:4] + bytes(4) + path.read_bytes()[8:header])
    with pytest.raises(ValueError, match="there are no images to validate on"):
        mnist(Options(tmp_path))
    assert len(mnist(Options(tmp_path, train_only=True)).train.labels) == 4


def test_real_images(tmp_path):
    archive = TEST_DATA / "cifar10-images.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is missing; FASTROUTE_TEST_DATA names the folder that holds it")
    with tarfile.open(archive) as tar:
        for member in itertools.islice(tar, 100):
            tar.extract(member, tmp_path, filter="data")
    data = imagefolder(Options(tmp_path / "cifar10", None, 2))
    assert len(data.train.labels) + len(data.val.labels) == 100
    assert data.train.images.shape[1:] == (32, 32, 3) and data.pad == 4 and data.flip
    assert data.train.images.float().std() > 30


def test_digits_are_enlarged_by_the_given_interpolation():
    images = digits(Options(img_size=16, interpolation="nearest")).train.images
    assert torch.equal(images[:, ::2, ::2], images[:, 1::2, 1::2])


@pytest.mark.filterwarnings("ignore:.*it is skipped")
def test_images_keep_their_labels_where_others_are_skipped(image_folder):
    (image_folder / "train" / "ant" / "0.png").write_bytes(b"")
    train = imagefolder(Options(image_folder, img_size=8, on_bad_image="skip")).train
    assert train.labels.tolist() == [0] * 7 + [1] * 8 + [2] * 8
    assert torch.equal(train.images.float().mean((1, 2)).argmax(1), train.labels)  # each has a colour of its own
