"""Slides: what OpenSlide opens, at the level of the pyramid that fits the scale."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kit.data.rasters import Layer, Raster, Window
from kit.errors import UserError, reason_of

SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif")


def load_slide(path: Path) -> Any:
    """Open a file with OpenSlide. Raises UserError."""
    try:
        import openslide  # here: nothing else needs it, and it need not be there

        return openslide.OpenSlide(str(path))
    except ImportError:
        remedy = "pip install openslide-python openslide-bin"
        raise UserError(path, "needs OpenSlide", remedy) from None
    except Exception as error:  # OpenSlide raises anything on a damaged file
        raise UserError(path, reason_of(error), "replace it or move it away") from None


def open_slide(layer: Layer) -> Raster | None:
    """A reader; None for what is no slide. Raises UserError."""
    if layer.path.suffix.lower() not in SUFFIXES:
        return None
    with load_slide(layer.path) as slide:
        width, height = slide.dimensions
    whole = Window(0, 0, height, width, (height, width))
    part = functools.partial(read_region, layer.path)
    return Raster((height, width), 3, False, functools.partial(part, whole), part=part)


def read_region(path: Path, window: Window) -> np.ndarray:
    """A window as RGB (h, w, 3) uint8, white where nothing was scanned. Raises UserError.

    Of the smallest level whose pixels are whole numbers of pixels, and parts of a reduced one.
    """
    with load_slide(path) as slide:
        level, shrink = 0, 1
        for number, factor in enumerate(slide.level_downsamples):
            near = abs(factor - round(factor)) < 0.01 * factor
            if near and window.shrink % round(factor) == 0:
                level, shrink = number, round(factor)
        size = -(-window.width // shrink), -(-window.height // shrink)
        try:
            region = slide.read_region((window.x, window.y), level, size)
        except Exception as error:  # OpenSlide raises anything on a damaged file
            place = f"the region at row {window.y}, column {window.x}"
            problem = f"{place} cannot be decoded ({reason_of(error)})"
            raise UserError(path, problem, "replace it or move it away") from None
    white = Image.new("RGB", region.size, "white")
    white.paste(region, mask=region.getchannel("A"))
    return np.asarray(white)
