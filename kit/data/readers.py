"""Readers: from files to pixels (h, w, C), whatever they are stored in.

A new format is one function and one entry in `READERS`.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from kit.data import arrays, photos, slides, tiffs
from kit.data.rasters import (
    MOST_CHANNELS,
    Layer,
    Raster,
    Source,
    join_layers,
    layers_of,
    natural_channels,
    read_window,
    to_pixels,
)
from kit.errors import UserError, first_five

# A reader is a function of a `Layer`: it opens the file, or returns None
READERS = [slides.open_slide, arrays.open_array, tiffs.open_tiff, photos.open_photo]
IMAGE_SUFFIXES = (*photos.SUFFIXES, *arrays.SUFFIXES, *slides.SUFFIXES)

# --------------------------------------------------------------------------------------------------
#  Read
# --------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What the headers of an image's files say."""

    size: tuple[int, int]  # (height, width) once it is upright
    turn: int  # EXIF's orientation
    deep: bool  # more than 8 bits per channel
    floats: bool  # values may be NaN or infinity
    channels: int  # that it has by itself, see `rasters.natural_channels`


def open_layers(source: Source) -> list[Raster]:
    """The rasters of an image, or of its window, opened and not decoded. Raises UserError."""
    layers = layers_of(source)
    rasters = [next(filter(None, (reader(layer) for reader in READERS))) for layer in layers]
    for layer, raster in zip(layers, rasters, strict=True):
        if raster.size != rasters[0].size:
            own, first = ("x".join(map(str, r.size[::-1])) for r in (raster, rasters[0]))
            raise UserError(layer, f"is {own}, but {layers[0]} is {first}", "replace one of them")
    return [
        r._replace(size=layer.window.size, read=functools.partial(read_window, r, layer.window))
        if layer.window
        else r
        for layer, r in zip(layers, rasters, strict=True)
    ]


def read_header(source: Source) -> Header:
    """Read the headers of an image's files. Raises UserError."""
    rasters = open_layers(source)
    deep, floats = any(raster.deep for raster in rasters), any(r.floats for r in rasters)
    return Header(rasters[0].size, rasters[0].turn, deep, floats, natural_channels(rasters))


def read_values(source: Source, channels: int) -> np.ndarray:
    """The values of an image, (h, w, channels) as stored. Raises UserError.

    A grey image has three equal channels; transparency is left out where it is not one of them.
    """
    rasters = open_layers(layers_of(source, channels))
    decoded = [raster.read() for raster in rasters]
    values = join_layers(decoded, [raster.alpha for raster in rasters], channels)
    if values is None:
        own = natural_channels(rasters)
        raise UserError(
            layers_of(source)[0],
            f"has {own} channels, {channels} are needed",
            "name images of the same kind, or train with --channels",
        )
    return values


def read_image(
    source: Source, channels: int = 3, value_range: tuple[float, ...] = ()
) -> np.ndarray:
    """The pixels of an image, (h, w, channels) uint8, with a `value_range` uint16.

    Also of grey, palette, alpha, 16-bit and turned images. `value_range`: see `rasters.to_pixels`.
    Raises UserError where a file is damaged, empty, over 179 million pixels, or no image.
    """
    return to_pixels(read_values(source, channels), value_range, source)


def open_image(source: Path | Layer) -> Image.Image:
    """Decode a file of grey levels or colours as a mask, upright. Raises UserError.

    A `Layer` names one of several pages or planes.
    """
    layer = source if isinstance(source, Layer) else Layer(Path(source))
    raster = arrays.open_array(layer)
    if raster and raster.bands > 1:
        problem = f"holds {raster.bands} planes"
        raise UserError(layer.path, problem, "save one as an array (height, width)")
    if raster:
        return tiffs.to_image(raster.read())
    return photos.open_image(layer.path) if layer.page < 0 else tiffs.open_page(layer)


def may_have_floats(source: Source) -> bool:
    """Whether an image's values may be NaN or infinity; not where it cannot be opened."""
    suffixes = (*tiffs.SUFFIXES, *arrays.SUFFIXES)
    try:
        named = any(layer.path.suffix.lower() in suffixes for layer in layers_of(source))
        return named and read_header(source).floats
    except UserError:  # `samples.decode_pairs` names it
        return False


def no_data(source: Source) -> np.ndarray | None:
    """Where an image of floats is NaN or infinity in any channel: bool (h, w); None for nowhere.

    Raises UserError where no pixel is left.
    """
    rasters = open_layers(source)
    if not any(raster.floats for raster in rasters):
        return None
    finite = [np.isfinite(raster.read()).all(2) for raster in rasters]
    missing = ~np.logical_and.reduce(finite)
    if missing.all():
        problem = "every pixel is NaN or infinity"
        raise UserError(layers_of(source)[0], problem, "replace it or move it away")
    return missing if missing.any() else None


# --------------------------------------------------------------------------------------------------
#  How many channels
# --------------------------------------------------------------------------------------------------


def decide_channels(
    samples: pd.DataFrame, wanted: str, slices: int = 1, bands: tuple[str, ...] = ()
) -> int:
    """The channels of all images: the wanted number, or what they have; says other than 3.

    `samples`: with the columns of `scan`; `wanted`: of each of the `slices` of an image; `bands`:
    the patterns of their files. Raises UserError where they differ.
    """
    if wanted.isdecimal():
        count = slices * int(wanted)
    else:
        counts = samples.channels[samples.channels > 0].value_counts()
        if len(counts) > 1:
            rare = samples[samples.channels == counts.index[-1]]
            names = first_five(path.name for path in rare.image)
            problem = f"most images have {counts.index[0]} channels, {len(rare)} have"
            raise UserError(
                "--data",
                f"{problem} {counts.index[-1]}: {names}",
                "move them away, or name a number with --channels",
            )
        count = int(counts.index[0]) if len(counts) else 3
    if not 1 <= count <= MOST_CHANNELS:
        fewer = f": choose files, such as --channels '{','.join(bands[:2])}'" if bands else ""
        raise UserError(
            "--channels", f"{count} channels", f"an image has from 1 to {MOST_CHANNELS}{fewer}"
        )
    if count != 3 or slices > 1:
        print(f"channels: {count} in each image")
    return count


# --------------------------------------------------------------------------------------------------
#  Black, white, mean and deviation
# --------------------------------------------------------------------------------------------------

PERCENTILES = "0.5,99.5"  # default of --window
SAMPLED_IMAGES = 200
SAMPLED_VALUES = 50_000  # of each image


def find_value_range(
    sources: Iterable[Source], window: str, channels: int = 3, bands: tuple[str, ...] = ()
) -> tuple:
    """The values that become black and white in these images of more than 8 bits; () for none.

    `window`: two percentiles of their values, of each channel by itself where these are not
    colours but `bands`. By default 0.5 and 99.5, but 0 and 65535 where whole numbers reach the
    upper half of 16 bits. Prints what is taken. Raises UserError.
    """
    low, _, high = window.partition(",")
    try:
        percentiles = float(low), float(high)
    except ValueError:
        percentiles = (0.0, 0.0)
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UserError(
            f"--window {window}", f"takes two percentiles from 0 to 100, such as {PERCENTILES}"
        )
    sources = list(sources)
    values = sample_values(sources, channels)
    if channels == 3 and not bands:  # of colours one range, or they would change
        values = values.reshape(-1, 1)
    limits, reasons = [], {}
    for column in values.T if len(values) else ():
        black, white, reason = black_and_white(column, percentiles, window == PERCENTILES)
        limits += [black, white]
        reasons[reason] = None
    if limits:
        levels = f"{limits[0]:g} is black, {limits[1]:g} white ({'; '.join(reasons)})"
        each = f"of the first of {channels} channels " if len(limits) > 2 else ""
        print(f"images: {len(sources)} of more than 8 bits, {each}{levels}")
    return tuple(limits)


def black_and_white(
    values: np.ndarray, percentiles: tuple[float, float], by_default: bool
) -> tuple[float, float, str]:
    """Black, white and why, for the sampled values (n,) of a channel."""
    values, without = leave_out_no_data(values)
    if not len(values):
        return 0.0, 1.0, f"no values{without}"
    black, white = np.percentile(values, percentiles).tolist()
    reason = f"percentiles {percentiles[0]:g} and {percentiles[1]:g}"
    whole = (values == values.round()).all()
    if by_default and whole and values.min() >= 0 and 32768 <= values.max() <= 65535:
        black, white, reason = 0.0, 65535.0, "all 16 bits are used"
    return black, white if white > black else black + 1, reason + without


def leave_out_no_data(values: np.ndarray) -> tuple[np.ndarray, str]:
    """The values (n,) without no-data, and which that is, for people.

    No-data is not finite, or a negative value further below the others than these are apart.
    """
    left, without = values[np.isfinite(values)], ""
    if len(left) < len(values):
        without = "; NaN and infinity: ignored"
    others = left[left > left.min()] if len(left) else left
    if len(others) and left.min() < 0 and others.min() - left.min() > np.ptp(others):
        without += f"; {left.min():g}: no data, black"
        left = others
    return left, without


def sample_values(sources: list[Source], channels: int) -> np.ndarray:
    """Some values (n, channels) of some of the images, float64; none of what cannot be read."""
    places = np.linspace(0, len(sources) - 1, min(SAMPLED_IMAGES, len(sources))).astype(int)
    sampled = [np.zeros((0, channels))]
    for place in places:
        try:
            values = read_values(sources[place], channels).reshape(-1, channels)
        except UserError:  # `samples.decode_pairs` names it
            continue
        sampled.append(values[:: -(-values.size // SAMPLED_VALUES)].astype(np.float64))
    return np.concatenate(sampled)


def measure_statistics(
    sources: list[Source], channels: int, value_range: tuple[float, ...]
) -> dict[str, tuple[float, ...]]:
    """Mean and std of each channel in pixels of 0..1, of some of the images, see `ModelConfig`."""
    values = sample_values(sources, channels)
    if value_range:
        black, white = np.array(value_range[::2]), np.array(value_range[1::2])
        values = np.clip((np.nan_to_num(values, nan=-np.inf) - black) / (white - black), 0, 1)
    else:
        values = values / 255
    mean, std = values.mean(0), values.std(0).clip(0.01)
    return {"mean": tuple(mean.round(4).tolist()), "std": tuple(std.round(4).tolist())}


# --------------------------------------------------------------------------------------------------
#  Many files
# --------------------------------------------------------------------------------------------------

SAY_SECONDS = 10  # between two lines about how far it is


def in_parallel(function: Callable, items: Iterable[Any], label: str) -> list[Any]:
    """Call the function for each item (an image) in threads; the results in order.

    Long ones show how far they are: a bar on a terminal, else a line each `SAY_SECONDS`.
    """
    items, results, said = list(items), [], time.monotonic()
    terminal = sys.stdout.isatty()
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(items), desc=label, unit="image", leave=False, disable=not terminal) as bar,
    ):
        for result in pool.map(function, items):
            results.append(result)
            bar.update()
            if not terminal and time.monotonic() - said >= SAY_SECONDS:
                print(f"{label}: {len(results)} of {len(items)} images", flush=True)
                said = time.monotonic()
    return results
