"""Damaged and hostile data: shards, images and sets, mutated at random and read with a bound on memory and time.

A case passes if it returns data, or raises a documented error that describes the damaged file in one sentence.
"""

import contextlib
import functools
import hashlib
import io
import multiprocessing
import pickle
import random
import resource
import signal
import tarfile
import tempfile
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torchvision
from PIL import ExifTags, Image

from fastroute.data.decode import UnreadableImage, decode_image
from fastroute.data.in_memory import Options, cifar10, mnist
from fastroute.data.sources import TarSource, read_image

SECONDS = 20
"""Time limit of a case: an image of the most pixels allowed decodes within a few seconds."""
MEMORY = 2 * 2**30
"""Bytes that a case may take; the operating system refuses twice as much."""

VALUES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


# --- Mutations: bytes to other bytes, by a generator of random numbers


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 4, 16))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    length = draw.choice((1, 16, 512, 4096))
    data[start : start + length] = bytes(len(data[start : start + length]))


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def overwrite(data: bytearray, draw: random.Random) -> None:
    """A number near the beginning, where sizes, counts and offsets are."""
    width = draw.choice((1, 2, 4))
    start = draw.randrange(max(1, min(len(data) - width, 300)))
    value = draw.choice(VALUES) % 256**width
    data[start : start + width] = value.to_bytes(width, draw.choice(("big", "little")))


def repeat(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    piece = data[start : start + draw.choice((2, 64, 512, 1024))]
    place = draw.randrange(len(data))
    data[place:place] = piece * draw.choice((1, 2, 200))


def zero_block(data: bytearray, draw: random.Random) -> None:
    start = 512 * draw.randrange(len(data) // 512 or 1)
    data[start : start + 512] = bytes(512)


def move_blocks(data: bytearray, draw: random.Random) -> None:
    """Tar's blocks exchanged or taken out."""
    one, other = (512 * draw.randrange(len(data) // 512 or 1) for _ in range(2))
    if draw.random() < 0.5:
        data[one : one + 512], data[other : other + 512] = data[other : other + 512], data[one : one + 512]
    else:
        del data[one : one + 512]


def header(data: bytearray, draw: random.Random) -> None:
    """A field of a tar header rewritten, and its checksum made right."""
    block = draw.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"] or [0])
    data.extend(bytes(max(0, 512 - len(data))))
    sizes = [b"\x80" + (2**e).to_bytes(11, "big") for e in (9, 20, 31, 33, 40, 63, 64, 87)]
    sizes += [
        b"\xff" * 12,
        b"\xff" * 11 + b"\0",
        b"-1\0",
        b"0o17",
        b"1_0",
        b" " * 12,
        b"99999999999",
        b"77777777777",
        b"0" * 11,
    ]
    field, values = draw.choice(
        (
            ((124, 12), sizes),
            ((156, 1), [bytes([kind]) for kind in b"\x0001234567gxLKSXDMNVA"]),
            (
                (0, 100),
                [b"", b"/", b"..", b"a/0.png", b"0.cls", b"\xff\xfe.png", b"x" * 100, b"../../0.jpg", b"a\n/0.png"],
            ),
            ((345, 155), [b"p" * 155, b"\xff", b"/", bytes(155)]),
            ((257, 8), [b"ustar  \0", b"ustar\x0000", bytes(8)]),
            ((386, 97), [b"0" * 97, b"7" * 97, b"\x80" + b"\xff" * 96]),
            ((482, 13), [b"\1" * 13, b"\1\x80" + b"\xff" * 11]),
        )
    )
    start, width = field
    data[block + start : block + start + width] = draw.choice(values).ljust(width, b"\0")[:width]
    data[block + 148 : block + 156] = b" " * 8
    data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])


def png_header(data: bytearray, draw: random.Random) -> None:
    """A PNG's size, depth, colours or interlacing rewritten, and its checksum made right."""
    data.extend(bytes(max(0, 33 - len(data))))
    start = draw.choice((16, 20, 24, 25, 26, 27, 28))
    width = 4 if start < 24 else 1
    data[start : start + width] = (draw.choice(VALUES) % 256**width).to_bytes(width, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")


ANY = (flip, zero, cut, overwrite, repeat)


# --- What is mutated, and how it is read


def picture(**options) -> bytes:
    mode, size = options.pop("mode", "RGB"), (61, 47)
    shape = (*size[::-1], 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels[10:30] = 90
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    if orientation := options.pop("orientation", None):
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    if options.get("save_all"):
        options["append_images"] = [image.rotate(90), image.rotate(180)]
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


PICTURES = {
    "jpeg": picture(format="jpeg"),
    "jpeg, progressive": picture(format="jpeg", progressive=True),
    "jpeg, cmyk": picture(format="jpeg", mode="CMYK"),
    "jpeg, turned": picture(format="jpeg", orientation=6),
    "jpeg, two": picture(format="mpo", save_all=True),
    "png": picture(format="png"),
    "png, palette": picture(format="png", mode="P"),
    "png, 16 bits": picture(format="png", mode="I;16"),
    "png, animated": picture(format="png", save_all=True),
    "ppm": picture(format="ppm"),
    "pgm": picture(format="ppm", mode="L"),
    "bmp": picture(format="bmp"),
    "bmp, palette": picture(format="bmp", mode="P"),
    "tiff": picture(format="tiff"),
    "tiff, lzw": picture(format="tiff", compression="tiff_lzw"),
    "tiff, jpeg": picture(format="tiff", compression="jpeg"),
    "tiff, deflate": picture(format="tiff", compression="tiff_adobe_deflate", save_all=True),
    "tiff, 32 bits": picture(format="tiff", mode="I"),
    "tiff, floats": picture(format="tiff", mode="F", orientation=5),
    "webp": picture(format="webp"),
    "webp, lossless": picture(format="webp", lossless=True),
    "webp, animated": picture(format="webp", save_all=True),
}


def read_picture(data: bytes, draw: random.Random, folder: Path) -> None:
    path = folder / "x.jpg"
    path.write_bytes(data)
    for file in (path, io.BytesIO(data)):
        with allowed(UnreadableImage, names="x.jpg"):
            image = decode_image(file, "x.jpg")
            assert image.mode == "RGB" and 0 < image.width * image.height <= Image.MAX_IMAGE_PIXELS


@functools.cache
def shard(labels: str, format: int) -> bytes:
    """Eight images with classes, which a .cls, a .json or their folders say."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for i, content in enumerate((*PICTURES.values(),)[:8]):
            name = f"{'long' * 30}/class{i % 3}/{i}" if labels == "folders" else f"{i}"
            says = {".json": b'{"label": "%d"}' % (i % 3), ".cls": b"%d" % (i % 3)}
            own = {suffix: data for suffix, data in says.items() if suffix == f".{labels}"}
            for suffix, data in ({".png": content} | own).items():
                member = tarfile.TarInfo(name + suffix)
                member.size, member.mtime = len(data), 1.5 if format == tarfile.PAX_FORMAT else 1
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def read_shard(data: bytes, draw: random.Random, folder: Path, whole: bool) -> None:
    path = folder / "x.tar"
    path.write_bytes(data)
    with allowed(ValueError, FileNotFoundError, UnreadableImage, names="x.tar"):
        source = TarSource([path])
        assert len(source.classes) <= 1_000_000 and source.labels.max() < len(source.classes)
        assert len(source) == 8 or not whole, f"{len(source)} images of 8, and not a word"
        for i in range(len(source)):
            with allowed(UnreadableImage, names="x.tar"):
                read_image(source, i)


def idx(*header: int, data: bytes) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in header) + data


MNIST_IMAGES = idx(0x803, 8, 28, 28, data=bytes(range(196)) * 32)
MNIST_LABELS = idx(0x801, 8, data=bytes(range(8)))


def read_mnist(data: bytes, draw: random.Random, folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half in ("train", "t10k"):
        (raw / f"{half}-images-idx3-ubyte").write_bytes(MNIST_IMAGES)
        (raw / f"{half}-labels-idx1-ubyte").write_bytes(MNIST_LABELS)
    of = "images-idx3" if len(data) > 100 or data[:4] == MNIST_IMAGES[:4] else "labels-idx1"
    (raw / f"{draw.choice(('train', 't10k'))}-{of}-ubyte").write_bytes(data)
    with allowed(ValueError, FileNotFoundError, names=str(folder)):
        check_set(mnist(Options(folder)))


def cifar_batch(count: int = 8) -> bytes:
    return pickle.dumps({"data": np.zeros((count, 3072), np.uint8), "labels": list(range(count))}, protocol=2)


def read_cifar(data: bytes, draw: random.Random, folder: Path) -> None:
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    whole, names = cifar_batch(), pickle.dumps({"label_names": [str(i) for i in range(10)]})
    digest = {name: hashlib.md5(content).hexdigest() for name, content in (("batch", whole), ("names", names))}

    class Cifar(torchvision.datasets.CIFAR10):
        train_list, test_list = (("train", digest["batch"]),), (("test", digest["batch"]),)
        meta = types.MappingProxyType({"filename": "names", "key": "label_names", "md5": digest["names"]})

    torchvision.datasets.CIFAR10 = Cifar  # in this process, which reads nothing else
    files = {"train": whole, "test": whole, "names": names}
    for name, content in files.items():
        (base / name).write_bytes(content)
    (base / draw.choice(("train", "test"))).write_bytes(data)
    with allowed(ValueError, FileNotFoundError, names=str(folder)):
        check_set(cifar10(Options(folder)))
        assert data == whole, "a batch is damaged, and not a word"


def check_set(images) -> None:
    for split in (images.train, images.val):
        assert len(split.images) == len(split.labels) > 0
        assert split.labels.min() >= 0 and split.labels.max() < len(images.classes)


@contextlib.contextmanager
def allowed(*kinds: type[Exception], names: str) -> Iterator[None]:
    """Errors of these very types, of one sentence that can be printed and names the file."""
    try:
        yield
    except kinds as error:
        message = str(error)
        assert type(error) in kinds, f"{type(error).__name__}: {message}"
        message.encode()
        assert names in message and "\n" not in message, f"no sentence on {names}: {message}"


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class Kind(NamedTuple):
    """content: what is mutated. mutations: up to `at_once` of them, drawn. read: raises where a case fails."""

    content: bytes
    mutations: tuple[Callable[[bytearray, random.Random], None], ...]
    read: Callable[[bytes, random.Random, Path], None]
    cases: int
    at_once: int = 2


KINDS = {
    name: Kind(content, (*ANY, *((png_header,) * 3 if name.startswith("png") else ())), read_picture, 300)
    for name, content in PICTURES.items()
}
for name, format in FORMATS.items():
    for layout in ("cls", "json", "folders"):
        mutations = (*ANY, zero_block, move_blocks, *(header,) * 6)
        read = functools.partial(read_shard, whole=False)
        KINDS[f"shard, {name}, {layout}"] = Kind(shard(layout, format), mutations, read, 600)
# If checksums cover all names and sizes, a single damage never hides an image; two can fake a valid end of the file.
KINDS["shard, whole or refused"] = Kind(
    shard("folders", tarfile.USTAR_FORMAT),
    (flip, zero, zero_block, cut),
    functools.partial(read_shard, whole=True),
    1600,
    at_once=1,
)
KINDS["mnist, images"] = Kind(MNIST_IMAGES, ANY, read_mnist, 200)
KINDS["mnist, labels"] = Kind(MNIST_LABELS, ANY, read_mnist, 200)
KINDS["cifar"] = Kind(cifar_batch(), ANY, read_cifar, 100)


# --- The worker: a process that may take so much memory and time, and is replaced where it dies


def peak() -> int:
    """The most memory of this process since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def work(kind: str, seeds: range, results) -> None:
    """Send (seed, "" or what is wrong) of each case; silence is the death of this process."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY,) * 2)
    content, mutations, read, _, at_once = KINDS[kind]
    for seed in seeds:
        draw, data = random.Random(f"{kind} {seed}"), bytearray(content)
        for _ in range(draw.randint(1, at_once)):
            if data:  # which an earlier one may have cut to nothing
                draw.choice(mutations)(data, draw)
        signal.alarm(SECONDS)
        peak()
        before, wrong = peak(), ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                read(bytes(data), draw, Path(folder))
            except Exception as error:  # whatever is not a documented error is a failure, with its name
                wrong = f"{type(error).__name__}: {error}"
        if not wrong and (taken := peak() - before) > MEMORY:
            wrong = f"it takes {taken / 2**20:.0f} MiB"
        signal.alarm(0)
        results.send((seed, wrong))


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_data_are_read_or_refused(kind):
    count, done, failures = KINDS[kind].cases, 0, {}
    processes = multiprocessing.get_context("fork")
    while done < count:
        results, sender = processes.Pipe(duplex=False)
        worker = processes.Process(target=work, args=(kind, range(done, count), sender))
        worker.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while done < count:
                seed, wrong = results.recv()
                done = seed + 1
                if wrong:
                    failures[seed] = wrong
        worker.join()
        if done < count:
            failures[done] = f"the process ended with {worker.exitcode}"
            done += 1
    assert not failures, f"{len(failures)} of {count} cases, by their seeds: {failures}"


def test_there_are_enough_cases():
    assert sum(kind.cases for kind in KINDS.values()) >= 10_000
