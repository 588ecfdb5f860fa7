"""Image and label bytes to pixels and back, with errors that name the place.

The one decoder of training, evaluation and prediction. Its rules:

- JPEG, PNG, WebP, BMP and TIFF with one picture in them; everything becomes RGB of 8 bits.
- Of samples of 16 bits the upper 8 count (0…65535 becomes 0…255); of 32 bits, or floating, none are taken.
- A picture stands upright: a note in it (EXIF) that a camera was turned is followed, so that it lies as
  people see it, and as masks are drawn.
- A mask is a PNG of class indices, read as raw samples at any depth; its palette is not looked up.

Pillow says what an image is. ``simplejpeg`` decodes the JPEGs of every day faster, to the same pixels
(both are libjpeg-turbo, with its accurate transform and smooth chroma); whatever it does not like, down
to a warning, goes to Pillow.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from ugrl.errors import DataError
from ugrl.row import IGNORE
from ugrl.text import line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_IMAGE = "JPEG, PNG, WebP, BMP or TIFF image"
_ORIENTATION = 0x0112
# What EXIF's orientations do to the rows and columns of the stored picture: swap them, then reverse rows, columns.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

# Pillow's remarks on doubtful files (large ones, notes that cannot be read) belong to no terminal of ours.
warnings.filterwarnings("ignore", module=r"PIL\.")


def without_suffix(name: str) -> str:
    """A file name without the suffix of an image; other dots are part of the name.

    >>> without_suffix("a.b.JPG"), without_suffix("street.left")
    ('a.b', 'street.left')
    """
    suffix = PurePath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in SUFFIXES else name


@contextmanager
def _opened(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS, kind: str = _IMAGE) -> Iterator[Image.Image]:
    """A picture whose header has been read, and the one net for what Pillow raises on foreign bytes: anything."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's second view is passed over
                raise DataError(f"{where}: a file of several pictures ({image.format}); expected one")
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise DataError(f"{where}: more than {most:.0f} million pixels; expected fewer: scale the image down") from None
    except Exception as error:
        raise DataError(f"{where}: {_cause(error, len(data), kind)}") from None


def decode_rgb(data: bytes, where: str) -> np.ndarray:
    """The image by Pillow alone, fully decoded, so that a cut-off file does not pass: see :func:`decode_pixels`."""
    with _opened(data, where) as image:
        image.load()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            gray_HW = (np.asarray(image) >> 8).astype(np.uint8)
            pixels_HW3 = np.repeat(gray_HW[..., None], 3, axis=2)
        elif image.mode in ("I", "F"):
            raise DataError(f"{where}: samples of 32 bits; expected 8 or 16 bits a sample")
        else:
            pixels_HW3 = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return _upright(pixels_HW3, _orientation(image))


@cache
def _simplejpeg() -> Any | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decode_pixels(data: bytes, where: str) -> np.ndarray:
    """The upright picture as a writable uint8 array (H, W, 3), by the fastest way there is.

    Args:
        data: The bytes of an image file.
        where: Names the file or row in the error.

    Raises:
        DataError: The bytes are no image, end too early, or hold more pixels or bits than are taken.
    """
    decoder = _simplejpeg()
    if decoder is not None and data.startswith(b"\xff\xd8"):
        try:
            height, width, space, _ = decoder.decode_jpeg_header(data)
            if space in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
                pixels: np.ndarray = decoder.decode_jpeg(data, "RGB")
                return _upright(pixels, orientation(data))
        except Exception:
            pass  # cut off, damaged or of a rare kind: Pillow decides and words the error
    return decode_rgb(data, where)


def orientation(data: bytes) -> int:
    """How a picture must be turned to stand upright, in EXIF's numbers; 1 where it lies as it should."""
    if data.startswith(b"\xff\xd8") and not _may_be_turned(data):
        return 1
    with _opened(data, "") as image:
        return _orientation(image)


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG's header has a segment (APP1) that EXIF or XMP may be in, or is of no common form."""
    at = 2
    while len(head := data[at : at + 4]) == 4 and head[0] == 0xFF and 0xC0 <= head[1] <= 0xFE:
        if head[1] == 0xDA:  # the picture begins
            return False
        if head[1] == 0xE1 or 0xD0 <= head[1] <= 0xD9:
            return True
        at += 2 + int.from_bytes(head[2:], "big")
    return True


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # notes that cannot be read say nothing, and the picture is as good without them
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _upright(pixels_HW3: np.ndarray, turn: int) -> np.ndarray:
    if turn not in _TURNS:
        return pixels_HW3
    swap, rows, columns = _TURNS[turn]
    turned = pixels_HW3.swapaxes(0, 1) if swap else pixels_HW3
    return np.ascontiguousarray(turned[:: -1 if rows else 1, :: -1 if columns else 1])


def decode_labels(data: bytes, where: str) -> Image.Image:
    """A label PNG as indices (mode ``L``), whatever its depth or palette.

    Raises:
        DataError: The bytes are no PNG, end too early, or hold colours instead of indices.
    """
    with _opened(data, where, ("PNG",), "PNG mask") as image:
        image.load()
        if image.mode == "P":  # the same bytes, seen as gray: nearest-neighbour code then knows one mode
            return Image.frombytes("L", image.size, image.tobytes())
        if image.mode in ("1", "L"):
            # Pillow spreads samples of 2 and 4 bits over 0…255: 85 and 17 are what it multiplies with.
            if data[12:16] != b"IHDR":
                raise ValueError("its header is not its first chunk")
            labels = np.asarray(image).astype(np.uint8) // {2: 85, 4: 17}.get(data[24], 1)
            return Image.fromarray(labels)
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if values.max() > IGNORE:
                raise DataError(f"{where}: the mask holds label {values.max()}; expected at most {IGNORE}")
            return Image.fromarray(values.astype(np.uint8))
        raise DataError(
            f"{where}: mask of mode {image.mode}; expected class indices (a palette or gray PNG), not colours"
        )


def encode_labels(labels_HW: np.ndarray) -> bytes:
    """A uint8 label map (H, W) as an 8-bit gray PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(labels_HW, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of the upright picture, from the header alone.

    Raises:
        DataError: The bytes are no image.
    """
    with _opened(data, where) as image:
        width, height = image.size
        return (height, width) if _TURNS.get(_orientation(image), (False,))[0] else (width, height)


def _cause(error: Exception, size: int, kind: str) -> str:
    text = str(error)
    if size == 0:
        return f"empty file, expected a {kind}"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated image ({size} bytes)"
    if "cannot identify" in text:
        return f"not a {kind}"
    return f"broken image ({line(text) or type(error).__name__})"
