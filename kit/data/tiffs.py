"""TIFFs that Pillow does not read: more than four bands, two bands, bands of floats, pages.

The pages of a TIFF are its bands, unless a `Layer` names one of them.
"""

import functools
from pathlib import Path

import numpy as np
import tifffile

from kit.data.photos import open_photo
from kit.data.rasters import Layer, Raster
from kit.errors import UserError, reason_of

SUFFIXES = (".tif", ".tiff")
CMYK = 5  # TIFF's number for it
TRANSPARENT = (1, 2)  # TIFF's numbers for a band of transparency


def open_tiff(layer: Layer) -> Raster | None:
    """A reader; None for what is no TIFF, or one that Pillow reads. Raises UserError."""
    path, page_number = layer.path, layer.page
    if path.suffix.lower() not in SUFFIXES:
        return None
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if not getattr(page, "subfiletype", 0) & 1]
            page, count = pages[max(page_number, 0)], len(pages)
            bands, kind, transparent = page.samplesperpixel, page.dtype, extra_bands(page)
            size = page.imagelength, page.imagewidth
    except Exception:  # tifffile raises anything: Pillow, which reads more kinds, names the fault
        return None
    if count > 1 and page_number < 0:
        return open_pages(path, count)
    plain = kind is not None and (kind.kind == "u" and bands == 3 or bands == 1 or transparent)
    if plain and page_number < 0:
        return None
    if plain:
        return open_photo(layer)
    read = functools.partial(read_page, layer)
    return Raster(size, bands, kind != np.uint8, read, kind.kind == "f")


def extra_bands(page: tifffile.TiffPage) -> bool:
    """Whether a page's fourth band, or second, is transparency, or it is CMYK."""
    extra = page.extrasamples[:1]
    return page.photometric == CMYK or (bool(extra) and extra[0] in TRANSPARENT)


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


def read_page(layer: Layer) -> np.ndarray:
    """The values of a page, (h, w, bands). Raises UserError where it is damaged."""
    try:
        with tifffile.TiffFile(layer.path) as file:
            page = file.pages[max(layer.page, 0)]
            values = page.asarray()
            planar = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and values.ndim == 3
    except Exception as error:  # tifffile raises anything on a damaged file
        reason = reason_of(error)
        codecs = "imagecodecs" in reason
        remedy = "pip install imagecodecs" if codecs else "replace it or move it away"
        raise UserError(layer, reason, remedy) from None
    return np.ascontiguousarray(np.moveaxis(values, 0, 2) if planar else np.atleast_3d(values))
