import io
import subprocess
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fastroute.data.decode import UnreadableImage, decode_image, limit_pixels
from tests.data.tars import png

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


@pytest.mark.parametrize("channels", [1, 3])
def test_lab_images_are_read_grey_too(channels):
    image = Image.new("LAB", (4, 4), (128, 128, 128))
    values = np.asarray(decode_image(saved(image, "TIFF"), "x", channels))
    assert 100 < values.min() <= values.max() < 140


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(UnreadableImage, match=r"x\.png cannot be read as an image: there is no such file$"):
        decode_image(tmp_path / "x.png", "x.png")
