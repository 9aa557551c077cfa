import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastroute.training.sources import FolderSource, TarSource, UnreadableImage, read_image, tar_sources, val_source


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def shard(path, values, numbered=True):
    """Image number v is of value v and of class v % 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for value in values:
            if numbered:
                add(tar, f"{value:04}.png", png(value))
                add(tar, f"{value:04}.cls", str(value % 3).encode())
            else:
                add(tar, f"set/class{value % 3}/{value:04}.png", png(value))
    return path


@pytest.mark.parametrize("numbered", [True, False])
def test_shards_hold_images_and_classes_in_either_layout(tmp_path, numbered):
    shards = [shard(tmp_path / f"{i}.tar", range(7 * i, 7 * i + 7), numbered) for i in range(3)]
    source = TarSource(shards, num_workers=2)
    assert source.classes == (["0", "1", "2"] if numbered else ["class0", "class1", "class2"])
    assert len(source) == 21 and source.labels.tolist() == [i % 3 for i in range(21)]
    for i in range(21):
        assert np.asarray(read_image(source, i)).mean() == i
    assert source.name(8).startswith(str(shards[1])) and source.name(8).endswith("0008.png")


def test_first_classes(tmp_path, image_folder):
    source = TarSource([shard(tmp_path / "a.tar", range(9))], first_classes=2)
    assert source.classes == ["0", "1"] and source.labels.tolist() == [0, 1] * 3
    assert [int(np.asarray(read_image(source, i)).mean()) for i in range(6)] == [0, 1, 3, 4, 6, 7]
    source = FolderSource(image_folder / "val", first_classes=2)
    assert source.classes == ["ant", "bee"] and source.labels.tolist() == [0] * 4 + [1] * 4
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"first_classes is {count}; it must be 1 to 3"):
            FolderSource(image_folder / "val", first_classes=count)


def test_an_epoch_reads_a_few_shards_at_a_time_and_everything_once(tmp_path, monkeypatch):
    monkeypatch.setattr(TarSource, "SHARDS_AT_ONCE", 2)
    source = TarSource([shard(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 10)) for i in range(5)])
    order = source.order(torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(50))
    assert len(set((order[:20] // 10).tolist())) == 2 and order[:20].tolist() != sorted(order[:20].tolist())
    assert not torch.equal(order, source.order(torch.Generator().manual_seed(1)))


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


def test_shards_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no shards train/\*.tar or \*train\*.tar in it for 'train'"):
        tar_sources(tmp_path)
    (tmp_path / "text.tar").write_text("no tar file, but long enough to be read as one" * 20)
    with pytest.raises(ValueError, match=r"text.tar cannot be read as a tar file of images"):
        TarSource([tmp_path / "text.tar"])
    whole = shard(tmp_path / "whole.tar", range(9)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(ValueError, match=r"cut.tar cannot be read as a tar file of images"):
        TarSource([tmp_path / "cut.tar"])
    with tarfile.open(tmp_path / "lone.tar", "w") as tar:
        add(tar, "0.png", png(0))
    with pytest.raises(ValueError, match=r"0.png has no class: there must be a 0.cls, or a folder for each class"):
        TarSource([tmp_path / "lone.tar"])
    with tarfile.open(tmp_path / "negative.tar", "w") as tar:
        add(tar, "0.png", png(0))
        add(tar, "0.cls", b"-1")
    with pytest.raises(ValueError, match=r"negative.tar cannot be read .*: 0.cls says class -1; classes are numbered"):
        TarSource([tmp_path / "negative.tar"])
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(FileNotFoundError, match=r"there are no images in .*empty.tar"):
        TarSource([tmp_path / "empty.tar"])
    mixed = [shard(tmp_path / "a.tar", range(3)), shard(tmp_path / "b.tar", range(3), numbered=False)]
    with pytest.raises(ValueError, match=r"some images have a \.cls and some have none"):
        TarSource(mixed)


def test_a_damaged_image_in_a_shard_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/0.png", png(0)[:40])
    with pytest.raises(UnreadableImage, match=r"a.tar:x/0.png cannot be read as an image"):
        read_image(TarSource([tmp_path / "a.tar"]), 0)
