"""Images and classes in tar shards."""

import errno
import os
import resource
import tarfile
import warnings

import numpy as np
import pytest
import torch

from fastroute.data import sources as sources_module
from fastroute.data.class_names import numbers_of, warn_of_sorted
from fastroute.data.decode import UnreadableImage
from fastroute.data.sources import (
    Reading,
    TarSource,
    read_image,
    tar_sources,
    val_source,
)
from tests.data.tars import add, binary, header, packed, pairs, png, shard


@pytest.mark.parametrize("numbered", [True, False])
def test_shards_hold_images_and_classes_in_either_layout(tmp_path, numbered):
    shards = [shard(tmp_path / f"{i}.tar", range(7 * i, 7 * i + 7), numbered) for i in range(3)]
    source = TarSource(shards, num_workers=2)
    assert source.classes == (["0", "1", "2"] if numbered else ["class0", "class1", "class2"])
    assert len(source) == 21 and source.labels.tolist() == [i % 3 for i in range(21)]
    for i in range(21):
        assert np.asarray(read_image(source, i)).mean() == i
    assert source.name(8).startswith(str(shards[1])) and source.name(8).endswith("0008.png")


def test_an_epoch_reads_a_few_shards_at_a_time_and_everything_once(tmp_path, monkeypatch):
    monkeypatch.setattr(TarSource, "SHARDS_AT_ONCE", 2)
    source = TarSource([shard(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 10)) for i in range(5)])
    order = source.order(torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(50))
    assert len(set((order[:20] // 10).tolist())) == 2 and order[:20].tolist() != sorted(order[:20].tolist())
    assert not torch.equal(order, source.order(torch.Generator().manual_seed(1)))


def test_wrong_shards(tmp_path):
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
    with pytest.raises(FileNotFoundError, match=r"none.tar cannot be read as a tar file .*: there is no such file"):
        TarSource([tmp_path / "none.tar"])
    with pytest.raises(FileNotFoundError, match=r"there are no images in .*empty.tar"):
        TarSource([tmp_path / "empty.tar"])
    mixed = [shard(tmp_path / "a.tar", range(3)), shard(tmp_path / "b.tar", range(3), numbered=False)]
    with pytest.raises(
        ValueError, match="some images have a number as class and some images have the name of their folder as"
    ):
        TarSource(mixed)


def test_a_damaged_image_in_a_shard_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/0.png", png(0)[:40])
    with pytest.raises(UnreadableImage, match=r"a.tar:x/0.png cannot be read as an image"):
        read_image(TarSource([tmp_path / "a.tar"]), 0)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"100000000", "0.cls says class 100000000; classes are numbered from 0 to 999,999"),
        (b"1" * 30, "0.cls says class 1{30}; classes are numbered from 0"),
        (b"1" * 1001, "0.cls has 1,001 bytes; a .cls with a class has at most 1,000"),
        (b"1.5", "0.cls says class 1.5; classes are numbered from 0"),
        (b"a\nb", r"0.cls says class a\\nb; classes are numbered from 0 to 999,999, or have names of one line"),
        (b"", "0.cls says class ; classes are numbered from 0"),
    ],
)
def test_a_class_is_a_small_number_or_a_name_of_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"a.tar cannot be read as a tar file of images: {message}"):
        TarSource([packed(tmp_path / "a.tar", ("0.png", png(0)), ("0.cls", content))])


@pytest.mark.parametrize("name", ["a/0.png", "a/0.cls"])
@pytest.mark.parametrize(
    "kind, what",
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.FIFOTYPE, "named pipe"),
        (tarfile.CHRTYPE, "device"),
    ],
)
def test_only_plain_files_are_taken_from_a_shard(tmp_path, name, kind, what):
    shard = packed(tmp_path / "a.tar", ("a/1.png", png(1)), (name, b"", {"type": kind, "linkname": "/etc/passwd"}))
    with pytest.raises(ValueError, match=f"{name} is a {what}, and must be a plain file"):
        TarSource([shard])


def test_folders_in_a_shard_may_be_named_as_images_but_not_as_classes(tmp_path):
    folder = {"type": tarfile.DIRTYPE}
    source = TarSource([packed(tmp_path / "a.tar", ("owl.png/", b"", folder), ("owl.png/0.png", png(0)))])
    assert source.classes == ["owl.png"] and len(source) == 1
    with pytest.raises(ValueError, match=r"a/0.cls is a folder, and must be a plain file"):
        TarSource([packed(tmp_path / "b.tar", ("a/0.png", png(0)), ("a/0.cls", b"", folder))])


SPARSE = {"483": binary(10**13), "386": b"0" * 11, "398": b"0" * 11}


@pytest.mark.parametrize(
    "blocks, message",
    [
        (header(b"S", b"a/0.png", **SPARSE), "a/0.png is a sparse file, and must be a plain one"),
        (
            header(b"x", b"a", b"%o" % 22) + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + header(b"0", b"a/0.png"),
            "a/0.png is a sparse file",
        ),
        (header(b"0", b"a/0.png", b"777777"), "a/0.png is cut short: it has 262,143 bytes, of which 1,024 are there"),
        (header(b"0", b"a/0.png", binary(10**13)), "a/0.png is cut short"),
        # -1 in GNU's binary numbers
        (header(b"0", b"a/0.png", b"\xff" * 12), "a/0.png has the size .*, which must be octal digits"),
        (header(b"0", b"a/0.png", b"-1"), "a/0.png has the size b'-1', which must be octal digits"),
        (header(b"x", b"a", binary(6 * 10**9)), "the header at byte 0 has 6,000,000,000 bytes"),
        (header(b"L", b"a", binary(6 * 10**9)), "the header at byte 0 has 6,000,000,000 bytes"),
        (header(b"x", b"a", b"12") + b"99 path=a\n".ljust(512, b"\0"), "the extended header at byte 0 is damaged"),
        (header(b"g", b"a", b"14") + b"12 path=aaa\n".ljust(512, b"\0"), "gives all files one name or one size"),
    ],
)
def test_headers_beyond_the_file_are_refused(tmp_path, blocks, message):
    (tmp_path / "a.tar").write_bytes(blocks + bytes(1024))
    with pytest.raises(ValueError, match=message):
        TarSource([tmp_path / "a.tar"])


def test_any_number_of_headers_may_precede_a_file(tmp_path):
    name = header(b"L", b"a", b"10") + b"a/0.png".ljust(512, b"\0")
    image = png(7)
    block = header(b"0", b"b/1.png", b"%o" % len(image)) + image + bytes(-len(image) % 512)
    (tmp_path / "a.tar").write_bytes(name * 2000 + block + bytes(1024))
    source = TarSource([tmp_path / "a.tar"])
    assert source.classes == ["a"] and np.asarray(read_image(source, 0)).mean() == 7


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_sizes_are_read_as_python_writes_them(tmp_path, format):
    names = [f"{'d' * 90}/{'e' * 50}/0.png", "ü/1.png"]
    if format != tarfile.USTAR_FORMAT:
        names.append(f"{'x' * 300}/{'y' * 200}.png")
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for value, name in enumerate(names):
            add(tar, name, png(value), mtime=0.5 if format == tarfile.PAX_FORMAT else 1)
    source = TarSource([tmp_path / "a.tar"])
    assert [source.name(i).partition(":")[2] for i in range(len(source))] == names
    assert [np.asarray(read_image(source, i)).mean() for i in range(len(source))] == list(range(len(names)))


def test_nothing_after_damage_in_the_middle_is_dropped(tmp_path):
    whole = packed(tmp_path / "a.tar", *((f"a/{i}.png", png(i)) for i in range(9))).read_bytes()
    for damage in (bytes(512), b"\1" + whole[4097 : 4096 + 512]):
        (tmp_path / "a.tar").write_bytes(whole[:4096] + damage + whole[4096 + 512 :])
        with pytest.raises(ValueError, match=r"its end is marked at byte 4,096, but|there is no header at byte 4,096"):
            TarSource([tmp_path / "a.tar"])
    (tmp_path / "a.tar").write_bytes(whole * 2)
    with pytest.raises(ValueError, match=r"but it goes on to byte .*: it is damaged, or several in one"):
        TarSource([tmp_path / "a.tar"])


def test_names_that_differ_in_their_suffix_are_two_images_and_may_not_share_a_class(tmp_path):
    images = ("a/0.png", png(1)), ("a/0.bmp", png(2, "bmp"))
    source = TarSource([packed(tmp_path / "a.tar", *images)])
    assert [np.asarray(read_image(source, i)).mean() for i in range(2)] == [1, 2]
    with pytest.raises(ValueError, match=r"a/0.png and a/0.bmp have one a/0.cls for both"):
        TarSource([packed(tmp_path / "b.tar", *images, ("a/0.cls", b"1"))])


@pytest.mark.parametrize("names", [("a/0.png", "a/0.png"), ("a/0.png", "./a/0.png"), ("a/0.cls", "a/0.cls")])
def test_a_name_is_in_a_shard_once(tmp_path, names):
    with pytest.raises(ValueError, match=rf"{names[0]} is in it twice"):
        TarSource([packed(tmp_path / "a.tar", *((name, b"1") for name in names))])


def test_a_shard_is_of_one_split(tmp_path):
    for split in ("train", "val"):
        shard(tmp_path / f"retrieval-{split}.tar", range(3))
    with pytest.raises(ValueError, match=r"retrieval-train.tar would be for train and val at once: put shards into"):
        tar_sources(tmp_path)


def test_more_shards_than_a_process_may_open(tmp_path):
    source = TarSource([shard(tmp_path / f"{i}.tar", [i], numbered=False) for i in range(80)])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, before[1]))
    try:
        assert [np.asarray(read_image(source, i)).mean() for i in range(80)] == list(range(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_long_name_does_not_lengthen_all_others(tmp_path):
    names = [f"a/{'x' * 100_000}.png", *(f"a/{i}.png" for i in range(500))]
    source = TarSource([packed(tmp_path / "a.tar", *((name, b"") for name in names))])
    assert len(source.names.text) < 120_000 and len(source.name(0)) < 2000 and source.name(500).endswith(":a/499.png")


def test_names_of_any_bytes_can_be_printed(tmp_path):
    (tmp_path / "a.tar").write_bytes(header(b"0", b"a/\xff\x1b[31m.png") + bytes(1024))
    assert TarSource([tmp_path / "a.tar"]).name(0).endswith(r":a/\xff\x1b[31m.png")


def test_json_or_text_files_give_the_class(tmp_path):
    jsons = [b'{"id": 7, "label": 2}', b'{"label": 0}']
    source = TarSource([packed(tmp_path / "a.tar", *pairs("json", jsons))])
    assert source.classes == ["0", "1", "2"] and source.labels.tolist() == [2, 0]
    for suffix, texts in (
        ("cls", [b"owl\n", b"cat"]),
        ("txt", [b"owl", b"cat"]),
        ("json", [b'{"cls": "owl"}', b'{"label": null, "cls": "cat"}']),
    ):
        source = TarSource([packed(tmp_path / "b.tar", *pairs(suffix, texts))])
        assert source.classes == ["cat", "owl"] and source.labels.tolist() == [1, 0]
    captions = ("dog/0.png", png(0)), ("dog/0.txt", b"a dog on a sofa"), ("dog/0.json", b'{"width": 4}')
    assert TarSource([packed(tmp_path / "c.tar", *captions)]).classes == ["dog"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "0.json is no JSON"),
        (b"{", "0.json is no JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "0.json is no JSON"),
        (b'{"label": [1]}', r"0.json says class \[1\]; it must be a number or a name"),
        (b'{"label": true}', "0.json says class true; it must be a number or a name"),
        (b'{"label": {"a": null}}', r'0.json says class {"a": null}; it must be a number or a name'),
        (b'{"label": [1]}' + b" " * 2**20, "0.json has 1,048,590 bytes; a .json with a class has at most 1,048,576"),
        (b'{"label": 1000000}', "0.json says class 1000000; classes are numbered from 0 to 999,999"),
        (b'{"label": ""}', "0.json says class ; classes are numbered"),
    ],
    ids=["deep", "cut", "digits", "list", "boolean", "object", "long", "number", "empty"],
)
def test_a_json_is_bounded(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"a.tar cannot be read as a tar file of images: {message}"):
        TarSource([packed(tmp_path / "a.tar", *pairs("json", [content]))])


def test_one_of_several_images_of_a_key_is_chosen(tmp_path):
    images = ("a/0.left.png", png(1)), ("a/0.right.png", png(2)), ("a/0.bmp", png(3, "bmp")), ("a/0.cls", b"5")
    shards = [packed(tmp_path / "a.tar", *images, ("a/1.left.png", png(4)), ("a/1.cls", b"6"))]
    with pytest.raises(
        ValueError, match=r"a/0.left.png and a/0.right.png have one a/0.cls for both, .*by input_key, such"
    ):
        TarSource(shards)
    for key, values in (("left.png", [1, 4]), ("bmp;left.png", [3, 4]), ("BMP", [3])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a .cls whose image is not chosen
            source = TarSource(shards, input_key=key)
        assert [np.asarray(read_image(source, i)).mean() for i in range(len(source))] == values
        assert source.labels.tolist() == [5, 6][: len(values)]
    with pytest.raises(FileNotFoundError, match=r"there are no images of input_key 'webp' in .*a.tar"), pytest.warns():
        TarSource(shards, input_key="webp")
    with pytest.raises(ValueError, match=r"input_key is 'json'; 'json' must end as an image does: .jpg"):
        TarSource(shards, input_key="json")


def test_a_pattern_of_shards(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            shard(tmp_path / f"{split}-{i:03}.tar", range(3 * i, 3 * i + 3))
    assert len(val_source("webdataset", tmp_path / "train-{000..001}.tar")) == 6
    sources = tar_sources(tmp_path / "{train,val}-{000..001}.tar")
    assert {split: len(source) for split, source in sources.items()} == {"train": 6, "val": 6}
    aside = tar_sources(tmp_path / "train-{000..002}.tar", Reading(val_split=0.34))
    assert {split: len(source) for split, source in aside.items()} == {"train": 6, "val": 3}


def test_shards_are_closed_where_a_process_has_too_many_files(tmp_path, monkeypatch):
    source = TarSource([shard(tmp_path / f"{i}.tar", [i], numbered=False) for i in range(8)])
    opened = sources_module.open_regular

    def limited(path):
        if len(source._files) == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path)

    monkeypatch.setattr(sources_module, "open_regular", limited)
    assert [np.asarray(read_image(source, i)).mean() for i in range(8)] == list(range(8))


def test_shards_sorted_by_class_are_named(tmp_path):
    sorted_by_class, labels = torch.arange(100).repeat_interleave(3), torch.arange(300) // 3
    with pytest.warns(UserWarning, match="its 100 shards hold 1 of 100 classes each, and 16 are shuffled together, so"):
        warn_of_sorted(tmp_path, labels, sorted_by_class, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_sorted(tmp_path, labels, torch.arange(300) % 30, 16)
        warn_of_sorted(tmp_path, labels, torch.arange(300) // 30, 16)  # all ten shards are shuffled together


def test_a_class_map_of_the_first_classes_need_not_name_the_others():
    assert numbers_of([0, 2, 1], ["a", "b"], "x", first_classes=2)[1].tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match="x: there are images of class 2, but the class map names 2 classes, 0 to 1"):
        numbers_of([0, 2, 1], ["a", "b"], "x")


def test_numbered_shards_with_a_class_map_and_first_classes_are_validated(tmp_path):
    shards = [shard(tmp_path / "val" / f"{i}.tar", range(3 * i, 3 * i + 3)) for i in range(2)]
    source = val_source("webdataset", tmp_path, Reading(first_classes=2, class_map=["a", "b"]))
    assert len(shards) == 2 and source.classes == ["a", "b"] and sorted(source.labels.tolist()) == [0, 0, 1, 1]


def test_epochs_shuffle_the_shards_and_the_images_of_those_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(TarSource, "SHARDS_AT_ONCE", 2)
    source = TarSource([shard(tmp_path / f"{i}.tar", range(9)) for i in range(6)])
    orders = [source.index[source.order(torch.Generator().manual_seed(seed)), 0] for seed in range(4)]
    assert len({frozenset(order[:18].tolist()) for order in orders}) > 1
    assert all((order[1:] != order[:-1]).sum() > 10 for order in orders)  # 5 where shards come one after the other
