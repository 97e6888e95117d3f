"""Run-length encoding (RLE): the codec, csv files of masks, submission.csv.

"start length start length ...", down the columns, starts counted from 1.
"""

import csv
import dataclasses
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from utils import UserError, check_file, first_five, reason_of, write_file

ID_COLUMNS = (
    "id", "imageid", "image_id", "img", "record_id", "image", "filename", "file_name",
)  # fmt: skip
RLE_COLUMNS = (
    "rle_mask", "encodedpixels", "encoded_pixels", "pixels", "rle", "mask", "segmentation",
)  # fmt: skip
EMPTY = ("", "-", "nan", "none", "-1")  # how competitions write a mask without foreground
MAX_FIELD = 64 << 20  # characters in one field of a csv

# --------------------------------------------------------------------------------------------------
#  Codec
# --------------------------------------------------------------------------------------------------


def rle_encode(mask: np.ndarray) -> str:
    """(h, w) bool to RLE; "" where it is empty. A 2x2 mask of ones is "1 4"."""
    flat = cv2.transpose(np.ascontiguousarray(mask, np.uint8)).ravel()
    first, last = [1] * int(flat[0]), [flat.size + 1] * int(flat[-1])
    edges = np.r_[first, np.flatnonzero(flat[1:] != flat[:-1]) + 2, last].astype(np.int64)
    edges[1::2] -= edges[::2]
    return " ".join(map(str, edges.tolist()))


def rle_decode(runs: str, size: tuple[int, int], where: str = "RLE") -> np.ndarray:
    """RLE to (h, w) uint8 of 0 and 1. Raises UserError, with `where`, for impossible runs."""
    height, width = size
    try:
        numbers = np.array(runs.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        reason = "holds something that is no whole number; expected start and length in turn"
        raise UserError(f"{where}: {reason}") from None
    if len(numbers) % 2:
        reason = f"an odd count of numbers, {len(numbers)}; expected start and length in turn"
        raise UserError(f"{where}: {reason}")
    order = np.argsort(numbers[::2], kind="stable")
    starts, lengths = numbers[::2][order] - 1, numbers[1::2][order]
    beyond = (lengths > height * width - starts).any()
    if len(starts) and (starts[0] < 0 or lengths.min() < 1 or beyond):
        reason = f"a run leaves the image of {width}x{height} (starts count from 1)"
        raise UserError(f"{where}: {reason}")
    if (starts[:-1] + lengths[:-1] > starts[1:]).any():
        raise UserError(f"{where}: runs overlap")
    steps = np.zeros(height * width + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + lengths, -1)
    flat = steps[:-1].cumsum(dtype=np.int8).view(np.uint8)
    return np.ascontiguousarray(flat.reshape(width, height).T)


# --------------------------------------------------------------------------------------------------
#  A csv of masks
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunLengths:
    """A mask in the rows of a csv, one row for each object."""

    path: Path
    rows: tuple[tuple[int, str], ...]  # number of the row, its RLE

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """(h, w) uint8 of 0 and 1. `size`: its image's (h, w). Raises UserError."""
        mask = np.zeros(size, np.uint8)
        for line, runs in self.rows:
            mask |= rle_decode(runs, size, f"{self.path.name} row {line}")
        return mask


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv with their numbers, the header first. Raises UserError that names the row.

    `csv`, not pandas, which fills up a short row and so turns it into an empty mask.
    """
    csv.field_size_limit(MAX_FIELD)
    line = 0
    try:
        check_file(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline(MAX_FIELD)
            file.seek(0)
            separator = max(",;\t", key=head.count)
            for fields in csv.reader(file, delimiter=separator, strict=True):
                line += 1
                if fields:
                    yield line, [field.strip() for field in fields]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = f"row {line + 1} cannot be read ({reason_of(error)}); fix the csv"
        raise UserError(f"{path}: {reason}") from None


def mask_columns(path: Path) -> tuple[int, int] | None:
    """Which columns of a csv hold ids and RLE: by name, or the first two if they look like it."""
    if "submission" in path.name.lower():
        return None
    rows = [fields for _, fields in itertools.islice(read_table(path), 200)]
    if not rows or len(rows[0]) < 2:
        return None
    header = [name.lower() for name in rows[0]]
    ids = [header.index(name) for name in ID_COLUMNS if name in header]
    runs = [header.index(name) for name in RLE_COLUMNS if name in header]
    if runs:
        return (ids or [0])[0], runs[0]
    values = [row[1] for row in rows[1:] if len(row) > 1 and row[1].lower() not in EMPTY]
    looks_like_rle = values and all(re.fullmatch(r"\d+ \d+( \d+ \d+)*", v) for v in values)
    return (0, 1) if looks_like_rle else None


def read_masks(
    path: Path, stems: set[str]
) -> tuple[dict[str, RunLengths], dict[str, dict[str, str]]]:
    """Read a csv with one row per image or per object; an image without a row is empty.

    Returns {stem: mask} and {stem: {column: value}}. Raises UserError.
    """
    columns = mask_columns(path)
    if columns is None:
        wanted = "expected a csv with a column of ids and one of RLE (start, length)"
        raise UserError(f"--masks {path}: {wanted}")
    table = read_table(path)
    _, header = next(table)
    rows: dict[str, list[tuple[int, str]]] = {stem: [] for stem in stems}
    fields_of: dict[str, dict[str, str]] = {}
    unknown = []
    for line, fields in table:
        if len(fields) != len(header):
            counts = f"{len(fields)} fields, the header {len(header)}"
            raise UserError(f"{path}: row {line} has {counts}; fix the csv")
        name, runs = (fields[column] for column in columns)
        stem = name if name in rows else Path(name).stem
        if stem not in rows:
            unknown.append(name)
            continue
        fields_of[stem] = dict(zip(header, fields, strict=True))
        if runs.lower() not in EMPTY:
            rows[stem].append((line, runs))
    if unknown and not fields_of:
        wanted = f"none of its ids is an image, such as {unknown[0]}; expected names of images"
        raise UserError(f"{path}: {wanted}")
    if unknown:
        names = first_five(unknown)
        print(f"{path.name}: {len(unknown)} rows name no image and are left out: {names}")
    return {stem: RunLengths(path, tuple(parts)) for stem, parts in rows.items()}, fields_of


# --------------------------------------------------------------------------------------------------
#  submission.csv
# --------------------------------------------------------------------------------------------------


class RleSubmission:
    """submission.csv with the header, ids and order of the sample submission ("" for none).

    Raises UserError where sample and images do not fit, unless `on_missing` is "empty".
    """

    def __init__(self, samples: pd.DataFrame, sample: str, on_missing: str = "error") -> None:
        ids = samples.id.tolist()
        self.answers: dict[str, str] = {}
        self.header, self.rows, self.column = ["id", "rle_mask"], [[i, ""] for i in ids], 1
        if sample:
            self.read_sample(sample)
        known = set(ids)
        self.ids = [row[0] if row[0] in known else Path(row[0]).stem for row in self.rows]
        unknown = sorted(set(self.ids) - known) if on_missing == "error" else []
        repeated = sorted(name for name, times in Counter(self.ids).items() if times > 1)
        for wrong, words in (
            (unknown, "ids without an image in --data (--on_missing empty: empty masks)"),
            (repeated, "ids that occur twice"),
        ):
            if wrong:
                reason = f"{len(wrong)} {words}: {first_five(wrong)}"
                raise UserError(f"--sample_submission {sample}: {reason}")
        extra = sorted(known - set(self.ids))
        if extra:
            names = first_five(extra)
            print(f"{sample}: {len(extra)} images are not asked for and left out: {names}")
        dash = any(row[self.column] == "-" for row in self.rows)
        self.empty = "-" if dash else ""

    def read_sample(self, sample: str) -> None:
        """Take header, ids, order and column from a sample submission. Raises UserError."""
        table = [fields for _, fields in read_table(Path(sample))]
        width = len(table[0]) if table else 0
        if width < 2 or any(len(row) != width for row in table):
            wanted = "expected a header and rows of ids and RLE"
            raise UserError(f"--sample_submission {sample}: {wanted}")
        self.header, self.rows = table[0], table[1:]
        names = [name.lower() for name in self.header]
        self.column = next((names.index(name) for name in RLE_COLUMNS if name in names), 1)

    def add(self, sample: Any, probability: np.ndarray, mask: np.ndarray) -> None:
        """Keep the RLE of one image's mask, bool (h, w), at the image's own size."""
        self.answers[sample.id] = rle_encode(mask)

    def write(self, out: Path) -> None:
        """Write submission.csv whole. An image without an answer gets an empty mask."""
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(self.header)
        for fields, name in zip(self.rows, self.ids, strict=True):
            answer = self.answers.get(name, "") or self.empty
            writer.writerow([*fields[: self.column], answer, *fields[self.column + 1 :]])
        write_file(out / "submission.csv", content.getvalue())
        filled = sum(self.answers.get(name, "") != "" for name in self.ids)
        print(f"wrote {out / 'submission.csv'}: {len(self.ids)} rows, {filled} not empty")


def find_sample_submission(folder: Path) -> str:
    """The sample submission in a folder of images or above it; "" where there is none."""
    above = folder.parents[: 2 if folder.name == "images" else 1]  # test/images, test
    found = [path for up in (folder, *above) for path in sorted(up.glob("*sample*submission*.csv"))]
    return str(found[0]) if found else ""
