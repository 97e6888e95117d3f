"""What the values in mask files mean, decided over all of them: one class, or labels of several."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kit.config import IGNORE, Classes
from kit.data.classes import ClassRequest, Labels, decide_labels, show
from kit.data.images import open_image
from kit.data.masks import (
    LabelMap,
    MaskFile,
    MaskValues,
    Opener,
    Planes,
    mask_pixels,
    palette_levels,
)
from kit.errors import UserError, first_five

MOST_LABELS = 254  # exclusive classes that fit into 8 bits, next to the ignored value 255

# --------------------------------------------------------------------------------------------------
#  Count the values
# --------------------------------------------------------------------------------------------------


class ValueCounts(NamedTuple):
    """The distinct values of a mask in one channel."""

    pixels: Counter[float]  # {value: number of pixels}
    lossy: bool  # a JPEG
    hint: str  # "colour": has colours; "alpha": one colour, but alpha varies; else ""
    palette: set[tuple[int, int, str]]  # its colours that occur: (level, index, #ff0000)
    path: Path  # the first file


def count_all(masks: list[MaskFile], channel: str, opener: Opener) -> list[ValueCounts]:
    """The values of each mask, read in threads; one that cannot be read is left out here."""

    def count(mask: MaskFile) -> ValueCounts | None:
        try:
            return count_values(mask, channel, opener)
        except UserError:  # `samples.decode_pairs` names the file
            return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [counts for counts in pool.map(count, masks) if counts]


def count_values(mask: MaskFile, channel: str, opener: Opener) -> ValueCounts:
    """The values of one mask. Soft levels of 0..1 are rounded to 256 steps. Raises UserError."""
    pixels, lossy, hint, palette = Counter(), False, "", set()
    for path in (mask.path, *mask.more):
        image = opener(path)
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


def sum_pixels(counts: list[ValueCounts]) -> Counter[float]:
    """{value: number of pixels} of all masks."""
    return sum((count.pixels for count in counts), Counter())


def palette_colours(image: Image.Image) -> set[tuple[int, int, str]]:
    """The colours of a palette that occur in an image, see `ValueCounts`."""
    if image.mode != "P":
        return set()
    colours, levels = np.array(image.getpalette("RGB")).reshape(-1, 3), palette_levels(image)
    used = np.flatnonzero(np.bincount(np.asarray(image).ravel(), minlength=256)[: len(colours)])
    return {(int(levels[i]), int(i), "#{:02x}{:02x}{:02x}".format(*colours[i])) for i in used}


def colour_hint(image: Image.Image) -> str:
    """Whether the mask is in the colours or in alpha, see `ValueCounts`."""
    if len(image.getbands()) == 1:
        return ""
    bands = np.asarray(image.convert("RGBA"))
    if np.ptp(bands[..., 3]) and (bands[..., :3] == bands[0, 0, :3]).all():
        return "alpha"
    return "colour" if (bands[..., 1:3] != bands[..., :1]).any() else ""


# --------------------------------------------------------------------------------------------------
#  Decide what the values mean
# --------------------------------------------------------------------------------------------------


def decide_files(
    masks: list[Planes | None],
    classes: Classes,
    request: ClassRequest,
    foreground: str,
    training: bool,
    opener: Opener = open_image,
) -> tuple[list[Planes | LabelMap | None], Classes]:
    """Decide what the values of all mask files mean, and print it; other masks stay as they are.

    Where there is one class only, label maps make several. `foreground`: the values of
    --foreground, or "". Raises UserError.
    """
    parts = [part for mask in masks if mask for part in mask.parts]
    files = [part for part in parts if isinstance(part, MaskFile)]
    if foreground and training and not files:
        raise UserError(
            f"--foreground {foreground}", "there are no mask files", "leave the flag out"
        )
    if not files:
        return masks, classes
    label_request = None if classes.several else request
    values, text, labels = decide_values(files, foreground, training, label_request, opener)
    print(f"masks: {text}", flush=True)
    if labels:
        if len(files) < len(parts):
            raise UserError(
                "--missing empty", "a label map cannot be empty", "move these images away"
            )
        numbers = labels.labels
        maps = [mask and LabelMap(mask.parts[0], values.channel, numbers) for mask in masks]
        return maps, labels.classes

    return [mask and mask.change(MaskFile, values=values) for mask in masks], classes


def decide_values(
    masks: list[MaskFile],
    foreground: str,
    training: bool,
    request: ClassRequest | None = None,
    opener: Opener = open_image,
) -> tuple[MaskValues, str, Labels | None]:
    """What the values of all these masks mean, the same for people, and the labels of label maps.

    `request`: --classes; None where masks are of one class each. Raises UserError.
    """
    counts, channel = count_all(masks, "grey", opener), "grey"
    hints = {count.hint for count in counts}
    palette = set().union(*(count.palette for count in counts))
    if "colour" in hints or differ({(level, colour) for level, _, colour in palette}):
        channel = "colour"
    elif "alpha" in hints and len(set().union(*(count.pixels for count in counts))) == 1:
        channel = "alpha"
    counts = counts if channel == "grey" else count_all(masks, channel, opener)
    pixels = sum_pixels(counts)
    if foreground:
        values = listed_values(foreground, pixels, channel)
    elif request and request.asks_for_labels:
        values = None
    else:
        values = binary_values(pixels, channel, any(count.lossy for count in counts))
    if values is None and request and request.merged and not request.model:
        ignored = {IGNORE} & set(pixels) if channel == "grey" else set()
        united = sorted(set(pixels) - {0} - ignored)  # all labels but 0, or black
        values = MaskValues(channel, tuple(united), tuple(ignored))
    if values is not None:
        if training and counts:
            check_foreground(values, pixels, len(masks))
        return values, describe_values(values, pixels, len(counts)), None
    if not request or request.merged or not are_labels(counts):
        raise not_binary(counts, channel)
    if channel == "grey" and palette:
        channel = palette_channel(palette, request)
        counts = count_all(masks, channel, opener)
    labels = decide_labels(sum_pixels(counts), channel, request, training)
    return MaskValues(channel), describe_labels(counts, channel, labels), labels


def differ(colours: set[tuple[int, str]]) -> bool:
    """Whether a value has several colours: each file has a palette of its own."""
    return len({value for value, _ in colours}) < len(colours)


def palette_channel(palette: set[tuple[int, int, str]], request: ClassRequest) -> str:
    """Whether label maps with palettes are read by colour or by index."""
    listed = {entry.colour for entry in request.listed if not entry.id.isdecimal()}
    by_list = len(listed & {colour for *_, colour in palette}) > 1
    differing = differ({(index, colour) for _, index, colour in palette})
    return "colour" if by_list or differing else "index"


def binary_values(pixels: Counter[float], channel: str, lossy: bool) -> MaskValues | None:
    """What the values of binary masks mean; None for a label map. Raises UserError."""
    values = set(pixels)
    if lossy and 0 < max(values, default=0) <= 8:
        raise UserError(
            "--data",
            f"masks of 0 to {max(values):g} as JPEG: JPEG's noise is as large as their values",
            "save PNG files",
        )
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
    for text in foreground.replace(" ", "").lower().split(","):
        low, _, high = text.partition("-")
        try:
            limits = (names[text], names[text]) if text in names else (float(low), float(high))
        except ValueError:
            limits = (1, 0)  # nothing is in it
        chosen = {value for value in pixels if limits[0] <= value <= limits[1]}
        if not chosen:
            raise UserError(f"--foreground {text}", "no mask has this value", first_five(names))
        listed |= chosen
    ignored = set(pixels) & {IGNORE} - listed if channel == "grey" else ()
    return MaskValues(channel, tuple(sorted(listed)), tuple(ignored))


def check_foreground(values: MaskValues, pixels: Counter[float], count: int) -> None:
    """Raise UserError where masks have no foreground, or no background."""
    is_foreground = [v in values.foreground or (v > (values.cut or np.inf)) for v in sorted(pixels)]
    background = sum(not yes for yes in is_foreground) - len(values.ignored)
    if any(is_foreground) and background:
        return
    kind = "full (no background)" if any(is_foreground) else "empty (no foreground)"
    names = first_five(show(value, values.channel) for value in sorted(pixels))
    raise UserError(
        "--data",
        f"all {count} masks are {kind}: {names}",
        "name other masks with --masks, or the values of the foreground with --foreground",
    )


# --------------------------------------------------------------------------------------------------
#  Label maps
# --------------------------------------------------------------------------------------------------


def are_labels(counts: list[ValueCounts]) -> bool:
    """Whether the values may be those of classes: few whole numbers, not a JPEG's."""
    values = set().union(*(count.pixels for count in counts))
    whole = all(value == int(value) >= 0 for value in values)
    return whole and len(values) <= MOST_LABELS + 1 and not any(count.lossy for count in counts)


# --------------------------------------------------------------------------------------------------
#  What was decided, for people
# --------------------------------------------------------------------------------------------------


def in_channel(channel: str) -> str:
    """Where values were read, unless it is grey."""
    return "" if channel == "grey" else f" in {channel}"


def describe_values(values: MaskValues, pixels: Counter[float], count: int) -> str:
    """What the values of so many masks mean."""
    where = in_channel(values.channel)
    if values.cut is not None:
        soft = f"{len(pixels)} levels with two peaks (soft edges or JPEG)"
        return f"{count} files{where}: {soft}, foreground is above {values.cut:g}"
    names = first_five(show(value, values.channel) for value in sorted(pixels))
    foreground = first_five(show(value, values.channel) for value in values.foreground)
    ignored = f", {IGNORE} is ignored" if values.ignored else ""
    return f"{count} files{where} of {names}: foreground is {foreground}{ignored}"


def describe_labels(counts: list[ValueCounts], channel: str, labels: Labels) -> str:
    """What label maps were understood as, and which values are ignored."""
    pixels = sum_pixels(counts)
    ignored = []
    free = set() if channel == "colour" else {IGNORE} & set(pixels)
    for value in sorted(set(pixels) - set(labels.labels) - free):
        where = next(count.path.name for count in counts if value in count.pixels)
        ignored.append(f"{show(value, channel)} ({pixels[value]} pixels, such as in {where})")
    never = f"; {IGNORE} is ignored" if free else ""
    unlisted = f"; not listed and ignored: {first_five(ignored)}" if ignored else ""
    names = zip(labels.classes.names, labels.labels, strict=True)
    absent = [name for name, label in names if not pixels[label]]
    without = f"; in no mask: {first_five(absent)}" if absent else ""
    maps = f"{len(counts)} label maps{in_channel(channel)} of {len(labels.labels)} classes"
    return f"{maps}{never}{unlisted}{without}"


def not_binary(counts: list[ValueCounts], channel: str) -> UserError:
    """The message for values that are not binary: how many pixels and images each has."""
    pixels = sum_pixels(counts)
    images = Counter(value for count in counts for value in count.pixels)
    values = [
        f"{show(value, channel)} ({pixels[value]} pixels, {images[value]} images)"
        for value in sorted(pixels)
    ]
    labels = [value for value in pixels if value not in (0, IGNORE)] or list(pixels)
    example = show(max(labels, key=pixels.__getitem__), channel)
    remedy = f"name the values that are foreground, such as --foreground {example}"
    ranges = ", or ranges such as 128-255" if len(values) > 5 else ""
    ignored = f" ({IGNORE} is ignored unless listed)" if IGNORE in pixels else ""
    return UserError(
        "--data", f"the masks are a label map: {first_five(values)}", f"{remedy}{ranges}{ignored}"
    )
