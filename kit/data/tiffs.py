"""TIFFs that Pillow does not read: more than four bands, two bands, floats, pages, large ones.

The pages of a TIFF are its bands, unless a `Layer` names one of them. A page is also a plane of a
stack that has one header for all of them, as ImageJ writes large ones. Of a large page only the
tiles or strips of a window are decoded. Masks are written as tiles.
"""

import functools
import itertools
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from kit.data import rasters
from kit.data.photos import decode, open_header, read_photo
from kit.data.rasters import Layer, Raster, Window
from kit.errors import UserError, reason_of
from kit.files import write_file

SUFFIXES = (".tif", ".tiff")
GREY, PALETTE, CMYK = 1, 3, 5  # TIFF's numbers for them; three bands of grey are no colours
TRANSPARENT = (1, 2)  # TIFF's numbers for a band of transparency
INVERTED, YCBCR = 0, 6  # TIFF's numbers for other kinds: white is 0; as JPEG stores colours
JPEG = 7  # TIFF's number for this compression
TILE = 256  # pixels along the sides of the tiles that are written
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF's transform and CRS
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
    problem: tuple[str, str] | None = None  # why a large one cannot be read, and the remedy
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
    size = page.imagelength, page.imagewidth
    problem = refuse_large(page.keyframe) if size[0] * size[1] > rasters.LARGE else None
    return Page(index, size, bands, kind, plain, simple, problem)


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
    large = page.size[0] * page.size[1] > rasters.LARGE
    if large and page.problem:
        raise UserError(layer, *page.problem)
    if layer.page < 0 and page.plain and not large:
        return None
    deep = page.kind not in (np.uint8, np.bool_)
    floats = page.kind is not None and page.kind.kind == "f"
    if by_pillow(page) and not large:
        bands = 1 if page.bands < 3 and page.plain else page.bands
        alpha, read = bands == 4, functools.partial(read_photo, layer._replace(page=page.index))
        return Raster(page.size, bands, deep, read, floats, alpha)
    read = functools.partial(read_page, layer, page)
    part = functools.partial(read_part, layer, page) if large else None
    alpha = large and page.plain and page.bands in (2, 4)
    return Raster(page.size, page.bands, deep, read, floats, alpha, part=part)


def by_pillow(page: Page) -> bool:
    """Whether Pillow decodes a page: palettes, compressions; not colours of 16 bits."""
    return page.plain and not page.simple and (page.bands < 3 or page.kind == np.uint8)


def open_pages(path: Path, count: int) -> Raster:
    """All pages of a TIFF as the bands of one image. Raises UserError for different sizes."""
    pages = [open_tiff(Layer(path, page)) for page in range(count)]
    sizes = {page.size for page in pages}
    if len(sizes) > 1:
        texts = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
        raise UserError(path, f"its pages differ in size: {texts}", "save pages of one size")

    def read() -> np.ndarray:
        return np.dstack([page.read() for page in pages])

    def part(window: Window) -> np.ndarray:
        return np.dstack([page.part(window) for page in pages])

    deep, floats = any(page.deep for page in pages), any(page.floats for page in pages)
    bands, by_parts = sum(page.bands for page in pages), part if pages[0].part else None
    return Raster(pages[0].size, bands, deep, read, floats, part=by_parts)


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


# --------------------------------------------------------------------------------------------------
#  Large ones, by windows
# --------------------------------------------------------------------------------------------------


def refuse_large(page: tifffile.TiffPage) -> tuple[str, str] | None:
    """Why a large page cannot be read by windows, and the remedy; None where it can."""
    colours = (INVERTED, *GREY_OR_RGB, *[YCBCR] * (page.compression == JPEG))
    if page.photometric not in colours:
        kind = getattr(page.photometric, "name", page.photometric)
        return f"has colours of the kind {kind}, and is large", "save it as grey or RGB"
    turn = page.tags.valueof("Orientation", 1)
    if turn != 1:
        return f"is too large to be turned upright (orientation {turn})", "save it upright"
    rows, columns = segment_size(page)
    if rows * columns > rasters.LARGE and not page.is_memmappable:
        return f"is compressed in pieces of {columns}x{rows}", "save it in tiles of 256x256"
    return None


def segment_size(page: tifffile.TiffPage) -> tuple[int, int]:
    """(height, width) of the tiles or strips of a page."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def read_part(layer: Layer, opened: Page, window: Window) -> np.ndarray:
    """The values of a window of a page, (h, w, bands). Raises UserError that names a bad tile."""
    if opened.offset is not None:
        shape = (*opened.size, opened.bands)
        values = window.cut(np.memmap(layer.path, opened.kind, "r", opened.offset, shape))
        return values.astype(opened.kind.newbyteorder("="))
    with tifffile.TiffFile(layer.path) as file:  # `open_tiff` has read these headers
        page = file.pages[opened.index]
        if page.is_memmappable:
            mapped = tifffile.memmap(layer.path, page=opened.index, mode="r")
            planar = mapped.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
            values = window.cut(np.moveaxis(mapped, 0, 2) if planar else np.atleast_3d(mapped))
            values = np.ascontiguousarray(values)
        else:
            values = decode_segments(layer, file, page, window)
    if page.photometric == INVERTED and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    return values.astype(np.uint8) * 255 if values.dtype == np.bool_ else values


def decode_segments(
    layer: Layer, file: tifffile.TiffFile, page: tifffile.TiffPage, window: Window
) -> np.ndarray:
    """The tiles or strips of a page that a window touches, (h, w, bands). Raises UserError."""
    size = segment_size(page)
    separate = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
    planes = page.samplesperpixel if separate else 1
    values = np.full((window.height, window.width, page.samplesperpixel), page.nodata, page.dtype)
    down, across = -(-page.imagelength // size[0]), -(-page.imagewidth // size[1])
    rows = range(window.y // size[0], -(-(window.y + window.height) // size[0]))
    columns = range(window.x // size[1], -(-(window.x + window.width) // size[1]))
    for plane, row, column in itertools.product(range(planes), rows, columns):
        index = (plane * down + row) * across + column
        segment = decode_segment(layer, file, page, index)
        if segment is None:  # a tile that is not stored: no data
            continue
        top, left = row * size[0] - window.y, column * size[1] - window.x
        segment = segment[max(0, -top) :, max(0, -left) :]
        area = values[max(0, top) :, max(0, left) :][: len(segment), : segment.shape[1]]
        bands = slice(plane, plane + 1) if separate else slice(None)
        area[..., bands] = segment[: len(area), : area.shape[1]]
    return values


def decode_segment(
    layer: Layer, file: tifffile.TiffFile, page: tifffile.TiffPage, index: int
) -> np.ndarray | None:
    """A tile or strip of a page, (h, w, bands); None for one that is not stored. UserError."""
    count = page.databytecounts[index]
    if not count:
        return None
    try:
        file.filehandle.seek(page.dataoffsets[index])
        content = file.filehandle.read(count)
        if len(content) < count:
            raise ValueError("the file ends in it")
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        return page.decode(content, index, **tables)[0][0]
    except Exception as error:  # tifffile raises anything on a damaged file
        reason = reason_of(error)
        codecs = "imagecodecs" in reason
        remedy = "pip install imagecodecs" if codecs else "replace it or move it away"
        kind = "tile" if page.is_tiled else "strip"
        place = f"{kind} {index + 1} of {len(page.dataoffsets)}"
        raise UserError(layer, f"{place} cannot be decoded ({reason})", remedy) from None


# --------------------------------------------------------------------------------------------------
#  Write masks
# --------------------------------------------------------------------------------------------------


def georeference(path: Path) -> list[tuple]:
    """The transform and CRS of a GeoTIFF, as tags for `write_tiff`; [] for any other file.

    Its no-data value (42113) is not among them: it would be a value of the mask.
    """
    if path.suffix.lower() not in SUFFIXES:
        return []
    try:
        with tifffile.TiffFile(path) as file:
            tags = filter(None, map(file.pages[0].tags.get, GEO_TAGS))
            return [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags]
    except Exception:  # tifffile raises anything; Pillow has read the image
        return []


def pack_tiles(values: np.ndarray) -> Iterator[tuple[int, int, bytes]]:
    """The row, column and compressed bytes of each tile of (h, w) uint8."""
    for y, x in itertools.product(*(range(0, length, TILE) for length in values.shape)):
        tile = np.zeros((TILE, TILE), np.uint8)
        inside = values[y : y + TILE, x : x + TILE]
        tile[: inside.shape[0], : inside.shape[1]] = inside
        yield y // TILE, x // TILE, zlib.compress(tile)


def write_tiff(path: Path, tiles: Iterable[bytes], size: tuple[int, int], tags: list) -> None:
    """Write a mask (h, w) uint8, of `pack_tiles` row by row, with the tags of `georeference`."""
    options = {"tile": (TILE, TILE), "compression": "zlib", "photometric": "minisblack"}
    options |= {"shape": size, "dtype": np.uint8, "metadata": None, "extratags": tags}
    write_file(path, lambda part: tifffile.imwrite(part, iter(tiles), **options))
