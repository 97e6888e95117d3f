"""Layouts that are a csv: RLE masks next to images, or a manifest of both. Columns and ids."""

import contextlib
import functools
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.classes import sort_values
from kit.data.folders import Collection, image_folder, masks_next_to
from kit.data.masks import LabelMap, MaskFile, Planes
from kit.data.names import (
    Listing,
    choose_split,
    image_paths,
    list_files,
    list_images,
    make_ids,
    split_of,
    split_words,
)
from kit.data.rasters import Layer
from kit.data.readers import read_header
from kit.data.rle import (
    HEAD,
    ORDERS,
    RLE_COLUMNS,
    RUNS,
    RunLengths,
    is_empty,
    rle_columns,
    split_lists,
)
from kit.errors import UserError, first_five
from kit.files import list_tables, read_rows, read_table, resolve_path

IMAGE_COLUMNS = {
    "imageid", "image_id", "img", "img_id", "record_id", "image", "image_label", "filename",
    "file_name", "img_path", "image_path",
}  # fmt: skip
ID_COLUMNS = IMAGE_COLUMNS | {"id"}  # which may be that of an object
INDEX_COLUMNS = {"", "index", "unnamed: 0"}  # as pandas writes a table's index
CLASS_COLUMNS = {"classid", "class_id", "class", "classname", "class_name", "label", "category_id"}
COMPARED = 20  # masks in a csv that are compared with files
Match = Callable[[str], str]  # from an id to an image's stem, see `id_matcher`
Rows = tuple[tuple[int, str], ...]  # the number of a row of a csv, and its mask
ClassRows = list[tuple[int, str, str]]  # the same, and the class; "" where there is none

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

    @functools.cache
    def match(name: str) -> str:
        base = re.split(r"[\\/]", name)[-1]
        path = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", name)
        parts = re.split(r"[\\/]", path)
        names = (name, base, parts[-1], "_".join(parts[-2:]))
        stem = next((each for each in names if each in exact), "")
        return stem or next((loose[n] for n in map(simplified, names) if n in loose), "")

    return match


def ways_to_name(paths: list[Path]) -> Iterator[dict[str, Path]]:
    """What the ids of a csv may call images: {name: path} in each way that names each image once.

    By their stems, or by a folder above them, alone or joined with the start of the stem:
    test/kidney_5/images/0001.tif is kidney_5_0001, and case1/case1_day0/scans/slice_0001_266.png is
    case1_day0_slice_0001.
    """
    ways = [slice(0), *(slice(depth, depth + 1) for depth in range(3))]  # of the folders above
    for folders, count in itertools.product(ways, (None, 0, 1, 2, 3)):
        names = {
            "_".join(
                [*(up.name for up in path.parents[folders]), *path.stem.split("_")[:count]]
            ): path
            for path in paths
        }
        if len(names) == len(paths) and "" not in names:
            yield names


def name_images(paths: list[Path], ids: Iterable[str]) -> dict[str, Path]:
    """The stems of images if ids mean any, else the best of `ways_to_name`, else their paths."""
    ids, best, most = set(ids), {}, -1
    for names in ways_to_name(paths):
        count = count_images(names, ids)
        if count > most:
            best, most = names, count
        if count and all(path.stem == name for name, path in names.items()):
            break
    return best or {str(path): path for path in paths}


def count_images(names: Iterable[str], ids: Iterable[str]) -> int:
    """How many of the names some of the ids mean, also where they are joined with classes."""
    match = id_matcher(names)
    return len({match(split_id(name, match)[0]) for name in ids} - {""})


def id_column(
    where: Any, header: list[str], rows: list[list[str]], others: Container[int], match: Match
) -> int:
    """The column whose values are ids of images; not one of the `others`.

    Where several are: names before numbers, a column that is called like images, one that does not
    just count the rows. Of none the first, or one that is called like ids. Raises UserError where
    two columns mean different images, and nothing tells.
    """
    columns = [column for column in range(len(header)) if column not in others]
    names = {column: header[column].lower() for column in columns}
    for read in (match, lambda name: match(split_id(name, match)[0])):
        stems = {column: [read(row[column]) for row in rows] for column in columns}
        images = {column: len(set(stems[column]) - {""}) for column in columns}
        if any(images.values()):
            break
    else:
        return max(columns, key=lambda column: names[column] in ID_COLUMNS)
    columns = [column for column in columns if 2 * images[column] >= max(images.values())]
    values = {column: [row[column] for row in rows] for column in columns}
    counter = {column: is_counter(values[column]) for column in columns}
    misfit = {column: stems[column].count("") - images[column] for column in columns}
    least = min((misfit[column] for column in columns if counter[column]), default=0)
    for prefers in (
        lambda column: names[column] not in CLASS_COLUMNS,
        lambda column: not all(map(str.isdecimal, values[column])),
        lambda column: names[column] in IMAGE_COLUMNS,
        lambda column: names[column] not in INDEX_COLUMNS,
        lambda column: not counter[column] and misfit[column] <= least,
    ):
        columns = list(filter(prefers, columns)) or columns
    unlike = next((c for c in columns if stems[c] != stems[columns[0]]), None)
    if unlike is not None:
        raise UserError(
            where,
            f"its columns {header[columns[0]]!r} and {header[unlike]!r} both hold ids of images",
            "name the right one image_id, or take the other out",
        )
    return max(columns, key=lambda column: sum(map(str.__eq__, values[column], stems[column])))


def is_counter(values: list[str]) -> bool:
    """Whether the values of a column are numbers that grow from row to row, such as an index."""
    grows = (int(first) < int(second) for first, second in itertools.pairwise(values))
    return all(map(str.isdecimal, values)) and all(grows)


def class_column(header: list[str], ids: int) -> int | None:
    """The column of a csv that holds classes."""
    columns = (c for c, name in enumerate(header) if c != ids and name.lower() in CLASS_COLUMNS)
    return next(columns, None)


def split_id(name: str, match: Match, labels: Container[str] = ()) -> tuple[str, str]:
    """An id joined with a class, such as a.jpg_3, in its two parts; (name, "") for any other.

    `labels`: classes by which the id of an image that is not there is split, too.
    """
    if match(name):
        return name, ""
    for place in reversed(list(re.finditer("_", name))):
        head, label = name[: place.start()], name[place.end() :]
        if label in labels or match(head):
            return head, label
    return name, ""


def class_of(label: str) -> str:
    """The class in a label: 3 for 3.0, as pandas writes it, and 6 for 6_20_116 (attributes)."""
    number = re.fullmatch(r"(\d+)(\.0|(_\d+)+)", label)
    return number[1] if number else label


def row_classes(
    header: list[str], table: dict[int, list[str]], ids: int, match: Match
) -> dict[int, str]:
    """{row: class} of a csv; a class that is joined to the ids is taken off them.

    Of one class {} is returned, but for a column of classes.
    """
    column = class_column(header, ids)
    if column is not None:
        return {line: class_of(row[column]) for line, row in table.items()}
    known = {split_id(row[ids], match)[1] for row in table.values()} - {""}
    pairs = {line: split_id(row[ids], match, known) for line, row in table.items()}
    labels = {line: class_of(label) for line, (_, label) in pairs.items() if label}
    if len(set(labels.values())) < 2 or 2 * len(labels) <= len(table):
        return {}
    for line, row in table.items():
        row[ids] = pairs[line][0]
    return labels


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
    words = split_words(folder.name) + split_words(parent.name) * (folder.name == "images")
    if not training and split_of(words) == "test":
        return None
    roots = [folder, parent, parent.parent][: 3 if folder.name == "images" else 2]
    tables = [path for root in roots for path in list_tables(root) if holds_masks(path)]
    train = [path for path in tables if path.name.lower() == "train.csv"]
    if train:
        return train[0]
    files = list_files(folder)
    is_folder = bool(image_paths(folder))  # else a folder of folders: what is next to it is not its
    if any(file.role for file in files) or (is_folder and masks_next_to(folder, files)):
        return None
    if len(tables) > 1 and training:
        raise UserError(
            "--data", f"{' and '.join(map(str, tables))} hold masks", "choose one with --masks"
        )
    return tables[0] if tables else None


def csv_of_masks(
    root: Path, masks: str, target: str, training: bool, files: Listing = None
) -> Collection | None:
    """Images, in a folder or in several, with a csv of RLE, one row per image, object or class."""
    if not root.is_dir():
        return None
    folder = image_folder(root, training) if files is None else None
    below = [file for file in files or list_files(root) if not file.role]
    below = below if files is None else [file for file in below if file.layers]
    if masks == "auto" and not (training or folder) and choose_split(below, True):
        return None  # predicts those
    place = csv_place(folder or root, masks, training)
    if not place or not (folder or below):
        return None
    others = [file.path for file in choose_split(below, False)]
    paths = list(list_images(folder).values()) if folder else []
    named = {f.path.with_name(f.stem + f.path.suffix): f.path for f in files or () if f.layers}
    try:
        table = read_masks(place, [*named] or paths or others)
        table = table._replace(names={n: named.get(p, p) for n, p in table.names.items()})
        if training and folder and not table.fields:  # those of another folder then
            table = read_masks(place, others)
        names = images_with_rows(place, table)
        planes = table.planes(place)
        check_sizes(place, table.fields, names)
    except UserError as error:
        if training or masks != "auto":
            raise
        print(f"no scores: {error}")  # nobody named this csv
        return None
    samples = pd.DataFrame(
        {
            "id": list(names),
            "image": list(names.values()),
            "mask": [planes[name] for name in names],
            "fields": [table.fields.get(name) for name in names],
            "folder": [os.path.relpath(path.parent, root) for path in names.values()],
        }
    )
    classes = Classes(table.classes, table.classes) if table.classes else Classes()
    return Collection("csv of RLE masks", samples, classes=classes)


def holds_masks(path: Path) -> bool:
    """Whether a csv that nobody named is one of masks; one that cannot be read is none."""
    if "submission" in path.name.lower() or path.name == "oof.csv":  # predictions
        return False
    try:
        header, *rows = [fields for _, fields in itertools.islice(read_rows(path, "replace"), HEAD)]
    except (UserError, ValueError):  # ValueError: no row
        return False
    return len(header) > 1 and bool(rle_columns(header, rows, RLE_COLUMNS))


class MaskTable(NamedTuple):
    """A csv of masks."""

    names: dict[str, Path]  # what its ids call the images
    rows: dict[str, ClassRows]  # of each image, with a mask
    classes: tuple[str, ...]  # () for one
    fields: dict[str, dict[str, str]]  # {name: {column: value}} of images with a row
    unknown: list[str]  # ids without an image

    def planes(self, path: Path) -> dict[str, Planes]:
        """{name: mask}; `path`: of the csv. Raises UserError."""
        make = functools.partial(RunLengths, path)
        return {n: make_planes(path, rows, self.classes, make) for n, rows in self.rows.items()}


def read_masks(path: Path, images: list[Path]) -> MaskTable:
    """Read a csv with one row per image, object or class, or a column for each class. UserError."""
    header, table = read_table(path)
    columns = rle_columns(header, list(table.values()), RLE_COLUMNS)
    if not columns or len(header) < 2:
        raise UserError(
            f"--masks {path}", "expected a csv with a column of ids and one of RLE (start, length)"
        )
    for column in columns:
        clear_word(path, header[column], table, column)
    others = [column for column in range(len(header)) if column not in columns]
    names = name_images(images, (row[column] for row in table.values() for column in others))
    match = id_matcher(names)
    ids = id_column(path, header, list(table.values()), columns, match)
    if len(columns) > 1:
        labels, classes = {}, tuple(header[column] for column in columns)
    else:
        labels = row_classes(header, table, ids, match)
        of_masks = {labels[line] for line in labels if not is_empty(table[line][columns[0]])}
        if set(labels.values()) == {"0", "1"} and "0" not in of_masks:
            print(f"{path.name}: 0 and 1 say which images have a mask, they are no classes")
            labels = {}
        classes = sort_values(filter(None, labels.values()))
    rows: dict[str, ClassRows] = {name: [] for name in names}
    for line, row in table.items():
        for column in columns:
            label = header[column] if len(columns) > 1 else labels.get(line, "")
            if not is_empty(row[column]):
                runs = ((line, part, label) for part in split_lists(row[column]))
                rows.get(match(row[ids]), []).extend(runs)
    fields = {match(row[ids]): dict(zip(header, row, strict=True)) for row in table.values()}
    fields.pop("", None)
    unknown = list(dict.fromkeys(row[ids] for row in table.values() if not match(row[ids])))
    return MaskTable(names, rows, classes, fields, unknown)


def clear_word(path: Path, title: str, table: dict[int, list[str]], column: int) -> None:
    """Make the masks empty that are one word, such as authentic, where no other occurs; says so."""
    counts = Counter(row[column] for row in table.values())
    words = [word for word in counts if len(word) > 2 and word.isalpha() and not is_empty(word)]
    if len(words) == 1:
        print(
            f"{path.name}: {title} is {words[0]!r} in {counts[words[0]]} rows, read as empty masks"
        )
        for row in table.values():
            row[column] = row[column].replace(words[0], "")


def images_with_rows(path: Path, table: MaskTable) -> dict[str, Path]:
    """{name: image} of the folders in which an image has a row; prints what has no row or no image.

    An image without a row is empty. Raises UserError where ids and images are without each other.
    """
    folders = {table.names[name].parent for name in table.fields}
    names = {n: image for n, image in table.names.items() if image.parent in folders or not folders}
    without = sorted(set(names) - set(table.fields))
    rows = f"{len(table.unknown)} ids have no image: {first_five(table.unknown)}"
    empty = f"{len(without)} images have no row: {first_five(without)}"
    if table.unknown and without:
        none = "none of its ids is an image, " * (not table.fields)
        raise UserError(path, f"{none}{rows}; {empty}", "fix the ids, or add rows of empty masks")
    if table.unknown:
        print(f"{path.name}: {rows}; left out")
    if without:
        print(f"{path.name}: {empty}; read as empty masks")
    others = {image.parent.name for image in table.names.values() if image.parent not in folders}
    if folders and others:
        print(f"{path.name}: no rows for the images in {first_five(sorted(others))}; left out")
    return names


def make_planes(
    path: Path,
    rows: ClassRows,
    values: tuple[str, ...],
    make: Callable[[Rows], RunLengths | MaskFile],
) -> Planes:
    """The mask of an image, of what `make` makes of its rows, or of the rows of each class.

    `values`: the classes of all images, () for one class. Raises UserError for a row of `path` with
    a mask and without a class.
    """
    nameless = [f"row {line}" for line, mask, label in rows if not (label or is_empty(mask))]
    if values and nameless:
        raise UserError(
            path,
            f"a mask without a class in {first_five(nameless)}, others have one",
            "give it a class, or take the row out",
        )
    by_class = [[row for row in rows if row[2] == value] for value in values] or [rows]
    return Planes(tuple(make(tuple(row[:2] for row in some)) for some in by_class))


def follow_csv(collection: Collection, root: Path, rle: str) -> Collection:
    """Whether a csv of RLE has a row for each object, and of one next to mask files its order.

    The order that gives the masks in the files, which is printed; taken where `rle` is auto.
    """
    masks = dict(zip(collection.samples.image, collection.samples["mask"], strict=True))
    if any(isinstance(mask, LabelMap) for mask in masks.values()):
        return collection
    if any(isinstance(part, RunLengths) for mask in masks.values() for part in mask.parts):
        return collection._replace(instances=has_objects(masks.values()))
    tables = (path for folder in (root, root.parent) for path in list_tables(folder))
    for path in filter(holds_masks, tables):
        agree: Counter[str] = Counter()
        try:
            table = read_masks(path, list(masks))
            planes = table.planes(path)
            filled = [name for name in table.names if table.rows[name]][:COMPARED]
            for name, order in itertools.product(filled, ORDERS):
                image = table.names[name]
                size = read_header(image).size
                mask = (masks[image].read(size) == 1).any(0)
                with contextlib.suppress(UserError):  # impossible in this order
                    decoded = planes[name].change(RunLengths, order=order).read(size).any(0)
                    agree[order] += int((mask & decoded).sum() > 0.95 * (mask | decoded).sum())
        except UserError:  # of something else
            continue
        order, count = max(agree.items(), key=lambda item: item[1], default=("", 0))
        if 2 * count > len(filled):
            print(f"{path.name}: RLE {order} (equals {count} of {len(filled)} mask files)")
            order = order if rle == "auto" else collection.rle
            return collection._replace(rle=order, instances=has_objects(planes.values()))
    return collection


def has_objects(masks: Iterable[Planes]) -> bool:
    """Whether some mask has several rows of a csv for one class."""
    return any(len(getattr(part, "rows", ())) > 1 for mask in masks for part in mask.parts)


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
        names = first_five(wrong, " | ")
        raise UserError(
            path,
            f"its columns for height and width differ from {len(wrong)} images ({names})",
            "take the images that the masks were made for",
        )


# --------------------------------------------------------------------------------------------------
#  A manifest: --data pairs.csv
# --------------------------------------------------------------------------------------------------


def manifest(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """A csv with the columns `image` and `mask`, a row for each image or for each object.

    Paths start from the csv's folder. An image is a file, or several with ";" between. A mask is a
    file, RLE, or empty. Optional columns: `id` names the outputs, `group` stays in one fold, `fold`
    is taken as it is, `category` is scored by itself; `class` makes several classes. UserError.
    """
    if root.suffix.lower() != ".csv":
        return None
    if masks != "auto":
        problem = f"{root.name} names the masks itself"
        raise UserError(f"--masks {masks}", problem, "leave the flag out")
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
    rows["layers"] = [resolve_layers(root, names) for names in rows["image"]]
    rows["image"] = [layers[0].path for layers in rows["layers"]]
    files = ((line, layer.path) for line, layers in rows["layers"].items() for layer in layers)
    lost = [f"row {line}: {path}" for line, path in files if not path.is_file()]
    if lost:
        raise UserError(f"--data {root}", f"{len(lost)} images are not there: {first_five(lost)}")
    return manifest_samples(root, rows, training)


def resolve_layers(root: Path, names: str) -> tuple[Layer, ...]:
    """The files of an image in a manifest, which has a ";" between several."""
    whole = resolve_path(root, names)
    parts = [resolve_path(root, name.strip()) for name in names.split(";")]
    return tuple(map(Layer, [whole] if whole.is_file() else parts))


def manifest_samples(root: Path, rows: pd.DataFrame, training: bool) -> Collection:
    """The samples of a manifest, one for each image. `rows`: index the row's number. UserError."""
    paths = list(rows["image"].unique())
    ids = make_ids(paths, [path.stem for path in paths], root.parent)
    samples, classes = pd.DataFrame({"id": ids, "image": paths, "mask": None}), Classes()
    filled = "mask" in rows and ~rows["mask"].map(is_empty)
    if training or np.any(filled):  # a column of nothing is no ground truth to score with
        samples["mask"], classes = manifest_masks(root, rows)
    samples["fields"] = rows.drop_duplicates("image").astype(str).to_dict("records")
    for column in ("layers", "id", "group", "fold", "category", "volume", "slice"):
        if column in rows:
            samples[column] = only_values(root, rows, column)
    check_ids(root, samples.id.tolist())
    if "fold" in samples:
        wrong = [value for value in samples.fold if not value.removesuffix(".0").isdecimal()]
        if wrong or samples.fold.nunique() < 2:
            has = f"holds {first_five(map(repr, wrong))}" if wrong else "has one value alone"
            raise UserError(f"--data {root}", f"column fold {has}", "it takes two numbers at least")
        samples["fold"] = samples.fold.astype(float).astype(int)
    bands = tuple(layer.path.name for layer in samples.layers[0][1:] and samples.layers[0])
    return Collection("manifest", samples, classes=classes, bands=bands)


def only_values(root: Path, rows: pd.DataFrame, column: str) -> list[str]:
    """The value of a column for each image. Raises UserError where its rows have several."""
    values = rows.groupby("image", sort=False)[column].unique()
    for path, several in values[values.map(len) > 1].items():
        raise UserError(
            f"--data {root}",
            f"{path.name} has several values in column {column}: {first_five(several)}",
            "an image has one",
        )
    return values.str[0].tolist()


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


def manifest_masks(root: Path, rows: pd.DataFrame) -> tuple[list[Planes], Classes]:
    """The mask of each image, and the classes. Raises UserError."""
    labels = rows.get("class", pd.Series("", rows.index))
    values = sort_values(filter(None, labels))
    by_image: dict[Path, ClassRows] = defaultdict(list)
    for image, *row in zip(rows["image"], rows.index, rows["mask"], labels, strict=True):
        by_image[image].append(tuple(row))
    masks = [
        make_planes(root, some, values, functools.partial(manifest_mask, root, image))
        for image, some in by_image.items()
    ]
    return masks, Classes(values, values) if values else Classes()


def manifest_mask(root: Path, image: Path, rows: Rows) -> MaskFile | RunLengths:
    """The mask in the rows of one image: a file or several, RLE, or empty. Raises UserError."""
    filled = {line: name for line, name in rows if not is_empty(name)}
    if all(map(RUNS.fullmatch, filled.values())):
        return RunLengths(root, tuple(filled.items()))
    paths = {line: resolve_path(root, name) for line, name in filled.items()}
    lost = [f"row {line}: {filled[line]}" for line, path in paths.items() if not path.is_file()]
    if lost:
        raise UserError(f"--data {root}", f"masks are neither a file nor RLE: {first_five(lost)}")
    first, *more = paths.values()
    return MaskFile(first, more=tuple(more), image=image)
