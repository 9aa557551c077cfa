import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fastroute.data.decode import decode_image

RAMP = np.linspace(0, 1, 64)[None].repeat(2, 0)
"""64 levels from 0 to 1."""
LEVELS = np.rint(255 * RAMP).astype(np.uint8)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return io.BytesIO(buffer.getvalue())


def decoded(values, format, channels=1):
    return np.asarray(decode_image(saved(Image.fromarray(values), format), "x", channels))


@pytest.mark.parametrize(
    "values, format",
    [
        ((65535 * RAMP).astype(np.uint16), "png"),
        ((65535 * RAMP).astype(np.uint16), "ppm"),
        ((65535 * RAMP).astype(np.uint16), "tiff"),
        ((65535 * RAMP).astype(np.int32), "tiff"),  # 16 bits kept in 32
        (((2**31 - 1) * RAMP).astype(np.int32), "tiff"),
        (((2**31 - 1) * np.where(np.arange(64) % 2, RAMP, -RAMP)).astype(np.int32), "tiff"),
        (RAMP.astype(np.float32), "tiff"),
        ((255 * RAMP).astype(np.float32), "tiff"),
        ((65535 * RAMP).astype(np.float32), "tiff"),
        ((1e6 * RAMP).astype(np.float32), "tiff"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} to {value.max():g}",
)
def test_values_are_scaled_by_the_range_of_their_type(values, format):
    expected = np.where(values < 0, 0, LEVELS)
    assert np.abs(decoded(values, format).astype(int) - expected).max() <= 1
    colour = decoded(values, format, channels=3)
    assert colour.shape == (2, 64, 3) and (colour == decoded(values, format)[..., None]).all()


def test_unsigned_values_of_32_bits():
    """Pillow writes no such files, so the format's tag of a signed image is overwritten."""
    values = (RAMP * (2**32 - 1)).astype(np.uint32)
    data = saved(Image.fromarray(values.view(np.int32)), "tiff").getvalue()
    tag = (339).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    at = data.index(tag) + 8
    assert data[at] == 2
    unsigned = data[:at] + b"\1" + data[at + 1 :]
    assert np.abs(np.asarray(decode_image(io.BytesIO(unsigned), "x", 1)).astype(int) - LEVELS).max() <= 1


def test_signed_values_of_16_bits():
    values = Image.fromarray((32767 * RAMP).astype(np.uint16))
    image = decode_image(saved(values, "tiff", tiffinfo={339: 2}), "x", 1)
    assert np.abs(np.asarray(image).astype(int) - LEVELS).max() <= 1


def test_non_finite_values_become_black_or_white():
    values = np.array([[0.5, np.nan, np.inf, -np.inf, 1.0]], np.float32)
    assert decoded(values, "tiff").tolist() == [[128, 0, 255, 0, 255]]
    assert decoded(np.full((1, 2), np.nan, np.float32), "tiff").tolist() == [[0, 0]]


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(format, orientation):
    """The bright corner is where the camera saw it: EXIF gives the order of rows and columns."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[274] = orientation
    image = decode_image(saved(Image.fromarray(pixels).convert("RGB"), format, exif=exif), "x", 1)
    rows, columns = np.unravel_index(np.asarray(image).argmax(), image.size[::-1])
    height, width = (16, 32) if orientation < 5 else (32, 16)
    corner = {1: "lu", 2: "ru", 3: "rd", 4: "ld", 5: "lu", 6: "ru", 7: "rd", 8: "ld"}[orientation]
    assert image.size == (width, height)
    assert ("r" if columns >= width // 2 else "l") + ("d" if rows >= height // 2 else "u") == corner


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_image_as_it_is():
    data = saved(Image.new("RGB", (4, 2)), "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff").getvalue()
    assert decode_image(io.BytesIO(data), "x").size == (4, 2)


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
def test_a_palette_with_transparency_does_not_warn(channels, mode):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(saved(palette, "png", transparency=b"\xff\x80"), "x", channels)
    assert image.mode == mode and image.getpixel((0, 0)) == ((200, 100, 50) if channels == 3 else 124)
