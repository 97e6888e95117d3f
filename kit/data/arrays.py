"""Arrays: images and masks in .npy files, and in .npz files of one array."""

import functools
import re
from pathlib import Path

import numpy as np

from kit.data.rasters import MOST_CHANNELS, Layer, Raster
from kit.errors import UserError, reason_of
from kit.files import check_file

SUFFIXES = (".npy", ".npz")


def load_array(path: Path) -> np.ndarray:
    """The numbers in a file, those of a .npy not read yet; never with pickle. Raises UserError."""
    check_file(path)
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix.lower() == ".npz":
            with content:
                if len(content.files) != 1:
                    raise ValueError(f"{len(content.files)} arrays; one is needed")
                content = content[content.files[0]]
    except Exception as error:  # numpy raises anything on a damaged file
        problem = reason_of(error)
        if re.search("pickle|objects", problem):
            problem = "holds objects, not numbers"
        raise UserError(path, problem, "save one array of numbers with numpy.save") from None
    if content.dtype.kind not in "biuf":
        raise UserError(path, f"holds {content.dtype}, not numbers", "save an array of numbers")
    return content


def channel_axis(path: Path, shape: tuple[int, ...]) -> int:
    """Which axis of an array of three holds the channels: the first, 0, or the last, 2.

    The one of at most `MOST_CHANNELS`; of two the one that is at most a quarter of the other.
    Raises UserError where neither is.
    """
    short = [axis for axis in (0, 2) if shape[axis] <= MOST_CHANNELS]
    if len(short) == 2:
        first, last = shape[0], shape[2]
        short = [0] if 4 * first <= last else [2] if 4 * last <= first else []
    if len(short) != 1:
        problem = f"an array of {shape}: its channels may be the first axis or the last"
        raise UserError(path, problem, "save it as (height, width, channels) with fewer channels")
    return short[0]


def open_array(layer: Layer) -> Raster | None:
    """A reader: (h, w), (h, w, C) or (C, h, w). Raises UserError for another number of axes.

    Of a page, a slice of a volume, (D, h, w).
    """
    path = layer.path
    if path.suffix.lower() not in SUFFIXES:
        return None
    array = load_page(layer)
    if array.ndim not in (2, 3) or not array.size:
        problem = f"an array of shape {array.shape}"
        raise UserError(path, problem, "an image has (h, w), (h, w, C) or (C, h, w)")
    deep, floats = array.dtype not in (np.uint8, np.bool), array.dtype.kind == "f"
    axis = channel_axis(path, array.shape) if array.ndim == 3 else None
    size = tuple(length for other, length in enumerate(array.shape) if other != axis)
    bands = 1 if axis is None else array.shape[axis]
    return Raster(size, bands, deep, functools.partial(read_array, layer, axis), floats)


def load_page(layer: Layer) -> np.ndarray:
    """The numbers in a file, or in a slice of it; not read yet. Raises UserError."""
    array = load_array(layer.path)
    if layer.page >= len(array):
        raise UserError(layer, f"the array has the shape {array.shape}", "replace the file")
    return array if layer.page < 0 else array[layer.page]


def read_array(layer: Layer, axis: int | None) -> np.ndarray:
    """The values of a file, (h, w, C); `axis`: of the channels. Truth values become 0 and 255."""
    array = np.array(load_page(layer))
    array = array.astype(np.uint8) * 255 if array.dtype == np.bool else array
    array = array[..., None] if axis is None else np.moveaxis(array, axis, 2)
    return np.ascontiguousarray(array)
