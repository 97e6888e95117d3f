"""Rasters: an opened image file of any number of channels, and its values as pixels.

A reader, an entry in `readers.READERS`, takes a `Layer` and returns a `Raster`, or None.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from kit.errors import UserError

MOST_CHANNELS = 64
LARGE = 100_000_000  # pixels of an image that is read by windows alone, where its format can be


class Window(NamedTuple):
    """A block of an image, in the image's own pixels."""

    y: int
    x: int
    height: int
    width: int
    whole: tuple[int, int]  # (height, width) of the image
    shrink: int = 1  # it is read reduced to one pixel for so many, along each axis

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) once it is reduced."""
        return -(-self.height // self.shrink), -(-self.width // self.shrink)

    def grow(self, margin: int) -> "Window":
        """With so many reduced pixels more at each side, within the image."""
        y, x = (max(0, start - margin * self.shrink) for start in (self.y, self.x))
        end = self.y + self.height + margin * self.shrink
        right = self.x + self.width + margin * self.shrink
        height, width = min(end, self.whole[0]) - y, min(right, self.whole[1]) - x
        return self._replace(y=y, x=x, height=height, width=width)

    def cut(self, values: np.ndarray, y: int = 0, x: int = 0) -> np.ndarray:
        """This block of values (h, w, ...) that start at (y, x) of the image."""
        top, left = self.y - y, self.x - x
        return values[top : top + self.height, left : left + self.width]


class Layer(NamedTuple):
    """A file, or a page of it, that holds channels of an image."""

    path: Path
    page: int = -1  # of a file of several pages, from 0; -1: the file is an image
    channels: int = 0  # that are asked for: they tell which axis of an array holds them
    window: Window | None = None  # what is read of it; None: all

    def __str__(self) -> str:
        return f"{self.path} (page {self.page + 1})" if self.page >= 0 else str(self.path)


Source = str | Path | tuple[Layer, ...]  # of an image: a file, or several layers one after another


class Raster(NamedTuple):
    """An opened image file."""

    size: tuple[int, int]  # (height, width), upright
    bands: int
    deep: bool  # more than 8 bits per channel
    read: Callable[[], np.ndarray]  # decodes it: (h, w, bands), raises UserError
    floats: bool = False  # values may be NaN or infinity: no data
    alpha: bool = False  # the last band is transparency
    turn: int = 1  # EXIF's orientation: 1 for upright, over 4 where height and width are swapped
    # of a large image: decodes a window alone, reduced by no more than its `shrink`
    part: Callable[[Window], np.ndarray] | None = None


def layers_of(source: Source, channels: int = 0) -> tuple[Layer, ...]:
    """The layers of an image; of a path the file itself, with the `channels` that are asked for."""
    return source if isinstance(source, tuple) else (Layer(Path(source), channels=channels),)


def natural_channels(rasters: list[Raster]) -> int:
    """How many channels an image of these rasters has.

    Of a single file: a grey image has three equal ones, and transparency is none.
    """
    counts = [raster.bands - raster.alpha for raster in rasters]
    return 3 if counts == [1] else sum(counts)


def join_layers(values: list[np.ndarray], alphas: list[bool], channels: int) -> np.ndarray | None:
    """The values of the layers, (h, w, bands) each, as (h, w, channels); None: they do not fit.

    All bands where there are as many, else without transparency. Else each layer has its share of
    the channels: of a grey layer they are equal, one channel of a colour image is its grey level.
    """
    for kept in (values, [v[..., : v.shape[2] - a] for v, a in zip(values, alphas, strict=True)]):
        if sum(v.shape[2] for v in kept) == channels:
            return np.dstack(kept) if len(kept) > 1 else kept[0]
    share, rest = divmod(channels, len(kept))
    if rest or not all(v.shape[2] == 1 or (share, v.shape[2]) == (1, 3) for v in kept):
        return None
    return np.dstack([grey(v) if v.shape[2] == 3 else v.repeat(share, 2) for v in kept])


def grey(values: np.ndarray) -> np.ndarray:
    """The grey levels (h, w, 1) of a colour image (h, w, 3) RGB, of the same dtype."""
    fits = values if values.dtype in (np.uint8, np.uint16) else values.astype(np.float32)
    return cv2.cvtColor(np.ascontiguousarray(fits), cv2.COLOR_RGB2GRAY)[..., None]


# --------------------------------------------------------------------------------------------------
#  Slices of a volume, see `volumes.py`
# --------------------------------------------------------------------------------------------------


def parse_steps(text: str) -> tuple[int, ...]:
    """The steps that --neighbours asks for: of 2 it is 1 and 2, of 1,3 these. Raises UserError."""
    numbers = [number.strip() for number in text.split(",")] if text else ["0"]
    if not all(map(str.isdecimal, numbers)) or (len(numbers) > 1 and "0" in numbers):
        problem = "takes how many slices before and after are channels"
        raise UserError(f"--neighbours {text}", problem, "such as 1 or 2, or steps such as 1,3")
    steps = sorted(set(map(int, numbers)))
    return tuple(steps) if len(numbers) > 1 else tuple(range(1, steps[0] + 1))


def middle_slice(layers: tuple[Layer, ...], steps: tuple[int, ...]) -> tuple[Layer, ...]:
    """The layers of the slice itself, of those of `with_neighbours`."""
    count = len(layers) // (2 * len(steps) + 1)
    return layers[len(steps) * count : (len(steps) + 1) * count]


# --------------------------------------------------------------------------------------------------
#  Values to pixels
# --------------------------------------------------------------------------------------------------


def to_pixels(values: np.ndarray, value_range: tuple[float, ...], where: Source) -> np.ndarray:
    """Values (h, w, C) as pixels: uint8 without a `value_range`, else uint16.

    `value_range`: what becomes black and white, of all channels or of each; () for a model that was
    trained on 8 bits: 0 and 65535, or 0 and 255 where no value is larger. What is no number is
    black. `where`: for the message. Raises UserError for values that 8 bits do not have.
    """
    if values.dtype == np.uint8:
        return values.astype(np.uint16) * 257 if value_range else values
    if not value_range and (values.min() < 0 or values.dtype.kind == "f"):
        raise UserError(
            layers_of(where)[0],
            "values that 8-bit images do not have",
            "save it with 8 or 16 bits per channel, or train on such images",
        )
    full, kind = (65535, np.uint16) if value_range else (255, np.uint8)
    limits = value_range or (0.0, 255.0 if values.max() <= 255 else 65535.0)
    black, white = np.array(limits[::2]), np.array(limits[1::2])
    precise = np.float64 if values.dtype.itemsize > 2 else np.float32
    levels = np.nan_to_num(values.astype(precise), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    levels = (levels - black.astype(precise)) * (full / (white - black)).astype(precise)
    rounding = 0.5 if value_range else 1e-6  # of 8 bits down, as // 257 would
    return np.clip(levels + rounding, 0, full).astype(kind)


# --------------------------------------------------------------------------------------------------
#  Windows at a lower resolution, and back
# --------------------------------------------------------------------------------------------------


def read_window(raster: Raster, window: Window) -> np.ndarray:
    """The values of a window, reduced by averaging areas: (h, w, bands). Raises UserError."""
    values = raster.part(window) if raster.part else window.cut(raster.read())
    return reduce_values(values, round(window.shrink * len(values) / window.height))


def reduce_values(values: np.ndarray, shrink: int) -> np.ndarray:
    """Values (h, w, C) averaged over squares of `shrink`; at the edges over what is there."""
    if shrink == 1:
        return values
    height, width = values.shape[:2]
    values = np.pad(values, ((0, -height % shrink), (0, -width % shrink), (0, 0)), "edge")
    exact = values if values.dtype in (np.uint8, np.uint16) else values.astype(np.float32)
    size = values.shape[1] // shrink, values.shape[0] // shrink
    bands = [cv2.resize(band, size, interpolation=cv2.INTER_AREA) for band in cv2.split(exact)]
    return np.dstack(bands)


def reduce_mask(mask: np.ndarray, window: Window | None) -> np.ndarray:
    """The mask (h, w) of a window at its size, by the nearest pixel."""
    if not window or window.shrink == 1:
        return mask
    rows, columns = (
        np.minimum(np.arange(0, length, window.shrink) + window.shrink // 2, length - 1)
        for length in mask.shape
    )
    return mask[rows[:, None], columns]


def enlarge(values: np.ndarray, window: Window, method: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Reduced values (h, w) uint8 of a window at the image's own resolution."""
    if window.shrink == 1:
        return values
    size = values.shape[1] * window.shrink, values.shape[0] * window.shrink
    return cv2.resize(values, size, interpolation=method)[: window.height, : window.width]
