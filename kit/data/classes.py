"""Classes: the files that list them, what --classes asks for, their colours."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kit.config import IGNORE, Classes
from kit.data.images import write_image, write_palette_image
from kit.errors import UserError, closest, first_five
from kit.files import read_rows

TABLES = ("classes.csv", "class_dict.csv")  # found next to the data
OTHER_TABLES = re.compile(r"(class|label.*colou?r|label_?map|colou?r_?map).*\.(csv|txt)$", re.I)
COLUMNS = {  # what their headers are called, without case, blanks and _; "id" has numbers alone
    "r": ("r", "red"),
    "g": ("g", "green"),
    "b": ("b", "blue"),
    "colour": ("colour", "color", "rgb", "colorrgb", "hex"),
    "id": ("id", "classid", "labelid", "value", "pixelvalue", "index", "class", "label"),
    "name": ("name", "classname", "labelname", "class", "label", "category"),
}


class ListedClass(NamedTuple):
    """A row of a file of classes."""

    name: str
    id: str = ""  # the value in a label map; "" for the number of its row, from 0
    colour: str = ""  # such as #804080


class ClassRequest(NamedTuple):
    """What --classes asks for."""

    merged: bool = False  # one class of all
    listed: tuple[ListedClass, ...] = ()  # the classes that a file lists, or a model has
    names: tuple[str, ...] = ()  # to choose
    where: str = ""  # the file or the flag, for messages
    strict: bool = False  # other classes are an error
    optional: bool = False  # the file was not named: it counts where it lists all values
    unread: str = ""  # why a file that may list the classes does not count
    model: Classes | None = None  # in inference

    @property
    def asks_for_labels(self) -> bool:
        """Whether masks of two values are two classes."""
        return self.strict or bool(self.names) or bool(self.model and self.model.exclusive)


# --------------------------------------------------------------------------------------------------
#  --classes
# --------------------------------------------------------------------------------------------------


def class_request(flag: str | Classes, root: Path, image: Path) -> ClassRequest:
    """What --classes means: auto, one, a file, or names; or the classes of a model.

    A file of `TABLES` is read too, next to the data or in a folder between `root` and its first
    `image`; one of `OTHER_TABLES` in `root` and between, where it can be. Raises UserError.
    """
    if isinstance(flag, Classes):
        return request_of_model(flag)
    if flag == "one":
        return ClassRequest(merged=True)
    between = [folder for folder in image.parents if root in folder.parents]
    folders = [folder for folder in (root, root.parent, *between) if folder.is_dir()]
    tables = (folder / name for folder in folders for name in TABLES)
    table = next((path for path in tables if path.is_file()), None)
    if flag == "auto":
        if table:
            return ClassRequest(listed=read_classes(table), where=str(table))
        return found_request([folder for folder in folders if folder != root.parent])
    places = [Path(flag), *(folder / flag for folder in folders)]
    file = next((path for path in places if path.is_file()), None)
    if file:
        return ClassRequest(listed=read_classes(file), where=f"--classes {file}", strict=True)
    if re.search(r"\.\w{2,4}$|/", flag):
        raise UserError(
            f"--classes {flag}", "no such file", "name a csv of id,name, or the classes"
        )
    names = tuple(filter(None, (name.strip() for name in flag.split(","))))
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"--classes {flag}",
            "takes auto, one, a file, or at least two different names such as car,road",
            "one class of a label map is --foreground and its value",
        )
    listed = read_classes(table) if table else ()
    return ClassRequest(listed=listed, names=names, where=f"--classes {flag}")


def request_of_model(classes: Classes) -> ClassRequest:
    """What a model asks of the masks that it is scored with."""
    listed = (
        ListedClass(name, value, value if value.startswith("#") else "")
        for name, value in zip(classes.names, classes.values, strict=True)
    )
    return ClassRequest(not classes.several, tuple(listed), where="the model", model=classes)


def found_request(folders: list[Path]) -> ClassRequest:
    """The list of classes in these folders, of any name of `OTHER_TABLES`."""
    files = (path for folder in folders for path in sorted(folder.glob("*.*")))
    path = next((path for path in files if OTHER_TABLES.search(path.name)), None)
    try:
        listed = read_classes(path) if path else ()
    except UserError as error:
        return ClassRequest(unread=f"{error.where} is not used ({error.problem})")
    return ClassRequest(listed=listed, where=str(path), optional=True)


def read_classes(path: Path) -> tuple[ListedClass, ...]:
    """Read a table of names with ids or colours, or a name in each line. Raises UserError.

    Columns are told by their headers, see `COLUMNS`, or by what is in them.
    """
    rows = [fields for _, fields in read_rows(path)]
    if rows and all(":" in row[0] for row in rows):  # CVAT's label:color_rgb:parts:actions
        rows = [",".join(row).lstrip("# ").split(":") for row in rows]
    columns, rows = find_columns(rows) if rows else ({"name": 0}, [])
    listed = []
    for number, row in enumerate(rows):
        if len(row) <= max(columns.values()):
            raise UserError(path, f"class {number + 1} has a field too few", "fix the csv")
        fields = {field: row[column] for field, column in columns.items()}
        levels = fields.get("colour") or " ".join(fields[band] for band in "rgb" if band in fields)
        colour = read_colour(levels)
        if levels and not colour:
            problem = f"{fields['name']}: r,g,b are {levels.replace(' ', ',')}, not 0 to 255"
            raise UserError(path, problem, "fix the csv")
        listed.append(ListedClass(fields["name"], fields.get("id", ""), colour))
    check_unique(path, listed)
    return tuple(listed)


def find_columns(rows: list[list[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """The columns of a list of classes, {"name": 1, "id": 0, ...}, and the rows below a header."""
    titles = [re.sub(r"[\s_]", "", cell.lower()) for cell in rows[0]]
    usual = {title for headers in COLUMNS.values() for title in headers}
    has_header = bool(usual & set(titles)) and not any(title.isdecimal() for title in titles)
    rows = rows[has_header:]
    cells = list(zip(*rows, strict=False))[: len(titles)]
    numbers = [k for k, column in enumerate(cells) if all(cell.isdecimal() for cell in column)]
    texts = [k for k in range(len(titles)) if k not in numbers]
    colours = [k for k in texts if k < len(cells) and all(map(read_colour, cells[k]))]
    if not has_header:  # id, or r,g,b, or both in this order
        names = ["id"] * (len(numbers) in (1, 4)) + [*"rgb"] * (len(numbers) > 2)
        columns = dict(zip(names, numbers, strict=False)) if texts else {}
        columns |= {"colour": colours[0]} if colours else {}
        return columns | {"name": min({*texts} - {*colours}, default=0)}, rows
    columns = {}
    for field, headers in COLUMNS.items():
        named = [titles.index(title) for title in headers if title in titles]
        fitting = [k for k in named if k not in columns.values()]
        if field == "id":
            fitting = [k for k in fitting if k in numbers or titles[k] == "id"]
        elif field == "name":
            fitting = [k for k in [*fitting, *texts] if k in texts and k not in columns.values()]
            fitting = fitting or named or [0]
        columns |= {field: fitting[0]} if fitting else {}
    return columns, rows


def read_colour(text: str) -> str:
    """A colour such as #804080, 128 64 128 or (128, 64, 128), as #804080; "" for anything else."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return text.lower()
    fits = re.fullmatch(r"\W*(\d+)\W+(\d+)\W+(\d+)\W*", text)
    levels = [int(level) for level in fits.groups()] if fits else []
    return "#" + bytes(levels).hex() if levels and max(levels) < 256 else ""


def check_unique(path: Path, listed: list[ListedClass]) -> None:
    """Raise UserError where a name, an id or a colour is listed twice, or too few classes."""
    for field in ListedClass._fields:
        names: dict[str, str] = {}
        for entry in listed:
            value = getattr(entry, field)
            if value and value in names:
                both = f"{names[value]} and {entry.name}"
                raise UserError(path, f"{field} {value} is listed twice ({both})", "fix the csv")
            names[value] = entry.name
    if len(listed) < 2:
        raise UserError(path, f"lists {len(listed)} classes", "list at least two")


def check_request(request: ClassRequest, names: Collection[str]) -> None:
    """Raise UserError for a name of --classes that is not among the names that there are."""
    unknown = [name for name in request.names if name not in names]
    if unknown:
        problem = f"there is no class {unknown[0]}"
        raise UserError(request.where, problem, closest(unknown[0], names))


def choose_planes(in_masks: Classes, request: ClassRequest) -> Classes:
    """The overlapping classes to train or to score, of those that there are masks for.

    Raises UserError for a class that a named file does not list.
    """
    if request.model:
        return request.model
    if request.names:
        check_request(request, in_masks.names)
        values = [in_masks.values[in_masks.names.index(name)] for name in request.names]
        return Classes(request.names, tuple(values))
    if not request.strict:
        return in_masks
    value_of = {}
    for value in in_masks.values:
        fitting = [entry.name for entry in request.listed if value in (entry.name, entry.id)]
        if not fitting:
            raise UserError(
                request.where,
                f"masks are of a class {value}",
                f"add it to the file, which lists {first_five(e.name for e in request.listed)}",
            )
        value_of[fitting[0]] = value
    by_id = bool({entry.id for entry in request.listed} & set(in_masks.values))
    values = (value_of.get(e.name, e.id if by_id else e.name) for e in request.listed)
    return Classes(tuple(entry.name for entry in request.listed), tuple(values))


def sort_values(values: Iterable[str]) -> tuple[str, ...]:
    """Values of classes by number where all are numbers, else by name."""
    values = set(values)
    numbers = all(value.isdecimal() for value in values)
    return tuple(sorted(values, key=int if numbers else str))


# --------------------------------------------------------------------------------------------------
#  Label maps
# --------------------------------------------------------------------------------------------------

LARGE_ID = 64  # ids of classes are smaller, or nearly all ids below occur, too


class Labels(NamedTuple):
    """What a label map's values mean."""

    labels: tuple[float, ...]  # the value of each class
    classes: Classes


def decide_labels(
    pixels: Counter[float],
    channel: str,
    request: ClassRequest,
    training: bool,
    ignored: tuple[float, ...] = (),
) -> Labels:
    """The classes of label maps: those listed, else one for each value. Raises UserError.

    `pixels`: {value: number of pixels}; `ignored`: values that are no classes although listed.
    """
    request = settle_list(pixels, channel, request)
    if channel == "grey" and not (request.listed or request.names or request.model):
        refuse_grey_levels(pixels)
    if channel != "colour" and str(IGNORE) not in {entry.id for entry in request.listed}:
        pixels = Counter({value: count for value, count in pixels.items() if value != IGNORE})
    listed = request.listed or name_values(pixels, channel, request)
    if channel == "colour":
        missing = [entry.name for entry in listed if not entry.colour]
        if missing:
            raise UserError(
                request.where,
                f"the masks are in colours, but {first_five(missing)} have none",
                "add the columns r,g,b",
            )
        value_of = {entry.name: int(entry.colour[1:], 16) for entry in listed}
    else:
        value_of = {e.name: label_of(e, number, request) for number, e in enumerate(listed)}
        check_highest(listed, pixels, request)
    if request.names and request.listed:
        check_request(request, value_of)
        value_of = {name: value_of[name] for name in request.names}
    value_of = {name: label for name, label in value_of.items() if label not in ignored}
    names, labels = tuple(value_of), tuple(value_of.values())
    present = [name for name, label in value_of.items() if pixels[label]]
    if training and len(present) < 2:
        there = present[0] if present else f"none of {first_five(names)}"
        values = first_five(show(value, channel) for value in sorted(pixels))
        raise UserError(
            "--data",
            f"{there} alone is in the masks, whose values are {values}",
            "name other masks with --masks, or fix --classes",
        )
    return Labels(labels, Classes(names, tuple(show(label, channel) for label in labels), True))


def refuse_grey_levels(pixels: Counter[float]) -> None:
    """Raise UserError for 255 next to few, large levels, such as 128: is it a class, or an edge?"""
    levels = sorted(value for value in pixels if value not in (0, IGNORE))
    highest = max(levels, default=0)
    if IGNORE in pixels and highest >= LARGE_ID and 2 * len(levels) < highest:
        all_levels = first_five(f"{value:g}" for value in sorted(pixels))
        united = f"--foreground {levels[len(levels) // 2]:g}-{IGNORE} takes these for one class"
        several = f"--classes FILE with id,name lists several; --ignore {IGNORE} ignores it"
        raise UserError(
            "--data",
            f"grey levels {all_levels} (is {IGNORE} a class, or ignored?)",
            f"{united}; {several}",
        )


def check_highest(
    listed: tuple[ListedClass, ...], pixels: Counter[float], request: ClassRequest
) -> None:
    """Raise UserError where a list of names without ids is too short for the label maps."""
    highest = int(max(pixels, default=0))
    if not listed[0].id and highest >= len(listed):
        raise UserError(
            request.where,
            f"lists {len(listed)} names, from 0, but label maps have ids to {highest}",
            "name them all, or give a file of id,name",
        )


def name_values(
    pixels: Counter[float], channel: str, request: ClassRequest
) -> tuple[ListedClass, ...]:
    """A class for each value, named by it, or as --classes says. Raises UserError."""
    values = [show(value, channel) for value in sorted(pixels)]
    if not request.names:
        return tuple(ListedClass(f"class {value}", value, value) for value in values)
    if channel == "colour":
        raise UserError(request.where, "the masks are in colours", "give a file of name,r,g,b")
    return tuple(ListedClass(name) for name in request.names)


def show(value: float, channel: str) -> str:
    """A value as people write it: 15, 0.5, #ff0000."""
    return f"#{value:06x}" if channel == "colour" else f"{value:g}"


def settle_list(pixels: Counter[float], channel: str, request: ClassRequest) -> ClassRequest:
    """The same with the ids of grey colours, and without a found list that does not fit: said."""
    listed = request.listed if channel == "colour" else grey_ids(request.listed)
    ids = {entry.id or str(number) for number, entry in enumerate(listed)}
    named = {entry.colour for entry in listed} if channel == "colour" else {*ids, str(IGNORE)}
    values = [show(value, channel) for value in sorted(pixels)]
    unknown = first_five(value for value in values if value not in named)
    problem = request.unread
    if listed and request.optional and unknown:
        problem, listed = f"{request.where} is not used (it does not list {unknown})", ()
    if problem:
        columns = "name,r,g,b" if channel == "colour" else "id,name"
        print(f"classes: {problem}; --classes FILE with {columns} names them", flush=True)
    return request._replace(listed=listed)


def grey_ids(listed: tuple[ListedClass, ...]) -> tuple[ListedClass, ...]:
    """Listed classes whose ids, where there are none, are the levels of their grey colours."""
    levels = [entry.colour[1:3] for entry in listed if not entry.id and entry.colour]
    grey = all(entry.colour == f"#{3 * entry.colour[1:3]}" for entry in listed)
    if len(levels) < len(listed) or not grey:
        return listed
    ids = [str(int(level, 16)) for level in levels]
    return tuple(entry._replace(id=id) for entry, id in zip(listed, ids, strict=True))


def label_of(entry: ListedClass, number: int, request: ClassRequest) -> int:
    """The value of a listed class in label maps: its id, else its place. Raises UserError."""
    if not entry.id and number < IGNORE:
        return number
    if not entry.id.isdecimal() or int(entry.id) > IGNORE:
        raise UserError(
            request.where,
            f"{entry.name} has the id {entry.id}, label maps need 0 to {IGNORE}",
            "fix the column id",
        )
    return int(entry.id)


# --------------------------------------------------------------------------------------------------
#  Colours, and how masks are written
# --------------------------------------------------------------------------------------------------

BACKGROUND = {"background", "unlabelled", "unlabeled", "void"}  # drawn black
# Each is the one of 512 that is furthest from all before it in CIE Lab, for whichever kind of
# colour vision tells it least (Machado, Oliveira, Fernandes, IEEE TVCG 2009).
COLOURS = (
    "ff6d00 0049ff 924992 92ff92 004900 ff92ff 92926d 490092 490049 ffdb00 "
    "92b6b6 b66dff 922449 ff0049 6d49b6 496d00 002400 24db49 0000b6 246d6d "
    "49006d 00ffb6 499292 242424 240024 ffdbff b6ff6d db00db b6b6db 6d246d "
    "b66db6 b6b66d ff9292 00b600 ffff00 000049 dbdbdb 6d9249 ff2492 db6ddb"
)


FOREGROUND = (46, 204, 64)  # of one class alone


def is_background(name: str) -> bool:
    """Whether a class's name says that it is none, as labelme's _background_ does."""
    return name.lower().strip("_") in BACKGROUND


@functools.cache
def class_colours(names: tuple[str, ...]) -> np.ndarray:
    """A colour for each class, uint8 (K, 3) RGB, that the colour-blind can tell; 40, then again."""
    if len(names) == 1:
        return np.array([FOREGROUND], np.uint8)
    table = itertools.cycle(tuple(bytes.fromhex(colour)) for colour in COLOURS.split())
    colours = [(0, 0, 0) if is_background(name) else next(table) for name in names]
    return np.array(colours, np.uint8)


def palette(classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """How a label map is written: the value of each class, uint8 (K,), and 256 colours.

    The value is that of the label maps; for masks in colours the number of the class, from 0.
    """
    grey = all(value.isdecimal() and int(value) < 256 for value in classes.values)
    values = np.array([int(v) for v in classes.values] if grey else range(len(classes.names)))
    colours = np.zeros((256, 3), np.uint8)
    colours[values] = class_colours(classes.names)
    return values.astype(np.uint8), colours


LEVELS = np.full(256, 127, np.uint8)  # of a plane's pixels in its file: 127 for ignored ones
LEVELS[:2] = 0, 255


def mask_folders(classes: Classes) -> list[str]:
    """Below masks/: a folder for each of several planes, its name without / and the like."""
    if classes.planes < 2:
        return [""]
    return [re.sub(r"[^\w .()+-]", "_", name).strip(" .") or "_" for name in classes.names]


def write_mask(folder: Path, name: str, mask: np.ndarray, classes: Classes) -> None:
    """Write planes (K, h, w) or a label map (h, w) below a folder whose `mask_folders` exist."""
    for place, values in mask_files(mask, classes).items():
        if classes.exclusive:
            write_palette_image(folder / f"{name}.png", values, palette(classes)[1])
        else:
            write_image(folder / place / f"{name}.png", values)


def write_probabilities(folder: Path, name: str, prediction: np.ndarray, classes: Classes) -> None:
    """Write a prediction, see `predict.to_prediction`, below a folder whose `mask_folders` exist.

    As 8-bit probabilities, of exclusive classes that of the most probable one.
    """
    planes = prediction[1:] if classes.exclusive else prediction
    for place, plane in zip(mask_folders(classes), planes, strict=True):
        write_image(folder / place / f"{name}.png", plane)


def mask_files(mask: np.ndarray, classes: Classes) -> dict[str, np.ndarray]:
    """{folder: values (h, w) uint8} of the files of planes (K, h, w) or of a label map (h, w).

    A plane is 255 for the class, 0, and 127 where it is ignored. A label map has the values of its
    classes, and 255.
    """
    if classes.exclusive:
        values = palette(classes)[0]
        table = np.r_[values, np.full(256 - len(values), IGNORE, np.uint8)]
        return {"": table[mask]}
    planes = zip(mask_folders(classes), mask, strict=True)
    return {place: LEVELS[plane.astype(np.uint8)] for place, plane in planes}
