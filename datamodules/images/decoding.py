"""From an encoded image to RGB pixels: upright, on white where it is transparent, and with the full range of its values."""

from __future__ import annotations

import io
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from fourier_moe.errors import UserError, printable

_SUFFIXES = {
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
if "avif" in features.modules and features.check("avif"):  # Pillow 11.3 or newer
    _SUFFIXES["AVIF"] = (".avif",)

# Pillow reads more: its EPS reader, for one, starts Ghostscript, whatever the file is called.
FORMATS = tuple(_SUFFIXES)
IMAGE_EXTENSIONS = frozenset(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)

_ORIENTATION = 0x0112  # EXIF and TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableImageError(UserError):
    """An image that is complete but cannot be used."""


def open_image(file: IO[bytes], name: str) -> Image.Image:
    """Read the header of an encoded image.

    Args:
        file: the encoded image, in one of `FORMATS`; of several frames or pages the first one counts.
        name: what to call the image in the error.

    Returns:
        The image, whose pixels are not decoded yet.

    Raises:
        UnusableImageError: if the image has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or values of no known range.
        UserError: if it is of none of `FORMATS`, or broken.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise UserError(f"image '{printable(name)}' cannot be decoded: it is no complete file of {known}") from error
    except Exception as error:  # the readers raise OSError, SyntaxError, struct.error and others
        raise _broken(name, error) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _too_large(name)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise UnusableImageError(
            f"image '{printable(name)}' has 32-bit or signed values, whose black and white are not known; convert it to 8 or "
            "16 unsigned bits a channel"
        )
    return image


def decode_rgb(content: bytes, name: str) -> Image.Image:
    """Decode an image to RGB.

    The image is turned upright as its EXIF orientation says. Transparent pixels show a white background. Of 16-bit values the
    upper 8 bits are kept, for gray images too (Pillow does the same for color).

    Args:
        content: the encoded image; see `open_image`.
        name: what to call the image in the error.

    Raises:
        UnusableImageError: see `open_image`.
        UserError: if the image cannot be decoded completely.
    """
    image = open_image(io.BytesIO(content), name)
    try:
        bits, inverted = _gray_range(image)
        image.load()
        image = _turn_upright(image)
        if image.mode.startswith("I"):
            image = _to_8_bits(image, bits, inverted)
        transparent = _has_transparency(image)
        mode = "RGBA" if transparent else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        return _on_white(image) if transparent else image
    except Exception as error:  # the decoders raise OSError, SyntaxError, struct.error and others
        raise _broken(name, error) from error


def _too_large(name: str) -> UnusableImageError:
    return UnusableImageError(
        f"image '{printable(name)}' is too large to decode: it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down"
    )


def _broken(name: str, error: Exception) -> UserError:
    return UserError(
        f"image '{printable(name)}' cannot be decoded ({error}): the file is truncated or corrupt; download it again or "
        "delete it"
    )


def _gray_range(image: Image.Image) -> tuple[int, bool]:
    """Bits of a gray value of more than 8, and whether 0 is white. Pillow ignores both; the tags are gone after `load`."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _to_8_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    values = np.asarray(image)
    transparent = image.info.get("transparency")  # one gray value
    gray = Image.fromarray((values >> (bits - 8)).astype(np.uint8) ^ (0xFF if inverted else 0))
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _turn_upright(image: Image.Image) -> Image.Image:
    """Do what `ImageOps.exif_transpose` does, but without rewriting the EXIF data, which fails where they are damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # unreadable EXIF data say nothing, and the pixels are complete
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _on_white(image: Image.Image) -> Image.Image:
    background = Image.new("RGB", image.size, "white")
    background.paste(image, mask=image)
    return background


def _has_transparency(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
