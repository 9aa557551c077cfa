"""Images in folders, and what folders and shards have in common."""

import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from fastroute.data.class_names import read_class_map
from fastroute.data.decode import UnreadableImage, decode_image
from fastroute.data.sources import (
    FolderSource,
    Reading,
    TarSource,
    folder_sources,
    read_image,
    stratified,
    tar_sources,
    val_source,
)
from tests.data.tars import add, packed, pairs, png, shard
from tests.image_folders import write_tree


def test_first_classes(tmp_path, image_folder):
    source = TarSource([shard(tmp_path / "a.tar", range(9))], first_classes=2)
    assert source.classes == ["0", "1"] and source.labels.tolist() == [0, 1] * 3
    assert [int(np.asarray(read_image(source, i)).mean()) for i in range(6)] == [0, 1, 3, 4, 6, 7]
    with pytest.raises(FileNotFoundError, match=r"there are no images of the first 1 classes in .*one.tar"):
        TarSource([shard(tmp_path / "one.tar", [1])], first_classes=1)
    source = FolderSource(image_folder / "val", first_classes=2)
    assert source.classes == ["ant", "bee"] and source.labels.tolist() == [0] * 4 + [1] * 4
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"first_classes is {count}; it must be 1 to 3"):
            FolderSource(image_folder / "val", first_classes=count)


def test_shards_are_found_by_folder_or_by_name(tmp_path):
    for layout in ("{split}/0.tar", "set-{split}-0.tar"):
        folder = tmp_path / layout[:3]
        shard(folder / layout.format(split="train"), range(6))
        shard(folder / layout.format(split="val"), range(3))
        assert {split: len(source) for split, source in tar_sources(folder).items()} == {"train": 6, "val": 3}
        assert len(val_source("webdataset", folder)) == 3
    assert len(val_source("webdataset", folder / "set-train-0.tar")) == 6


def test_validation_images_need_no_training_images(image_folder, tmp_path):
    assert len(val_source("imagefolder", image_folder)) == len(val_source("imagefolder", image_folder / "val")) == 12
    with pytest.raises(FileNotFoundError, match=r"data_dir is .*none; there is no such file or folder"):
        val_source("imagefolder", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there are no tar shards in it"):
        val_source("webdataset", image_folder)


def test_files_left_out_are_named_and_counted(image_folder, tmp_path):
    members = ("0.png", png(0)), ("0.cls", b"0"), ("1.gif", png(1, "gif")), ("1.cls", b"1"), ("1.json", b"{}")
    with pytest.warns(UserWarning) as found:
        assert len(TarSource([packed(tmp_path / "a.tar", *members)])) == 1
    messages = [str(warning.message).partition(": ")[2] for warning in found]
    assert [message.partition(" are left out, ")[2] for message in messages] == ["1 such as 1.gif", "1 such as 1.cls"]
    for name in ("8.gif", "9.JFIF", "notes.txt"):
        (image_folder / "val" / "ant" / name).write_bytes(b"")
    (image_folder / "val" / "dog").symlink_to("gone")
    with pytest.warns(UserWarning) as found:
        assert FolderSource(image_folder / "val").classes == ["ant", "bee", "cat"]
    messages = sorted(str(warning.message) for warning in found)
    assert len(messages) == 2 and "images of other names than .jpg, .jpeg, .png" in messages[0]
    assert ".webp are left out, 2 such as " in messages[0]
    assert messages[1].endswith(f"links to nothing are left out, 1 such as {image_folder / 'val' / 'dog'}")


def special_files(folder, suffix):
    os.mkfifo(folder / f"pipe{suffix}")
    (folder / f"folder{suffix}").mkdir()
    (folder / f"device{suffix}").symlink_to("/dev/zero")
    return [("pipe", "a named pipe"), ("folder", "a folder"), ("device", "a device")]


def test_only_regular_files_are_opened(tmp_path):
    for name, what in special_files(tmp_path, ".jpg"):
        with pytest.raises(UnreadableImage, match=f"{name}.jpg cannot be read as an image: it is {what}, and must be"):
            decode_image(tmp_path / f"{name}.jpg", f"{name}.jpg")
    for name, what in special_files(tmp_path, ".tar"):
        with pytest.raises(ValueError, match=f"{name}.tar cannot be read as a tar file of images: it is {what}"):
            TarSource([tmp_path / f"{name}.tar"])
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(UnreadableImage, match=r"self.jpg cannot be read as an image"):
        decode_image(tmp_path / "self.jpg", "self.jpg")


def test_a_folder_that_links_lead_back_to_is_read_once(image_folder):
    folder = image_folder / "train" / "ant"
    for name in "xy":
        (folder / name).symlink_to(".")
    with pytest.warns(UserWarning, match="links to a folder that is read already are left out, 2 such as .*ant/x"):
        assert len(FolderSource(image_folder / "train")) == 24


def test_images_are_in_the_order_of_torchvision(image_folder):
    elsewhere = image_folder / "elsewhere"
    for folder in (image_folder / "train/ant/b", image_folder / "train/ant/B/c", elsewhere):
        folder.mkdir(parents=True)
        for name in ("z.png", "A.JPG", "notes.txt", "\udcff.webp"):
            (folder / name).write_bytes(b"")
    (image_folder / "train/ant/a").symlink_to(elsewhere)
    source, expected = FolderSource(image_folder / "train"), ImageFolder(image_folder / "train")
    assert [(source.open(i), int(source.labels[i])) for i in range(len(source))] == expected.samples


def test_a_folder_that_cannot_be_read_is_an_error(monkeypatch, image_folder):
    (image_folder / "train" / "ant" / "closed").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*ant/closed'"):
        FolderSource(image_folder / "train")


def named(source, index):
    return source.classes[source.labels[index]]


def test_hidden_files_are_neither_classes_nor_images(image_folder, tmp_path, recwarn):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/ant/0.png", "ant/._0.png", "ant/.ipynb_checkpoints/0.png"):
        path = image_folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    source = FolderSource(image_folder / "train")
    assert source.classes == ["ant", "bee", "cat"] and len(source) == 24
    members = ("./a/0.png", png(1)), ("./a/._0.png", b"no image"), ("__MACOSX/a/0.png", b""), ("./._a/1.png", b"")
    folders = (("./", b"", {"type": tarfile.DIRTYPE}), ("./a/", b"", {"type": tarfile.DIRTYPE}))
    source = TarSource([packed(tmp_path / "a.tar", *folders, *members)])
    assert source.classes == ["a"] and [source.name(i).partition(":")[2] for i in range(len(source))] == ["./a/0.png"]
    assert not recwarn.list


def test_a_split_that_lacks_a_class_is_named(tmp_path):
    shard(tmp_path / "train.tar", range(6))
    packed(tmp_path / "val.tar", *pairs("cls", [b"2", b"0"]))
    with pytest.raises(ValueError, match=r"the same classes, but only train/ has \['1'\], which val/ lacks"):
        tar_sources(tmp_path)
    (tmp_path / "train.tar").rename(tmp_path / "x")
    (tmp_path / "val.tar").rename(tmp_path / "train.tar")
    (tmp_path / "x").rename(tmp_path / "val.tar")
    with pytest.raises(ValueError, match=r"only val/ has \['1'\], which train/ lacks"):
        tar_sources(tmp_path)


def test_a_class_map_orders_and_chooses_classes(image_folder, tmp_path):
    (tmp_path / "map.txt").write_text("cat\nant\n")
    names = read_class_map(tmp_path / "map.txt")
    with pytest.warns(UserWarning, match="folders that the class map does not name are left out, 1 such as .*bee"):
        source = FolderSource(image_folder / "val", class_map=names)
    assert (
        source.classes == ["cat", "ant"] and [named(source, i) for i in (0, 4)] == ["cat", "ant"] and len(source) == 8
    )
    numbered = TarSource([shard(tmp_path / "a.tar", range(6))], class_map=["zero", "one", "two"])
    assert numbered.classes == ["zero", "one", "two"] and numbered.labels.tolist() == [0, 1, 2] * 2
    with pytest.warns(UserWarning, match="classes that the class map does not name are left out, 1 such as class1"):
        source = TarSource([shard(tmp_path / "b.tar", range(6), numbered=False)], class_map=["class2", "class0"])
    assert source.labels.tolist() == [1, 0] * 2 and np.asarray(read_image(source, 1)).mean() == 2
    with pytest.raises(ValueError, match="there are images of class 2, but the class map names 1 classes, 0 to 0"):
        TarSource([tmp_path / "a.tar"], class_map=["zero"])
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes dog"), pytest.warns():
        FolderSource(image_folder / "val", class_map=["dog"])
    with pytest.raises(
        ValueError, match=r"the class map has the line '\.\./train'; each line must be the name of one class"
    ):
        FolderSource(image_folder / "val", class_map=["../train"])


@pytest.mark.parametrize(
    "content, message", [(b"a\nb\na\n", "it names a twice"), (b"\n", "it names no class"), (b"\xff", "a text in UTF-8")]
)
def test_wrong_class_maps(tmp_path, content, message):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"class_map is .*map.txt; .*{message}"):
        read_class_map(tmp_path / "map.txt")


@pytest.mark.parametrize(
    "names",
    [
        ("set/train/a/0.png", "set/train/b/1.png", "set/val/a/2.png"),
        ("train/a/0.png", "test/a/1.png"),
        ("train/a/sub/0.png", "validation/b/1.png"),
        ("train/0.png", "train/0.cls", "val/1.png", "val/1.cls"),
    ],
)
def test_a_tar_file_of_several_splits_is_refused(names, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in names:
            add(tar, name, png(0) if name.endswith("png") else b"1")
    for reading in (Reading(val_split=0.5), Reading()):
        with pytest.raises(ValueError, match=r"all.tar: it holds (test|train)/ and \w+/, whose images would be mixed"):
            val_source("webdataset", tmp_path / "all.tar", reading)


def test_classes_may_be_called_as_splits(tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for i, name in enumerate(("x/train/0.png", "x/test/1.png")):
            add(tar, name, png(i))
    assert val_source("webdataset", tmp_path / "all.tar").classes == ["test", "train"]


def test_classes_without_images_are_named(tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for value in range(1, 4):
                add(tar, f"{value}.png", png(value))
                add(tar, f"{value}.cls", str(value).encode())
    with pytest.warns(UserWarning, match=r"no training image is of the classes 0 \(numbers start at 0\)"):
        assert len(tar_sources(tmp_path)["train"].classes) == 4


def test_a_share_of_each_class_is_set_aside_by_the_seed():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] + [3] * 2)[
        torch.randperm(26, generator=torch.Generator().manual_seed(0))
    ]
    train, val = stratified(labels, 0.1, seed=1)
    assert torch.cat([train, val]).sort().values.tolist() == list(range(26))
    assert torch.bincount(labels[val], minlength=4).tolist() == [2, 1, 0, 1]
    assert train.tolist() == sorted(train.tolist()) and val.tolist() == sorted(val.tolist())
    assert torch.equal(stratified(labels, 0.1, seed=1)[1], val)
    assert any(not torch.equal(stratified(labels, 0.1, seed=seed)[1], val) for seed in range(2, 5))
    assert torch.bincount(labels[stratified(labels, 0.9, seed=1)[0]]).tolist() == [2, 1, 1, 1]


def test_a_flat_folder_of_classes_is_split(image_folder):
    flat = image_folder / "train"
    sources = folder_sources(flat, Reading(val_split=0.25, seed=3))
    assert [len(sources[split]) for split in ("train", "val")] == [18, 6]
    names = [{source.name(i) for i in range(len(source))} for source in sources.values()]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 24
    assert all(named(source, i) in source.name(i) for source in sources.values() for i in range(len(source)))
    again = val_source("imagefolder", flat, Reading(val_split=0.25, seed=3))
    assert {again.name(i) for i in range(6)} == names[1]
    assert len(folder_sources(image_folder, Reading(val_split=0.25))["train"]) == 18  # of its train/
    for path in flat.glob("*/[1-7].png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"val_split is 0.25, but no class has two images to split"):
        folder_sources(flat, Reading(val_split=0.25))


def test_splits_are_not_split_as_classes(tmp_path):
    write_tree(tmp_path / "a", sizes=((8, 8),))
    shutil.copy(tmp_path / "a" / "train" / "ant" / "0.png", tmp_path / "a" / "train" / "cover.png")
    sources = folder_sources(tmp_path / "a", Reading(val_split=0.25))
    assert sources["train"].classes == ["ant", "bee", "cat"]
    (tmp_path / "a" / "train").rename(tmp_path / "a" / "test")
    with pytest.raises(FileNotFoundError, match=r"it holds test/, val/, which are no classes, .* such as .*/val"):
        folder_sources(tmp_path / "a", Reading(val_split=0.25))
