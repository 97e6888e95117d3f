"""TIFFs that Pillow does not read: more than four bands, two bands, bands of floats, pages.

The pages of a TIFF are its bands, unless a `Layer` names one of them. A page is also a plane of a
stack that has one header for all of them, as ImageJ writes large ones.
"""

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from kit.data.photos import decode, open_header, read_photo
from kit.data.rasters import Layer, Raster
from kit.errors import UserError, reason_of

SUFFIXES = (".tif", ".tiff")
GREY, PALETTE, CMYK = 1, 3, 5  # TIFF's numbers for them; three bands of grey are no colours
TRANSPARENT = (1, 2)  # TIFF's numbers for a band of transparency
GREY_OR_RGB = (1, 2)  # TIFF's numbers for kinds of pixels that are values
NO_CODEC = (1, 8, 32946)  # TIFF's numbers for compressions that need no imagecodecs: none, Deflate

# --------------------------------------------------------------------------------------------------
#  Pages
# --------------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """What the header of a page says."""

    index: int  # among all pages of the file
    size: tuple[int, int]
    bands: int
    kind: np.dtype | None
    plain: bool  # Pillow reads it
    simple: bool  # values as they are, no palette; tifffile finds a late page sooner
    offset: int | None = None  # of a plane: where its values start in the file


class Pages(NamedTuple):
    """The pages of a TIFF, and what a stack says of them."""

    pages: tuple[Page, ...]
    axes: str = ""  # of the stack, such as ZC: slices of channels; "": it does not say
    lengths: tuple[int, ...] = ()  # of these axes


def list_pages(path: Path) -> Pages | None:
    """The pages of a file, without smaller copies; None for what tifffile cannot open."""
    try:
        return read_pages(path, os.stat(path).st_mtime_ns)
    except Exception:  # tifffile raises anything: Pillow, which reads more kinds, names the fault
        return None


@functools.lru_cache(256)
def read_pages(path: Path, _: int) -> Pages:
    """The same, once for each `mtime`: a stack has one file for all slices."""
    with tifffile.TiffFile(path) as file:
        every = [(n, p) for n, p in enumerate(file.pages) if not getattr(p, "subfiletype", 0) & 1]
        pages = [describe_page(number, page) for number, page in every]
        if not (file.is_imagej or file.is_ome or (file.is_shaped and len(pages) == 1)):
            return Pages(tuple(pages))
        series, first = file.series[0], every[0][1]
        axes, lengths = series.axes, series.shape
        outer = [(axis, n) for axis, n in zip(axes, lengths, strict=True) if axis not in "YXS"]
        count = math.prod(n for _, n in outer)
        if len(pages) == 1 and count > 1 and series.dataoffset is not None:
            kind, start = first.dtype.newbyteorder(file.byteorder), series.dataoffset
            step = math.prod(first.shape) * kind.itemsize
            changes = {"kind": kind, "plain": False, "simple": True}
            pages = [pages[0]._replace(**changes, offset=start + n * step) for n in range(count)]
        outer = [(axis, n) for axis, n in outer if n > 1] if count == len(pages) else []
        return Pages(tuple(pages), "".join(axis for axis, _ in outer), tuple(n for _, n in outer))


def describe_page(index: int, page: tifffile.TiffPage) -> Page:
    """What the header of a page says."""
    bands, kind = page.samplesperpixel, page.dtype
    extra = page.extrasamples[:1]
    transparent = page.photometric == CMYK or (bool(extra) and extra[0] in TRANSPARENT)
    colours = bands == 3 and page.photometric > GREY and kind is not None and kind.kind == "u"
    plain = kind is not None and (colours or bands == 1 or transparent)
    whole = kind is not None and page.bitspersample == 8 * kind.itemsize
    simple = whole and page.photometric in GREY_OR_RGB and page.compression in NO_CODEC
    if page.photometric == PALETTE or (page.photometric == CMYK and kind == np.uint8):
        bands = 3  # as Pillow decodes it
    return Page(index, (page.imagelength, page.imagewidth), bands, kind, plain, simple)


def page_of(layer: Layer, pages: Pages) -> Page:
    """The page that a layer names, or the first. Raises UserError where there is none."""
    if layer.page >= len(pages.pages):
        raise UserError(layer, f"the file has {len(pages.pages)} pages", "replace the file")
    return pages.pages[max(layer.page, 0)]


# --------------------------------------------------------------------------------------------------
#  Read
# --------------------------------------------------------------------------------------------------


def open_tiff(layer: Layer) -> Raster | None:
    """A reader; None for what is no TIFF, or one that Pillow reads. Raises UserError."""
    pages = list_pages(layer.path) if layer.path.suffix.lower() in SUFFIXES else None
    if not pages or not pages.pages:
        return None
    if layer.page < 0 and len(pages.pages) > 1:
        return open_pages(layer.path, len(pages.pages))
    page = page_of(layer, pages)
    if layer.page < 0 and page.plain:
        return None
    deep, floats = page.kind != np.uint8, page.kind is not None and page.kind.kind == "f"
    if by_pillow(page):
        bands = 1 if page.bands < 3 and page.plain else page.bands
        alpha, read = bands == 4, functools.partial(read_photo, layer._replace(page=page.index))
        return Raster(page.size, bands, deep, read, floats, alpha)
    read = functools.partial(read_page, layer, page)
    return Raster(page.size, page.bands, deep, read, floats)


def by_pillow(page: Page) -> bool:
    """Whether Pillow decodes a page: palettes, compressions; not colours of 16 bits."""
    return page.plain and not page.simple and (page.bands < 3 or page.kind == np.uint8)


def open_pages(path: Path, count: int) -> Raster:
    """All pages of a TIFF as the bands of one image. Raises UserError for different sizes."""
    rasters = [open_tiff(Layer(path, page)) for page in range(count)]
    sizes = {raster.size for raster in rasters}
    if len(sizes) > 1:
        texts = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
        raise UserError(path, f"its pages differ in size: {texts}", "save pages of one size")

    def read() -> np.ndarray:
        return np.dstack([raster.read() for raster in rasters])

    deep, floats = any(raster.deep for raster in rasters), any(r.floats for r in rasters)
    return Raster(rasters[0].size, sum(raster.bands for raster in rasters), deep, read, floats)


def read_page(layer: Layer, page: Page) -> np.ndarray:
    """The values of a page, (h, w, bands). Raises UserError where it is damaged."""
    try:
        if page.offset is not None:
            shape = (*page.size, page.bands)
            values = np.array(np.memmap(layer.path, page.kind, "r", page.offset, shape))
            return values.astype(page.kind.newbyteorder("="), copy=False)
        with tifffile.TiffFile(layer.path) as file:
            opened = file.pages[page.index]
            values = opened.asarray()
            planar = opened.planarconfig == tifffile.PLANARCONFIG.SEPARATE and values.ndim == 3
    except Exception as error:  # tifffile raises anything on a damaged file
        reason = reason_of(error)
        codecs = "imagecodecs" in reason
        remedy = "pip install imagecodecs" if codecs else "replace it or move it away"
        raise UserError(layer, reason, remedy) from None
    return np.ascontiguousarray(np.moveaxis(values, 0, 2) if planar else np.atleast_3d(values))


def open_page(layer: Layer) -> Image.Image:
    """Decode a page as Pillow would; a palette stays. Raises UserError."""
    pages = list_pages(layer.path)
    page = pages and page_of(layer, pages)
    if not page or by_pillow(page):
        index = page.index if page else layer.page
        return decode(layer.path, open_header(layer.path), index)
    return to_image(read_page(layer, page))


def to_image(values: np.ndarray) -> Image.Image:
    """Values (h, w, 1) or (h, w, 3) as an image."""
    values = values[..., 0] if values.shape[2] == 1 else values
    kinds = {"f": np.float32, "i": np.int32}
    small = values.dtype in (np.uint8, np.uint16)
    return Image.fromarray(values if small else values.astype(kinds.get(values.dtype.kind, "i4")))
