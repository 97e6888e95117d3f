"""Run-length encoding (RLE): the codec, its dialects, csv files of masks, submission.csv.

"start length start length ...", down the columns, starts counted from 1; other orders are found.
"""

import contextlib
import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

import images
import utils
from utils import UserError, first_five, write_file

RLE_COLUMNS = {"rle", "rle_mask", "mask_rle", "encodedpixels", "encoded_pixels"}
ANSWER_COLUMNS = RLE_COLUMNS | {
    "pixels", "mask", "segmentation", "annotation", "predicted", "prediction", "prediction_string",
    "predictionstring",
}  # fmt: skip
EMPTY = {"", "-", "-1", "1 0", "0 0", "nan", "null", "none"}  # a mask without foreground
RUNS = re.compile(r"\d+ \d+( \d+ \d+)*")
SAMPLE_NAME = re.compile(r"(?=.*(sample|example|format|template)).*sub(?!set)")
HEAD = 200  # rows from which the columns of a csv are understood

# --------------------------------------------------------------------------------------------------
#  Codec
# --------------------------------------------------------------------------------------------------

# An order is "columns" or "rows", with " from 0" where starts count from 0, or "relative": down the
# columns, from 0, each start counted from the end of the run before (SIIM-ACR Pneumothorax).


def rle_encode(mask: np.ndarray, order: str = "columns") -> str:
    """(h, w) bool to RLE; "" where it is empty. A 2x2 mask of ones is "1 4"."""
    pixels = np.ascontiguousarray(mask, np.uint8)
    flat = (pixels if order.startswith("rows") else cv2.transpose(pixels)).ravel()
    first, last = [1] * int(flat[0]), [flat.size + 1] * int(flat[-1])
    edges = np.r_[first, np.flatnonzero(flat[1:] != flat[:-1]) + 2, last].astype(np.int64)
    if order == "relative":
        edges = np.diff(edges, prepend=1)
    else:
        edges[1::2] -= edges[::2]
        edges[::2] -= order.endswith("from 0")
    return " ".join(map(str, edges.tolist()))


def parse_runs(runs: str, where: str) -> np.ndarray:
    """RLE to (n, 2) int64, start and length of each run. Raises UserError, with `where`."""
    try:
        numbers = np.array(runs.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        reason = "holds something that is no whole number; expected start and length in turn"
        raise UserError(f"{where}: {reason}") from None
    if len(numbers) % 2:
        reason = f"an odd count of numbers, {len(numbers)}; expected start and length in turn"
        raise UserError(f"{where}: {reason}")
    return numbers.reshape(-1, 2)


def rle_decode(
    runs: str, size: tuple[int, int], where: str = "RLE", order: str = "columns"
) -> np.ndarray:
    """RLE to (h, w) uint8 of 0 and 1. Raises UserError, with `where`, for impossible runs."""
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
        reason = f"a run leaves the image of {width}x{height} (starts count from {first})"
        raise UserError(f"{where}: {reason}")
    if (starts[:-1] + lengths[:-1] > starts[1:]).any():
        raise UserError(f"{where}: runs overlap")
    steps = np.zeros(pixels + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + lengths, -1)
    flat = steps[:-1].cumsum(dtype=np.int8).view(np.uint8)
    if order.startswith("rows"):
        return flat.reshape(height, width)
    return np.ascontiguousarray(flat.reshape(width, height).T)


@dataclass(frozen=True)
class RunLengths:
    """A mask in the rows of a csv, one row for each object."""

    path: Path
    rows: tuple[tuple[int, str], ...] = ()  # number of the row, its RLE
    order: str = "columns"

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """(h, w) uint8 of 0 and 1. `size`: its image's (h, w). Raises UserError."""
        mask = np.zeros(size, np.uint8)
        for line, runs in self.rows:
            mask |= rle_decode(runs, size, f"{self.path.name} row {line}", self.order)
        return mask


# --------------------------------------------------------------------------------------------------
#  The order of the runs
# --------------------------------------------------------------------------------------------------

SAMPLE_IMAGES, SAMPLE_PIXELS = 200, 5e7  # that the order is decided from, at most
# Smallest mean of ln(rows / columns) that decides. On 36 images of nuclei the outline's is 1.7 to
# 2.7 for each image, the edges' 0.45 to 3.7.
CLEAR = 0.2
LEAST_SPREAD = 0.25  # of that logarithm between images: one image alone needs 0.7


def resolve_order(samples: pd.DataFrame, wanted: str) -> tuple[list[Any], str]:
    """The masks with the order of their runs, which is printed in a line, and that order.

    `wanted`: auto, columns, rows or relative; other masks than those of a csv stay as they are.
    Raises UserError where auto cannot read the runs, and for relative where they are absolute.
    """
    masks = samples["mask"].tolist()
    examples = [row for row in samples.itertuples() if isinstance(row.mask, RunLengths)]
    examples = [row for row in examples if row.mask.rows]
    if not examples:
        return masks, "columns" if wanted == "auto" else wanted
    path = examples[0].mask.path
    starts = (runs for row in examples for _, runs in row.mask.rows)
    base = " from 0" if any(runs.startswith("0 ") for runs in starts) else ""
    examples = examples[:: -(-len(examples) // SAMPLE_IMAGES)]
    overlap = 2 * sum(absolute_overlaps(row.mask) for row in examples) > len(examples)
    if wanted == "relative" and not overlap:
        raise UserError(f"--rle relative: the runs of {path} are absolute; leave the flag out")
    if wanted == "auto" and overlap and not fits_relative(examples):
        remedy = "take --rle columns, rows or relative"
        raise UserError(f"{path}: runs overlap with absolute starts, relative too; {remedy}")
    order, reason = wanted + base, "--rle"
    if wanted == "relative" or wanted == "auto" and overlap:
        order, reason = "relative", "each start counts from the end of the run before"
    elif wanted == "auto":
        order, reason = columns_or_rows(examples, base)
    print(f"{path.name}: RLE {order} ({reason})")
    runs = [replace(mask, order=order) if isinstance(mask, RunLengths) else mask for mask in masks]
    return runs, order


def absolute_overlaps(mask: RunLengths) -> bool:
    """Whether runs of a mask would overlap, or go back, if their starts were absolute."""
    rows = [parse_runs(runs, "") for _, runs in mask.rows if RUNS.fullmatch(runs)]
    return any((runs[1:, 0] < runs[:-1].sum(1)).any() for runs in rows)


def fits_relative(examples: list[Any]) -> bool:
    """Whether most masks can be read with relative starts."""
    readable = 0
    for row in examples:
        with contextlib.suppress(UserError):  # counted; `data.decode_samples` names it
            replace(row.mask, order="relative").read(images.read_header(row.image).size)
            readable += 1
    return 2 * readable > len(examples)


def columns_or_rows(examples: list[Any], base: str) -> tuple[str, str]:
    """The order that the masks' outlines tell, else the images' edges, and the reason in words.

    Read in the wrong order a mask has a longer outline; transposed, that of a square, the same.
    """
    for measure, sign, words in (
        (images.outline_length, -1, "outlines of {} masks: {:.0f} pixels, by {} {:.0f}"),
        (images.edge_contrast, 1, "edges of {} images along the outline: {:.0f}, by {} {:.0f}"),
    ):
        found = [
            [measure(image, mask) for mask in both] for image, both in both_orders(examples, base)
        ]
        values = np.array(found).reshape(-1, 2)
        values = values[values[:, 0] != values[:, 1]]
        ratios = sign * np.log((values[:, 0] + 1) / (values[:, 1] + 1))
        spread = max(LEAST_SPREAD, np.std(ratios)) if len(ratios) else math.inf
        if abs(ratios.sum()) > len(ratios) * CLEAR + 2 * spread * math.sqrt(len(ratios)):
            pairs = list(zip(values.mean(0), ("columns", "rows"), strict=True))
            (value, order), (other, name) = pairs if ratios.sum() > 0 else pairs[::-1]
            return order + base, words.format(len(values), value, name, other)
    return f"columns{base}", "neither outlines nor edges tell: check the masks, or take --rle rows"


def both_orders(examples: list[Any], base: str) -> Iterator[tuple[Any, tuple[np.ndarray, ...]]]:
    """Each image with its mask (h, w) read by columns and by rows; damaged ones are left out."""
    pixels = 0
    for sample in examples:
        try:
            image = images.read_image(sample.image)
            columns = replace(sample.mask, order=f"columns{base}").read(image.shape[:2])
        except UserError:  # `data.decode_samples` names it
            continue
        yield image, (columns, columns.T.reshape(columns.shape))
        pixels += columns.size
        if pixels > SAMPLE_PIXELS:
            return


# --------------------------------------------------------------------------------------------------
#  The column of the runs
# --------------------------------------------------------------------------------------------------


def rle_column(header: list[str], rows: list[list[str]], names: set[str]) -> int | None:
    """The column whose values are RLE, else the one with one of the names; None for neither."""
    named = [c for c, name in enumerate(header) if name.lower() in names]
    by_value = []
    for column in range(len(header)):
        values = [row[column] for row in rows[:HEAD] if len(row) > column]
        values = [value for value in values if value.lower() not in EMPTY]
        if 2 * sum(RUNS.fullmatch(value) is not None for value in values) > len(values):
            by_value.append(column)
    both = [column for column in by_value if column in named]
    return next(iter(both or by_value or named), None)


# --------------------------------------------------------------------------------------------------
#  submission.csv
# --------------------------------------------------------------------------------------------------


class RleSubmission:
    """submission.csv with the header, ids and order of the sample submission ("" for none).

    `order` is that of the runs. Raises UserError where sample and images do not fit, unless
    `on_missing` is "empty".
    """

    def __init__(
        self, samples: pd.DataFrame, sample: str, on_missing: str = "error", order: str = "columns"
    ) -> None:
        self.order, self.empty = order, ""
        self.answers: dict[str, str] = {}
        self.header, self.column = ["id", "rle_mask"], 1
        self.ids = samples.id.tolist()
        self.rows = [[name, ""] for name in self.ids]
        if sample:
            self.read_sample(sample, on_missing)
            extra = sorted(set(samples.id) - set(self.ids))
            if extra:
                names = first_five(extra)
                print(f"{sample}: {len(extra)} images are not asked for and left out: {names}")
        else:
            print("sample submission: none found, a row for each image; or --sample_submission CSV")

    def read_sample(self, sample: str, on_missing: str) -> None:
        """Take header, ids, order and column from a sample submission. Raises UserError."""
        self.header, table = utils.read_table(Path(sample))
        if len(self.header) < 2:
            wanted = "expected a header and rows of ids and RLE"
            raise UserError(f"--sample_submission {sample}: {wanted}")
        match, self.rows = utils.id_matcher(self.ids), list(table.values())
        column = rle_column(self.header, self.rows, ANSWER_COLUMNS)
        self.column = len(self.header) - 1 if column is None else column
        id_place = utils.id_column(self.header, self.rows, self.column, match)
        names = [row[id_place] for row in self.rows]
        self.ids = [match(name) or name for name in names]
        unknown = [name for name in names if not match(name)] if on_missing == "error" else []
        repeated = sorted(name for name, times in Counter(self.ids).items() if times > 1)
        for wrong, words in (
            (unknown, "ids without an image in --data (--on_missing empty: empty masks)"),
            (repeated, "ids that occur twice"),
        ):
            if wrong:
                reason = f"{len(wrong)} {words}: {first_five(wrong)}"
                raise UserError(f"--sample_submission {sample}: {reason}")
        self.empty = empty_mark(self.rows, self.column)
        columns = f"ids in {self.header[id_place]}, RLE in {self.header[self.column]}"
        print(f"sample submission: {sample} ({columns}, by {self.order}, empty: {self.empty!r})")

    def add(self, sample: Any, probability: np.ndarray, mask: np.ndarray) -> None:
        """Keep the RLE of one image's mask, bool (h, w), at the image's own size."""
        self.answers[sample.id] = rle_encode(mask, self.order)

    def write(self, out: Path) -> None:
        """Write submission.csv whole. An image without an answer gets an empty mask."""
        answers = [self.answers.get(name, "") for name in self.ids]
        write_submission(out, self.header, self.rows, self.column, answers, self.empty)


def empty_mark(rows: list[list[str]], column: int) -> str:
    """How a sample submission writes an empty mask."""
    values = Counter(row[column] for row in rows)
    marks = [value for value, _ in values.most_common() if value and value.lower() in EMPTY]
    return marks[0] if marks else ""


def write_submission(
    out: Path,
    header: list[str],
    rows: list[list[str]],
    column: int,
    answers: list[str],
    empty: str,
) -> None:
    """Write submission.csv whole: the rows with the answers in a column; `empty` stands for ""."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(header)
    for fields, answer in zip(rows, answers, strict=True):
        writer.writerow([*fields[:column], answer or empty, *fields[column + 1 :]])
    write_file(out / "submission.csv", content.getvalue())
    filled = sum(answer != "" for answer in answers)
    print(f"wrote {out / 'submission.csv'}: {len(rows)} rows, {filled} not empty")


def find_sample_submission(folder: Path, ids: Iterable[str]) -> str:
    """The sample submission in a folder of images or above it; "" where there is none.

    Of several the one with the most of the images' ids. Raises UserError for one that is damaged.
    """
    above = folder.parents[: 2 if folder.name == "images" else 1]  # test/images, test
    paths = [path for up in (folder, *above) for path in utils.list_tables(up)]
    samples = [path for path in paths if SAMPLE_NAME.match(path.name.lower())]
    if len(samples) < 2:
        return str(samples[0]) if samples else ""
    match = utils.id_matcher(ids)

    def matches(path: Path) -> int:
        return len({match(field) for _, fields in utils.read_rows(path) for field in fields} - {""})

    return str(max(samples, key=matches))
