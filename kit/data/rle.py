"""Run-length encoding (RLE): the codec, masks in the rows of a csv, the order of their runs.

"start length start length ...", down the columns, starts counted from 1; other orders are found.
"""

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from kit.data.masks import outline_length
from kit.data.rasters import Source, Window, reduce_mask
from kit.data.readers import read_header, read_image
from kit.errors import UserError

EMPTY = {"", "-", "-1", "1 0", "0 0", "[]", "nan", "null", "none"}  # a mask without foreground
RLE_COLUMNS = {"rle", "rle_mask", "mask_rle", "encodedpixels", "encoded_pixels"}
HEAD = 200  # rows from which the columns of a csv are understood
RUNS = re.compile(r"\d+ \d+( \d+ \d+)*")
LISTS = re.compile(r"\[[\d, ]*\]( *[;,] *\[[\d, ]*\])*")  # [1, 4];[9, 2]: a list for each object


def is_empty(mask: str) -> bool:
    """Whether a field of a csv is a mask without foreground."""
    return mask.lower() in EMPTY


def split_lists(mask: str) -> list[str]:
    """The RLE of each object in a field that holds `LISTS`; any other field as it is."""
    if not LISTS.fullmatch(mask):
        return [mask]
    lists = (" ".join(re.findall(r"\d+", part)) for part in mask.split("]"))
    return list(filter(None, lists))


def is_runs(mask: str) -> bool:
    """Whether a field of a csv is RLE."""
    return bool(RUNS.fullmatch(mask) or LISTS.fullmatch(mask))


def rle_columns(header: list[str], rows: list[list[str]], names: set[str]) -> list[int]:
    """The columns whose values are RLE, of several those with one of the names; else by name.

    By name alone at most one.
    """
    by_name = [c for c, name in enumerate(header) if name.lower() in names]
    by_value: dict[re.Pattern, list[int]] = {RUNS: [], LISTS: []}
    for column, (form, columns) in itertools.product(range(len(header)), by_value.items()):
        values = (row[column] for row in rows if len(row) > column)
        filled = (value for value in values if not (is_empty(value) or value.isalpha()))
        fits = [form.fullmatch(value) is not None for value in itertools.islice(filled, HEAD)]
        if 2 * sum(fits) > len(fits):
            columns.append(column)
    lists = [c for c in by_value[LISTS] if header[c].lower() in {*names, "annotation"}]
    found = by_value[RUNS] or lists  # other lists are boxes or points
    both = [column for column in found if column in by_name]
    return both or found or by_name[:1]


# --------------------------------------------------------------------------------------------------
#  Codec
# --------------------------------------------------------------------------------------------------

# An order is "columns" or "rows", with " from 0" where starts count from 0, or "relative": down the
# columns, from 0, each start counted from the end of the run before (SIIM-ACR Pneumothorax).
ORDERS = ("columns", "rows", "columns from 0", "rows from 0", "relative")


def rle_encode(mask: np.ndarray, order: str = "columns") -> str:
    """(h, w) bool to RLE; "" where it is empty. A 2x2 mask of ones is "1 4"."""
    return write_runs(find_runs(mask, order), order)


def find_runs(mask: np.ndarray, order: str) -> np.ndarray:
    """The runs of a mask, (h, w) bool: start, from 0, and length of each, (n, 2) int64."""
    pixels = np.ascontiguousarray(mask, np.uint8)
    flat = (pixels if order.startswith("rows") else cv2.transpose(pixels)).ravel()
    first, last = [0] * int(flat[0]), [flat.size] * int(flat[-1])
    edges = np.r_[first, np.flatnonzero(flat[1:] != flat[:-1]) + 1, last].astype(np.int64)
    edges[1::2] -= edges[::2]
    return edges.reshape(-1, 2)


def write_runs(runs: np.ndarray, order: str) -> str:
    """Runs of `find_runs` as RLE."""
    starts = runs[:, 0] + (order in ("columns", "rows"))
    if order == "relative":
        starts[1:] -= runs[:-1].sum(1)
    numbers = np.stack([starts, runs[:, 1]], 1).ravel()
    parts = np.array_split(numbers, 1 + len(numbers) // 100_000)  # numbers of Python are large
    return " ".join(" ".join(map(str, part.tolist())) for part in parts)


def block_runs(mask: np.ndarray, window: Window, order: str) -> np.ndarray:
    """The runs of a block of a mask, (h, w) bool, in the whole mask, see `find_runs`."""
    rows = order.startswith("rows")
    (height, width), lines = window.whole, mask if rows else mask.T
    runs = find_runs(np.pad(lines, ((0, 0), (0, 1))), "rows")  # none goes on in the next line
    line, start = np.divmod(runs[:, 0], lines.shape[1] + 1)
    first = (window.y + line) * width + window.x if rows else (window.x + line) * height + window.y
    return np.stack([first + start, runs[:, 1]], 1)


def join_runs(blocks: list[np.ndarray], order: str) -> str:
    """The RLE of a mask from the runs of its blocks, which go on in each other."""
    return write_runs(unite_runs(blocks), order)


def unite_runs(parts: list[np.ndarray]) -> np.ndarray:
    """The runs of several masks, see `find_runs`, as those of one: sorted, apart."""
    runs = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    runs = runs[runs[:, 0].argsort()]
    ends = np.maximum.accumulate(runs.sum(1))
    first = np.r_[True, runs[1:, 0] > ends[:-1]][: len(runs)]
    last = np.r_[first[1:], True][: len(runs)]
    return np.stack([runs[first, 0], ends[last] - runs[first, 0]], 1)


def rle_objects(mask: np.ndarray, order: str = "columns") -> list[str]:
    """The RLE of each connected component of a mask, (h, w) bool."""
    runs = find_runs(mask, order)
    labels = cv2.connectedComponents(mask.astype(np.uint8))[1]
    owner = labels.ravel("C" if order.startswith("rows") else "F")[runs[:, 0]]
    return [write_runs(runs[owner == number], order) for number in range(1, labels.max() + 1)]


def parse_runs(runs: str, where: str) -> np.ndarray:
    """RLE to (n, 2) int64, start and length of each run. Raises UserError, with `where`."""
    expected = "expected start and length in turn"
    try:
        numbers = np.array(runs.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise UserError(where, "holds something that is no whole number", expected) from None
    if len(numbers) % 2:
        raise UserError(where, f"an odd count of numbers, {len(numbers)}", expected)
    return numbers.reshape(-1, 2)


def rle_decode(
    runs: str,
    size: tuple[int, int],
    where: str = "RLE",
    order: str = "columns",
    window: Window | None = None,
) -> np.ndarray:
    """RLE to (h, w) uint8 of 0 and 1. Raises UserError, with `where`, for impossible runs.

    `window`: the block that is decoded, of an image of `size`; None: all.
    """
    window = window or Window(0, 0, *size, size)
    return decode_runs(sorted_runs(runs, size, where, order), window, order)


def decode_runs(runs: np.ndarray, window: Window, order: str) -> np.ndarray:
    """The block of a mask in `window`, (h, w) uint8 of 0 and 1, from runs that are sorted."""
    height, width = window.whole
    rows, columns = (
        range(start, start + length)
        for start, length in ((window.y, window.height), (window.x, window.width))
    )
    if order.startswith("rows"):
        return expand(runs, rows, columns, width)
    return np.ascontiguousarray(expand(runs, columns, rows, height).T)


def expand(runs: np.ndarray, lines: range, places: range, length: int) -> np.ndarray:
    """Sorted runs in some lines of a mask, and some places of these, as uint8 (lines, places).

    `length`: of a line. A run is cut into a piece for each line, and these to the places.
    """
    ends = runs.sum(1)
    first, last = lines.start * length, lines.stop * length
    runs = runs[np.searchsorted(ends, first, "right") : np.searchsorted(runs[:, 0], last)]
    starts, ends = np.maximum(runs[:, 0], first), np.minimum(runs.sum(1), last)
    counts = (ends - 1) // length - starts // length + 1
    run = np.repeat(np.arange(len(runs)), counts)
    line = starts[run] // length + np.arange(len(run)) - np.repeat(counts.cumsum() - counts, counts)
    steps = np.zeros(len(lines) * len(places) + 1, np.int8)
    for bounds, step in ((starts, 1), (ends, -1)):
        inside = np.clip(bounds[run] - line * length, places.start, places.stop) - places.start
        np.add.at(steps, (line - lines.start) * len(places) + inside, step)
    return steps[:-1].cumsum(dtype=np.int8).view(np.uint8).reshape(len(lines), len(places))


def sorted_runs(runs: str, size: tuple[int, int], where: str, order: str) -> np.ndarray:
    """RLE to its runs by their starts, see `find_runs`. Raises UserError for impossible ones."""
    height, width = size
    numbers, pixels = parse_runs(runs, where), height * width
    first = 0 if order == "relative" or order.endswith("from 0") else 1
    beyond = (numbers > pixels).any()
    if order == "relative" and not beyond:
        numbers[:, 0] = numbers.ravel().cumsum()[::2]
    starts, lengths = numbers[numbers[:, 0].argsort(kind="stable")].T
    starts = starts - first
    beyond = beyond or (lengths > pixels - starts).any()
    if len(starts) and (starts[0] < 0 or lengths.min() < 1 or beyond):
        raise UserError(
            where, f"a run leaves the image of {width}x{height} (starts count from {first})"
        )
    if (starts[:-1] + lengths[:-1] > starts[1:]).any():
        raise UserError(where, "runs overlap")
    return np.stack([starts, lengths], 1)


@dataclass(frozen=True)
class RunLengths:
    """A mask in the rows of a csv, one row for each object."""

    path: Path
    rows: tuple[tuple[int, str], ...] = ()  # number of the row, its RLE
    order: str = "auto"  # of `ORDERS`; auto: `decide_order` finds it, until then it is columns
    window: Window | None = None  # the block that is read; None: all

    @property
    def source(self) -> str:
        """The rows."""
        return f"{self.path} rows {' '.join(str(line) for line, _ in self.rows)}"

    def read(self, size: tuple[int, int], *_: Any) -> np.ndarray:
        """(h, w) uint8 of 0 and 1. `size`: its image's (h, w). Raises UserError."""
        window = self.window or Window(0, 0, *size, size)
        runs = united_runs(self.rows, window.whole, self.path.name, self.order)
        return reduce_mask(decode_runs(runs, window, self.order), window)


@functools.lru_cache(maxsize=8)  # blocks of an image read the same rows, one after another
def united_runs(
    rows: tuple[tuple[int, str], ...], size: tuple[int, int], name: str, order: str
) -> np.ndarray:
    """The runs in all rows of a mask, see `unite_runs`. Raises UserError for impossible ones."""
    return unite_runs([sorted_runs(runs, size, f"{name} row {n}", order) for n, runs in rows])


# --------------------------------------------------------------------------------------------------
#  The order of the runs
# --------------------------------------------------------------------------------------------------

SAMPLE_IMAGES, SAMPLE_PIXELS = 200, 5e7  # that the order is decided from, at most
# Smallest mean of ln(rows / columns) that decides. On 36 images of nuclei the outline's is 1.7 to
# 2.7 for each image, the edges' 0.45 to 3.7.
CLEAR = 0.2
LEAST_SPREAD = 0.25  # of that logarithm between images: one image alone needs 0.7
Example = tuple[Source, RunLengths]  # an image and its mask


def decide_order(samples: pd.DataFrame, rle: str, needed: bool) -> str:
    """Set the order of the masks in RLE; returns it, for the submission.

    Raises UserError where it cannot be told; masks that are not `needed` are left out instead.
    """
    pairs = zip(samples.layers, samples["mask"], strict=True)
    parts = [(image, part) for image, mask in pairs if mask for part in mask.parts]
    examples = [pair for pair in parts if getattr(pair[1], "order", "") == "auto" and pair[1].rows]
    if not examples:
        return "columns" if rle == "auto" else rle
    try:
        order = find_order(examples, rle)
    except UserError as error:
        if needed:
            raise
        print(f"no scores: {error}")
        samples["mask"] = None
        return "columns"
    samples["mask"] = [mask and mask.change(RunLengths, order=order) for mask in samples["mask"]]
    return order


def find_order(examples: list[Example], order: str) -> str:
    """The order of the runs, which is printed in a line.

    `order`: auto, columns, rows or relative. Raises UserError where auto cannot read the runs, and
    for relative where they are absolute.
    """
    path = examples[0][1].path
    starts = (runs for _, mask in examples for _, runs in mask.rows)
    base = " from 0" if any(runs.startswith("0 ") for runs in starts) else ""
    examples = examples[:: -(-len(examples) // SAMPLE_IMAGES)]
    overlap = 2 * sum(absolute_overlaps(mask.rows) for _, mask in examples) > len(examples)
    if order == "relative" and not overlap:
        raise UserError("--rle relative", f"the runs of {path} are absolute", "leave the flag out")
    if order == "auto" and overlap and not fits_relative(examples):
        raise UserError(
            path,
            "runs overlap with absolute starts, relative too",
            "take --rle columns, rows or relative",
        )
    if order == "relative" or (order == "auto" and overlap):
        order, reason = "relative", "each start counts from the end of the run before"
    elif order == "auto":
        order, reason = columns_or_rows(examples, base)
    else:
        order, reason = order + base, "--rle"
    print(f"{path.name}: RLE {order} ({reason})")
    return order


@functools.lru_cache(maxsize=8)  # blocks of an image have the same rows
def absolute_overlaps(rows: tuple[tuple[int, str], ...]) -> bool:
    """Whether runs of a mask would overlap, or go back, if their starts were absolute."""
    rows = [parse_runs(runs, "") for _, runs in rows if RUNS.fullmatch(runs)]
    return any((runs[1:, 0] < runs[:-1].sum(1)).any() for runs in rows)


def fits_relative(examples: list[Example]) -> bool:
    """Whether most masks can be read with relative starts."""
    readable = 0
    for image, mask in examples:
        with contextlib.suppress(UserError):  # counted; `samples.decode_pairs` names it
            replace(mask, order="relative").read(read_header(image).size)
            readable += 1
    return 2 * readable > len(examples)


def columns_or_rows(examples: list[Example], base: str) -> tuple[str, str]:
    """The order that the masks' outlines tell, else the images' edges, and the reason.

    Read in the wrong order a mask has a longer outline; transposed, that of a square, the same.
    """
    for measure, sign, reason in (
        (
            lambda _, mask: outline_length(mask),
            -1,
            "outlines of {} masks: {:.0f} pixels, by {} {:.0f}",
        ),
        (edge_contrast, 1, "edges of {} images along the outline: {:.0f}, by {} {:.0f}"),
    ):
        measured = [
            [measure(image, mask) for mask in both] for image, both in both_orders(examples, base)
        ]
        values = np.array([pair for pair in measured if pair[0] != pair[1]]).reshape(-1, 2)
        ratios = sign * np.log((values[:, 0] + 1) / (values[:, 1] + 1))
        spread = max(LEAST_SPREAD, np.std(ratios)) if len(ratios) else math.inf
        if abs(ratios.sum()) > len(ratios) * CLEAR + 2 * spread * math.sqrt(len(ratios)):
            pairs = list(zip(values.mean(0), ("columns", "rows"), strict=True))
            (value, order), (other, name) = pairs if ratios.sum() > 0 else pairs[::-1]
            return order + base, reason.format(len(values), value, name, other)
    return f"columns{base}", "neither outlines nor edges tell: check the masks, or take --rle rows"


def both_orders(
    examples: list[Example], base: str
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Each image with its mask (h, w) read by columns and by rows; damaged ones are left out."""
    pixels = 0
    for source, mask in examples:
        try:
            size = read_header(source).size
            orders = [f"{order}{base}" for order in ("columns", "rows")]
            columns, rows = (replace(mask, order=order).read(size) for order in orders)
            if not (columns.any() and rows.any()):  # of a block they may differ
                continue
            image = read_image(source)
        except UserError:  # `samples.decode_pairs` names it
            continue
        yield image, (columns, rows)
        pixels += columns.size
        if pixels > SAMPLE_PIXELS:
            return


def edge_contrast(image: np.ndarray, mask: np.ndarray) -> float:
    """The mean gradient of an image (h, w, 3) uint8 along the outline of a mask (h, w) uint8."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    gradient = cv2.magnitude(*(cv2.Sobel(grey, cv2.CV_32F, x, 1 - x) for x in (0, 1)))
    band = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return cv2.mean(gradient, band)[0]
