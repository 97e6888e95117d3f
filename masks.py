"""Mask files: what their values mean, decided once over the whole data set, and how each is read.

Binary values, soft edges and JPEG's noise are understood; any other set of values is a label map,
whose labels are classes.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from PIL.Image import Transpose

import classes
import rle
from classes import Classes, Wanted
from images import IGNORE, Collection, open_image, read_header
from labels import (
    ValueCounts,
    are_labels,
    class_numbers,
    decide_labels,
    describe_label_map,
    show,
)
from utils import UserError, first_five

# --------------------------------------------------------------------------------------------------
#  Read
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MaskValues:
    """What the values in mask files mean. What is neither foreground nor ignored is background."""

    channel: str = "grey"  # grey (or a palette's level), index, colour (as 0xRRGGBB), alpha
    foreground: tuple[float, ...] = ()
    ignored: tuple[float, ...] = ()
    cut: float | None = None  # where levels are soft: what is above is foreground
    labels: tuple[float, ...] = ()  # of a label map: the value of each class; others are ignored


@dataclasses.dataclass(frozen=True)
class MaskFile:
    """A mask in a file, or in several files of one object each."""

    path: Path
    values: MaskValues | None = None  # None: decided from this mask alone
    more: tuple[Path, ...] = ()  # files of further objects of the same image
    image: Path | None = None  # its image: a mask of the stored size is turned like it (EXIF)

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """(h, w) uint8: 1 foreground, 0 background, 255 ignored. `size`: its image's (h, w).

        Of a label map the number of the class, from 0. Raises UserError.
        """
        images = [open_mask(path, size, self.image) for path in (self.path, *self.more)]
        values = self.values or decide_values([self], "", training=False)[0]
        if values.labels and self.more:
            reason = f"one of {len(images)} label maps of one image"
            raise UserError(f"{self.path}: {reason}; keep one, or name it with --masks")
        if values.labels:
            return class_numbers(mask_pixels(images[0], values.channel), values.labels)
        mask = np.zeros(size, np.uint8)
        for image in images:
            pixels = mask_pixels(image, values.channel)
            for ignored in values.ignored:
                mask[(pixels == ignored) & (mask == 0)] = IGNORE
            for foreground in values.foreground:
                mask[pixels == foreground] = 1
            if values.cut is not None:
                mask[pixels > values.cut] = 1
        return mask


# What turns an image of EXIF's orientations 5 to 8 upright.
TURNS = {
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def open_mask(path: Path, size: tuple[int, int], photo: Path | None = None) -> Image.Image:
    """Decode a mask file. Raises UserError, also where it does not have its image's (h, w).

    `photo`: its image. If EXIF turns that, a mask of the stored size was drawn on the stored pixels
    and is turned, too.
    """
    image = open_image(path)
    if photo and image.size == size != size[::-1]:
        turn = read_header(photo).turn
        image = image.transpose(TURNS[turn]) if turn in TURNS else image
    if image.size != size[::-1]:
        mask, own = ("x".join(map(str, s)) for s in (image.size, size[::-1]))
        raise UserError(f"{path}: is {mask}, but its image is {own}; replace one of them")
    return image


def mask_pixels(image: Image.Image, channel: str) -> np.ndarray:
    """One channel of a mask as numbers (h, w); see `MaskValues.channel`."""
    if channel == "alpha":
        return np.asarray(image.convert("RGBA"))[..., 3]
    if channel == "colour":
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), -1, 0)
        return red << 16 | green << 8 | blue
    if image.mode == "P" and channel == "grey":
        return palette_levels(image)[np.asarray(image)]
    if len(image.getbands()) > 1:
        return np.asarray(image.convert("RGB"))[..., 0]
    return np.asarray(image, np.uint8 if image.mode == "1" else None)


def palette_levels(image: Image.Image) -> np.ndarray:
    """What each index of a palette counts as, uint8 (256,).

    The grey level where all colours are grey; otherwise the index, and 0 for black.
    """
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    levels = np.arange(256, dtype=np.uint8)
    if (colours == colours[:, :1]).all():
        levels[: len(colours)] = colours[:, 0]
        return levels
    black = np.flatnonzero((colours == 0).all(1))
    if len(black):
        levels[[0, black[0]]] = levels[[black[0], 0]]
    return levels


# --------------------------------------------------------------------------------------------------
#  Decide
# --------------------------------------------------------------------------------------------------


def decide_classes(
    collection: Collection,
    foreground: str,
    training: bool,
    runs: str,
    needed: bool,
    wanted: Wanted,
) -> Collection:
    """Decide which classes the masks tell apart, and how they are read. Raises UserError.

    `needed`: whether masks that cannot be read are an error.
    """
    samples = collection.samples
    samples["mask"], found = classes.choose_masks(samples["mask"].tolist(), wanted)
    parts = classes.split_parts(samples)
    order = resolve_order(parts, runs, needed)
    if parts["mask"].isna().all():
        samples["mask"] = None
        return collection._replace(rle=order)
    maps = None if found.names else wanted
    masks, labels = decide_masks(parts["mask"], foreground, training, maps)
    samples["mask"] = classes.join_parts(samples["mask"], masks)
    found = found if found.names else labels
    if found.exclusive and any(isinstance(mask, rle.RunLengths) for mask in samples["mask"]):
        raise UserError("--missing empty: a label map cannot be empty; move these images away")
    if training and wanted.asks_for_labels and not found.names:
        raise UserError(f"{wanted.where}: the masks are of one class; leave the flag out")
    if wanted.model is not None and found != wanted.model and any(samples["mask"]):
        own, other = (classes.describe_classes(one) for one in (wanted.model, found))
        print(f"no scores: the model has {own}, the masks have {other}")
        samples["mask"] = None
    return collection._replace(rle=order, classes=found)


def resolve_order(samples: pd.DataFrame, runs: str, needed: bool) -> str:
    """Set the order of RLE in the samples' masks and return it, see `rle.resolve_order`.

    Raises UserError where it cannot be found; masks that are not needed are left out instead.
    """
    try:
        samples["mask"], order = rle.resolve_order(samples, runs)
        return order
    except UserError as error:
        if needed:
            raise
        print(f"no scores: {error}")
        samples["mask"] = None
        return "columns"


def decide_masks(
    masks: Iterable[MaskFile | None], foreground: str, training: bool, wanted: Wanted | None = None
) -> tuple[list[MaskFile | None], Classes]:
    """Decide what the values of all mask files mean, and say it in a line; others stay as they are.

    Returns the masks and the classes of a label map. `foreground`: the values of --foreground, or
    "". `wanted`: --classes; None where the masks are of one class each. Raises UserError.
    """
    masks = list(masks)
    files = [mask for mask in masks if isinstance(mask, MaskFile)]
    if foreground and training and not files:
        raise UserError(f"--foreground {foreground}: there are no mask files; leave the flag out")
    if not files:
        return masks, Classes()
    values, words, found = decide_values(files, foreground, training, wanted)
    print(f"masks: {words}", flush=True)
    decided = (dataclasses.replace(mask, values=values) for mask in files)
    masks = [next(decided) if isinstance(mask, MaskFile) else mask for mask in masks]
    return masks, found


def decide_values(
    masks: list[MaskFile], foreground: str, training: bool, wanted: Wanted | None = None
) -> tuple[MaskValues, str, Classes]:
    """What the values of all these masks mean, the same in words, and the classes of a label map.

    Raises UserError.
    """
    counts, channel = count_all(masks, "grey"), "grey"
    hints = {count.hint for count in counts}
    palette = set().union(*(count.palette for count in counts))
    if "colour" in hints or differ({(level, colour) for level, _, colour in palette}):
        channel = "colour"
    elif "alpha" in hints and len(set().union(*(count.pixels for count in counts))) == 1:
        channel = "alpha"
    counts = counts if channel == "grey" else count_all(masks, channel)
    pixels = sum((count.pixels for count in counts), Counter())
    if foreground:
        values = listed_values(foreground, pixels, channel)
    elif wanted and wanted.asks_for_labels:
        values = None
    else:
        values = usual_values(pixels, channel, any(count.lossy for count in counts))
    if values is None and wanted and wanted.merged and not wanted.model:
        values = all_but_zero(pixels, channel)
    if values is None:
        if not wanted or wanted.merged or not are_labels(counts):
            raise UserError(describe_label_map(counts, channel))
        if channel == "grey" and palette:
            listed = {one.colour for one in wanted.listed if not one.id.isdecimal()}
            several = len(listed & {colour for *_, colour in palette}) > 1
            own = differ({(index, colour) for _, index, colour in palette})
            channel = "colour" if several or own else "index"
            counts = count_all(masks, channel)
        labels, words, found = decide_labels(counts, channel, wanted, training)
        return MaskValues(channel, labels=labels), words, found
    names = [show(value, channel) for value in sorted(pixels)]
    is_foreground = [v in values.foreground or (v > (values.cut or np.inf)) for v in sorted(pixels)]
    background = sum(not yes for yes in is_foreground) - len(values.ignored)
    if training and counts and not (any(is_foreground) and background):
        what = "full (no background)" if any(is_foreground) else "empty (no foreground)"
        remedy = "name other masks with --masks, or the values of the foreground with --foreground"
        raise UserError(f"--data: all {len(masks)} masks are {what}: {first_five(names)}; {remedy}")
    return values, describe_values(values, names, len(counts)), Classes()


def differ(colours: set[tuple[int, str]]) -> bool:
    """Whether a value has several colours: each file has a palette of its own."""
    return len({value for value, _ in colours}) < len(colours)


def all_but_zero(pixels: Counter[float], channel: str) -> MaskValues:
    """All labels as one class: what is not 0 (or black) is foreground."""
    ignored = {IGNORE} & set(pixels) if channel == "grey" else set()
    return MaskValues(channel, tuple(sorted(set(pixels) - {0} - ignored)), tuple(ignored))


def count_all(masks: list[MaskFile], channel: str) -> list[ValueCounts]:
    """The values of each mask, read in threads; one that cannot be read is left out here."""

    def count(mask: MaskFile) -> ValueCounts | None:
        try:
            return count_values(mask, channel)
        except UserError:  # `data.decode_samples` names the file
            return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [counts for counts in pool.map(count, masks) if counts]


def count_values(mask: MaskFile, channel: str) -> ValueCounts:
    """The values of one mask. Soft levels of 0..1 are rounded to 256 steps. Raises UserError."""
    pixels, lossy, hint, palette = Counter(), False, "", set()
    for path in (mask.path, *mask.more):
        image = open_image(path)
        lossy |= image.format == "JPEG"
        palette |= palette_colours(image)
        hint = max(hint, colour_hint(image))
        values = mask_pixels(image, channel)
        if values.dtype == np.uint8:
            counts = np.bincount(values.ravel())
            pixels.update({value: int(counts[value]) for value in np.flatnonzero(counts).tolist()})
            continue
        if values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
            values = np.round(255 * values) / 255
        unique, counts = np.unique(values, return_counts=True)
        pixels.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
    return ValueCounts(pixels, lossy, hint, palette, mask.path)


def palette_colours(image: Image.Image) -> set[tuple[int, int, str]]:
    """The colours of a palette that occur in an image, see `ValueCounts`."""
    if image.mode != "P":
        return set()
    colours, levels = np.array(image.getpalette("RGB")).reshape(-1, 3), palette_levels(image)
    found = np.flatnonzero(np.bincount(np.asarray(image).ravel(), minlength=256)[: len(colours)])
    return {(int(levels[i]), int(i), "#{:02x}{:02x}{:02x}".format(*colours[i])) for i in found}


def colour_hint(image: Image.Image) -> str:
    """Whether the mask is in the colours or in alpha, see `ValueCounts`."""
    if len(image.getbands()) == 1:
        return ""
    bands = np.asarray(image.convert("RGBA"))
    if np.ptp(bands[..., 3]) and (bands[..., :3] == bands[0, 0, :3]).all():
        return "alpha"
    return "colour" if (bands[..., 1:3] != bands[..., :1]).any() else ""


def usual_values(pixels: Counter[float], channel: str, lossy: bool) -> MaskValues | None:
    """What usual values of masks mean; None for a label map. Raises UserError."""
    values = set(pixels)
    if lossy and 0 < max(values, default=0) <= 8:
        reason = "JPEG's noise is as large as their values"
        raise UserError(f"--data: masks of 0 to {max(values):g} as JPEG: {reason}; save PNG files")
    if channel == "colour":
        return None
    if 1 in values and values <= {0, 1, IGNORE}:
        return MaskValues(channel, (1,), tuple(values & {IGNORE}))
    for full in (1, 255, 65535):
        if values <= {0, full}:
            return MaskValues(channel, (full,))
    cut = soft_cut(pixels, lossy)
    return None if cut is None else MaskValues(channel, cut=cut)


def soft_cut(pixels: Counter[float], lossy: bool) -> float | None:
    """Half of the full scale where the levels are soft: two peaks, at 0 and at the full scale.

    Between the peaks soft edges fill many of 16 bins evenly, JPEG's noise those near the peaks; a
    further peak is a label, and so are few levels.
    """
    levels = np.array(sorted(pixels), float)
    full = next((full for full in (1, 255, 65535) if levels.max() <= full), 0)
    if not full or levels.min() < 0:
        return None
    counts = np.array([pixels[level] for level in sorted(pixels)])
    bins = np.histogram(levels / full, 16, (0, 1), weights=counts)[0]
    filled = (bins[2:-2] > 0).sum()
    if full > 1 and not lossy and (len(levels) < 16 or filled < 8):
        return None
    ends = min(bins[:2].sum(), bins[-2:].sum())
    pairs = bins[:-1] + bins[1:]
    central = pairs[4:11]
    label = central.max() > max(0.6 * bins[4:12].sum(), 0.01 * ends)
    return None if label or ends < 2 * pairs[2:-2].max() or not ends else full / 2


def listed_values(foreground: str, pixels: Counter[float], channel: str) -> MaskValues:
    """The values of --foreground, such as 15 or 1,128-255. Raises UserError for one without use."""
    names = {show(value, channel): value for value in sorted(pixels)}
    listed: set[float] = set()
    for word in foreground.replace(" ", "").lower().split(","):
        low, _, high = word.partition("-")
        try:
            limits = (names[word], names[word]) if word in names else (float(low), float(high))
        except ValueError:
            limits = (1, 0)  # nothing is in it
        chosen = {value for value in pixels if limits[0] <= value <= limits[1]}
        if not chosen:
            known = first_five(names)
            raise UserError(f"--foreground {word}: no mask has this value; they have {known}")
        listed |= chosen
    ignored = set(pixels) & {IGNORE} - listed if channel == "grey" else ()
    return MaskValues(channel, tuple(sorted(listed)), tuple(ignored))


# --------------------------------------------------------------------------------------------------
#  Words
# --------------------------------------------------------------------------------------------------


def describe_values(values: MaskValues, names: list[str], count: int) -> str:
    """What the values of so many masks mean, in words."""
    where = "" if values.channel == "grey" else f" in {values.channel}"
    if values.cut is not None:
        soft = f"{len(names)} levels with two peaks (soft edges or JPEG)"
        return f"{count} files{where}: {soft}, foreground is above {values.cut:g}"
    foreground = first_five(show(value, values.channel) for value in values.foreground)
    ignored = f", {IGNORE} is ignored" if values.ignored else ""
    return f"{count} files{where} of {first_five(names)}: foreground is {foreground}{ignored}"
