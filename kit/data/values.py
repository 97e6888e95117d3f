"""What the values in mask files mean, decided over all of them: one class, or labels of several."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable
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
    open_part,
    palette_levels,
)
from kit.data.rasters import Layer, Window
from kit.data.readers import in_parallel, open_image
from kit.errors import UserError, first_five

FEW_OBJECTS = 8  # as many, in every mask, may be classes of one piece each
FEW_LABELS = 4  # as many, in some masks, may be, too
SAMPLED_MASKS = 12  # and values of each, to count connected pieces
INVERTED = 0.75  # of the pixels are foreground: a line says so
MOST_LABELS = 254  # exclusive classes that fit into 8 bits, next to the ignored value 255

# --------------------------------------------------------------------------------------------------
#  Count the values
# --------------------------------------------------------------------------------------------------


class MaskCounts(NamedTuple):
    """The distinct values of a mask in one channel."""

    pixels: Counter[float]  # {value: number of pixels}
    lossy: bool  # a JPEG
    hint: str  # "colour": has colours; "alpha": one colour, but alpha varies; else ""
    palette: set[tuple[int, int, str]]  # its colours that occur: (level, index, #ff0000)
    path: Path | Layer  # the first file, or its first plane
    window: Window | None = None  # what was read of the file


class ValueCounts:
    """The distinct values of all masks in one channel, see `masks.MaskValues`."""

    def __init__(
        self, masks: list[MaskCounts], channel: str, ignored: Iterable[float] = ()
    ) -> None:
        """`ignored`: values that the masks have, but that do not count."""
        self.masks, self.channel, self.ignored = masks, channel, tuple(sorted(ignored))
        self.lossy = any(mask.lossy for mask in masks)
        self.palette = set().union(*(mask.palette for mask in masks))
        self.pixels: Counter[float] = Counter()
        for mask in masks:
            self.pixels.update(mask.pixels)

    def show(self, values: Iterable[float] | None = None) -> str:
        """Some values, or all, as people write them."""
        values = sorted(self.pixels if values is None else values)
        return first_five(show(value, self.channel) for value in values)

    def describe(self, kind: str) -> str:
        """How many files of a kind there are, and where their values are unless it is grey."""
        return f"{len(self.masks)} {kind}" + f" in {self.channel}" * (self.channel != "grey")


def count_all(masks: list[MaskFile], channel: str, opener: Opener) -> ValueCounts:
    """The values of all masks, read in threads; one that cannot be read is left out here."""

    def count(mask: MaskFile) -> MaskCounts | None:
        try:
            return count_values(mask, channel, opener)
        except UserError:  # `samples.decode_pairs` names the file
            return None

    counts = in_parallel(count, masks, "values of masks")
    return ValueCounts(list(filter(None, counts)), channel)


def count_values(mask: MaskFile, channel: str, opener: Opener) -> MaskCounts:
    """The values of one mask. Soft levels of 0..1 are rounded to 256 steps. Raises UserError."""
    pixels, lossy, hint, palette = Counter(), False, "", set()
    for plane in mask.planes:
        image = open_part(plane, opener, mask.window)
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
    return MaskCounts(pixels, lossy, hint, palette, mask.planes[0], mask.window)


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
    soft: bool = False,
) -> tuple[list[Planes | LabelMap | None], Classes]:
    """Decide what the values of all mask files mean, and print it; other masks stay as they are.

    Where there is one class only, label maps make several. `foreground`, `ignore`: the values of
    --foreground and --ignore, or ""; `soft`: --soft. Raises UserError.
    """
    parts = [part for mask in masks if mask for part in mask.parts]
    files = [part for part in parts if isinstance(part, MaskFile)]
    flags = {"foreground": foreground, "ignore": ignore, "soft": "true" if soft else ""}
    for flag, text in flags.items():
        if text and training and not files:
            raise UserError(f"--{flag} {text}", "there are no mask files", "leave the flag out")
    if not files:
        return masks, classes
    label_request = None if classes.several else request
    values, text, labels = decide_values(files, foreground, ignore, training, label_request, opener)
    print(f"masks: {text}{'; a pixel has the mean of its shares' if soft else ''}", flush=True)
    if labels and soft:
        problem, remedy = "the masks are label maps, without shares", "leave the flag out"
        raise UserError("--soft true", problem, f"{remedy}, or save shares as floats of 0 to 1")
    if labels:
        if len(files) < len(parts):
            raise UserError(
                "--missing empty", "a label map cannot be empty", "take --missing leave_out"
            )
        numbers = labels.labels
        maps = [mask and LabelMap(mask.parts[0], values.channel, numbers) for mask in masks]
        return maps, labels.classes
    values = replace(values, soft=soft)
    changed = [mask and mask.change(MaskFile, values=values) for mask in masks]
    return [mask and replace(mask, soft=soft) for mask in changed], classes


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
    channel = choose_channel(counts)
    if channel != "grey":
        counts = count_all(masks, channel, opener)
    counts = leave_out(counts, ignore, training)
    values, hint = None, ""
    if foreground:
        values = listed_foreground(foreground, counts)
    elif not (request and request.asks_for_labels):
        values = binary_values(counts, request, training, opener)
    if values is not None:
        if training and counts.masks:
            check_foreground(values, counts, len(masks))
            hint = hint_of_inversion(values, counts)
        values = replace(values, ignored=(*values.ignored, *counts.ignored))
        return values, describe_values(values, counts) + hint, None
    check_labels(counts, request)
    if channel == "grey" and counts.palette:
        channel = palette_channel(counts.palette, request)
        counts = leave_out(count_all(masks, channel, opener), ignore, training)
    labels = decide_labels(counts.pixels, channel, request, training, counts.ignored)
    return MaskValues(channel), describe_labels(counts, labels), labels


def leave_out(counts: ValueCounts, ignore: str, training: bool) -> ValueCounts:
    """The counts without ignored values: no-data below 0 or NaN, and --ignore's. UserError."""
    ignored = {value for value in counts.pixels if value < 0}
    accepted = () if training else (UserError,)  # what is scored need not have every value
    for text in ignore.split(",") if ignore else ():
        with contextlib.suppress(*accepted):
            ignored |= listed_values("--ignore", text, counts)
    if not ignored:
        return counts
    masks = [
        mask._replace(pixels=Counter({v: n for v, n in mask.pixels.items() if v not in ignored}))
        for mask in counts.masks
    ]
    return ValueCounts(masks, counts.channel, ignored)


def choose_channel(counts: ValueCounts) -> str:
    """Where the masks are: grey, colour or alpha. Raises UserError for a JPEG's colours."""
    hints = {mask.hint for mask in counts.masks}
    if "colour" in hints and counts.lossy:
        remedy = "save PNG files, with as many colours as there are classes"
        raise UserError("--data", "JPEG masks of colours: JPEG's noise blurs them", remedy)
    if "colour" in hints or differ({(level, colour) for level, _, colour in counts.palette}):
        return "colour"
    return "alpha" if "alpha" in hints and len(counts.pixels) == 1 else "grey"


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
    counts: ValueCounts, request: ClassRequest | None, training: bool, opener: Opener
) -> MaskValues | None:
    """What the values of masks of one class mean; None for label maps. Raises UserError."""
    channel, values, highest = counts.channel, set(counts.pixels), max(counts.pixels, default=0)
    if counts.lossy and 0 < highest <= 8:
        raise UserError(
            "--data",
            f"masks of 0 to {highest:g} as JPEG: JPEG's noise is as large as their values",
            "save PNG files",
        )
    full_scales = values & {1, IGNORE, 65535}
    if values <= {0, *full_scales} and channel != "colour":
        if all(len(full_scales & set(mask.pixels)) < 2 for mask in counts.masks):
            return MaskValues(channel, tuple(sorted(full_scales)) or (1,))  # each has its own
        if values <= {0, 1, IGNORE}:
            return MaskValues(channel, (1,), (IGNORE,))
    labels = values - {0, IGNORE if channel == "grey" else 0}
    if 0 in values and len(labels) == 1 and (IGNORE not in values or max(labels) < LARGE_ID):
        return MaskValues(channel, tuple(labels), tuple(values - labels - {0}))
    cut = soft_cut(counts)
    if cut is not None:
        return MaskValues(channel, cut=cut)
    refuse_soft_levels(counts)
    merged = bool(request and request.merged)  # into one class
    if (merged or not (request and request.listed)) and are_objects(counts, opener):
        if training and not merged:
            refuse_few_objects(counts, len(labels))
        return MaskValues(channel, cut=0)
    if not merged or request.model:
        return None
    ignored = {IGNORE} & values if channel == "grey" else set()
    return MaskValues(channel, tuple(sorted(values - {0} - ignored)), tuple(ignored))


def are_objects(counts: ValueCounts, opener: Opener) -> bool:
    """Whether values number the objects of each image on a background of 0, and are no classes.

    In nearly all images they are 1, 2, 3, ..., or few of many values recur; and nearly all are in
    one piece.
    """
    pixels = counts.pixels
    if len(pixels) < 4 or counts.lossy or pixels[0] < max(pixels.values()):
        return False
    listed = [sorted(set(mask.pixels) - {0}) for mask in counts.masks]
    unit = min(set(pixels) - {0})  # 1, or that of green or red in a colour
    numbered = [values == [unit * (k + 1) for k in range(len(values))] for values in listed]
    images = Counter(itertools.chain(*listed))
    often = max(1, len(listed) / 10)
    rare = len(images) > FEW_OBJECTS and np.median(list(images.values())) <= often
    if not rare and (unit not in (1, 1 << 8, 1 << 16) or np.mean(numbered) < 0.9):
        return False
    pieces = []
    for mask in counts.masks[:: -(-len(listed) // SAMPLED_MASKS)]:
        values = mask_pixels(open_part(mask.path, opener, mask.window), counts.channel)
        for value in sorted(set(mask.pixels) - {0})[:SAMPLED_MASKS]:
            pieces.append(cv2.connectedComponents(np.uint8(values == value))[0] - 1)
    return bool(np.mean(np.array(pieces) < 2) >= 0.9)


def soft_cut(counts: ValueCounts) -> float | None:
    """Half of the full scale where the levels are soft: two peaks, at 0 and at the full scale.

    Between the peaks soft edges fill many of 16 bins evenly, JPEG's noise those near the peaks; a
    further peak is a label, and so are few levels. Fractions of 1 are soft, colours are not.
    """
    levels = np.array(sorted(counts.pixels), float)
    full = next((full for full in (1, 255, 65535) if levels.max() <= full), 0)
    if counts.channel == "colour" or not full or levels.min() < 0:
        return None
    if full == 1 and (levels % 1).any():
        return full / 2
    weights = [counts.pixels[level] for level in levels]
    bins = np.histogram(levels / full, 16, (0, 1), weights=weights)[0]
    filled = (bins[2:-2] > 0).sum()
    if full > 1 and not counts.lossy and (len(levels) < 16 or filled < 8):
        return None
    ends = min(bins[:2].sum(), bins[-2:].sum())
    pairs = bins[:-1] + bins[1:]
    label = pairs[4:11].max() > max(0.6 * bins[4:12].sum(), 0.01 * ends)
    return None if label or ends < 2 * pairs[2:-2].max() or not ends else full / 2


def listed_foreground(foreground: str, counts: ValueCounts) -> MaskValues:
    """The values of --foreground, such as 15 or 1,128-255. Raises UserError for one without use.

    255 is ignored next to other background, unless it is listed or the levels are soft.
    """
    listed = listed_values("--foreground", foreground, counts)
    of_labels = counts.channel == "grey" and set(counts.pixels) - listed > {IGNORE}
    ignored = of_labels and not counts.lossy and soft_cut(counts) is None
    return MaskValues(counts.channel, tuple(sorted(listed)), (IGNORE,) if ignored else ())


def listed_values(flag: str, listed: str, counts: ValueCounts) -> set[float]:
    """The values that a flag lists, such as 15 or 1,128-255. Raises UserError for one without use.

    Those of labels may be written as numbers or as colours.
    """
    names = {show(value, counts.channel): value for value in sorted(counts.pixels)}
    chosen: set[float] = set()
    for text in listed.replace(" ", "").lower().split(","):
        low, _, high = text.partition("-")
        values = {names[text]} if text in names else set()
        with contextlib.suppress(ValueError):  # no number: nothing is in it
            values |= {
                value for value in counts.pixels if float(low) <= value <= float(high or low)
            }
        if not values:
            raise UserError(f"{flag} {text}", "no mask has this value", first_five(names))
        chosen |= values
    return chosen


def hint_of_inversion(values: MaskValues, counts: ValueCounts) -> str:
    """The end of a line about masks that are foreground nearly everywhere; else ""."""
    shares = []
    for mask in counts.masks:
        seen = {value: n for value, n in mask.pixels.items() if value not in values.ignored}
        foreground = sum(n for value, n in seen.items() if values.covers(value))
        shares.append(foreground / max(1, sum(seen.values())))
    if np.mean(shares) <= INVERTED or values.cut == 0.5:
        return ""
    rest = [v for v in sorted(counts.pixels) if not (v in values.ignored or values.covers(v))]
    listed = ",".join(show(value, values.channel) for value in rest)
    flag = listed if values.cut is None else f"0-{values.cut:g}"
    share = f"{100 * np.mean(shares):.0f} % of the pixels are foreground"
    return f"; {share}, so the masks look inverted: --foreground {flag} inverts them"


def check_foreground(values: MaskValues, counts: ValueCounts, files: int) -> None:
    """Raise UserError where masks have no foreground, or no background."""
    foreground = [value for value in counts.pixels if values.covers(value)]
    if foreground and len(counts.pixels) > len(foreground) + len(values.ignored):
        return
    kind = "full (no background)" if foreground else "empty (no foreground)"
    raise UserError(
        "--data",
        f"all {files} masks are {kind}: {counts.show()}",
        "name other masks with --masks, or the values of the foreground with --foreground",
    )


# --------------------------------------------------------------------------------------------------
#  Label maps
# --------------------------------------------------------------------------------------------------


def check_labels(counts: ValueCounts, request: ClassRequest | None) -> None:
    """Raise UserError where the values are not those of classes: few whole numbers, no JPEG."""
    whole = all(value == int(value) >= 0 for value in counts.pixels)
    few = len(counts.pixels) <= MOST_LABELS + 1
    if not (request and whole and few) or request.merged or counts.lossy:
        raise not_binary(counts)
    in_red = counts.channel == "colour" and not any(value & 0xFFFF for value in counts.pixels)
    if in_red and not request.listed:
        raise UserError(
            "--data",
            "the masks are numbers in red alone: of objects, or of classes?",
            "--classes one takes all for one class; --classes FILE with name,r,g,b lists classes",
        )


def refuse_few_objects(counts: ValueCounts, objects: int) -> None:
    """Raise UserError where the most objects of a mask are so few that they may be classes."""
    same = len({len(mask.pixels) for mask in counts.masks}) == 1
    if objects > (FEW_OBJECTS if same else FEW_LABELS):
        return
    columns = "name,r,g,b" if counts.channel == "colour" else "id,name"
    raise UserError(
        "--data",
        f"values {counts.show()}, each in one piece: are they numbered objects, or classes?",
        f"--classes one takes all for one class; --classes FILE with {columns} lists classes",
    )


def refuse_soft_levels(counts: ValueCounts) -> None:
    """Raise UserError for a few levels, such as 0, 128 and 255, with soft edges or JPEG's noise.

    Each image has levels all over, but nearly all pixels are close to one of few.
    """
    pixels, peaks = counts.pixels, []
    for value, count in pixels.most_common(64):
        if count > 0.01 * pixels.total() and all(abs(value - peak) > 16 for peak in peaks):
            peaks.append(value)
    peaks.sort()
    close = sum(n for v, n in pixels.items() if any(abs(v - peak) <= 8 for peak in peaks))
    levels = np.median([len({v // 16 for v in mask.pixels}) for mask in counts.masks] or [0])
    soft = levels >= 8 and close > 0.7 * pixels.total()
    if not (soft and 3 <= len(peaks) <= 8 and LARGE_ID <= peaks[-1] <= IGNORE):
        return
    flags = [
        f"--foreground {(low + high) / 2:g}-{IGNORE} (all from {high:g})"
        for low, high in itertools.pairwise(peaks)
    ]
    around = ", ".join(f"{peak:g}" for peak in peaks)
    raise UserError(
        "--data",
        f"the masks are a label map with soft edges or JPEG's noise, of levels around {around}",
        f"name the foreground: {' or '.join(flags)}",
    )


# --------------------------------------------------------------------------------------------------
#  What was decided, for people
# --------------------------------------------------------------------------------------------------


def describe_values(values: MaskValues, counts: ValueCounts) -> str:
    """What the values of masks mean, and what is ignored."""
    if values.cut is None:
        text = f"of {counts.show()}: foreground is {counts.show(values.foreground)}"
    elif values.cut == 0:
        text = f"of {len(counts.pixels) - 1} objects: foreground is above 0; if they are classes, "
        text += "list them: --classes FILE"
    else:
        kind = "levels with two peaks (soft edges or JPEG)"
        kind = kind if values.cut > 1 else "shares of 0 to 1 (--soft true trains on them)"
        text = f"of {len(counts.pixels)} {kind}, foreground is above {values.cut:g}"
    ignored = f"; {counts.show(values.ignored)} is ignored" if values.ignored else ""
    return f"{counts.describe('files')} {text}{ignored}"


def describe_labels(counts: ValueCounts, labels: Labels) -> str:
    """What label maps were understood as, and which values are ignored."""
    unlisted, always = set(counts.pixels) - set(labels.labels), set(counts.ignored)
    if counts.channel != "colour":
        always |= {IGNORE} & unlisted
    ignored = []
    for value in sorted(unlisted - always):
        where = next(Path(str(mask.path)).name for mask in counts.masks if value in mask.pixels)
        pixels = f"{counts.pixels[value]} pixels, such as in {where}"
        ignored.append(f"{show(value, counts.channel)} ({pixels})")
    names = zip(labels.classes.names, labels.labels, strict=True)
    absent = [name for name, label in names if not counts.pixels[label]]
    text = f"{counts.describe('label maps')} of {len(labels.labels)} classes"
    text += f"; {counts.show(always)} is ignored" if always else ""
    text += f"; not listed and ignored: {first_five(ignored)}" if ignored else ""
    return text + (f"; in no mask: {first_five(absent)}" if absent else "")


def not_binary(counts: ValueCounts) -> UserError:
    """The message for values that are not binary: how many pixels and images each has."""
    pixels, channel = counts.pixels, counts.channel
    images = Counter(value for mask in counts.masks for value in mask.pixels)
    values = [
        f"{show(value, channel)} ({pixels[value]} pixels, {images[value]} images)"
        for value in sorted(pixels)
    ]
    labels = [value for value in pixels if value not in (0, IGNORE)] or list(pixels)
    example = show(max(labels, key=pixels.__getitem__), channel)
    ranges = ", or ranges such as 128-255" if len(values) > 5 else ""
    ignored = f" ({IGNORE} is ignored unless listed)" if IGNORE in pixels else ""
    return UserError(
        "--data",
        f"the masks are a label map: {first_five(values)}",
        f"name the values that are foreground, such as --foreground {example}{ranges}{ignored}",
    )
