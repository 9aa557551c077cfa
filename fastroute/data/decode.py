"""One image file to pixels: every command decodes by `decode_image`.

A file may be damaged or hostile: only regular files are opened, only as the formats that their names can stand for, and
an image takes no more memory than a stated bound.
"""

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fastroute.data.tar import open_regular

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""Pillow's names of what `IMG_EXTENSIONS` stand for. Others are not tried: EPS, for one, starts Ghostscript."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's names of what images become, by their channels."""

MAX_SCANS = 100
"""Of a JPEG, as in libtiff: photographs have about 10, and each passes over all pixels with a few bytes of the file."""

SCAN, END = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""Of JPEG, where what follows has a length, or the end; the others are within a scan."""

BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339
UNSIGNED = 1
"""Of TIFF: two tags, and a value of the second."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


def limit_pixels(number: str) -> None:
    """Set the most pixels that an image may have, which is Pillow's own limit, to a number in digits.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[1-9]\d{0,11}", number, re.ASCII):
        raise ValueError(f"FASTROUTE_MAX_IMAGE_PIXELS is {number!r}; it must be a number of pixels, at least 1")
    Image.MAX_IMAGE_PIXELS = int(number)


if "FASTROUTE_MAX_IMAGE_PIXELS" in os.environ:
    limit_pixels(os.environ["FASTROUTE_MAX_IMAGE_PIXELS"])


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it and says why."""


def check_pixels(width: int, height: int, what: str) -> None:
    """Raise for an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, 89,478,485 unless that is changed.

    Raises:
        UnreadableImage: it has more; the message starts with `what`.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UnreadableImage(f"{what} {width:,} × {height:,} pixels, {_at_most()}")


def _at_most() -> str:
    return (
        f"and at most {Image.MAX_IMAGE_PIXELS:,} are allowed; set the environment variable FASTROUTE_MAX_IMAGE_PIXELS, "
        "or PIL.Image.MAX_IMAGE_PIXELS, to allow more"
    )


def decode_image(file: str | Path | io.BytesIO, name: str, channels: int = 3) -> Image.Image:
    """Decode an image, as RGB or grey, upright by its EXIF orientation; of several in one file, the first.

    Transparency is dropped. Values of more than 8 bits are scaled to 0 to 255 by the range of their type: 0 to 65,535
    for 16 bits, 0 to 1 for floats; see `_eight_bits` for files that use another.

    Args:
        file: a path, or the bytes of a file.
        name: how messages name it.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UnreadableImage: it is damaged, missing, no regular file, of none of `FORMATS`, or of too many pixels (see
            `check_pixels`) or scans; `name` names it.
    """
    with named(name), _opened(file) as stream, Image.open(stream, formats=FORMATS) as image:
        check_pixels(*image.size, "it has")
        _check_work(image, stream)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        return upright(image, channels)


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """An image of Pillow's as RGB or grey, upright by its EXIF orientation; see `decode_image`."""
    image.load()  # where the orientation is in the file's last part
    turn = UPRIGHT.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        decoded = Image.fromarray(_eight_bits(image)).convert(MODES[channels])
    elif image.mode == "P" and "transparency" in image.info:
        decoded = image.convert("RGBA").convert(MODES[channels])  # Pillow warns of the direct way
    else:
        decoded = image.convert(MODES[channels])
    return decoded if turn is None else decoded.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, of any type of error; the pixels are whole
        return None


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of 16 or 32 bits as uint8 (H, W), scaled from the range of their type; negative ones are black.

    The range is 0 to the largest value of the type, or 1 for floats. Where it would leave an image black or white
    throughout, a usual one that holds its values is taken: 65,535 for whole numbers of 32 bits, as files of 16 bits
    are often kept; for floats 255, 65,535, or else the image's largest value.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, kind = (np.ravel(tags.get(tag, default))[0] for tag, default in ((BITS_PER_SAMPLE, 0), (SAMPLE_FORMAT, 0)))
    if image.mode == "I" and kind == UNSIGNED and bits == 32:
        values = values.view(np.uint32)
    if image.mode == "F":
        largest = float(np.max(values, initial=0, where=np.isfinite(values)))
        most = next((most for most in (1, 255, 65535) if largest <= most), largest)
    elif image.mode == "I" and bits == 16:
        most = 32767
    elif image.mode == "I":
        most = 65535 if values.max() <= 65535 else np.iinfo(values.dtype).max
    else:
        most = 4095 if bits == 12 else 65535
    scaled = np.empty(values.shape, np.uint8)
    for rows, out in zip(_row_blocks(values), _row_blocks(scaled), strict=True):  # floats of all would take much more
        floats = np.nan_to_num(rows.astype(np.float64) * (255 / most), nan=0, posinf=255, neginf=0)
        out[:] = np.clip(np.rint(floats), 0, 255)
    return scaled


def _row_blocks(values: np.ndarray) -> list[np.ndarray]:
    rows = max(1, 2**20 // values.shape[1])
    return [values[start : start + rows] for start in range(0, len(values), rows)]


def _check_work(image: Image.Image, stream: io.BufferedIOBase) -> None:
    """Raise where decoding takes more work than the pixels tell."""
    if image.format == "TIFF" and (tile := [image.tag_v2.get(tag) for tag in (322, 323)]) != [None, None]:
        whole = [-(-size // int(side)) * int(side) for size, side in zip(image.size, tile, strict=True)]
        check_pixels(*whole, "its tiles have")
    if image.format in ("JPEG", "MPO"):
        place = stream.tell()
        stream.seek(0)
        data = stream.read()
        stream.seek(place)
        if data.count(SCAN) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
            raise ValueError(f"it has {scans:,} scans, and at most {MAX_SCANS} are allowed")


def _scans(jpeg: bytes) -> int:
    """How many scans are before the end of the first image; a video may follow it."""
    count, at = 0, 2
    while (marker := MARKER.search(jpeg, at)) and marker[0] != END:
        count += marker[0] == SCAN
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return count


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Whatever goes wrong in reading an image is an `UnreadableImage`, except that a process has too many files open.

    Decoders raise errors of all kinds for damaged files: Pillow's own for a PNG cut short is a SyntaxError.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{name} cannot be read as an image: it is none of {', '.join(FORMATS)}, or damaged"
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's, at twice the limit
        raise UnreadableImage(f"{name} cannot be read as an image: it has too many pixels, {_at_most()}") from error
    except Exception as error:  # decoders raise errors of many types for damaged files
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise UnreadableImage(f"{name} cannot be read as an image: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def _opened(file: str | Path | io.BytesIO) -> Iterator[io.BufferedIOBase]:
    if isinstance(file, io.BytesIO):
        yield file
        return
    with os.fdopen(open_regular(file), "rb") as stream:
        check_size(os.fstat(stream.fileno()).st_size)
        yield stream


def check_size(size: int) -> None:
    """Raise for a file larger than an image of as many pixels as allowed, of 16 bits in 4 channels, with 1 MiB more."""
    if Image.MAX_IMAGE_PIXELS is not None and size > (limit := 8 * Image.MAX_IMAGE_PIXELS + 2**20):
        raise ValueError(f"it has {size:,} bytes, and at most {limit:,} are allowed")
