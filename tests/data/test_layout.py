import shutil
from pathlib import Path

import pytest

from fastroute.data import layout
from fastroute.data.layout import choose, class_folders, expanded, layouts


def touched(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


SPLIT = [f"{split}/{name}/0.png" for split in ("train", "val") for name in ("ant", "bee")]


@pytest.mark.parametrize(
    "names, dataset",
    [
        (SPLIT, "imagefolder"),
        (["train/0.tar", "val/0.tar"], "webdataset"),
        (["set-train-0.tar", "set-val-0.tar", "notes.txt"], "webdataset"),
        (["MNIST/raw/train-images-idx3-ubyte"], "mnist"),
        (["cifar-10-batches-py/batches.meta"], "cifar10"),
        (["cifar-100-python/meta"], "cifar100"),
        (["stl10_binary/train_X.bin"], "stl10"),
    ],
)
def test_layouts_are_recognised(tmp_path, names, dataset):
    touched(tmp_path, *names)
    assert (choose(tmp_path).dataset, choose(tmp_path).root) == (dataset, tmp_path)
    if dataset in layout.TORCHVISION:  # the folder of the files themselves
        inner = tmp_path / layout.TORCHVISION[dataset]
        assert choose(inner).dataset == dataset and choose(inner).root == tmp_path
    other = "stl10" if dataset != "stl10" else "mnist"
    with pytest.raises(ValueError, match=f"it holds .*, for the dataset '{dataset}', not '{other}'"):
        choose(tmp_path, other)


def test_data_without_validation_images(tmp_path):
    flat = touched(tmp_path / "flat", "ant/0.png", "bee/deep/1.JPG", ".ipynb_checkpoints/x/0.png", "empty/notes.txt")
    assert class_folders(flat) == ["ant", "bee"]
    with pytest.raises(
        ValueError, match=r"it holds 2 folders of images, and no images for val: .*by val_split, such as"
    ):
        choose(flat)
    assert choose(flat, any_split=True).dataset == "imagefolder"
    half = touched(tmp_path / "half", "train/ant/0.png")
    with pytest.raises(ValueError, match="it holds class folders under train/, and no images for val"):
        choose(half)
    shards = touched(tmp_path / "shards", "a.tar", "._b.tar")
    with pytest.raises(ValueError, match="it holds tar shards, and no images for val"):
        choose(shards)
    assert choose(shards / "a.tar", any_split=True).dataset == "webdataset"
    assert choose(touched(tmp_path / "val-only", "val/ant/0.png")).dataset == "imagefolder"
    classes = touched(tmp_path / "classes", "train/0.png", "bus/0.png")  # a train is a class here
    assert choose(classes, any_split=True).what == "2 folders of images"


def test_an_image_beside_class_folders_does_not_make_train_a_class(tmp_path):
    touched(tmp_path, *SPLIT, "train/cover.jpg")
    assert choose(tmp_path).what == "class folders under train/ and val/"
    touched(tmp_path, "docs/0.png")
    assert choose(tmp_path).what == "class folders under train/ and val/"
    vehicles = touched(tmp_path / "vehicles", "train/0.png", "train/old/1.png", "bus/0.png")  # a train is a class here
    assert not layout.split_folders(vehicles)


def test_images_may_lie_behind_links(tmp_path):
    touched(tmp_path / "elsewhere", "batch/0.png")
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "batch").symlink_to(tmp_path / "elsewhere" / "batch")
    (tmp_path / "data" / "val" / "ant" / "loop").symlink_to(tmp_path / "data" / "val")
    assert choose(tmp_path / "data").what == "class folders under train/ and val/"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "loop").symlink_to(tmp_path / "empty")
    assert not layout.has_images(tmp_path / "empty")


def test_a_link_to_itself_is_no_folder(tmp_path):
    touched(tmp_path, *SPLIT)
    (tmp_path / "train" / "ant" / "x").symlink_to("x")
    (tmp_path / "train" / "y").symlink_to("y")
    assert choose(tmp_path).what == "class folders under train/ and val/"
    assert class_folders(tmp_path / "train") == ["ant", "bee"]


@pytest.mark.parametrize(
    "names, held",
    [
        ([], "it holds nothing, and must hold train/ and val/ with a folder"),
        (["a.txt", "b.csv"], "it holds a.txt, b.csv, and must hold"),
        (["0.png", "1.png"], "it holds 0.png, 1.png, and must hold"),
        (["train/0.png", "val/0.png"], "it holds train/, val/, and must hold"),
        ([f"set/{name}" for name in SPLIT], r"it holds set/ \(did you mean .*/set/?\?\), and must hold"),
        ([f"{i}.txt" for i in range(9)], "it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more"),
    ],
)
def test_unknown_layouts_are_described(tmp_path, names, held):
    touched(tmp_path, *names)
    for any_split in (False, True):
        with pytest.raises(FileNotFoundError, match=f"data_dir is .*; {held}"):
            choose(tmp_path, any_split=any_split)


def test_several_sets_in_one_folder_are_not_guessed_from(tmp_path):
    touched(tmp_path, "MNIST/raw/x", "cifar-10-batches-py/x")
    with pytest.raises(ValueError, match="it holds mnist and cifar10: choose one by dataset"):
        choose(tmp_path)
    assert choose(tmp_path, "cifar10").dataset == "cifar10"
    with pytest.raises(FileNotFoundError, match=r"data_dir is .*none; there is no such file or folder"):
        choose(tmp_path / "none")


def test_looking_for_images_is_bounded(tmp_path, monkeypatch):
    touched(tmp_path, "ant/a/b/c/d/0.png", "bee/0.png")
    assert class_folders(tmp_path) == ["ant", "bee"]
    monkeypatch.setattr(layout, "MAX_ENTRIES", 3)
    assert class_folders(tmp_path) == ["bee"]
    shutil.rmtree(tmp_path / "bee")
    assert layouts(tmp_path) == []


def test_patterns(tmp_path):
    assert expanded(Path("a-{008..011}.tar")) == [Path(f"a-{i:03}.tar") for i in range(8, 12)]
    assert expanded(Path("{x,y}/{0..1}.tar")) == [Path(f"{a}/{i}.tar") for a in "xy" for i in range(2)]
    assert expanded(Path("a.tar")) is None and expanded(Path("{a}.tar")) is None
    touched(tmp_path, "a/b.tar", "a/c.tar", "a/.d.tar", "a/e.txt")
    shards = [tmp_path / "a/b.tar", tmp_path / "a/c.tar"]
    assert expanded(tmp_path / "a/*.tar") == expanded(tmp_path / "?/[bc].tar") == shards
    assert expanded(tmp_path / "x*.tar") is None
    touched(tmp_path, "set [1]/b-0.tar", "set [1]/b-1.tar", "set [1]/c-0.tar")
    folder = tmp_path / "set [1]"  # the name of a folder is no pattern
    assert expanded(folder / "b-{0..1}.tar") == expanded(folder / "b*.tar") == [folder / "b-0.tar", folder / "b-1.tar"]
    assert expanded(folder / "{b,c}-*.tar") == [folder / f"{name}.tar" for name in ("b-0", "b-1", "c-0")]
    assert expanded(folder / "b-0.tar") is None
    touched(tmp_path, "{0..1}")
    assert expanded(tmp_path / "{0..1}") is None  # there is a file of that name
    for pattern, message in (
        ("{3..1}.tar", "must be two numbers, the smaller first"),
        ("{0..x}.tar", "must be two numbers, the smaller first"),
        ("{0..999999999}.tar", "must be two numbers"),
        ("{0..999}{0..999}.tar", "it stands for 1,000,000 files, and at most 100,000 may be"),
        ("{{0..1}.tar", "its braces do not match"),
    ):
        with pytest.raises(ValueError, match=f"data_dir is .*; .*{message}"):
            expanded(Path(pattern))


def test_a_table_of_labels_is_not_read(tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\n")
    with pytest.raises(FileNotFoundError, match="a table, which is not read: link its images into a folder for each"):
        choose(tmp_path / "labels.csv")
