"""Submissions: a csv of RLE as its sample shows, or label maps in a zip."""

import contextlib
import csv
import io
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.bands import join_bands
from kit.data.classes import palette
from kit.data.csvs import (
    Match,
    class_column,
    class_of,
    count_images,
    id_column,
    id_matcher,
    name_images,
    split_id,
)
from kit.data.images import encode_image
from kit.data.masks import plane
from kit.data.names import IMAGE_WORDS, SPLIT_WORDS, list_files, make_ids, split_words
from kit.data.readers import IMAGE_SUFFIXES, read_header
from kit.data.rle import (
    LISTS,
    RLE_COLUMNS,
    RUNS,
    is_empty,
    is_runs,
    parse_runs,
    rle_columns,
    rle_encode,
    rle_objects,
)
from kit.errors import UserError, first_five
from kit.files import list_tables, read_rows, read_table, write_file, write_zip

ANSWER_COLUMNS = RLE_COLUMNS | {
    "pixels", "mask", "segmentation", "annotation", "predicted", "prediction", "prediction_string",
    "predictionstring",
}  # fmt: skip
SAMPLE_NAME = re.compile(r"(?=.*(sample|example|format|template)).*sub(?!set)")
OWN_HEADER = "--sample_submission none writes a row for each image and class"
SMALLEST = 64  # a sample's full mask of fewer of the image's pixels, one in so many, is a dummy

# --------------------------------------------------------------------------------------------------
#  submission.csv
# --------------------------------------------------------------------------------------------------


def own_header(classes: Classes) -> list[str]:
    """The columns of a csv that no sample describes."""
    return ["ImageId", "ClassId", "EncodedPixels"] if classes.several else ["id", "rle_mask"]


class RleSubmission:
    """submission.csv, a row for each image and class, or each object, as the sample has them.

    The class of a row is in a column of its own, or joined to the id; of one class there is none.
    `order` is that of the runs, `size` (h, w) that of the masks, () each image's own. `instances`:
    rows writes each connected component by itself, union all in one; auto is rows where the sample
    has lists of runs. Raises UserError where sample, images and classes do not fit; ids without an
    image are refused where `on_missing` is "error", or where all are and it is not "rerun".
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        classes: Classes,
        sample: str = "",
        on_missing: str = "error",
        order: str = "columns",
        size: tuple[int, ...] = (),
        instances: str = "auto",
    ) -> None:
        self.classes, self.order, self.size, self.instances = classes, order, size, instances
        self.answers: dict[tuple[str, str], list[str]] = {}  # {(image, value of the class): RLE}
        self.empty = self.list = ""  # how the sample writes an empty mask, and a list of runs
        self.keys = [(name, value) for name in samples.id for value in classes.values]
        self.header = own_header(classes)
        self.column = len(self.header) - 1
        self.rows = [[*key[: self.column], ""] for key in self.keys]
        if sample:
            self.read_sample(sample, on_missing, samples)
        else:
            rows = " and ".join(["image", "class"][: self.column])
            print(
                f"sample submission: none found, a row for each {rows}; or --sample_submission CSV"
            )
        each = "all objects of an image in one mask (or --instances rows)"
        if self.instances == "rows":
            each = "each object has a mask of its own (or --instances union)"
        own = "{}x{}".format(*self.size[::-1]) if self.size else "the size of their image"
        print(f"submission: {each}; masks have {own} (or --submission_size H,W)")

    def read_sample(self, sample: str, on_missing: str, samples: pd.DataFrame) -> None:
        """Take header, ids, classes, form and column from a sample submission. UserError."""
        where = f"--sample_submission {sample}"
        self.header, table = read_table(Path(sample))
        self.rows = list(table.values())
        if len(self.header) < 2:
            raise UserError(where, "has one column, expected ids and RLE", OWN_HEADER)
        columns = rle_columns(self.header, self.rows, ANSWER_COLUMNS)
        if len(columns) > 1:
            several = first_five(self.header[column] for column in columns)
            raise UserError(where, f"several columns hold RLE: {several}", OWN_HEADER)
        self.column = columns[0] if columns else len(self.header) - 1
        self.read_form(where)
        names = self.name_samples(Path(sample), samples)
        match = id_matcher(names)
        ids = id_column(where, self.header, self.rows, [self.column], match)
        pairs, place = self.ids_and_labels(where, ids, match)
        self.check_ids(where, [name for name, _ in pairs], match, on_missing, len(samples))
        self.check_classes(where, pairs, on_missing)
        self.keys = [(names.get(match(i), i), self.value_of(label)) for i, label in pairs]
        self.check_keys(where)
        ids_left = sorted(set(samples.id) - {name for name, _ in self.keys})
        classes_left = sorted(set(self.classes.values) - {value for _, value in self.keys})
        for left, what in ((ids_left, "images"), (classes_left, "classes")):
            if left and self.rows:
                named = first_five(left)
                print(f"{sample}: {len(left)} {what} are not asked for and left out: {named}")
        if not self.size and self.order != "relative" and "image" in samples:
            self.size = self.find_size(where, dict(zip(samples.id, samples.image, strict=True)))
        answers = f"RLE in {self.header[self.column]}, by {self.order}, empty: {self.empty!r}"
        print(f"sample submission: {sample} ({place}, {answers})")

    def read_form(self, where: str) -> None:
        """How the sample writes empty masks and lists of runs. Raises UserError for no RLE."""
        values = Counter(row[self.column] for row in self.rows)
        tokens = [value for value in values if not (is_empty(value) or is_runs(value))]
        runs = [value for value in values if is_runs(value) and not is_empty(value)]
        if len(tokens) > 1 or (tokens and not runs):
            raise UserError(
                where,
                f"{self.header[self.column]} holds {first_five(map(repr, tokens))}, not RLE",
                "the masks are in --out without --submission; for a csv of RLE write a mask into "
                "one row of a copy of the sample, as it is wanted, such as 1 2 or [1, 2]",
            )
        marks = [value for value, _ in values.most_common() if value and is_empty(value)]
        self.empty = next(iter(tokens + marks), "")
        self.list = next(filter(LISTS.fullmatch, runs), "")
        if self.list and self.instances == "auto":
            self.instances = "rows"

    def name_samples(self, sample: Path, samples: pd.DataFrame) -> dict[str, str]:
        """{what the sample calls an image: its id}: an id, what folders and name make, or a table.

        The table, next to the sample, has a column of the sample and one of names of files.
        """
        values = {field for row in self.rows for field in row}
        own = {name: name for name in samples.id}
        ids = dict(zip(map(Path, samples.get("image", samples.id)), samples.id, strict=True))
        ruled = {name: ids[path] for name, path in name_images(list(ids), values).items()}
        stems = {path.stem: name for path, name in ids.items()}
        ways = [*tables_of_names(sample, self.header, stems), own, ruled]
        return max(ways, key=lambda names: count_images(names, values))

    def ids_and_labels(
        self, where: str, ids: int, match: Match
    ) -> tuple[list[tuple[str, str]], str]:
        """The id and the class of each row, and where they stand. Raises UserError."""
        title, column = self.header[ids], class_column(self.header, ids)
        labels = [] if column is None or column == self.column else [r[column] for r in self.rows]
        if not self.classes.several:
            if len(set(labels)) > 1:
                problem = f"asks for classes {first_five(sorted(set(labels)))}, the model has one"
                raise UserError(where, problem, "train on masks with classes")
            return [(row[ids], self.classes.names[0]) for row in self.rows], f"ids in {title}"
        names = {*self.classes.names, *self.classes.values}
        if not labels:
            pairs = [split_id(row[ids], match, names) for row in self.rows]
            return pairs, f"ids joined with classes in {title}"
        place = f"ids in {title}, classes in {self.header[column]}"
        if len(set(labels)) == 1 and not self.value_of(labels[0]):  # a row for each image
            place += f", a row for each instead of {labels[0]!r}"
            pairs = [(row, value) for row in self.rows for value in self.classes.values]
            self.rows = [[*row[:column], value, *row[column + 1 :]] for row, value in pairs]
        return [(row[ids], row[column]) for row in self.rows], place

    def value_of(self, label: str) -> str:
        """The value of a class that a sample calls by its value or its name; "" for none."""
        names = dict(zip(self.classes.names, self.classes.values, strict=True))
        names |= {value: value for value in self.classes.values}
        return names.get(label, names.get(class_of(label), ""))

    def check_classes(self, where: str, pairs: list[tuple[str, str]], on_missing: str) -> None:
        """Raise UserError where a sample asks for classes that the model does not have, or none."""
        labels = Counter(label for _, label in pairs)
        names = first_five(self.classes.names)
        if on_missing != "error":
            labels.pop("", None)  # an id without an image is not split
        other = [label for label in labels if label and not self.value_of(label)]
        if other:
            raise UserError(
                where,
                f"asks for classes that the model does not have: {first_five(other)}",
                f"it has {names}; {OWN_HEADER}",
            )
        if labels[""]:
            example = next(name for name, label in pairs if not label)
            raise UserError(
                where,
                f"{labels['']} rows name no class, such as {example}; the model has {names}",
                f"name a sample with a column of classes, or ids such as a.jpg_1; {OWN_HEADER}",
            )

    def check_ids(
        self, where: str, ids: list[str], match: Match, on_missing: str, count: int
    ) -> None:
        """Raise UserError for ids without an image; say so where they get empty masks."""
        unknown = [name for name in ids if not match(name)]
        if not unknown:
            return
        problem = f"{len(unknown)} ids without an image in --data: {first_five(unknown)}"
        none = len(unknown) == len(ids)
        if on_missing == "error" or (none and count and on_missing != "rerun"):
            remedy = "name the folder of its images" if none else "--on_missing empty: empty masks"
            raise UserError(where, problem, remedy)
        print(f"{where}: {problem}; their masks are empty")
        if none:
            print("NO ID OF THE SAMPLE SUBMISSION IS AN IMAGE: ALL MASKS ARE EMPTY", flush=True)

    def check_keys(self, where: str) -> None:
        """Keep the first of the rows of an image and class. Raises UserError if nobody wants it."""
        counts = Counter(self.keys)
        twice = sorted(key for key, times in counts.items() if times > 1)
        if twice and self.instances == "auto":
            names = first_five(" ".join(key) if self.classes.several else key[0] for key in twice)
            raise UserError(
                where,
                f"{len(twice)} ids that occur twice: {names}",
                "--instances rows writes a row for each object, union one for each image",
            )
        first = dict(zip(reversed(self.keys), reversed(self.rows), strict=True))
        self.keys = list(counts)
        self.rows = [first[key] for key in self.keys]

    def find_size(self, where: str, images: dict[str, Path]) -> tuple[int, ...]:
        """The size (h, w) of the masks where the sample's can only have another than the images'.

        It is told from masks that are full; () for each image's own. Raises UserError where runs
        leave their image.
        """
        for (name, _), row in zip(self.keys[:SMALLEST], self.rows, strict=False):
            answer = row[self.column]
            if is_empty(answer) or not RUNS.fullmatch(answer) or name not in images:
                continue
            try:
                height, width = read_header(images[name]).size
            except UserError:  # a damaged image costs its own mask alone
                continue
            runs = parse_runs(answer, where)
            last, pixels = int(runs.sum(1).max()) - 1, height * width
            rows = math.isqrt(last * height // width)
            full = rows > 0 and len(runs) == 1 and runs[0, 0] <= 1 and last * SMALLEST >= pixels
            if full and last != pixels and (rows * rows * width, last % rows) == (last * height, 0):
                return rows, last // rows
            if last > pixels:
                problem = f"its runs reach pixel {last}, {images[name].name} is {width}x{height}"
                raise UserError(where, problem, "name the masks' size with --submission_size H,W")
        return ()

    def add(self, sample: Any, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Keep the RLE of an image's classes: bool (K, h, w), or a label map (h, w)."""
        for index, value in enumerate(self.classes.values):
            pixels = plane(mask, index) == 1
            if self.size:
                kind = cv2.INTER_AREA if self.size[0] < pixels.shape[0] else cv2.INTER_LINEAR
                pixels = cv2.resize(pixels.astype(np.float32), self.size[::-1], None, 0, 0, kind)
                pixels = pixels >= 0.5
            encode = rle_objects if self.instances == "rows" else rle_encode
            runs = encode(pixels, self.order)
            self.answers[sample.id, value] = [runs] if isinstance(runs, str) else runs

    def add_runs(self, name: str, runs: dict[str, list[str]]) -> None:
        """Keep the RLE of an image's classes, {value of the class: RLE}, of one mask each."""
        self.answers |= {(name, value): texts for value, texts in runs.items()}

    def write(self, out: Path, name: str = "submission.csv") -> None:
        """Write the csv whole. An image without an answer gets empty masks."""
        answers = [list(filter(None, self.answers.get(key, []))) for key in self.keys]
        rows = [
            [*fields[: self.column], answer, *fields[self.column + 1 :]]
            for fields, masks in zip(self.rows, answers, strict=True)
            for answer in self.fields_of(masks) or [self.empty]
        ]
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([self.header, *rows])
        write_file(out / name, content.getvalue())
        filled = sum(map(bool, answers))
        of = "" if len(rows) == len(answers) else f" of {len(answers)} images"
        print(f"wrote {out / name}: {len(rows)} rows, {filled}{of} not empty")

    def fields_of(self, masks: list[str]) -> list[str]:
        """The answers of an image and class, a row each; masks as lists are all in one."""
        if not self.list or not masks:
            return masks
        separator = (re.search(r"\d([ ,]+)\d", self.list) or ["", ", "])[1]
        return [";".join(f"[{runs.replace(' ', separator)}]" for runs in masks)]


def tables_of_names(
    sample: Path, header: list[str], stems: dict[str, str]
) -> Iterator[dict[str, str]]:
    """{name in a column of the sample: id} in each table next to it that names files for them.

    `stems`: {stem of an image: its id}.
    """
    match = id_matcher(stems)
    for path in list_tables(sample.parent):
        try:
            titles, *first = (fields for _, fields in itertools.islice(read_rows(path), 2))
            keys = [c for c, title in enumerate(titles) if title in header and path != sample]
            suffixes = [Path(field).suffix.lower() for fields in first for field in fields]
            files = [c for c, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES]
            rows = list(read_table(path)[1].values()) if keys and files else []
        except (UserError, ValueError):  # no table of names; ValueError: no row
            continue
        for key, column in itertools.product(keys, files):
            pairs = {(row[key], match(row[column])) for row in rows if match(row[column])}
            if len(pairs) == len(dict(pairs)) == len({stem for _, stem in pairs}):
                yield {name: stems[stem] for name, stem in pairs}


def places_of_samples(root: Path, folder: Path) -> Iterator[Path]:
    """Where a sample submission may be: from a folder of images up to `root`, and above that.

    Above folders of a split or of images (test/stage1) one more each.
    """
    yield from (up for up in (folder, *folder.parents) if up.is_relative_to(root))
    for start in (root, folder):
        yield start
        for above in start.parents:
            yield above
            if not set(split_words(above.name)) & {*SPLIT_WORDS, *IMAGE_WORDS}:
                break


def find_sample_submission(folder: Path, ids: Iterable[str], root: Path | None = None) -> str:
    """The sample submission for the images in a folder of the data `root`; "" for none.

    Of several the one with the most of the images' ids. Raises UserError for one that is damaged.
    """
    places = dict.fromkeys(places_of_samples(root or folder, folder))
    paths = [path for place in places for path in list_tables(place)]
    samples = [path for path in paths if SAMPLE_NAME.match(path.name.lower())]
    if len(samples) < 2:
        return str(samples[0]) if samples else ""
    match = id_matcher(ids)
    fields = {path: {field for _, row in read_rows(path) for field in row} for path in samples}
    return str(max(samples, key=lambda path: len(set(map(match, fields[path])) - {""})))


def check_sample(data: str, classes: Classes, bands: tuple[str, ...] = ()) -> None:
    """Say in a line, before training, that the sample submission with the data cannot be filled.

    `bands`: the patterns of an image's files, see `bands`.
    """
    root = Path(data).absolute()
    files = [file for file in list_files(root) if file.split == "test" and not file.role]
    try:
        if files and "{stem}" in "".join(bands):
            files = join_bands(root, files, bands)
        paths = [file.path for file in files]
        ids = make_ids(paths, [file.stem for file in files], root)
        samples = pd.DataFrame({"id": ids, "image": paths})
        sample = find_sample_submission(root, samples.id, root) if root.is_dir() else ""
        if sample:
            rerun = not files or os.environ.get("KAGGLE_IS_COMPETITION_RERUN")
            with contextlib.redirect_stdout(io.StringIO()):
                RleSubmission(samples, classes, sample, "rerun" if rerun else "error")
    except UserError as error:
        print(f"infer.py --submission rle would refuse {error}", flush=True)


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
        self.answers[f"{sample.id}.png"] = encode_image(self.values[numbers], ".png")

    def write(self, out: Path) -> None:
        """Write submission.zip whole; the same masks give the same bytes."""
        write_zip(out / "submission.zip", self.answers)
        print(f"wrote {out / 'submission.zip'}: {len(self.answers)} label maps")
