"""Layouts that are a csv: run-length encoded masks next to images, or a manifest of both."""

import functools
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import classes
import folders
import images
import layouts
import rle
import utils
from classes import Classes, ClassMasks
from images import Collection
from masks import MaskFile
from utils import UserError, first_five

# --------------------------------------------------------------------------------------------------
#  A csv of masks next to images
# --------------------------------------------------------------------------------------------------


def csv_place(folder: Path, masks: str, training: bool) -> Path | None:
    """The csv of masks that belongs to a folder of images. Raises UserError."""
    parent = folder.parent
    if masks != "auto":
        named = (Path(masks), parent / masks, parent.parent / masks)
        place = next((path for path in named if path.is_file()), None)
        if masks.lower().endswith(".csv") and not place:
            raise UserError(f"--masks {masks}: not found; name a folder of masks or a csv of RLE")
        return place
    if folder.name in ("test", "test_images") or (folder.name, parent.name) == ("images", "test"):
        return None
    roots = [folder, parent, parent.parent][: 3 if folder.name == "images" else 2]
    tables = [path for root in roots for path in utils.list_tables(root) if holds_masks(path)]
    train = [path for path in tables if path.name.lower() == "train.csv"]
    if train:
        return train[0]
    if layouts.masks_next_to(folder) or any(file.role for file in folders.list_files(folder)):
        return None
    if len(tables) > 1 and training:
        raise UserError(f"--data: {' and '.join(map(str, tables))} hold masks; choose with --masks")
    return tables[0] if tables else None


def csv_of_masks(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """A folder of images with a csv of RLE, one row per image or per object."""
    folder = images.image_folder(root, training)
    place = csv_place(folder, masks, training) if folder else None
    if not place:
        return None
    paths = images.list_images(folder)
    try:
        found, fields = read_masks(place, set(paths))
        check_sizes(place, fields, paths)
    except UserError as error:
        if training or masks != "auto":
            raise
        print(f"no scores: {error}")  # nobody named this csv
        return None
    rows = {"id": list(paths), "image": list(paths.values()), "mask": [found[s] for s in paths]}
    samples = pd.DataFrame(rows).assign(fields=[fields.get(stem) for stem in paths])
    return Collection("csv of RLE masks", samples)


def holds_masks(path: Path) -> bool:
    """Whether a csv that nobody named is one of masks; one that cannot be read is none."""
    if "submission" in path.name.lower():
        return False
    try:
        header, *rows = [
            fields for _, fields in itertools.islice(utils.read_rows(path, "replace"), rle.HEAD)
        ]
    except (UserError, ValueError):  # ValueError: no row
        return False
    return len(header) > 1 and rle.rle_column(header, rows, rle.RLE_COLUMNS) is not None


def read_masks(
    path: Path, stems: set[str]
) -> tuple[dict[str, rle.RunLengths | ClassMasks], dict[str, dict[str, str]]]:
    """Read a csv with one row per image, object or class; an image without a row is empty.

    Returns {stem: mask} and {stem: {column: value}}. Raises UserError.
    """
    header, table = utils.read_table(path)
    column = rle.rle_column(header, list(table.values()), rle.RLE_COLUMNS)
    if column is None or len(header) < 2:
        wanted = "expected a csv with a column of ids and one of RLE (start, length)"
        raise UserError(f"--masks {path}: {wanted}")
    match = utils.id_matcher(stems)
    ids = utils.id_column(header, list(table.values()), column, match)
    table, labels = classes.row_classes(header, table, ids, match)
    filled = {line: row for line, row in table.items() if row[column].lower() not in rle.EMPTY}
    fields = {match(row[ids]): dict(zip(header, row, strict=True)) for row in table.values()}
    unknown = list(dict.fromkeys(row[ids] for row in table.values() if not match(row[ids])))
    fields.pop("", None)
    without = sorted(set(stems) - set(fields))
    rows = f"{len(unknown)} ids have no image: {first_five(unknown)}"
    empty = f"{len(without)} images have no row: {first_five(without)}"
    if unknown and without:
        none = "" if fields else "none of its ids is an image, "
        raise UserError(f"{path}: {none}{rows}; {empty}; fix the ids, or add rows of empty masks")
    if unknown or without:
        print(f"{path.name}: {f'{rows}; left out' if unknown else f'{empty}; read as empty masks'}")
    masks: dict[str, Rows] = {stem: [] for stem in stems}
    for line, row in filled.items():
        masks.get(match(row[ids]), []).append((line, row[column]))
    values = classes.sort_values(filter(None, labels.values()))

    def make(rows: Rows) -> rle.RunLengths:
        return rle.RunLengths(path, tuple(rows))

    return {stem: by_class(path, own, labels, values, make) for stem, own in masks.items()}, fields


Rows = list[tuple[int, str]]  # the number of a row of a csv, and its mask


def by_class(
    path: Path,
    rows: Rows,
    labels: dict[int, str],
    values: tuple[str, ...],
    make: Callable[[Rows], Any],
) -> Any:
    """The mask that `make` makes of the rows of an image, or that of each class.

    `labels`: {row: class}; `values`: the classes of all images, () for one class. Raises UserError
    for a row of `path` with a mask and without a class.
    """
    if not values:
        return make(rows)
    filled = [line for line, mask in rows if mask.lower() not in rle.EMPTY]
    nameless = [f"row {line}" for line in filled if not labels.get(line)]
    if nameless:
        reason = f"a mask without a class in {first_five(nameless)}, others have one"
        raise UserError(f"{path}: {reason}; give it a class, or take the row out")
    parts = (make([row for row in rows if labels.get(row[0]) == value]) for value in values)
    return ClassMasks(tuple(parts), Classes(values, values))


def check_sizes(path: Path, fields: dict[str, dict[str, str]], files: dict[str, Path]) -> None:
    """Raise UserError where columns for height and width are not the images' own sizes.

    `fields`: {stem: {column: value}}, `files`: {stem: image}.
    """
    wrong = []
    for stem, row in fields.items():
        values = {re.sub("^(img|image)_?", "", name.lower()): value for name, value in row.items()}
        size = [values.get(name, "").removesuffix(".0") for name in ("height", "width")]
        if all(map(str.isdecimal, size)):
            height, width = images.read_header(files[stem]).size
            if (height, width) != tuple(map(int, size)):
                own = f"{files[stem].name} is {width}x{height}"
                wrong.append(f"{own}, not {size[1]}x{size[0]}")
    if wrong:
        reason = f"its columns for height and width differ from {len(wrong)} images"
        remedy = "take the images that the masks were made for"
        raise UserError(f"{path}: {reason} ({first_five(wrong, ' | ')}); {remedy}")


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
        raise UserError(f"--masks {masks}: {root.name} names the masks itself; leave the flag out")
    header, table = utils.read_table(root)
    names = [name.lower() for name in header]
    absent = [name for name in ("image", "mask")[: 1 + training] if name not in names]
    if absent or not table:
        what = f"no column {absent[0]}" if absent else "no row"
        optional = "optional: id, class, group, fold, category"
        remedy = f"a manifest has the columns image and mask ({optional})"
        other = "for a csv of RLE name the folder of images, and the csv with --masks"
        raise UserError(f"--data {root}: {what} in {first_five(header)}; {remedy}; {other}")
    rows = pd.DataFrame(list(table.values()), index=list(table), columns=names)
    rows["image"] = [resolve_path(root, name) for name in rows["image"]]
    lost = [line for line, path in rows["image"].items() if not path.is_file()]
    if lost:
        wrong = first_five(f"row {line}: {rows['image'][line]}" for line in lost)
        raise UserError(f"--data {root}: {len(lost)} images are not there: {wrong}")
    return Collection("manifest", manifest_samples(root, rows, training))


def resolve_path(root: Path, name: str) -> Path:
    """A path in a manifest, which starts from the manifest's folder and may be of any system."""
    path = root.parent / name
    return path if path.is_file() else root.parent / name.replace("\\", "/")


def manifest_samples(root: Path, rows: pd.DataFrame, training: bool) -> pd.DataFrame:
    """The samples of a manifest, one for each image. `rows`: index the row's number. UserError."""
    records = rows.to_dict("index")
    lines: dict[Path, list[int]] = defaultdict(list)
    for line, record in records.items():
        lines[record["image"]].append(line)
    paths = list(lines)
    unique = len({path.stem for path in paths}) == len(paths)
    short = [path.stem for path in paths]
    long = [re.sub(r"[\\/:]+", "_", os.path.relpath(p.with_suffix(""), root.parent)) for p in paths]
    samples = pd.DataFrame({"id": short if unique else long, "image": paths})
    filled = "mask" in rows and ~rows["mask"].str.lower().isin(rle.EMPTY)
    known = training or np.any(filled)  # a column of nothing is no ground truth to score with
    samples["mask"] = manifest_masks(root, records, lines) if known else None
    first = (records[own[0]] for own in lines.values())
    samples["fields"] = [{name: str(value) for name, value in one.items()} for one in first]
    for column in ("id", "group", "fold", "category"):
        if column in rows:
            samples[column] = [one_value(root, records, own, column) for own in lines.values()]
    check_ids(root, samples.id.tolist())
    if "fold" in samples:
        wrong = [value for value in samples.fold if not value.removesuffix(".0").isdecimal()]
        if wrong or samples.fold.nunique() < 2:
            what = f"holds {first_five(map(repr, wrong))}" if wrong else "has one value alone"
            raise UserError(f"--data {root}: column fold {what}; it takes numbers, two at least")
        samples["fold"] = samples.fold.astype(float).astype(int)
    return samples


def one_value(root: Path, records: dict[int, dict], lines: list[int], column: str) -> str:
    """The value of a column in all rows of an image. Raises UserError where there are several."""
    values = list(dict.fromkeys(records[line][column] for line in lines))
    if len(values) > 1:
        reason = f"{records[lines[0]]['image'].name} has several values in column {column}"
        raise UserError(f"--data {root}: {reason}: {first_five(values)}; an image has one")
    return values[0]


def check_ids(root: Path, ids: list[str]) -> None:
    """Raise UserError for ids that stand twice, or that are no names of files."""
    twice = [name for name, count in Counter(ids).items() if count > 1]
    wrong = [name for name in ids if not name or name.startswith(".") or re.search(r"[\\/:]", name)]
    for names, what in ((twice, "stand twice"), (wrong, "are no names of files")):
        if names:
            remedy = "ids name the files that are written: fix the column id"
            raise UserError(f"--data {root}: ids {what}: {first_five(map(repr, names))}; {remedy}")


def manifest_masks(
    root: Path, records: dict[int, dict], lines: dict[Path, list[int]]
) -> list[MaskFile | rle.RunLengths | ClassMasks]:
    """The mask of each image, or those of its classes. `lines`: its rows. Raises UserError."""
    labels = {line: record.get("class", "") for line, record in records.items()}
    values = classes.sort_values(filter(None, labels.values()))
    masks = []
    for image, own in lines.items():
        rows = [(line, records[line]["mask"]) for line in own]
        make = functools.partial(manifest_mask, root, image)
        masks.append(by_class(root, rows, labels, values, make))
    return masks


def manifest_mask(root: Path, image: Path, rows: Rows) -> MaskFile | rle.RunLengths:
    """The mask in the rows of one image: a file or several, RLE, or empty. Raises UserError."""
    filled = [(line, name) for line, name in rows if name.lower() not in rle.EMPTY]
    if all(rle.RUNS.fullmatch(name) for _, name in filled):
        return rle.RunLengths(root, tuple(filled))
    paths = [resolve_path(root, name) for _, name in filled]
    pairs = zip(filled, paths, strict=True)
    lost = [f"row {line}: {name}" for (line, name), path in pairs if not path.is_file()]
    if lost:
        raise UserError(f"--data {root}: masks are neither a file nor RLE: {first_five(lost)}")
    return MaskFile(paths[0], None, tuple(paths[1:]), image)
