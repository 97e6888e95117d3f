"""Layouts that are a csv: RLE masks next to images, or a manifest of both. Columns and ids."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.classes import sort_values
from kit.data.folders import (
    Collection,
    image_folder,
    list_files,
    list_images,
    make_ids,
    masks_next_to,
)
from kit.data.images import read_header
from kit.data.masks import MaskFile, Planes
from kit.data.rle import EMPTY, RUNS, RunLengths
from kit.errors import UserError, first_five
from kit.files import list_tables, read_rows, read_table

ID_COLUMNS = {
    "id", "imageid", "image_id", "img", "record_id", "image", "filename", "file_name",
}  # fmt: skip
RLE_COLUMNS = {"rle", "rle_mask", "mask_rle", "encodedpixels", "encoded_pixels"}
CLASS_COLUMNS = {"classid", "class_id", "class", "classname", "class_name", "label", "category_id"}
HEAD = 200  # rows from which the columns of a csv are understood
Match = Callable[[str], str]  # from an id to an image's stem, see `id_matcher`
Rows = list[tuple[int, str]]  # the number of a row of a csv, and its mask

# --------------------------------------------------------------------------------------------------
#  Columns and ids
# --------------------------------------------------------------------------------------------------


def id_matcher(stems: Iterable[str]) -> Match:
    """A function from an id of a csv to the image's stem that it means; "" for none.

    An id may be a path of any system, have a suffix, have another case, and lack leading zeros.
    """

    def simplified(name: str) -> str:
        name = name.casefold()
        return name.lstrip("0") or "0" if name.isdigit() else name

    exact, loose = set(stems), {}
    for stem in sorted(exact):
        loose[simplified(stem)] = "" if simplified(stem) in loose else stem  # "": two images

    def match(name: str) -> str:
        base = re.split(r"[\\/]", name)[-1]
        names = (name, base, re.sub(r"\.[A-Za-z0-9]{1,5}$", "", base))
        stem = next((each for each in names if each in exact), "")
        return stem or next((loose[n] for n in map(simplified, names) if n in loose), "")

    return match


def id_column(header: list[str], rows: list[list[str]], column: int, match: Match) -> int:
    """The column with the most ids of images, else the one whose name says so, else the first."""

    def rank(other: int) -> tuple[int, bool, int]:
        matched = {row[other]: match(row[other]) for row in rows}
        exact = sum(value == stem for value, stem in matched.items())
        matching = sum(stem != "" for stem in matched.values())
        return matching, header[other].lower() in ID_COLUMNS, exact

    return max((c for c in range(len(header)) if c != column), key=rank)


def rle_column(header: list[str], rows: list[list[str]], names: set[str]) -> int | None:
    """The column whose values are RLE, else the one with one of the names; None for neither."""
    by_name = [c for c, name in enumerate(header) if name.lower() in names]
    by_value = []
    for column in range(len(header)):
        values = [row[column] for row in rows[:HEAD] if len(row) > column]
        values = [value for value in values if value.lower() not in EMPTY]
        if 2 * sum(RUNS.fullmatch(value) is not None for value in values) > len(values):
            by_value.append(column)
    both = [column for column in by_value if column in by_name]
    return next(iter(both or by_value or by_name), None)


def class_column(header: list[str], ids: int) -> int | None:
    """The column of a csv that holds classes."""
    columns = (c for c, name in enumerate(header) if c != ids and name.lower() in CLASS_COLUMNS)
    return next(columns, None)


def split_id(name: str, match: Match) -> tuple[str, str]:
    """An id joined with a class, such as a.jpg_3, in its two parts; (name, "") for any other."""
    if match(name):
        return name, ""
    for place in reversed(list(re.finditer("_", name))):
        if match(name[: place.start()]):
            return name[: place.start()], name[place.end() :]
    return name, ""


def row_classes(
    header: list[str], table: dict[int, list[str]], ids: int, match: Match
) -> tuple[dict[int, list[str]], dict[int, str]]:
    """The rows of a csv, whose ids lose a class that is joined, and {row: class}.

    Of one class {} is returned, but for a column of classes.
    """
    column = class_column(header, ids)
    if column is not None:
        return table, {line: row[column] for line, row in table.items()}
    pairs = {line: split_id(row[ids], match) for line, row in table.items()}
    labels = {line: label for line, (_, label) in pairs.items() if label}
    if len(set(labels.values())) < 2 or 2 * len(labels) <= len(table):
        return table, {}
    rows = {}
    for line, row in table.items():
        rows[line] = [*row[:ids], pairs[line][0], *row[ids + 1 :]]
    return rows, labels


# --------------------------------------------------------------------------------------------------
#  A csv of masks next to images
# --------------------------------------------------------------------------------------------------


def csv_place(folder: Path, masks: str, training: bool) -> Path | None:
    """The csv of masks that belongs to a folder of images. Raises UserError."""
    parent = folder.parent
    if masks != "auto":
        places = (Path(masks), parent / masks, parent.parent / masks)
        place = next((path for path in places if path.is_file()), None)
        if masks.lower().endswith(".csv") and not place:
            raise UserError(
                f"--masks {masks}", "not found", "name a folder of masks or a csv of RLE"
            )
        return place
    if folder.name in ("test", "test_images") or (folder.name, parent.name) == ("images", "test"):
        return None
    roots = [folder, parent, parent.parent][: 3 if folder.name == "images" else 2]
    tables = [path for root in roots for path in list_tables(root) if holds_masks(path)]
    train = [path for path in tables if path.name.lower() == "train.csv"]
    if train:
        return train[0]
    if masks_next_to(folder) or any(file.role for file in list_files(folder)):
        return None
    if len(tables) > 1 and training:
        raise UserError(
            "--data", f"{' and '.join(map(str, tables))} hold masks", "choose one with --masks"
        )
    return tables[0] if tables else None


def csv_of_masks(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """A folder of images with a csv of RLE, one row per image, object or class."""
    folder = image_folder(root, training)
    place = csv_place(folder, masks, training) if folder else None
    if not place:
        return None
    paths = list_images(folder)
    try:
        planes, classes, fields = read_masks(place, set(paths))
        check_sizes(place, fields, paths)
    except UserError as error:
        if training or masks != "auto":
            raise
        print(f"no scores: {error}")  # nobody named this csv
        return None
    rows = {"id": list(paths), "image": list(paths.values()), "mask": [planes[s] for s in paths]}
    samples = pd.DataFrame(rows).assign(fields=[fields.get(stem) for stem in paths])
    return Collection("csv of RLE masks", samples, classes=classes)


def holds_masks(path: Path) -> bool:
    """Whether a csv that nobody named is one of masks; one that cannot be read is none."""
    if "submission" in path.name.lower():
        return False
    try:
        header, *rows = [fields for _, fields in itertools.islice(read_rows(path, "replace"), HEAD)]
    except (UserError, ValueError):  # ValueError: no row
        return False
    return len(header) > 1 and rle_column(header, rows, RLE_COLUMNS) is not None


def read_masks(
    path: Path, stems: set[str]
) -> tuple[dict[str, Planes], Classes, dict[str, dict[str, str]]]:
    """Read a csv with one row per image, object or class; an image without a row is empty.

    Returns {stem: mask}, the classes, and {stem: {column: value}}. Raises UserError.
    """
    header, table = read_table(path)
    column = rle_column(header, list(table.values()), RLE_COLUMNS)
    if column is None or len(header) < 2:
        raise UserError(
            f"--masks {path}", "expected a csv with a column of ids and one of RLE (start, length)"
        )
    match = id_matcher(stems)
    ids = id_column(header, list(table.values()), column, match)
    table, labels = row_classes(header, table, ids, match)
    fields = {match(row[ids]): dict(zip(header, row, strict=True)) for row in table.values()}
    fields.pop("", None)
    unknown = list(dict.fromkeys(row[ids] for row in table.values() if not match(row[ids])))
    check_rows(path, unknown, sorted(stems - set(fields)), bool(fields))
    rows: dict[str, Rows] = {stem: [] for stem in stems}
    for line, row in table.items():
        if row[column].lower() not in EMPTY:
            rows.get(match(row[ids]), []).append((line, row[column]))
    values = sort_values(filter(None, labels.values()))

    def make(some: Rows) -> RunLengths:
        return RunLengths(path, tuple(some))

    planes = {stem: make_planes(path, some, labels, values, make) for stem, some in rows.items()}
    return planes, Classes(values, values) if values else Classes(), fields


def check_rows(path: Path, unknown: list[str], without: list[str], matched: bool) -> None:
    """Print ids without an image, or images without a row. Raises UserError where both occur."""
    rows = f"{len(unknown)} ids have no image: {first_five(unknown)}"
    empty = f"{len(without)} images have no row: {first_five(without)}"
    if unknown and without:
        none = "" if matched else "none of its ids is an image, "
        raise UserError(path, f"{none}{rows}; {empty}", "fix the ids, or add rows of empty masks")
    if unknown:
        print(f"{path.name}: {rows}; left out")
    if without:
        print(f"{path.name}: {empty}; read as empty masks")


def make_planes(
    path: Path,
    rows: Rows,
    labels: dict[int, str],
    values: tuple[str, ...],
    make: Callable[[Rows], Any],
) -> Planes:
    """The mask of an image, of what `make` makes of its rows, or of the rows of each class.

    `labels`: {row: class}; `values`: the classes of all images, () for one class. Raises UserError
    for a row of `path` with a mask and without a class.
    """
    if not values:
        return Planes((make(rows),))
    filled = [line for line, mask in rows if mask.lower() not in EMPTY]
    nameless = [f"row {line}" for line in filled if not labels.get(line)]
    if nameless:
        raise UserError(
            path,
            f"a mask without a class in {first_five(nameless)}, others have one",
            "give it a class, or take the row out",
        )
    by_class = [[row for row in rows if labels.get(row[0]) == value] for value in values]
    return Planes(tuple(map(make, by_class)))


def check_sizes(path: Path, fields: dict[str, dict[str, str]], files: dict[str, Path]) -> None:
    """Raise UserError where columns for height and width are not the images' own sizes.

    `fields`: {stem: {column: value}}, `files`: {stem: image}.
    """
    wrong = []
    for stem, row in fields.items():
        values = {re.sub("^(img|image)_?", "", name.lower()): value for name, value in row.items()}
        size = [values.get(name, "").removesuffix(".0") for name in ("height", "width")]
        if all(map(str.isdecimal, size)):
            height, width = read_header(files[stem]).size
            if (height, width) != tuple(map(int, size)):
                wrong.append(f"{files[stem].name} is {width}x{height}, not {size[1]}x{size[0]}")
    if wrong:
        problem = f"its columns for height and width differ from {len(wrong)} images"
        raise UserError(
            path,
            f"{problem} ({first_five(wrong, ' | ')})",
            "take the images that the masks were made for",
        )


# --------------------------------------------------------------------------------------------------
#  A manifest: --data pairs.csv
# --------------------------------------------------------------------------------------------------


def manifest(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """A csv with the columns `image` and `mask`, a row for each image or for each object.

    Paths start from the csv's folder. A mask is a file, RLE, or empty. Optional columns: `id` names
    the outputs, `group` stays in one fold, `fold` is taken as it is, `category` is scored by
    itself; `class` makes several classes. Raises UserError.
    """
    if root.suffix.lower() != ".csv":
        return None
    if masks != "auto":
        raise UserError(
            f"--masks {masks}", f"{root.name} names the masks itself", "leave the flag out"
        )
    header, table = read_table(root)
    names = [name.lower() for name in header]
    absent = [name for name in ("image", "mask")[: 1 + training] if name not in names]
    if absent or not table:
        lacks = f"no column {absent[0]}" if absent else "no row"
        raise UserError(
            f"--data {root}",
            f"{lacks} in {first_five(header)}",
            "a manifest has the columns image and mask (optional: id, class, group, fold, "
            "category); for a csv of RLE name the folder of images, and the csv with --masks",
        )
    rows = pd.DataFrame(list(table.values()), index=list(table), columns=names)
    rows["image"] = [resolve_path(root, name) for name in rows["image"]]
    lost = [line for line, path in rows["image"].items() if not path.is_file()]
    if lost:
        wrong = first_five(f"row {line}: {rows['image'][line]}" for line in lost)
        raise UserError(f"--data {root}", f"{len(lost)} images are not there: {wrong}")
    return manifest_samples(root, rows, training)


def resolve_path(root: Path, name: str) -> Path:
    """A path in a manifest, which starts from the manifest's folder and may be of any system."""
    path = root.parent / name
    return path if path.is_file() else root.parent / name.replace("\\", "/")


def manifest_samples(root: Path, rows: pd.DataFrame, training: bool) -> Collection:
    """The samples of a manifest, one for each image. `rows`: index the row's number. UserError."""
    records = rows.to_dict("index")
    lines: dict[Path, list[int]] = defaultdict(list)
    for line, record in records.items():
        lines[record["image"]].append(line)
    paths = list(lines)
    ids = make_ids(paths, [path.stem for path in paths], root.parent)
    samples, classes = pd.DataFrame({"id": ids, "image": paths, "mask": None}), Classes()
    filled = "mask" in rows and ~rows["mask"].str.lower().isin(EMPTY)
    if training or np.any(filled):  # a column of nothing is no ground truth to score with
        samples["mask"], classes = manifest_masks(root, records, lines)
    first = (records[own[0]] for own in lines.values())
    samples["fields"] = [{name: str(value) for name, value in row.items()} for row in first]
    for column in ("id", "group", "fold", "category"):
        if column in rows:
            samples[column] = [only_value(root, records, own, column) for own in lines.values()]
    check_ids(root, samples.id.tolist())
    if "fold" in samples:
        wrong = [value for value in samples.fold if not value.removesuffix(".0").isdecimal()]
        if wrong or samples.fold.nunique() < 2:
            has = f"holds {first_five(map(repr, wrong))}" if wrong else "has one value alone"
            raise UserError(f"--data {root}", f"column fold {has}", "it takes two numbers at least")
        samples["fold"] = samples.fold.astype(float).astype(int)
    return Collection("manifest", samples, classes=classes)


def only_value(root: Path, records: dict[int, dict], lines: list[int], column: str) -> str:
    """The value of a column in all rows of an image. Raises UserError where there are several."""
    values = list(dict.fromkeys(records[line][column] for line in lines))
    if len(values) > 1:
        name = records[lines[0]]["image"].name
        raise UserError(
            f"--data {root}",
            f"{name} has several values in column {column}: {first_five(values)}",
            "an image has one",
        )
    return values[0]


def check_ids(root: Path, ids: list[str]) -> None:
    """Raise UserError for ids that stand twice, or that are no names of files."""
    twice = [name for name, count in Counter(ids).items() if count > 1]
    wrong = [name for name in ids if not name or name.startswith(".") or re.search(r"[\\/:]", name)]
    for names, fault in ((twice, "stand twice"), (wrong, "are no names of files")):
        if names:
            raise UserError(
                f"--data {root}",
                f"ids {fault}: {first_five(map(repr, names))}",
                "ids name the files that are written: fix the column id",
            )


def manifest_masks(
    root: Path, records: dict[int, dict], lines: dict[Path, list[int]]
) -> tuple[list[Planes], Classes]:
    """The mask of each image, and the classes. `lines`: its rows. Raises UserError."""
    labels = {line: record.get("class", "") for line, record in records.items()}
    values = sort_values(filter(None, labels.values()))
    masks = []
    for image, own in lines.items():
        rows = [(line, records[line]["mask"]) for line in own]

        def make(some: Rows, image: Path = image) -> MaskFile | RunLengths:
            return manifest_mask(root, image, some)

        masks.append(make_planes(root, rows, labels, values, make))
    return masks, Classes(values, values) if values else Classes()


def manifest_mask(root: Path, image: Path, rows: Rows) -> MaskFile | RunLengths:
    """The mask in the rows of one image: a file or several, RLE, or empty. Raises UserError."""
    filled = [(line, name) for line, name in rows if name.lower() not in EMPTY]
    if all(RUNS.fullmatch(name) for _, name in filled):
        return RunLengths(root, tuple(filled))
    paths = [resolve_path(root, name) for _, name in filled]
    pairs = zip(filled, paths, strict=True)
    lost = [f"row {line}: {name}" for (line, name), path in pairs if not path.is_file()]
    if lost:
        raise UserError(f"--data {root}", f"masks are neither a file nor RLE: {first_five(lost)}")
    return MaskFile(paths[0], more=tuple(paths[1:]), image=image)
