import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.hub_repositories import parquet
from support.hub_server import Repository

from datamodules.images.benchmarks import HubBenchmark
from datamodules.images.decoding import FORMATS, UnusableImageError, decode_rgb

GRAY = np.array([[8000, 40000]], np.uint16)  # of 65535: 31 and 156 of 255


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(content, "x"))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_is_decoded_to_rgb(mode, encode):
    image = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    decoded = decode_rgb(encode(image, "TIFF"), "x.tif")
    assert (decoded.mode, decoded.size) == ("RGB", (6, 4))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


def test_decoded_pixels_are_those_of_the_file(encode):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(noise), "PNG")), noise)


def test_undecodable_image_is_named(encode):
    with pytest.raises(ValueError, match=re.escape("image 'some/x.jpg' cannot be decoded")):
        decode_rgb(encode()[:200], "some/x.jpg")


# Values of more than 8 bits


def tiff(order: str, bits: int, photometric: int, data: bytes) -> bytes:
    """A gray TIFF of two pixels. Photometric 0 means that 0 is white, 1 that it is black."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1), (278, 1), (279, len(data))]
    entries = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags)
    start = b"II" if order == "<" else b"MM"
    head = start + struct.pack(f"{order}HIH", 42, 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + data


def png(depth: int, kind: int, values: np.ndarray) -> bytes:
    """A PNG of two pixels of more than 8 bits, which Pillow does not write for every kind."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    data = zlib.compress(b"\0" + values.astype(">u2").tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


TWELVE_BITS = bytes([0x1F, 0x49, 0xC4])  # 0x1f4 and 0x9c4: 8000 and 40000 by 16


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png(16, 0, GRAY), id="png"),
        pytest.param(png(16, 2, np.repeat(GRAY.T, 3, 1)), id="png of 16-bit color"),
        pytest.param(png(16, 4, np.stack([GRAY[0], [65535, 65535]], 1)), id="png with alpha"),
        pytest.param(tiff("<", 16, 1, GRAY.tobytes()), id="tiff"),
        pytest.param(tiff(">", 16, 1, GRAY.astype(">u2").tobytes()), id="big-endian tiff"),
        pytest.param(tiff("<", 16, 0, (~GRAY).tobytes()), id="tiff where 0 is white"),
        pytest.param(tiff("<", 12, 1, TWELVE_BITS), id="tiff of 12 bits"),
        pytest.param(b"P5 2 1 65535\n" + GRAY.astype(">u2").tobytes(), id="pgm"),
        pytest.param(b"P5 2 1 4095\n" + (GRAY >> 4).astype(">u2").tobytes(), id="pgm of 12 bits"),
    ],
)
def test_values_of_16_bits_keep_their_range(content):
    assert pixels(content).tolist() == [[[31] * 3, [156] * 3]]


@pytest.mark.parametrize(("dtype", "file_format"), [("int32", "TIFF"), ("float32", "TIFF"), ("float32", "PPM")])
def test_values_without_a_known_range_are_refused(dtype, file_format, encode):
    content = encode(Image.fromarray(GRAY.astype(dtype)), file_format)
    with pytest.raises(UnusableImageError, match=r"image 'a/x\.tif' has 32-bit or signed values.*convert it to 8 or 16"):
        decode_rgb(content, "a/x.tif")


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG", "LZW"])
def test_image_is_turned_upright(orientation, file_format, encode):
    corners = Image.new("RGB", (48, 32), "black")
    corners.paste("red", (0, 0, 16, 16))
    corners.paste("blue", (32, 16, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"LZW": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    content = encode(corners, "TIFF" if file_format == "LZW" else file_format, exif=exif, **options.get(file_format, {}))
    corners.info["exif"] = exif.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(corners), int)
    assert expected.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    assert np.abs(pixels(content) - expected).max() <= (3 if file_format == "JPEG" else 0)


def test_16_bit_image_is_turned_upright_too(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encode(Image.fromarray(GRAY), "PNG", exif=exif)).tolist() == [[[31] * 3], [[156] * 3]]


def test_unreadable_exif_data_do_not_make_an_image_unreadable(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = (
        encode(Image.new("RGB", (4, 2)), "JPEG", exif=exif)
        .replace(b"Exif\0\0MM", b"Exif\0\0ZZ")
        .replace(b"Exif\0\0II", b"Exif\0\0ZZ")
    )
    assert pixels(content).shape == (2, 4, 3)


def test_images_of_a_table_are_turned_upright(hub, encode):
    import datasets

    exif = Image.Exif()
    exif[0x0112] = 6
    image = {"bytes": encode(Image.new("RGB", (4, 2)), exif=exif), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = parquet(features, {"image": [image], "label": [0]})
    hub.datasets["x/y"] = Repository({f"data/{split}-00000-of-00001.parquet": rows for split in ("train", "test")})
    source = HubBenchmark(hub_id="x/y", num_classes=1, image_size=(4, 2), file_format="JPEG")
    assert decode_rgb(*source.open("y").load("test").read(0)).size == (2, 4)


# Transparency


@pytest.mark.parametrize(
    ("mode", "color", "file_format"),
    [("RGBA", (255, 0, 0, 0), "PNG"), ("RGBA", (255, 0, 0, 0), "TIFF"), ("RGBA", (9, 9, 9, 0), "WEBP"), ("LA", (40, 0), "PNG")],
)
def test_transparent_pixels_are_white(mode, color, file_format, encode):
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    assert (pixels(encode(Image.new(mode, (3, 2), color), file_format, **options)) == 255).all()


@pytest.mark.parametrize(
    ("mode", "color", "file_format"),
    [("L", 40, "PNG"), ("1", 0, "PNG"), ("RGB", (1, 2, 3), "PNG"), ("P", 0, "PNG"), ("P", 0, "GIF"), ("I;16", 8000, "PNG")],
)
def test_transparent_color_is_white(mode, color, file_format, encode):
    assert (pixels(encode(Image.new(mode, (3, 2), color), file_format, transparency=color)) == 255).all()


def test_half_transparent_palette_shows_half_of_the_white_without_a_warning(encode):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_rgb(encode(image, "PNG", transparency=b"\x80\x40"), "x.png")
    expected = [255 + (color - 255) * 0x40 / 255 for color in (10, 200, 30)]
    assert decoded.mode == "RGB"
    assert np.abs(np.subtract(decoded.getpixel((0, 0)), expected)).max() < 1


# Files of strangers


def test_format_that_starts_another_program_is_refused_whatever_the_name(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started a program"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match=r"'x\.jpg' cannot be decoded: it is no complete file of BMP, GIF, JPEG"):
        decode_rgb(eps, "x.jpg")
    assert "EPS" not in FORMATS


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("height", [11, 40])  # Pillow warns above its limit, and raises an error above twice of it
def test_image_above_pillows_limit_is_refused_with_that_cause(height, monkeypatch, encode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    decode_rgb(encode(Image.new("RGB", (100, 10))), "small.jpg")
    with pytest.raises(UnusableImageError, match=r"'x\.jpg' is too large to decode: it has more than 1,000 pixels; scale"):
        decode_rgb(encode(Image.new("RGB", (100, height))), "x.jpg")


def test_control_characters_of_names_are_escaped(encode):
    with pytest.raises(ValueError, match=re.escape(r"image 'a\x1b[2Jb\xe9.jpg' cannot")):
        decode_rgb(encode()[:200], "a\x1b[2Jb\udce9.jpg")
