"""Label maps: mask files whose values are the labels of classes that exclude each other."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from classes import MOST, Classes, Listed, Wanted, choose_names
from images import IGNORE
from utils import UserError, first_five

LARGE_ID = 64  # ids of classes are smaller, or nearly all ids below occur, too


class ValueCounts(NamedTuple):
    """The distinct values of a mask in one channel."""

    pixels: Counter[float]  # {value: number of pixels}
    lossy: bool  # a JPEG
    hint: str  # "colour": has colours; "alpha": one colour, but alpha varies; else ""
    palette: set[tuple[int, int, str]]  # its colours that occur: (level, index, #ff0000)
    path: Path  # the first file


def show(value: float, channel: str) -> str:
    """A value as people write it: 15, 0.5, #ff0000."""
    return f"#{value:06x}" if channel == "colour" else f"{value:g}"


def class_numbers(pixels: np.ndarray, labels: tuple[float, ...]) -> np.ndarray:
    """The values of a label map (h, w) as numbers of classes, uint8; 255 for any other value."""
    if pixels.dtype == np.uint8:
        table = np.full(256, IGNORE, np.uint8)
        table[np.array(labels, int)] = range(len(labels))
        return table[pixels]
    order = np.argsort(labels)
    known = np.array(labels)[order]
    place = np.searchsorted(known, pixels).clip(max=len(known) - 1)
    return np.where(known[place] == pixels, order[place], IGNORE).astype(np.uint8)


def are_labels(counts: list[ValueCounts]) -> bool:
    """Whether the values may be those of classes: few whole numbers, not a JPEG's."""
    values = set().union(*(count.pixels for count in counts))
    whole = all(value == int(value) >= 0 for value in values)
    return whole and len(values) <= MOST + 1 and not any(count.lossy for count in counts)


def decide_labels(
    counts: list[ValueCounts], channel: str, wanted: Wanted, training: bool
) -> tuple[tuple[float, ...], str, Classes]:
    """The classes of label maps: those listed, else one for each value.

    Returns the value of each class, the same in words, and the classes. Raises UserError.
    """
    pixels = sum((count.pixels for count in counts), Counter())
    if channel == "grey" and not (wanted.listed or wanted.only or wanted.model):
        refuse_grey_levels(pixels)
    if channel != "colour":
        pixels.pop(IGNORE, None)
    listed = wanted.listed or name_values(pixels, channel, wanted)
    if channel == "colour":
        missing = [one.name for one in listed if not one.colour]
        if missing:
            reason = f"the masks are in colours, but {first_five(missing)} have none"
            raise UserError(f"{wanted.where}: {reason}; add the columns r,g,b")
        value_of = {one.name: int(one.colour[1:], 16) for one in listed}
    else:
        value_of = {one.name: label_of(one, number, wanted) for number, one in enumerate(listed)}
        check_highest(listed, pixels, wanted)
    if wanted.only and wanted.listed:
        choose_names(wanted, value_of)
        value_of = {name: value_of[name] for name in wanted.only}
    names, labels = tuple(value_of), tuple(value_of.values())
    present = [name for name, label in value_of.items() if pixels[label]]
    if training and len(present) < 2:
        there = present[0] if present else f"none of {first_five(names)}"
        values = first_five(show(value, channel) for value in sorted(pixels))
        reason = f"{there} alone is in the masks, whose values are {values}"
        raise UserError(f"--data: {reason}; name other masks with --masks, or fix --classes")
    values = tuple(show(label, channel) for label in labels)
    words = describe_labels(counts, channel, labels, names)
    return labels, words, Classes(names, values, exclusive=True)


def refuse_grey_levels(pixels: Counter[float]) -> None:
    """Raise UserError for 255 next to few, large levels, such as 128: is it a class, or an edge?"""
    levels = sorted(value for value in pixels if value not in (0, IGNORE))
    highest = max(levels, default=0)
    if IGNORE in pixels and highest >= LARGE_ID and 2 * len(levels) < highest:
        reason = f"grey levels {first_five(f'{value:g}' for value in sorted(pixels))}"
        one = f"--foreground {levels[len(levels) // 2]:g}-{IGNORE} takes these levels for one class"
        several = f"--classes FILE with id,name lists several, and {IGNORE} is ignored"
        raise UserError(f"--data: {reason}: is {IGNORE} a class, or ignored? {one}; {several}")


def label_of(one: Listed, number: int, wanted: Wanted) -> int:
    """The value of a listed class in label maps, its id or its place. Raises UserError."""
    if not one.id and number < IGNORE:
        return number
    if not one.id.isdecimal() or int(one.id) >= IGNORE:
        reason = f"{one.name} has the id {one.id}, label maps need 0 to {IGNORE - 1}"
        raise UserError(f"{wanted.where}: {reason}; fix the column id")
    return int(one.id)


def check_highest(listed: tuple[Listed, ...], pixels: Counter[float], wanted: Wanted) -> None:
    """Raise UserError where a list of names without ids is too short for the label maps."""
    highest = int(max(pixels, default=0))
    if not listed[0].id and highest >= len(listed):
        reason = f"lists {len(listed)} names, from 0, but label maps have ids to {highest}"
        raise UserError(f"{wanted.where}: {reason}; name them all, or give a file of id,name")


def name_values(pixels: Counter[float], channel: str, wanted: Wanted) -> tuple[Listed, ...]:
    """A class for each value, named by it, or as --classes says. Raises UserError."""
    values = [show(value, channel) for value in sorted(pixels)]
    if not wanted.only:
        return tuple(Listed(f"class {value}", value, value) for value in values)
    if channel == "colour":
        raise UserError(f"{wanted.where}: the masks are in colours; give a file of name,r,g,b")
    return tuple(Listed(name) for name in wanted.only)


def describe_labels(
    counts: list[ValueCounts], channel: str, labels: tuple[float, ...], names: tuple[str, ...]
) -> str:
    """What a label map was understood as, and which values are ignored, in words."""
    pixels = sum((count.pixels for count in counts), Counter())
    ignored = []
    free = set() if channel == "colour" else {IGNORE} & set(pixels)
    for value in sorted(set(pixels) - set(labels) - free):
        where = next(count.path.name for count in counts if value in count.pixels)
        ignored.append(f"{show(value, channel)} ({pixels[value]} pixels, such as in {where})")
    never = f"; {IGNORE} is ignored" if free else ""
    unlisted = f"; not listed and ignored: {first_five(ignored)}" if ignored else ""
    absent = [name for name, label in zip(names, labels, strict=True) if not pixels[label]]
    without = f"; in no mask: {first_five(absent)}" if absent else ""
    where = "" if channel == "grey" else f" in {channel}"
    return f"{len(counts)} label maps{where} of {len(labels)} classes{never}{unlisted}{without}"


def describe_label_map(counts: list[ValueCounts], channel: str) -> str:
    """The message for values that are not binary: how many pixels and images each has."""
    pixels = sum((count.pixels for count in counts), Counter())
    images = Counter(value for count in counts for value in count.pixels)
    words = [
        f"{show(value, channel)} ({pixels[value]} pixels, {images[value]} images)"
        for value in sorted(pixels)
    ]
    labels = [value for value in pixels if value not in (0, IGNORE)] or list(pixels)
    example = show(max(labels, key=pixels.__getitem__), channel)
    remedy = f"name the values that are foreground, such as --foreground {example}"
    ignored = f" ({IGNORE} is ignored unless listed)" if IGNORE in pixels else ""
    ranges = ", or ranges such as 128-255" if len(words) > 5 else ""
    return f"--data: the masks are a label map: {first_five(words)}; {remedy}{ranges}{ignored}"
