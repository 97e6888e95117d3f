"""Classes: the files that list them, what --classes means, masks of overlapping ones.

Classes exclude each other (one label for each pixel) or overlap (one mask for each class).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import utils
from utils import UserError, closest, first_five

TABLES = ("classes.csv", "class_dict.csv")  # found next to the data
MOST = 254  # exclusive classes that fit into 8 bits, next to the ignored value 255


class Classes(NamedTuple):
    """What a model tells apart. Without names: one class, foreground and background."""

    names: tuple[str, ...] = ()
    values: tuple[str, ...] = ()  # in mask files or a csv: "3", "#804080", "Fish"
    exclusive: bool = False


def class_settings(classes: Classes) -> dict[str, Any]:
    """The fields of a `model.ModelConfig` that say which classes it has."""
    return {
        "classes": len(classes.names) or 1,
        "class_names": classes.names,
        "class_values": classes.values,
        "exclusive": classes.exclusive,
    }


def describe_classes(classes: Classes) -> str:
    """The kind and the names, for a message."""
    if not classes.names:
        return "one class"
    kind = "that exclude each other" if classes.exclusive else "that may overlap"
    return f"classes {kind} ({first_five(classes.names)})"


class Listed(NamedTuple):
    """A row of a file of classes."""

    name: str
    id: str = ""  # the value in a label map; "" for the number of its row, from 0
    colour: str = ""  # such as #804080


class Wanted(NamedTuple):
    """What --classes asks for."""

    merged: bool = False  # one class of all
    listed: tuple[Listed, ...] = ()  # the classes that a file lists, or a model has
    only: tuple[str, ...] = ()  # names to choose
    where: str = ""  # the file or the flag, for messages
    strict: bool = False  # other classes are an error
    model: Classes | None = None  # in inference

    @property
    def asks_for_labels(self) -> bool:
        """Whether masks of two values are two classes."""
        return self.strict or bool(self.only) or bool(self.model and self.model.exclusive)


ONE_CLASS = Classes()


def classes_of(config: Any) -> Classes:
    """The classes of a `model.ModelConfig`."""
    return Classes(config.class_names, config.class_values, config.exclusive)


# --------------------------------------------------------------------------------------------------
#  --classes
# --------------------------------------------------------------------------------------------------


def find_wanted(flag: str | Classes, root: Path, image: Path) -> Wanted:
    """What --classes means: auto, one, a file, or names; or the classes of a model.

    A file of `TABLES` is read too, next to the data or in a folder between `root` and its first
    `image`. Raises UserError.
    """
    if isinstance(flag, Classes):
        return of_model(flag)
    if flag == "one":
        return Wanted(merged=True)
    between = [folder for folder in image.parents if root in folder.parents]
    folders = [folder for folder in (root, root.parent, *between) if folder.is_dir()]
    tables = (folder / name for folder in folders for name in TABLES)
    table = next((path for path in tables if path.is_file()), None)
    if flag == "auto":
        return Wanted(listed=read_classes(table) if table else (), where=str(table))
    places = [Path(flag), *(folder / flag for folder in folders)]
    named = next((path for path in places if path.is_file()), None)
    if named:
        return Wanted(listed=read_classes(named), where=f"--classes {named}", strict=True)
    if re.search(r"\.\w{2,4}$|/", flag):
        raise UserError(f"--classes {flag}: no such file; name a csv of id,name, or the classes")
    names = tuple(filter(None, (name.strip() for name in flag.split(","))))
    if len(names) < 2 or len(set(names)) < len(names):
        remedy = "takes auto, one, a file, or at least two different names such as car,road"
        raise UserError(f"--classes {flag}: {remedy}")
    return Wanted(False, read_classes(table) if table else (), names, f"--classes {flag}")


def of_model(classes: Classes) -> Wanted:
    """What a model asks of the masks that it is scored with."""
    listed = (
        Listed(name, value, value if value.startswith("#") else "")
        for name, value in zip(classes.names, classes.values, strict=True)
    )
    return Wanted(not classes.names, tuple(listed), (), "the model", False, classes)


def read_classes(path: Path) -> tuple[Listed, ...]:
    """Read `id,name[,r,g,b]`, `name,r,g,b`, or a name in each line. Raises UserError."""
    rows = [fields for _, fields in utils.read_rows(path)]
    header = [name.lower() for name in rows[0]] if rows else []
    if "name" in header:
        columns = {name: column for column, name in enumerate(header)}
        rows = rows[1:]
    else:
        columns = {"name": 0}
    colours = [columns[name] for name in ("r", "g", "b") if name in columns]
    listed = []
    for number, row in enumerate(rows):
        if len(row) <= max(columns.values()):
            raise UserError(f"{path}: class {number + 1} has a field too few; fix the csv")
        value = row[columns["id"]] if "id" in columns else ""
        colour = ""
        if len(colours) == 3:
            levels = [row[column] for column in colours]
            if not all(level.isdecimal() and int(level) < 256 for level in levels):
                reason = f"{row[columns['name']]}: r,g,b are {','.join(levels)}, not 0 to 255"
                raise UserError(f"{path}: {reason}; fix the csv")
            colour = "#" + "".join(f"{int(level):02x}" for level in levels)
        listed.append(Listed(row[columns["name"]], value, colour))
    check_unique(path, listed)
    return tuple(listed)


def check_unique(path: Path, listed: list[Listed]) -> None:
    """Raise UserError where a name, an id or a colour is listed twice, or too few classes."""
    for title in ("name", "id", "colour"):
        known: dict[str, str] = {}
        for one in listed:
            value = getattr(one, title)
            if value and value in known:
                both = f"{known[value]} and {one.name}"
                raise UserError(f"{path}: {title} {value} is listed twice ({both}); fix the csv")
            known[value] = one.name
    if len(listed) < 2:
        raise UserError(f"{path}: lists {len(listed)} classes; list at least two")


def choose_names(wanted: Wanted, names: Iterable[str]) -> None:
    """Raise UserError for a name of --classes that is not among the names that there are."""
    names = list(names)
    for name in wanted.only:
        if name not in names:
            raise UserError(f"{wanted.where}: there is no class {name}{closest(name, names)}")


def choose_overlapping(found: Classes, wanted: Wanted) -> Classes:
    """The overlapping classes to train or to score, of those that masks are found for.

    Raises UserError for a class that a named file does not list.
    """
    if wanted.model:
        return wanted.model
    if not wanted.strict and not wanted.only:
        return found
    if wanted.only:
        choose_names(wanted, found.names)
        values = [found.values[found.names.index(name)] for name in wanted.only]
        return Classes(wanted.only, tuple(values))
    value_of = {}
    for value in found.values:
        fits = [one.name for one in wanted.listed if value in (one.name, one.id)]
        if not fits:
            names = first_five(one.name for one in wanted.listed)
            remedy = f"add it to the file, which lists {names}"
            raise UserError(f"{wanted.where}: masks are of a class {value}; {remedy}")
        value_of[fits[0]] = value
    by_id = bool({one.id for one in wanted.listed} & set(found.values))
    values = (value_of.get(one.name, one.id if by_id else one.name) for one in wanted.listed)
    return Classes(tuple(one.name for one in wanted.listed), tuple(values))


# --------------------------------------------------------------------------------------------------
#  Masks of overlapping classes
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassMasks:
    """A mask for each of several classes that may overlap."""

    parts: tuple[Any, ...]  # for each class an object with `read(size)`; None: empty
    classes: Classes

    @property
    def path(self) -> Path:
        """One of the files; an empty path where there is none."""
        return next((part.path for part in self.parts if part), Path())

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """(h, w, K) uint8: 1 foreground, 0 background, 255 ignored. Raises UserError."""
        masks = np.zeros((*size, len(self.parts)), np.uint8)
        for index, part in enumerate(self.parts):
            if part:
                masks[..., index] = part.read(size)
        return masks


@dataclass(frozen=True)
class UnitedMasks(ClassMasks):
    """The masks of several classes as one."""

    def read(self, size: tuple[int, int]) -> np.ndarray:
        """(h, w) uint8 of 0, 1 and 255. Raises UserError."""
        masks = super().read(size)
        return np.where((masks == 1).any(-1), 1, masks.max(-1)).astype(np.uint8)


def choose_masks(masks: list[Any], wanted: Wanted) -> tuple[list[Any], Classes]:
    """The masks of the classes that --classes asks for, and these; others stay as they are.

    Raises UserError.
    """
    found = next((mask.classes for mask in masks if isinstance(mask, ClassMasks)), None)
    if not found:
        return masks, ONE_CLASS
    if wanted.model and wanted.model.exclusive:
        return masks, found
    empty = ClassMasks((None,) * len(found.names), found)  # of an image without any
    masks = [mask and (mask if isinstance(mask, ClassMasks) else empty) for mask in masks]
    if wanted.merged:
        print(f"classes: {first_five(found.names)} are merged into one", flush=True)
        return [mask and UnitedMasks(mask.parts, found) for mask in masks], ONE_CLASS
    if len(found.names) == 1 and not (wanted.model or wanted.strict):
        return [mask and mask.parts[0] for mask in masks], ONE_CLASS
    chosen = choose_overlapping(found, wanted)
    places = [found.values.index(v) if v in found.values else None for v in chosen.values]

    def choose(mask: ClassMasks) -> ClassMasks:
        parts = (None if place is None else mask.parts[place] for place in places)
        return ClassMasks(tuple(parts), chosen)

    return [mask and choose(mask) for mask in masks], chosen


def split_parts(samples: pd.DataFrame) -> pd.DataFrame:
    """A row for each image and mask of a class, with the columns `image` and `mask`."""
    rows = []
    for image, mask in zip(samples["image"], samples["mask"], strict=True):
        parts = mask.parts if isinstance(mask, ClassMasks) else [mask]
        rows += [(image, part) for part in parts]
    return pd.DataFrame(rows, columns=["image", "mask"])


def join_parts(masks: Iterable[Any], parts: Iterable[Any]) -> list[Any]:
    """The masks with the parts that `split_parts` made of them and something has replaced."""
    parts = iter(parts)
    joined = []
    for mask in masks:
        if isinstance(mask, ClassMasks):
            own = tuple(next(parts) for _ in mask.parts)
            joined.append(replace(mask, parts=own))
        else:
            joined.append(next(parts))
    return joined


def sort_values(values: Iterable[str]) -> tuple[str, ...]:
    """Values of classes by number where all are numbers, else by name."""
    values = set(values)
    numbers = all(value.isdecimal() for value in values)
    return tuple(sorted(values, key=int if numbers else str))


# --------------------------------------------------------------------------------------------------
#  Classes in a csv
# --------------------------------------------------------------------------------------------------

CLASS_COLUMNS = {"classid", "class_id", "class", "classname", "class_name", "label", "category_id"}


def class_column(header: list[str], ids: int) -> int | None:
    """The column of a csv that holds classes."""
    named = (c for c, name in enumerate(header) if c != ids and name.lower() in CLASS_COLUMNS)
    return next(named, None)


def split_id(name: str, match: Callable[[str], str]) -> tuple[str, str]:
    """An id joined with a class, such as a.jpg_3, in its two parts; (name, "") for any other."""
    if match(name):
        return name, ""
    for place in reversed(list(re.finditer("_", name))):
        if match(name[: place.start()]):
            return name[: place.start()], name[place.end() :]
    return name, ""


def row_classes(
    header: list[str], table: dict[int, list[str]], ids: int, match: Callable[[str], str]
) -> tuple[dict[int, list[str]], dict[int, str]]:
    """The rows of a csv, whose ids lose a class that is joined, and {row: class}.

    Of one class {} is returned, but for a column of classes.
    """
    column = class_column(header, ids)
    if column is not None:
        return table, {line: row[column] for line, row in table.items()}
    both = {line: split_id(row[ids], match) for line, row in table.items()}
    labels = {line: label for line, (_, label) in both.items() if label}
    if len(set(labels.values())) < 2 or 2 * len(labels) <= len(table):
        return table, {}
    rows = {}
    for line, row in table.items():
        rows[line] = [*row[:ids], both[line][0], *row[ids + 1 :]]
    return rows, labels


# --------------------------------------------------------------------------------------------------
#  Balance
# --------------------------------------------------------------------------------------------------


def shares_of(mask: np.ndarray, classes: Classes) -> tuple[float, ...]:
    """The part of an image that each class covers. `mask`: numbers (h, w), or (h, w, K)."""
    if not classes.names:
        return ()
    if classes.exclusive:
        counts = np.bincount(mask.ravel(), minlength=256)[: len(classes.names)]
    else:
        counts = (mask == 1).sum((0, 1))
    return tuple((counts / (mask.shape[0] * mask.shape[1])).tolist())


def rarest_class(shares: np.ndarray) -> np.ndarray:
    """For each image its class that the fewest images have, int (n,); -1 for none.

    `shares`: (n, K), the part of each image that a class covers.
    """
    images = (shares > 0).sum(0)
    rank = np.where(shares > 0, images, len(shares) + 1)
    return np.where((shares > 0).any(1), rank.argmin(1), -1)


def describe_shares(classes: Classes, shares: np.ndarray) -> str:
    """Each class with its share of the pixels and of the images, for people."""
    kind = "exclude each other" if classes.exclusive else "may overlap"
    pixels, images = shares.mean(0), (shares > 0).mean(0)
    parts = [
        f"{name} {100 * share:.1f} % in {100 * part:.0f} % of the images"
        for name, share, part in zip(classes.names, pixels, images, strict=True)
    ]
    rest = f", ... ({len(parts)} in all)" if len(parts) > 40 else ""
    return f"{len(parts)} classes that {kind}: {', '.join(parts[:40])}{rest}"
