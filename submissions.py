"""Submissions of several classes: submission.csv with a row for each image and class, and PNGs."""

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import utils
from classes import Classes, class_column, split_id
from colours import palette
from images import encode_image
from rle import ANSWER_COLUMNS, empty_mark, rle_column, rle_encode, write_submission
from utils import UserError, first_five, write_file


class ClassSubmission:
    """submission.csv of several classes, with the header, ids and order of the sample submission.

    The class of a row is in a column of its own, or joined to the id. Without a sample: a row for
    each image and class. Raises UserError where sample, images and classes do not fit.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        sample: str,
        on_missing: str,
        order: str,
        classes: Classes,
    ) -> None:
        self.order, self.classes, self.empty = order, classes, ""
        self.answers: dict[tuple[str, str], str] = {}
        self.header, self.column = ["ImageId", "ClassId", "EncodedPixels"], 2
        self.keys = [(name, value) for name in samples.id for value in classes.values]
        self.rows = [[*key, ""] for key in self.keys]
        if sample:
            self.read_sample(sample, on_missing, samples.id.tolist())
        else:
            words = "none found, a row for each image and class; or --sample_submission CSV"
            print(f"sample submission: {words}")

    def read_sample(self, sample: str, on_missing: str, stems: list[str]) -> None:
        """Take header, ids, classes, order and column from a sample submission. UserError."""
        self.header, table = utils.read_table(Path(sample))
        self.rows = list(table.values())
        column = rle_column(self.header, self.rows, ANSWER_COLUMNS)
        self.column = len(self.header) - 1 if column is None else column
        match = utils.id_matcher(stems)
        ids = utils.id_column(self.header, self.rows, self.column, match)
        kind = class_column(self.header, ids)
        if kind is None:
            pairs = [split_id(row[ids], match) for row in self.rows]
            where = f"ids joined with classes in {self.header[ids]}"
        else:
            pairs = [(row[ids], row[kind]) for row in self.rows]
            where = f"ids in {self.header[ids]}, classes in {self.header[kind]}"
        self.check_classes(sample, pairs, on_missing)
        self.keys = [(match(name) or name, self.value_of(label)) for name, label in pairs]
        unknown = [name for name, _ in pairs if not match(name)]
        twice = [" ".join(key) for key, times in Counter(self.keys).items() if times > 1]
        missing = "ids without an image in --data (--on_missing empty: empty masks)"
        checks = {missing: unknown * (on_missing == "error")}
        checks["ids that occur twice with one class"] = twice
        for words, wrong in checks.items():
            if wrong:
                reason = f"{len(wrong)} {words}: {first_five(wrong)}"
                raise UserError(f"--sample_submission {sample}: {reason}")
        left = sorted(set(stems) - {name for name, _ in self.keys})
        if left:
            print(
                f"{sample}: {len(left)} images are not asked for and left out: {first_five(left)}"
            )
        self.empty = empty_mark(self.rows, self.column)
        answers = f"RLE in {self.header[self.column]}, by {self.order}, empty: {self.empty!r}"
        print(f"sample submission: {sample} ({where}, {answers})")

    def value_of(self, label: str) -> str:
        """The value of a class that a sample calls by its value or its name; "" for none."""
        names = dict(zip(self.classes.names, self.classes.values, strict=True))
        return label if label in self.classes.values else names.get(label, "")

    def check_classes(self, sample: str, pairs: list[tuple[str, str]], on_missing: str) -> None:
        """Raise UserError where a sample asks for classes that the model does not have, or none."""
        labels = Counter(label for _, label in pairs)
        own = first_five(self.classes.names)
        if on_missing == "empty":
            labels.pop("", None)  # an id without an image is not split
        other = [label for label in labels if label and not self.value_of(label)]
        if other:
            reason = f"asks for classes that the model does not have: {first_five(other)}"
            raise UserError(f"--sample_submission {sample}: {reason}; it has {own}")
        if labels[""]:
            example = next(name for name, label in pairs if not label)
            reason = f"{labels['']} rows name no class, such as {example}; the model has {own}"
            remedy = "name a sample with a column of classes, or ids such as a.jpg_1"
            raise UserError(f"--sample_submission {sample}: {reason}; {remedy}")

    def add(self, sample: Any, probability: np.ndarray, mask: np.ndarray) -> None:
        """Keep the RLE of one image's classes: bool (K, h, w), or their numbers (h, w)."""
        for index, value in enumerate(self.classes.values):
            one = mask == index if self.classes.exclusive else mask[index]
            self.answers[sample.id, value] = rle_encode(one, self.order)

    def write(self, out: Path) -> None:
        """Write submission.csv whole. An image without an answer gets empty masks."""
        answers = [self.answers.get(key, "") for key in self.keys]
        write_submission(out, self.header, self.rows, self.column, answers, self.empty)


class PngSubmission:
    """submission.zip: a grey PNG for each image, whose values are those of the label maps.

    Of one class 0 and 255. Raises UserError for classes that overlap.
    """

    def __init__(
        self, samples: pd.DataFrame, sample: str, on_missing: str, order: str, classes: Classes
    ) -> None:
        if classes.names and not classes.exclusive:
            reason = "the model's classes may overlap, a label map holds one class for each pixel"
            raise UserError(f"--submission png: {reason}; take --submission rle")
        self.values = palette(classes)[0] if classes.names else np.array([0, 255], np.uint8)
        self.answers: dict[str, bytes] = {}

    def add(self, sample: Any, probability: np.ndarray, mask: np.ndarray) -> None:
        """Keep the PNG of one image's mask, at the image's own size."""
        self.answers[sample.id] = encode_image(self.values[mask.astype(np.uint8)], ".png")

    def write(self, out: Path) -> None:
        """Write submission.zip whole."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in sorted(self.answers):
                archive.writestr(f"{name}.png", self.answers[name])
        write_file(out / "submission.zip", buffer.getvalue())
        print(f"wrote {out / 'submission.zip'}: {len(self.answers)} label maps")
