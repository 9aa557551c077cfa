"""Decode image files; every command uses `decode_image`.

A file may be damaged or hostile. So only regular files are opened, only formats of the usual suffixes are decoded, and
the memory of an image is bounded.
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
"""Pillow's names of the formats of `IMG_EXTENSIONS`. Others are not tried: EPS, for example, starts Ghostscript."""
MODES = {1: "L", 3: "RGB"}
"""Channels → Pillow's mode."""

ON_BAD_IMAGE = ("stop", "skip")
"""What a data set may do about an image that cannot be read."""
WAYS_ON = "repair or remove it, or leave such images out (on_bad_image='skip', --on-bad-image skip)"
"""What to do about an image that cannot be read, for its message."""

MAX_SCANS = 100
"""The most scans of a JPEG, as in libtiff: photographs have about 10, and a scan of a few bytes takes all pixels."""

SCAN, END = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""JPEG's markers of segments with a length, and of the end; all other markers are within a scan."""

BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339
UNSIGNED = 1
"""Two tags of TIFF, and a value of the second."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the transposition that turns an image upright."""


def limit_pixels(number: str) -> None:
    """Set Pillow's limit of pixels in an image.

    Args:
        number: the limit, as decimal digits.

    Raises:
        ValueError: number is not one of at least 1.
    """
    if not re.fullmatch(r"[1-9]\d{0,11}", number, re.ASCII):
        raise ValueError(f"FASTROUTE_MAX_IMAGE_PIXELS is {number!r}; it must be a number of pixels, at least 1")
    Image.MAX_IMAGE_PIXELS = int(number)


if "FASTROUTE_MAX_IMAGE_PIXELS" in os.environ:
    limit_pixels(os.environ["FASTROUTE_MAX_IMAGE_PIXELS"])


class UnreadableImage(ValueError):
    """An image cannot be decoded; the message names it and says why."""


def check_pixels(width: int, height: int, what: str) -> None:
    """Check that an image has at most `PIL.Image.MAX_IMAGE_PIXELS` pixels, by default 89,478,485.

    Raises:
        UnreadableImage: the image has more; the message starts with `what`.
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
    """Decode an image file to RGB or grey, and turn it upright by its EXIF orientation.

    The first image of a file is decoded. Transparency is dropped. Values of more than 8 bits are scaled to 0 to 255 by
    the range of their type: 0 to 65,535 for 16 bits, 0 to 1 for floats; `_eight_bits` handles files of another range.

    Args:
        file: a path, or the bytes of a file.
        name: the name of the image in messages.
        channels: 3 for RGB, 1 for grey.

    Returns:
        a Pillow image.

    Raises:
        UnreadableImage: the file is damaged, missing, no regular file or of another format than `FORMATS`, or the image
            has too many pixels (see `check_pixels`) or scans.
    """
    with named(name), _opened(file) as stream, Image.open(stream, formats=FORMATS) as image:
        check_pixels(*image.size, "it has")
        _check_work(image, stream)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        return upright(image, channels)


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """Convert a Pillow image to RGB or grey, and turn it upright by its EXIF orientation; see `decode_image`."""
    image.load()  # the orientation may be in the last part of the file
    turn = UPRIGHT.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        decoded = Image.fromarray(_eight_bits(image)).convert(MODES[channels])
    elif image.mode == "P" and "transparency" in image.info:
        decoded = image.convert("RGBA").convert(MODES[channels])  # Pillow warns about the direct conversion
    else:
        image = image.convert("RGB") if image.mode == "LAB" else image  # which Pillow does not make grey
        decoded = image.convert(MODES[channels])
    return decoded if turn is None else decoded.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises errors of many types, but the pixels are intact
        return None


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Scale grey values of 16 or 32 bits by the range of their type to uint8 (H, W); negative values become black.

    The range is 0 to the largest value of the type, or 1 for floats. Some files use another range, which would leave
    the image black or white. Integers of 32 bits up to 65,535 are therefore scaled as 16 bits, and floats above 1 by
    255, 65,535, or the image's largest value, the first that is large enough.
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
    for rows, out in zip(_row_blocks(values), _row_blocks(scaled), strict=True):  # bounds the memory of the floats
        floats = np.nan_to_num(rows.astype(np.float64) * (255 / most), nan=0, posinf=255, neginf=0)
        out[:] = np.clip(np.rint(floats), 0, 255)
    return scaled


def _row_blocks(values: np.ndarray) -> list[np.ndarray]:
    rows = max(1, 2**20 // values.shape[1])
    return [values[start : start + rows] for start in range(0, len(values), rows)]


def _check_work(image: Image.Image, stream: io.BufferedIOBase) -> None:
    """Check for tiles and scans that take far more work than the image's pixels."""
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
    """Count the scans before the end of the first image, which a video may follow."""
    count, at = 0, 2
    while (marker := MARKER.search(jpeg, at)) and marker[0] != END:
        count += marker[0] == SCAN
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return count


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Turn every error in reading an image into `UnreadableImage`, except that a process has too many files open.

    Decoders raise errors of many types for damaged files, such as Pillow's SyntaxError for a truncated PNG.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{name} cannot be read as an image: it is not one of {', '.join(FORMATS)}, or is damaged"
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's, at twice the limit
        raise UnreadableImage(f"{name} cannot be read as an image: it has too many pixels, {_at_most()}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        raise UnreadableImage(f"{name} cannot be read as an image: {reason}") from error


@contextlib.contextmanager
def _opened(file: str | Path | io.BytesIO) -> Iterator[io.BufferedIOBase]:
    if isinstance(file, io.BytesIO):
        yield file
        return
    with os.fdopen(open_regular(file), "rb") as stream:
        check_size(os.fstat(stream.fileno()).st_size)
        yield stream


def check_size(size: int) -> None:
    """Check that a file is at most as large as an image of the most pixels, with 4 channels of 16 bits, plus 1 MiB."""
    if Image.MAX_IMAGE_PIXELS is not None and size > (limit := 8 * Image.MAX_IMAGE_PIXELS + 2**20):
        raise ValueError(f"it has {size:,} bytes, and at most {limit:,} are allowed")
