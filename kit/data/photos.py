"""Photographs and masks in the common formats, as Pillow decodes them."""

import functools
import io
import logging
import os
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from kit.data.rasters import Layer, Raster
from kit.errors import UserError, reason_of
from kit.files import check_file

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
)  # fmt: skip
PAGED_FORMATS = ("PNG", "GIF", "TIFF", "WEBP")
FORMATS = (*PAGED_FORMATS, "JPEG", "BMP", "PPM")  # others, such as EPS, could run a program
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, of more than 8 bits
GREY_MODES = ("1", "L", "LA", "La")

warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")  # hostile model files
warnings.filterwarnings("ignore", module="PIL")  # large images, damaged EXIF: reading decides
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # as the warnings


def open_header(path: str | Path) -> Image.Image:
    """Open an image without decoding it. Raises UserError."""
    try:
        check_file(path)
        try:
            return Image.open(path, formats=FORMATS)
        except Image.UnidentifiedImageError:
            return Image.open(without_damaged_extras(path), formats=("PNG",))
    except Exception as error:  # Pillow raises anything on a damaged file
        raise unreadable(path, error) from None


def without_damaged_extras(path: str | Path) -> io.BytesIO:
    """The bytes of a file; of a PNG without ancillary chunks (resolution) of a bad checksum."""
    content = Path(path).read_bytes()
    kept, place = [content[:8]], 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunk = content[place:end]
        ancillary = chunk[4:5].islower()
        if not ancillary or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            kept.append(chunk)
        place = end
    return io.BytesIO(b"".join(kept))


def open_image(path: str | Path) -> Image.Image:
    """Decode an image as a whole and turn it upright (EXIF). Raises UserError.

    Pillow, not OpenCV: it refuses what is cut off or damaged, and reads palettes.
    """
    return decode(path, open_header(path))


def decode(path: str | Path, image: Image.Image, page: int = -1) -> Image.Image:
    """The same for an image from `open_header`, or for a page of it, from 0."""
    try:
        pages = 1 if page >= 0 else count_pages(image)
        image.seek(max(page, 0))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow raises anything on a damaged file
        raise unreadable(Layer(Path(path), page), error) from None
    if pages > 1:
        raise UserError(path, f"has {pages} pages", "save the one that is meant as an image")
    return image


def is_deep(image: Image.Image) -> bool:
    """Whether an image from `open_header` has more than 8 bits per channel."""
    return image.mode in DEEP_MODES or ";16" in str(image.tile)  # RGB;16B: Pillow has no mode


def count_pages(image: Image.Image) -> int:
    """The pages of an opened image; a photograph's preview and a TIFF's smaller copies are none."""
    pages = getattr(image, "n_frames", 1) if image.format in PAGED_FORMATS else 1
    if pages == 1 or image.format != "TIFF":
        return pages
    full_size = 0
    for page in range(pages):
        image.seek(page)
        full_size += not image.tag_v2.get(254, 0) & 1  # NewSubfileType
    image.seek(0)
    return full_size


def unreadable(where: str | Path | Layer, error: Exception) -> UserError:
    """The message for a file, or a page, that is no image."""
    unknown = isinstance(error, Image.UnidentifiedImageError)
    problem = "not an image" if unknown else reason_of(error)
    path = where.path if isinstance(where, Layer) else where
    empty = os.path.isfile(path) and os.path.getsize(path) == 0
    return UserError(where, "empty file" if empty else problem, "replace it or move it away")


def deep_values(path: str | Path, image: Image.Image) -> np.ndarray:
    """The values of a decoded image of more than 8 bits: (h, w), or (h, w, 3) RGB. UserError."""
    if image.mode in DEEP_MODES:
        return np.asarray(image)
    values = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # Pillow drops 8 bits
    if values is None or values.shape[:2] != image.size[::-1]:
        raise UserError(path, "16 bits that cannot be read", "save it as a 16-bit PNG")
    return cv2.cvtColor(values, cv2.COLOR_BGR2RGB)


def open_photo(layer: Layer) -> Raster:
    """A reader: what Pillow opens. Raises UserError."""
    path = layer.path
    with open_header(path) as image:
        deep = is_deep(image)  # first: EXIF may decode the image
        try:
            turn = image.getexif().get(0x0112, 1)
        except Exception as error:  # Pillow raises anything on damaged EXIF
            raise unreadable(path, error) from None
        tags = image.tag_v2 if image.format == "TIFF" else {}  # its size may be turned already
        width, height = tags.get(256, image.width), tags.get(257, image.height)
        size = (width, height) if turn > 4 else (height, width)
        alpha = image.mode == "RGBA" and not deep
        bands = 1 if image.mode in (*DEEP_MODES, *GREY_MODES) else 3 + alpha
        read = functools.partial(read_photo, layer)
        return Raster(size, bands, deep, read, image.mode == "F", alpha, turn)


def read_photo(layer: Layer) -> np.ndarray:
    """The values of what Pillow opens, (h, w, bands). Raises UserError."""
    image = open_header(layer.path)
    deep = is_deep(image)
    image = decode(layer.path, image, layer.page)
    if deep:
        return np.atleast_3d(deep_values(layer.path, image))
    mode = "L" if image.mode in GREY_MODES else image.mode if image.mode == "RGBA" else "RGB"
    return np.atleast_3d(image.convert(mode))
