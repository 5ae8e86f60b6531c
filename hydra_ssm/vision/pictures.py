"""A picture file as eight-bit RGB, whatever it holds; what cannot be read is told apart from what was converted."""

from __future__ import annotations

import io
import warnings
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

MOST_PIXELS = 1 << 26  # of a picture that is decoded whole
PARTS = (2, 4, 8)  # of a side, at which a larger JPEG can be decoded
ENOUGH = 2048  # pixels of the shorter side of a larger JPEG
MOST_SIDES = 100  # of a picture, the longer over the shorter
UNREADABLE = "cannot be read"
JPEG = b"\xff\xd8"  # begins a file
PROGRAMS = {"EPS"}  # what Pillow would have another program run
GREY = {"1": "grey", "L": "grey", "LA": "grey"}
KINDS = {"P": "palette", "PA": "palette", "RGBA": "transparent", "CMYK": "CMYK", **GREY}


class Unreadable(OSError):
    """A file that holds no picture, or not all of it, or too large a one. The message says which."""


def open_picture(content: bytes) -> tuple[Image.Image, str]:
    """The picture of a file, upright, on white where it is transparent; and what was done to it, or "".

    Raises Unreadable.
    """
    if not content:
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata, which are dealt with here
            return _decoded(content)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("the file holds no picture of a known kind") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # what a decoder raises for damaged bytes is of a dozen classes
        raise Unreadable(" ".join(str(error).split())[:120] or type(error).__name__) from None


def _decoded(content: bytes) -> tuple[Image.Image, str]:
    with _opened(content) as image:
        done = _kind(image.mode)
        if image.width * image.height > MOST_PIXELS:
            done = "huge"
            width, height = image.size
            needed = next((n for n in PARTS if width * height <= MOST_PIXELS * n * n), PARTS[-1])
            part = max(needed, min(width, height) // ENOUGH)
            image.draft(None, (width // part, height // part))  # JPEG alone can be decoded so
            if image.width * image.height > MOST_PIXELS:
                raise Unreadable(f"{width:,} x {height:,} pixels, more than {MOST_PIXELS:,}")
        if max(image.size) > MOST_SIDES * min(image.size):  # its shorter side is scaled up to that of a square
            size = f"{image.width:,} x {image.height:,} pixels"
            raise Unreadable(f"{size}, one side more than {MOST_SIDES} times the other")
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _rgb(upright if upright is not None else image), done


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except Image.DecompressionBombError:
        if not content.startswith(JPEG):
            raise
        return JpegImageFile(io.BytesIO(content))  # need not be decoded whole


@cache
def _formats() -> list[str]:
    Image.preinit()  # the common ones go first
    Image.init()
    return [name for name in Image.OPEN if name not in PROGRAMS]


def _kind(mode: str) -> str:
    if mode.startswith("I"):
        return "16-bit"
    return "" if mode == "RGB" else KINDS.get(mode, mode)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray(_eight_bits(values, fractions=image.mode == "F")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, fractions: bool) -> np.ndarray:
    """Of 16 bits, of 8 bits in a wide type, or, where there may be such, of fractions of 1; else of its range."""
    values = np.nan_to_num(values)
    top = values.max(initial=0.0)
    if fractions and top <= 1:
        values = values * 255
    elif top > 255:
        values = values / (257 if top <= 65535 else top / 255)
    return np.clip(values, 0, 255).round().astype(np.uint8)
