"""Submissions: a csv of RLE as its sample shows, or label maps in a zip."""

import csv
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.classes import palette
from kit.data.csvs import (
    RLE_COLUMNS,
    class_column,
    id_column,
    id_matcher,
    rle_column,
    split_id,
)
from kit.data.images import encode_image
from kit.data.masks import plane
from kit.data.rle import EMPTY, rle_encode
from kit.errors import UserError, first_five
from kit.files import list_tables, read_rows, read_table, write_file

ANSWER_COLUMNS = RLE_COLUMNS | {
    "pixels", "mask", "segmentation", "annotation", "predicted", "prediction", "prediction_string",
    "predictionstring",
}  # fmt: skip
SAMPLE_NAME = re.compile(r"(?=.*(sample|example|format|template)).*sub(?!set)")

# --------------------------------------------------------------------------------------------------
#  submission.csv
# --------------------------------------------------------------------------------------------------


class RleSubmission:
    """submission.csv, a row for each image and class, as the sample submission has them.

    The class of a row is in a column of its own, or joined to the id; of one class there is none.
    Without a sample: a row for each image and class. `order` is that of the runs. Raises UserError
    where sample, images and classes do not fit, unless `on_missing` is "empty".
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        classes: Classes,
        sample: str = "",
        on_missing: str = "error",
        order: str = "columns",
    ) -> None:
        self.classes, self.order, self.empty = classes, order, ""
        self.answers: dict[tuple[str, str], str] = {}  # {(image, value of the class): RLE}
        self.keys = [(name, value) for name in samples.id for value in classes.values]
        if sample:
            self.read_sample(sample, on_missing, samples.id.tolist())
            return
        self.header = (
            ["ImageId", "ClassId", "EncodedPixels"] if classes.several else ["id", "rle_mask"]
        )
        self.column = len(self.header) - 1
        self.rows = [[*key[: self.column], ""] for key in self.keys]
        each = " and ".join(["image", "class"][: self.column])
        print(f"sample submission: none found, a row for each {each}; or --sample_submission CSV")

    def read_sample(self, sample: str, on_missing: str, stems: list[str]) -> None:
        """Take header, ids, classes, order and column from a sample submission. UserError."""
        where = f"--sample_submission {sample}"
        self.header, table = read_table(Path(sample))
        if len(self.header) < 2:
            raise UserError(where, "expected a header and rows of ids and RLE")
        match, self.rows = id_matcher(stems), list(table.values())
        column = rle_column(self.header, self.rows, ANSWER_COLUMNS)
        self.column = len(self.header) - 1 if column is None else column
        ids = id_column(self.header, self.rows, self.column, match)
        pairs, columns = self.ids_and_labels(ids, match)
        self.check_classes(where, pairs, on_missing)
        self.keys = [(match(name) or name, self.value_of(label)) for name, label in pairs]
        unknown = [name for name, _ in pairs if not match(name)]
        twice = [key for key, times in Counter(self.keys).items() if times > 1]
        twice = sorted(" ".join(key) if self.classes.several else key[0] for key in twice)
        for names, fault in (
            (unknown, "ids without an image in --data (--on_missing empty: empty masks)"),
            (twice, "ids that occur twice"),
        ):
            if names and (names is twice or on_missing == "error"):
                raise UserError(where, f"{len(names)} {fault}: {first_five(names)}")
        left = sorted(set(stems) - {name for name, _ in self.keys})
        if left:
            names = first_five(left)
            print(f"{sample}: {len(left)} images are not asked for and left out: {names}")
        self.empty = empty_mark(self.rows, self.column)
        answers = f"RLE in {self.header[self.column]}, by {self.order}, empty: {self.empty!r}"
        print(f"sample submission: {sample} ({columns}, {answers})")

    def ids_and_labels(self, ids: int, match: Any) -> tuple[list[tuple[str, str]], str]:
        """The id and the class of each row, and where they stand."""
        title, column = self.header[ids], class_column(self.header, ids)
        if not self.classes.several:
            return [(row[ids], self.classes.names[0]) for row in self.rows], f"ids in {title}"
        if column is None:
            pairs = [split_id(row[ids], match) for row in self.rows]
            return pairs, f"ids joined with classes in {title}"
        pairs = [(row[ids], row[column]) for row in self.rows]
        return pairs, f"ids in {title}, classes in {self.header[column]}"

    def value_of(self, label: str) -> str:
        """The value of a class that a sample calls by its value or its name; "" for none."""
        names = dict(zip(self.classes.names, self.classes.values, strict=True))
        return label if label in self.classes.values else names.get(label, "")

    def check_classes(self, where: str, pairs: list[tuple[str, str]], on_missing: str) -> None:
        """Raise UserError where a sample asks for classes that the model does not have, or none."""
        labels = Counter(label for _, label in pairs)
        names = first_five(self.classes.names)
        if on_missing == "empty":
            labels.pop("", None)  # an id without an image is not split
        other = [label for label in labels if label and not self.value_of(label)]
        if other:
            raise UserError(
                where,
                f"asks for classes that the model does not have: {first_five(other)}",
                f"it has {names}",
            )
        if labels[""]:
            example = next(name for name, label in pairs if not label)
            raise UserError(
                where,
                f"{labels['']} rows name no class, such as {example}; the model has {names}",
                "name a sample with a column of classes, or ids such as a.jpg_1",
            )

    def add(self, sample: Any, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Keep the RLE of an image's classes: bool (K, h, w), or a label map (h, w)."""
        for index, value in enumerate(self.classes.values):
            self.answers[sample.id, value] = rle_encode(plane(mask, index), self.order)

    def write(self, out: Path) -> None:
        """Write submission.csv whole. An image without an answer gets empty masks."""
        answers = [self.answers.get(key, "") for key in self.keys]
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(self.header)
        for fields, answer in zip(self.rows, answers, strict=True):
            before, after = fields[: self.column], fields[self.column + 1 :]
            writer.writerow([*before, answer or self.empty, *after])
        write_file(out / "submission.csv", content.getvalue())
        filled = sum(answer != "" for answer in answers)
        print(f"wrote {out / 'submission.csv'}: {len(self.rows)} rows, {filled} not empty")


def empty_mark(rows: list[list[str]], column: int) -> str:
    """How a sample submission writes an empty mask."""
    values = Counter(row[column] for row in rows)
    marks = [value for value, _ in values.most_common() if value and value.lower() in EMPTY]
    return marks[0] if marks else ""


def find_sample_submission(folder: Path, ids: Iterable[str]) -> str:
    """The sample submission in a folder of images or above it; "" where there is none.

    Of several the one with the most of the images' ids. Raises UserError for one that is damaged.
    """
    above = folder.parents[: 2 if folder.name == "images" else 1]  # test/images, test
    paths = [path for up in (folder, *above) for path in list_tables(up)]
    samples = [path for path in paths if SAMPLE_NAME.match(path.name.lower())]
    if len(samples) < 2:
        return str(samples[0]) if samples else ""
    match = id_matcher(ids)

    def matches(path: Path) -> int:
        return len({match(field) for _, fields in read_rows(path) for field in fields} - {""})

    return str(max(samples, key=matches))


# --------------------------------------------------------------------------------------------------
#  submission.zip
# --------------------------------------------------------------------------------------------------


class PngSubmission:
    """submission.zip: a grey PNG for each image, whose values are those of the label maps.

    Of one class 0 and 255. Raises UserError for classes that overlap.
    """

    def __init__(self, samples: pd.DataFrame, classes: Classes, *_: str) -> None:
        if classes.planes > 1:
            raise UserError(
                "--submission png",
                "the model's classes may overlap, a label map holds one for each pixel",
                "take --submission rle",
            )
        self.values = np.array([0, 255], np.uint8) if classes.planes else palette(classes)[0]
        self.answers: dict[str, bytes] = {}

    def add(self, sample: Any, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Keep the PNG of one image's mask, at the image's own size."""
        numbers = mask.reshape(-1, *mask.shape[-2:])[0].astype(np.uint8)
        self.answers[sample.id] = encode_image(self.values[numbers], ".png")

    def write(self, out: Path) -> None:
        """Write submission.zip whole; the same masks give the same bytes."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in sorted(self.answers):
                archive.writestr(zipfile.ZipInfo(f"{name}.png"), self.answers[name])
        write_file(out / "submission.zip", buffer.getvalue())
        print(f"wrote {out / 'submission.zip'}: {len(self.answers)} label maps")
