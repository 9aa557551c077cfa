import errno
import io
import os
import resource
import subprocess
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fastroute.data import sources as sources_module
from fastroute.data.decode import UnreadableImage, decode_image, limit_pixels
from fastroute.data.sources import (
    FolderSource,
    Reading,
    TarSource,
    folder_sources,
    read_class_map,
    read_image,
    stratified,
    tar_sources,
    val_source,
)


def add(tar, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def png(value, format="png"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, format)
    return buffer.getvalue()


def packed(path, *members):
    """Write a shard of (name, content) or (name, content, fields of the header)."""
    with tarfile.open(path, "w") as tar:
        for name, content, *fields in members:
            add(tar, name, content, **(fields[0] if fields else {}))
    return path


def header(kind, name, size=b"", **fields):
    """Return a tar header with a correct checksum; fields are {offset: bytes}."""
    block = bytearray(512)
    places = {"0": name, "124": size, "156": kind, "257": b"ustar\x0000", "148": b" " * 8} | fields
    for offset, value in places.items():
        block[int(offset) : int(offset) + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(size):
    return b"\x80" + size.to_bytes(11, "big")


def shard(path, values, numbered=True):
    """Image v has the value v and the class v % 3."""
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
    with pytest.raises(FileNotFoundError, match=r"there are no images of the first 1 classes in .*one.tar"):
        TarSource([shard(tmp_path / "one.tar", [1])], first_classes=1)
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


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
BLP = b"BLP2" + bytes([1, 0, 0, 0, 1, 8, 8, 1, 16, 0, 0, 0, 16, 0, 0, 0]) + bytes(20)


@pytest.mark.parametrize("content", [EPS, BLP, png(0, "gif"), b"", b"no image"], ids=["eps", "blp", "gif", "", "text"])
def test_only_formats_of_the_allowed_names_are_decoded(monkeypatch, tmp_path, content):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript is started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(
        UnreadableImage, match=r"x.jpg cannot be read as an image: it is not one of JPEG, PNG, .*, WEBP, or is"
    ):
        decode_image(tmp_path / "x.jpg", "x.jpg")


def test_all_formats_of_the_allowed_names_are_decoded(tmp_path):
    for suffix in ("jpeg", "png", "ppm", "bmp", "tiff", "webp"):
        assert decode_image(io.BytesIO(png(9, suffix)), suffix).size == (4, 4)
    frames = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(tmp_path / "a.webp", "a.webp").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("error", [MemoryError(), KeyError("x"), RecursionError("deep"), ZeroDivisionError("by 0")])
def test_errors_of_decoders_name_the_image(monkeypatch, error):
    def convert(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(UnreadableImage) as raised:
        decode_image(io.BytesIO(png(0)), "x.png")
    assert str(raised.value) == f"x.png cannot be read as an image: {str(error) or 'MemoryError'}"


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def zeros_png(width, height):
    """A PNG of black pixels, one bit each."""
    row = bytes(1 + -(-width // 8))
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((1, 0, 0, 0, 0))
    data = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it is decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    too_many = "and at most 10,000 are allowed; set the environment variable FASTROUTE_MAX_IMAGE_PIXELS"
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UnreadableImage, match=rf"x cannot be read as an image: it has 101 × 100 pixels, {too_many}"),
    ):
        decode_image(io.BytesIO(zeros_png(101, 100)), "x")
    with pytest.raises(UnreadableImage, match=rf"x cannot be read as an image: it has too many pixels, {too_many}"):
        decode_image(io.BytesIO(zeros_png(300, 100)), "x")
    with (tmp_path / "x.webp").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UnreadableImage, match=r"x.webp .*: it has 1,000,000,000,000 bytes, and at most 1,128,576 are"):
        decode_image(tmp_path / "x.webp", "x.webp")


def test_the_limit_of_pixels_is_set_by_a_number(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    limit_pixels("123")
    assert Image.MAX_IMAGE_PIXELS == 123
    for number in ("many", "0", "-1", "1e9", ""):
        with pytest.raises(
            ValueError, match=f"FASTROUTE_MAX_IMAGE_PIXELS is '{number}'; it must be a number of pixels"
        ):
            limit_pixels(number)


def test_a_jpeg_has_few_scans():
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "jpeg", progressive=True)
    image = buffer.getvalue()
    scan = image[image.rindex(b"\xff\xda") : -2]
    assert decode_image(io.BytesIO(image[:-2] + scan * 50 + image[-2:]), "x").size == (16, 16)
    with pytest.raises(UnreadableImage, match=r"x cannot be read as an image: it has 20\d scans, and at most 100 are"):
        decode_image(io.BytesIO(image[:-2] + scan * 200 + image[-2:]), "x")
    assert decode_image(io.BytesIO(image + scan * 200), "x").size == (16, 16)  # a video may follow the image


def test_a_tiff_has_tiles_of_about_its_size():
    tile = (322, 9024), (323, 9920), (324, 8), (325, 9)
    tags = ((256, 1), (257, 9921), (258, 8), (259, 5), (262, 1), (277, 1), *tile)
    data = b"".join(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags)
    tiff = b"II*\0\x20\0\0\0" + bytes(24) + len(tags).to_bytes(2, "little") + data + bytes(4)
    with pytest.raises(
        UnreadableImage, match="its tiles have 9,024 × 19,840 pixels, and at most 89,478,485 are allowed"
    ):
        decode_image(io.BytesIO(tiff), "x")


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


def test_json_or_text_files_give_the_class(tmp_path):
    jsons = [b'{"id": 7, "label": 2}', b'{"label": 0}']
    source = TarSource([packed(tmp_path / "a.tar", *pairs("json", jsons))])
    assert source.classes == ["0", "1", "2"] and source.labels.tolist() == [2, 0]
    for suffix, texts in (
        ("cls", [b"owl\n", b"cat"]),
        ("txt", [b"owl", b"cat"]),
        ("json", [b'{"cls": "owl"}', b'{"cls": "cat"}']),
    ):
        source = TarSource([packed(tmp_path / "b.tar", *pairs(suffix, texts))])
        assert source.classes == ["cat", "owl"] and source.labels.tolist() == [1, 0]
    captions = ("dog/0.png", png(0)), ("dog/0.txt", b"a dog on a sofa"), ("dog/0.json", b'{"width": 4}')
    assert TarSource([packed(tmp_path / "c.tar", *captions)]).classes == ["dog"]


def pairs(suffix, contents):
    """Image number i, with a file of that suffix."""
    return [member for i, c in enumerate(contents) for member in ((f"{i}.png", png(i)), (f"{i}.{suffix}", c))]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "0.json is no JSON"),
        (b"{", "0.json is no JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "0.json is no JSON"),
        (b'{"label": [1]}' + b" " * 2**20, "0.json has 1,048,590 bytes; a .json with a class has at most 1,048,576"),
        (b'{"label": 1000000}', "0.json says class 1000000; classes are numbered from 0 to 999,999"),
        (b'{"label": ""}', "0.json says class ; classes are numbered"),
    ],
    ids=["deep", "cut", "digits", "long", "number", "empty"],
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
    with pytest.raises(ValueError, match="there are images of class 2, but the class map names 1"):
        TarSource([tmp_path / "a.tar"], class_map=["zero"])
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes dog"), pytest.warns():
        FolderSource(image_folder / "val", class_map=["dog"])
    with pytest.raises(ValueError, match=r"the class map names \.\./train, which can be no folder of a class"):
        FolderSource(image_folder / "val", class_map=["../train"])


@pytest.mark.parametrize(
    "content, message", [(b"a\nb\na\n", "it names a twice"), (b"\n", "it names no class"), (b"\xff", "a text in UTF-8")]
)
def test_wrong_class_maps(tmp_path, content, message):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"class_map is .*map.txt; .*{message}"):
        read_class_map(tmp_path / "map.txt")


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
