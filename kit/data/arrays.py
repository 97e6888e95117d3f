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
    while content.ndim > 3 and 1 in content.shape:  # (h, w, 1, C)
        content = content.squeeze(content.shape.index(1))
    return content


def channel_axis(path: Path, shape: tuple[int, ...], channels: int = 0) -> int:
    """Which axis of an array of three holds the channels: the first, 0, or the last, 2.

    The one of as many as `channels`, that are asked for, else of at most `MOST_CHANNELS`; of two
    the one that is at most a quarter of the other. Raises UserError where neither is.
    """
    if (shape[0] == channels) != (shape[2] == channels):
        return 0 if shape[0] == channels else 2
    short = [axis for axis in (0, 2) if shape[axis] <= MOST_CHANNELS]
    if len(short) == 2:
        first, last = shape[0], shape[2]
        short = [0] if 4 * first <= last else [2] if 4 * last <= first else []
    if len(short) != 1:
        problem = f"an array of {shape}: its channels may be the first axis or the last"
        remedy = "save it as (height, width, channels) with fewer channels"
        if shape[0] != shape[2]:
            remedy = f"name their number: --channels {shape[2]}, or {shape[0]}"
        raise UserError(path, problem, remedy)
    return short[0]


def page_axis(shape: tuple[int, ...]) -> int:
    """Which axis of an array of three counts its slices or planes: the first, or the last.

    Where two neighbours are equal it is the third one, else the shorter one.
    """
    if shape[1] == shape[2] or shape[0] == shape[1]:
        return 0 if shape[1] == shape[2] else 2
    return 0 if shape[0] < shape[2] else 2


def open_array(layer: Layer) -> Raster | None:
    """A reader: (h, w), (h, w, C) or (C, h, w). Raises UserError for another number of axes.

    Of a page, a slice of a volume, (D, h, w).
    """
    path = layer.path
    if path.suffix.lower() not in SUFFIXES:
        return None
    array = load_array(path)
    if array.ndim not in (2, 3) or not array.size:
        problem = f"an array of shape {array.shape}"
        raise UserError(path, problem, "an image has (h, w), (h, w, C) or (C, h, w)")
    deep, floats = array.dtype not in (np.uint8, np.bool_), array.dtype.kind == "f"
    axis = None
    if array.ndim == 3 and layer.page < 0:
        axis = channel_axis(path, array.shape, layer.channels)
    elif array.ndim == 3:
        axis = page_axis(array.shape)
        if layer.page >= array.shape[axis]:
            raise UserError(layer, f"the array has the shape {array.shape}", "replace the file")
    size = tuple(length for other, length in enumerate(array.shape) if other != axis)
    bands = 1 if axis is None or layer.page >= 0 else array.shape[axis]
    return Raster(size, bands, deep, functools.partial(read_array, layer, axis), floats)


def read_array(layer: Layer, axis: int | None) -> np.ndarray:
    """The values of a file, (h, w, C), or of its page (h, w, 1), a plane of a mask.

    `axis`: of the channels. Truth values become 0 and 255.
    """
    array = load_array(layer.path)
    array = array[..., None] if axis is None else np.moveaxis(array, axis, 2)
    array = array if layer.page < 0 else array[..., layer.page : layer.page + 1]
    array = array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array
    return np.array(array, order="C")


# --------------------------------------------------------------------------------------------------
#  Masks
# --------------------------------------------------------------------------------------------------


def count_planes(path: Path) -> int:
    """How many planes a mask in an array has; 1 for any other file, or one that is damaged."""
    try:
        raster = open_array(Layer(path))
    except UserError:  # `samples.decode_pairs` names it
        return 1
    return raster.bands if raster else 1


def planes_of(path: Path) -> list[Path | Layer]:
    """The planes of a mask file, each as `open_image` takes it."""
    count = count_planes(path)
    return [Layer(path, page) for page in range(count)] if count > 1 else [path]
