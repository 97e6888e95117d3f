"""The hidden test set of a rehearsal, made of a competition's own images, and its scorer."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2

from kit.data import rle
from kit.data.csvs import id_matcher, name_images, split_id
from kit.data.names import ImageFile, list_files
from kit.data.readers import read_header
from kit.errors import UserError, first_five
from kit.files import list_tables, read_table
from kit.results.submissions import ANSWER_COLUMNS, find_sample_submission

LONGEST_ID = 300  # characters in a field that may be an id; RLE is longer

# --------------------------------------------------------------------------------------------------
#  The hidden test set
# --------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A csv that names images; `images`: the one that each row names, or None."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    images: list[Path | None]
    columns: list[int]  # that name them

    def rows_of(self, image: Path, new: str) -> list[list[str]]:
        """The rows of an image, with its new name."""
        rows = [row for row, own in zip(self.rows, self.images, strict=True) if own == image]
        return [
            [rename(f, image.stem, new, 1) if c in self.columns else f for c, f in enumerate(row)]
            for row in rows
        ]


class Hidden(NamedTuple):
    """A hidden test set; `answers`: its sample submission, (row, size of the image or None)."""

    header: list[str]
    column: int  # of the masks
    answers: list[tuple[list[str], tuple[int, int] | None]]
    objects: bool  # whether an id may have several rows
    order: str  # of the runs
    count: int  # of images
    words: str

    def key(self, row: list[str]) -> tuple[str, ...]:
        """What stands in a row besides the mask."""
        return (*row[: self.column], *row[self.column + 1 :])


def rename(text: str, stem: str, new: str, most: int = 0) -> str:
    """A field or a path with another image's name, in `most` places; 0: in all."""
    name = rf"(?<![A-Za-z0-9]){re.escape(stem)}(?![A-Za-z0-9])"
    return re.sub(name, lambda _: new, text, count=most)


def read_ids(path: Path, images: list[Path]) -> Table:
    """A csv, with the images that its rows name."""
    header, numbered = read_table(path)
    rows = list(numbered.values())
    short = {field for row in rows for field in row if len(field) <= LONGEST_ID}
    named = name_images(images, short)
    match = id_matcher(named)

    def image_of(field: str) -> Path | None:
        return named.get(match(split_id(field, match)[0])) if field in short else None

    columns = [[image_of(row[column]) for row in rows] for column in range(len(header))]
    best = max(columns, key=lambda column: sum(map(bool, column)), default=[])
    return Table(path, header, rows, best, [c for c, own in enumerate(columns) if own == best])


def new_names(stems: list[str]) -> Iterator[str]:
    """Names as these that none of them is: their last number is another, maybe a longer one."""
    taken, generator = set(stems), random.Random(0)
    for tries in itertools.count():
        head, digits, tail = re.fullmatch(r"(.*?)(\d*)(\D*)", generator.choice(stems)).groups()
        head, tail = (head, tail) if digits else (tail, "")
        width = len(digits) + tries // (20 * len(taken))
        name = f"{head}{generator.randrange(10 ** (width or 1)):0{width or 1}d}{tail}"
        if name not in taken:
            taken.add(name)
            yield name


def mirror(source: Path, target: Path, left_out: set[Path], link: Any) -> None:
    """A copy of a folder without some files; `link` copies what has none of them."""
    target.mkdir(parents=True)
    around = {folder for path in left_out for folder in path.parents}
    for path in source.iterdir():
        if path in around:
            mirror(path, target / path.name, left_out, link)
        elif path not in left_out:
            link(path, target / path.name)


def copy_tree(source: Path, target: Path) -> None:
    """A copy of a file or a folder."""
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def copy_image(source: Path, target: Path, resize: bool) -> None:
    """Copy an image, or write it a quarter higher and half as wide again where that is simple."""
    target.parent.mkdir(parents=True, exist_ok=True)
    plain = source.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp")
    image = cv2.imread(str(source), cv2.IMREAD_UNCHANGED) if resize and plain else None
    if image is None:
        shutil.copyfile(source, target)
    else:
        height, width = image.shape[:2]
        cv2.imwrite(str(target), cv2.resize(image, (width * 3 // 2, height * 5 // 4)))


def full_again(answer: str, before: tuple[int, int], after: tuple[int, int]) -> str:
    """A sample's mask for an image of another size: one that is full stays full."""
    return f"1 {after[0] * after[1]}" if answer == f"1 {before[0] * before[1]}" else answer


def find_competition(data: Path) -> tuple[list[ImageFile], list[ImageFile], Path]:
    """The training images, the test images and the sample submission of a folder. UserError."""
    if not data.is_dir():
        raise UserError(f"--data {data}", "is no folder", "name the competition's folder, unzipped")
    images = [file for file in list_files(data) if not file.role]
    public = [file for file in images if file.split == "test"]
    sample = find_sample_submission(data, [file.stem for file in public or images], data)
    if not images or not sample:
        missing = "no sample submission, such as sample_submission.csv" if images else "no images"
        raise UserError(f"--data {data}", f"has {missing}", "name the competition's folder")
    return [file for file in images if file.split != "test"], public, Path(sample)


def make_hidden(data: Path, mount: Path, link: Any = os.symlink, more: bool = False) -> Hidden:
    """Write the competition of `data` with a hidden test set into `mount`. Raises UserError.

    `link(source, target)`: how what stays as it is comes there; `more`: other numbers of images.
    """
    training, public, sample = find_competition(data)
    images = [file.path for file in public or training]
    answers = read_ids(sample, images)
    others = read_others(sample, images) if public else []
    example, renamed = find_example(answers, bool(public))
    hidden = draw_images(training, public, renamed, more)
    left_out = {file.path for file in list_files(data) if file.split == "test"}
    mirror(data, mount, left_out | {table.path for table in (answers, *others)}, link)
    fresh = new_names([file.stem for file in (*training, *public)])
    place = {file.path: Path(file.name) for file in public}
    form = place.get(example) or Path("test", Path(example.name))
    rows: list[tuple[list[str], tuple[int, int] | None]] = []
    more: list[list[list[str]]] = [[] for _ in others]
    last = len(answers.header) - 1
    column = (rle.rle_columns(answers.header, answers.rows, ANSWER_COLUMNS) or [last])[0]
    resized = 0
    for number, source in enumerate(hidden):
        new = next(fresh) if renamed else source.stem
        own = place.get(source, form)
        target = (mount / rename(str(own), own.stem, new)).with_suffix(source.suffix)
        copy_image(source, target, resize=number % 2 == 1)
        before, after = read_header(source).size, read_header(target).size
        resized += before != after
        for row in answers.rows_of(source if source in answers.images else example, new):
            row[column] = full_again(row[column], before, after)
            rows.append((row, after))
        for table, rest in zip(others, more, strict=True):
            rest += table.rows_of(source if source in table.images else example, new)
    target.write_bytes(target.read_bytes()[: target.stat().st_size // 3])
    missing = next(fresh)
    rows += [(row, None) for row in answers.rows_of(example, missing) if renamed]
    write_table(mount / sample.relative_to(data), answers.header, [row for row, _ in rows])
    for table, rest in zip(others, more, strict=True):
        kept = [row for row, own in zip(table.rows, table.images, strict=True) if not own]
        write_table(mount / table.path.relative_to(data), table.header, kept + rest)
    words = f"{len(hidden)} images (public: {len(public)}), {resized} of another size, "
    words += f"{target.name} damaged" + f", no image of {missing}" * renamed
    objects, order = forms_of_masks(data, answers, column)
    return Hidden(answers.header, column, rows, objects, order, len(hidden), words)


def find_example(answers: Table, public: bool) -> tuple[Path, bool]:
    """An image that the sample has rows of, and whether its ids follow the images' names.

    `public`: there are test images. Raises UserError where there is none.
    """
    example = next(filter(None, answers.images), None)
    ids = {row[column] for row in answers.rows for column in answers.columns}
    renamed = bool(example) and any(rename(name, example.stem, "") != name for name in ids)
    if not example or not (renamed or public):
        remedy = "give it the rows of an image that is there"
        raise UserError(answers.path, "names no image of the folder", remedy)
    return example, renamed


def other_tables(folder: Path, sample: Path) -> list[Path]:
    """The csv files of a folder but the sample, sorted."""
    return [path for path in list_tables(folder) if path != sample]


def read_others(sample: Path, images: list[Path]) -> list[Table]:
    """The other csv files next to the sample that have rows of these images."""
    tables = []
    for path in other_tables(sample.parent, sample):
        with contextlib.suppress(UserError):  # it stays as it is
            tables.append(read_ids(path, images))
    return [table for table in tables if any(table.images)]


def draw_images(
    training: list[ImageFile], public: list[ImageFile], renamed: bool, more: bool
) -> list[Path]:
    """The images of the hidden test set: another number of them than of the public ones."""
    if not renamed:
        paths = [file.path for file in public]
        count = min(len(public) - 1, 20) // (1 + more)
        return random.Random(0).sample(paths, max(1, count))
    count = (len(public) + 3 if len(public) < 21 else 20) + 20 * more
    pairs = itertools.zip_longest(public, training[: max(count, len(public))])
    mixed = [file.path for pair in pairs for file in pair if file]
    return list(itertools.islice(itertools.cycle(mixed), count))


def forms_of_masks(data: Path, sample: Table, column: int) -> tuple[bool, str]:
    """Whether an image has a row for each object in the csv of the training, and their order."""
    titles = [title for place, title in enumerate(sample.header) if place != column]
    for path in other_tables(data, sample.path):
        with contextlib.suppress(UserError):  # of a csv that has nothing to do with masks
            header, numbered = read_table(path)
            rows = list(numbered.values())
            shared = [header.index(title) for title in titles if title in header]
            columns = rle.rle_columns(header, rows, ANSWER_COLUMNS)
            if not shared or not columns or not rows:
                continue
            keys = Counter(tuple(row[place] for place in shared) for row in rows)
            masks = [row[columns[0]] for row in rows if rle.RUNS.fullmatch(row[columns[0]])]
            overlaps = sum(rle.absolute_overlaps(((0, mask),)) for mask in masks)
            base = " from 0" if any(mask.startswith("0 ") for mask in masks) else ""
            order = "relative" if 2 * overlaps > len(masks) else f"columns{base}"
            return max(keys.values()) > 1, order
    return False, "columns"


def write_table(path: Path, header: list[str], rows: list[list[str]]) -> None:
    """Write a csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


# --------------------------------------------------------------------------------------------------
#  The scorer
# --------------------------------------------------------------------------------------------------


def check_submission(path: Path, hidden: Hidden) -> str:
    """What a scorer would stop at in a submission.csv; "" for nothing."""
    try:
        header, rows = read_table(path)
        if header != hidden.header:
            return f"its header is {','.join(header)}, the sample's {','.join(hidden.header)}"
        return check_ids(list(rows.values()), hidden) or check_masks(rows, hidden)
    except UserError as error:
        return error.problem


def check_ids(rows: list[list[str]], hidden: Hidden) -> str:
    """Whether each id of the sample is there, once, and no other."""
    counts = Counter(map(hidden.key, rows))
    wanted = {hidden.key(row) for row, _ in hidden.answers}
    twice = [key for key, times in counts.items() if times > 1 and not hidden.objects]
    for keys, what in (
        (wanted - set(counts), "ids of the sample are missing"),
        (set(counts) - wanted, "ids are not in the sample"),
        (twice, "ids occur twice"),
    ):
        if keys:
            return f"{len(keys)} {what}: {first_five(' '.join(key) for key in sorted(keys))}"
    return ""


def check_masks(rows: dict[int, list[str]], hidden: Hidden) -> str:
    """Whether each mask is RLE inside of its image, in order, without overlaps, and not NaN."""
    sizes = {hidden.key(row): size for row, size in hidden.answers}
    tokens = {row[hidden.column] for row, _ in hidden.answers}
    marks = {token for token in tokens if token and not rle.RUNS.fullmatch(token)}
    marks |= {token for token in tokens if token and rle.is_empty(token)}
    together: dict[tuple[str, ...], list[str]] = {}
    for number, row in rows.items():
        key, answer = hidden.key(row), row[hidden.column]
        where = f"row {number} ({' '.join(key)})"
        if answer in tokens and answer in marks:
            continue
        if answer.lower() in ("nan", "inf", "none", "null") or (not answer and marks - {""}):
            empty = first_five(map(repr, sorted(marks))) if marks else "nothing"
            return f"{where} is {answer or 'NaN: empty'}; the sample writes {empty} for no mask"
        for runs in rle.split_lists(answer) if not rle.is_empty(answer) else ():
            numbers = rle.parse_runs(runs, where)
            if hidden.order != "relative" and (numbers[1:, 0] < numbers[:-1, 0]).any():
                return f"{where}: the runs are not sorted"
            together.setdefault(key, []).append(runs)
        size = sizes[key] or (1 << 20, 1 << 20)
        texts = together.get(key, [])
        for runs in [texts[-1:], [" ".join(texts)]][hidden.order != "relative"]:
            rle.sorted_runs(runs, size, where, hidden.order)
    return ""
