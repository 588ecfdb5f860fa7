"""Image and label bytes to pixels and back, with errors that name the place.

EXIF orientation is left alone, as the annotation files of VOC and COCO do.

Pillow says what an image is. ``simplejpeg`` decodes the JPEGs of every day faster, to the same pixels
(both are libjpeg-turbo, with its accurate transform and smooth chroma); whatever it does not like, down
to a warning, goes to Pillow.
"""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ugrl.errors import DataError

# What Pillow raises on bytes that are no image, are cut off, or are far too large.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_LABEL_MODES = ("L", "P", "1")


def decode_rgb(data: bytes, where: str) -> Image.Image:
    """The image, fully decoded, so that a cut-off file does not pass.

    Args:
        data: JPEG or PNG bytes.
        where: Names the file or row in the error.

    Raises:
        DataError: The bytes are no image, or end too early.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except BROKEN as error:
        raise DataError(f"{where}: {_cause(error, len(data))}") from None


@cache
def _simplejpeg() -> Any | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decode_pixels(data: bytes, where: str) -> np.ndarray:
    """The pixels of :func:`decode_rgb` as a writable uint8 array (H, W, 3), by the fastest way there is.

    Args:
        data: JPEG or PNG bytes.
        where: Names the file or row in the error.

    Raises:
        DataError: The bytes are no image, or end too early.
    """
    decoder = _simplejpeg()
    if decoder is not None and data.startswith(b"\xff\xd8"):
        try:
            height, width, space, _ = decoder.decode_jpeg_header(data)
            if space in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
                pixels: np.ndarray = decoder.decode_jpeg(data, "RGB")
                return pixels
        except ValueError:
            pass  # cut off, damaged or of a rare kind: Pillow decides and words the error
    return np.array(decode_rgb(data, where))


def decode_labels(data: bytes, where: str) -> Image.Image:
    """A label PNG as indices (mode ``L``); palettes are not looked up.

    Raises:
        DataError: The bytes are no PNG, end too early, or hold colours instead of indices.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.load()
    except BROKEN as error:
        raise DataError(f"{where}: {_cause(error, len(data), 'PNG mask')}") from None
    if image.mode not in _LABEL_MODES:
        raise DataError(
            f"{where}: mask of mode {image.mode}; expected class indices (a palette or 8-bit gray PNG), not colours"
        )
    if image.mode == "1":
        return image.convert("P").point(lambda v: min(v, 1), "L")
    if image.mode == "P":  # the same bytes, seen as gray: nearest-neighbour code then knows one mode
        return Image.frombytes("L", image.size, image.tobytes())
    return image


def encode_labels(labels_HW: np.ndarray) -> bytes:
    """A uint8 label map (H, W) as an 8-bit gray PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(labels_HW, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height from the header alone.

    Raises:
        DataError: The bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return image.size
    except BROKEN as error:
        raise DataError(f"{where}: {_cause(error, len(data))}") from None


def _cause(error: Exception, size: int, kind: str = "JPEG or PNG image") -> str:
    text = str(error)
    if size == 0:
        return f"empty file, expected a {kind}"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated image ({size} bytes)"
    if "cannot identify" in text:
        return f"not a {kind}"
    return f"broken image ({' '.join(text.split()) or type(error).__name__})"
