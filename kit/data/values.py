"""What the values in mask files mean, decided over all of them: one class, or labels of several."""

import contextlib
import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from kit.config import IGNORE, Classes
from kit.data.classes import LARGE_ID, ClassRequest, Labels, decide_labels, show
from kit.data.masks import (
    LabelMap,
    MaskFile,
    MaskValues,
    Opener,
    Planes,
    mask_pixels,
    palette_levels,
)
from kit.data.photos import open_image
from kit.errors import UserError, first_five

FEW_OBJECTS = 8  # as many, in every mask, may be classes of one piece each
FEW_LABELS = 4  # as many, in some masks, may be, too
SAMPLED_MASKS = 12  # and values of each, to count connected pieces
INVERTED = 0.75  # of the pixels are foreground: a line says so
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
    channel: str  # see `masks.MaskValues`

    def without(self, values: set[float]) -> "ValueCounts":
        """The same without some values."""
        rest = {value: count for value, count in self.pixels.items() if value not in values}
        return self._replace(pixels=Counter(rest))


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
    return ValueCounts(pixels, lossy, hint, palette, mask.path, channel)


def sum_pixels(counts: list[ValueCounts]) -> Counter[float]:
    """{value: number of pixels} of all masks."""
    pixels: Counter[float] = Counter()
    for count in counts:
        pixels.update(count.pixels)
    return pixels


def is_lossy(counts: list[ValueCounts]) -> bool:
    """Whether a mask is a JPEG."""
    return any(count.lossy for count in counts)


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
    bands = np.asarray(image.convert("RGBA"), np.int16)
    if np.ptp(bands[..., 3]) and (bands[..., :3] == bands[0, 0, :3]).all():
        return "alpha"
    noise = 32 if image.format == "JPEG" else 0  # of grey that was saved as colour
    return "colour" if (np.abs(bands[..., 1:3] - bands[..., :1]) > noise).any() else ""


# --------------------------------------------------------------------------------------------------
#  Decide what the values mean
# --------------------------------------------------------------------------------------------------


def decide_files(
    masks: list[Planes | None],
    classes: Classes,
    request: ClassRequest,
    foreground: str,
    ignore: str,
    training: bool,
    opener: Opener = open_image,
) -> tuple[list[Planes | LabelMap | None], Classes]:
    """Decide what the values of all mask files mean, and print it; other masks stay as they are.

    Where there is one class only, label maps make several. `foreground`, `ignore`: the values of
    --foreground and --ignore, or "". Raises UserError.
    """
    parts = [part for mask in masks if mask for part in mask.parts]
    files = [part for part in parts if isinstance(part, MaskFile)]
    for flag, text in (("foreground", foreground), ("ignore", ignore)):
        if text and training and not files:
            raise UserError(f"--{flag} {text}", "there are no mask files", "leave the flag out")
    if not files:
        return masks, classes
    label_request = None if classes.several else request
    values, text, labels = decide_values(files, foreground, ignore, training, label_request, opener)
    print(f"masks: {text}", flush=True)
    if labels:
        if len(files) < len(parts):
            raise UserError(
                "--missing empty", "a label map cannot be empty", "take --missing leave_out"
            )
        numbers = labels.labels
        maps = [mask and LabelMap(mask.parts[0], values.channel, numbers) for mask in masks]
        return maps, labels.classes

    return [mask and mask.change(MaskFile, values=values) for mask in masks], classes


def decide_values(
    masks: list[MaskFile],
    foreground: str,
    ignore: str,
    training: bool,
    request: ClassRequest | None = None,
    opener: Opener = open_image,
) -> tuple[MaskValues, str, Labels | None]:
    """What the values of all these masks mean, the same for people, and the labels of label maps.

    `request`: --classes; None where masks are of one class each. Negative values are no data and
    ignored. Raises UserError.
    """
    counts = count_all(masks, "grey", opener)
    channel, lossy = choose_channel(counts), is_lossy(counts)
    counts = counts if channel == "grey" else count_all(masks, channel, opener)
    counts, ignored = leave_out(counts, ignore, channel, training)
    pixels = sum_pixels(counts)
    values, hint = None, ""
    if foreground:
        values = listed_foreground(foreground, pixels, channel, lossy)
    elif not (request and request.asks_for_labels):
        values = binary_values(counts, channel, request, training, opener)
    if values is not None:
        if training and counts:
            check_foreground(values, pixels, len(masks))
            hint = hint_of_inversion(values, counts)
        values = replace(values, ignored=(*values.ignored, *ignored))
        return values, describe_values(values, pixels, len(counts)) + hint, None
    check_labels(counts, channel, request)
    palette = set().union(*(count.palette for count in counts))
    if channel == "grey" and palette:
        channel = palette_channel(palette, request)
        counts, ignored = leave_out(count_all(masks, channel, opener), ignore, channel, training)
    labels = decide_labels(sum_pixels(counts), channel, request, training, ignored)
    return MaskValues(channel), describe_labels(counts, channel, labels, ignored), labels


def leave_out(
    counts: list[ValueCounts], ignore: str, channel: str, training: bool
) -> tuple[list[ValueCounts], tuple[float, ...]]:
    """The counts without ignored values, and these: no-data below 0 or NaN, and --ignore's."""
    pixels = sum_pixels(counts)
    ignored = {value for value in pixels if value < 0}
    if ignore and training:
        ignored |= listed_values("--ignore", ignore, pixels, channel)
    elif ignore:  # what is scored need not have every value
        for text in ignore.split(","):
            with contextlib.suppress(UserError):
                ignored |= listed_values("--ignore", text, pixels, channel)
    return [count.without(ignored) for count in counts], tuple(sorted(ignored))


def choose_channel(counts: list[ValueCounts]) -> str:
    """Where the masks are: grey, colour or alpha. Raises UserError for a JPEG's colours."""
    hints = {count.hint for count in counts}
    if "colour" in hints and is_lossy(counts):
        remedy = "save PNG files, with as many colours as there are classes"
        raise UserError("--data", "JPEG masks of colours: JPEG's noise blurs them", remedy)
    if "colour" in hints or differ(
        {(level, c) for count in counts for level, _, c in count.palette}
    ):
        return "colour"
    one_value = len(set().union(*(count.pixels for count in counts))) == 1
    return "alpha" if "alpha" in hints and one_value else "grey"


def differ(colours: set[tuple[int, str]]) -> bool:
    """Whether a value has several colours: each file has a palette of its own."""
    return len({value for value, _ in colours}) < len(colours)


def palette_channel(palette: set[tuple[int, int, str]], request: ClassRequest) -> str:
    """Whether label maps with palettes are read by colour or by index."""
    listed = {entry.colour for entry in request.listed if not entry.id.isdecimal()}
    by_list = len(listed & {colour for *_, colour in palette}) > 1
    differing = differ({(index, colour) for _, index, colour in palette})
    return "colour" if by_list or differing else "index"


def binary_values(
    counts: list[ValueCounts],
    channel: str,
    request: ClassRequest | None,
    training: bool,
    opener: Opener,
) -> MaskValues | None:
    """What the values of masks of one class mean; None for label maps. Raises UserError."""
    pixels, lossy = sum_pixels(counts), is_lossy(counts)
    values, highest = set(pixels), max(pixels, default=0)
    if lossy and 0 < highest <= 8:
        raise UserError(
            "--data",
            f"masks of 0 to {highest:g} as JPEG: JPEG's noise is as large as their values",
            "save PNG files",
        )
    full_scales = values & {1, IGNORE, 65535}
    if values <= {0, *full_scales} and channel != "colour":
        if all(len(full_scales & set(count.pixels)) < 2 for count in counts):
            return MaskValues(channel, tuple(sorted(full_scales)) or (1,))  # each has its own
        if values <= {0, 1, IGNORE}:
            return MaskValues(channel, (1,), (IGNORE,))
    labels = values - {0, IGNORE if channel == "grey" else 0}
    if 0 in values and len(labels) == 1 and (IGNORE not in values or max(labels) < LARGE_ID):
        return MaskValues(channel, tuple(labels), tuple(values - labels - {0}))
    cut = None if channel == "colour" else soft_cut(pixels, lossy)
    if cut is not None:
        return MaskValues(channel, cut=cut)
    refuse_soft_levels(counts)
    merged = bool(request and request.merged)  # into one class
    if (not request or request.may_be_objects) and are_objects(counts, opener):
        most = FEW_OBJECTS if len({len(count.pixels) for count in counts}) == 1 else FEW_LABELS
        if training and not merged and len(labels) <= most:
            raise objects_or_classes(pixels, channel)
        return MaskValues(channel, cut=0)
    if not merged or request.model:
        return None
    ignored = {IGNORE} & values if channel == "grey" else set()
    return MaskValues(channel, tuple(sorted(values - {0} - ignored)), tuple(ignored))


def are_objects(counts: list[ValueCounts], opener: Opener) -> bool:
    """Whether values number the objects of each image on a background of 0, and are no classes.

    In nearly all images they are 1, 2, 3, ..., or few of many values recur; and nearly all are in
    one piece.
    """
    pixels = sum_pixels(counts)
    if len(pixels) < 4 or is_lossy(counts) or pixels[0] < max(pixels.values()):
        return False
    listed = [sorted(set(count.pixels) - {0}) for count in counts]
    unit = min(set(pixels) - {0})  # 1, or that of green or red in a colour
    numbered = [values == [unit * (k + 1) for k in range(len(values))] for values in listed]
    images = Counter(itertools.chain(*listed))
    often = max(1, len(counts) / 10)
    rare = len(images) > FEW_OBJECTS and np.median(list(images.values())) <= often
    if not rare and (unit not in (1, 1 << 8, 1 << 16) or np.mean(numbered) < 0.9):
        return False
    pieces = []
    for count in counts[:: -(-len(counts) // SAMPLED_MASKS)]:
        values = mask_pixels(opener(count.path), count.channel)
        for value in sorted(set(count.pixels) - {0})[:SAMPLED_MASKS]:
            pieces.append(cv2.connectedComponents(np.uint8(values == value))[0] - 1)
    return bool(np.mean(np.array(pieces) < 2) >= 0.9)


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


def listed_foreground(
    foreground: str, pixels: Counter[float], channel: str, lossy: bool
) -> MaskValues:
    """The values of --foreground, such as 15 or 1,128-255. Raises UserError for one without use.

    255 is ignored next to other background, unless it is listed or the levels are soft.
    """
    listed = listed_values("--foreground", foreground, pixels, channel)
    rest = set(pixels) - listed
    labels = channel == "grey" and rest > {IGNORE} and not lossy and soft_cut(pixels, lossy) is None
    return MaskValues(channel, tuple(sorted(listed)), (IGNORE,) if labels else ())


def listed_values(flag: str, listed: str, pixels: Counter[float], channel: str) -> set[float]:
    """The values that a flag lists, such as 15 or 1,128-255. Raises UserError for one without use.

    Those of labels may be written as numbers or as colours.
    """
    names = {show(value, channel): value for value in sorted(pixels)}
    chosen: set[float] = set()
    for text in listed.replace(" ", "").lower().split(","):
        low, _, high = text.partition("-")
        try:
            limits = (
                (names[text], names[text]) if text in names else (float(low), float(high or low))
            )
        except ValueError:
            limits = (1, 0)  # nothing is in it
        values = {value for value in pixels if limits[0] <= value <= limits[1]}
        if not values:
            raise UserError(f"{flag} {text}", "no mask has this value", first_five(names))
        chosen |= values
    return chosen


def hint_of_inversion(values: MaskValues, counts: list[ValueCounts]) -> str:
    """The end of a line about masks that are foreground nearly everywhere; else ""."""
    shares = []
    for count in counts:
        seen = {value: n for value, n in count.pixels.items() if value not in values.ignored}
        foreground = sum(n for value, n in seen.items() if values.covers(value))
        shares.append(foreground / max(1, sum(seen.values())))
    if np.mean(shares) <= INVERTED or values.cut == 0.5:
        return ""
    rest = sorted(set(sum_pixels(counts)) - {*values.ignored})
    rest = [show(value, values.channel) for value in rest if not values.covers(value)]
    flag = ",".join(rest) if values.cut is None else f"0-{values.cut:g}"
    share = f"{100 * np.mean(shares):.0f} % of the pixels are foreground"
    return f"; {share}, so the masks look inverted: --foreground {flag} inverts them"


def check_foreground(values: MaskValues, pixels: Counter[float], count: int) -> None:
    """Raise UserError where masks have no foreground, or no background."""
    is_foreground = [values.covers(value) for value in sorted(pixels)]
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


def check_labels(counts: list[ValueCounts], channel: str, request: ClassRequest | None) -> None:
    """Raise UserError where the values are not those of classes: few whole numbers, no JPEG."""
    pixels = sum_pixels(counts)
    whole = all(value == int(value) >= 0 for value in pixels) and len(pixels) <= MOST_LABELS + 1
    lossy = is_lossy(counts)
    if not request or request.merged or not whole or lossy:
        raise not_binary(counts, channel)
    if channel == "colour" and not request.listed and not any(v & 0xFFFF for v in pixels):
        raise UserError(
            "--data",
            "the masks are numbers in red alone: of objects, or of classes?",
            "--classes one takes all for one class; --classes FILE with name,r,g,b lists classes",
        )


def objects_or_classes(pixels: Counter[float], channel: str) -> UserError:
    """The message for few values that may number objects."""
    names = first_five(show(value, channel) for value in sorted(pixels))
    columns = "name,r,g,b" if channel == "colour" else "id,name"
    return UserError(
        "--data",
        f"values {names}, each in one piece: are they numbered objects, or classes?",
        f"--classes one takes all for one class; --classes FILE with {columns} lists classes",
    )


def refuse_soft_levels(counts: list[ValueCounts]) -> None:
    """Raise UserError for a few levels, such as 0, 128 and 255, with soft edges or JPEG's noise.

    Each image has levels all over, but nearly all pixels are close to one of few.
    """
    pixels = sum_pixels(counts)
    peaks: list[float] = []
    total = pixels.total()
    for value, count in pixels.most_common(64):
        if count > 0.01 * total and all(abs(value - peak) > 16 for peak in peaks):
            peaks.append(value)
    peaks.sort()
    close = sum(n for v, n in pixels.items() if any(abs(v - peak) <= 8 for peak in peaks))
    many = (
        bool(counts) and np.median([len({v // 16 for v in count.pixels}) for count in counts]) >= 8
    )
    if not (
        many and close > 0.7 * total and 3 <= len(peaks) <= 8 and LARGE_ID <= peaks[-1] <= IGNORE
    ):
        return
    flags = [
        f"--foreground {(low + high) / 2:g}-{IGNORE} (all from {high:g})"
        for low, high in itertools.pairwise(peaks)
    ]
    levels = ", ".join(f"{peak:g}" for peak in peaks)
    problem = (
        f"the masks are a label map with soft edges or JPEG's noise, of levels around {levels}"
    )
    raise UserError("--data", problem, f"name the foreground: {' or '.join(flags)}")


# --------------------------------------------------------------------------------------------------
#  What was decided, for people
# --------------------------------------------------------------------------------------------------


def in_channel(channel: str) -> str:
    """Where values were read, unless it is grey."""
    return "" if channel == "grey" else f" in {channel}"


def describe_values(values: MaskValues, pixels: Counter[float], count: int) -> str:
    """What the values of so many masks mean, and what is ignored."""
    names = first_five(show(value, values.channel) for value in sorted(pixels))
    foreground = first_five(show(value, values.channel) for value in values.foreground)
    text = f"of {names}: foreground is {foreground}"
    if values.cut == 0:
        text = f"of {len(pixels) - 1} objects: foreground is above 0; if they are classes, list "
        text += "them: --classes FILE"
    elif values.cut is not None:
        soft = f"{len(pixels)} levels with two peaks (soft edges or JPEG)"
        text = f"of {soft}, foreground is above {values.cut:g}"
    if values.ignored:
        text += f"; {first_five(show(v, values.channel) for v in values.ignored)} is ignored"
    return f"{count} files{in_channel(values.channel)} {text}"


def describe_labels(
    counts: list[ValueCounts], channel: str, labels: Labels, always: tuple[float, ...]
) -> str:
    """What label maps were understood as, and which values are ignored: some `always`."""
    pixels = sum_pixels(counts)
    ignored = []
    free = set() if channel == "colour" else {IGNORE} & set(pixels) - set(labels.labels)
    for value in sorted(set(pixels) - set(labels.labels) - free):
        where = next(count.path.name for count in counts if value in count.pixels)
        ignored.append(f"{show(value, channel)} ({pixels[value]} pixels, such as in {where})")
    never = f"; {first_five(show(v, channel) for v in sorted({*free, *always}))} is ignored"
    never *= bool(free or always)
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
