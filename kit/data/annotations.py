"""Annotations of labelling tools: COCO json, YOLO text files with polygons, labelme json.

Each object becomes runs, see `rle`. Coordinates count from the image's corner, as in COCO: a pixel
is of an object where its centre is inside, by the even-odd rule. Objects of a class are united.
"""

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from kit.config import Classes
from kit.data.classes import sort_values
from kit.data.csvs import make_planes
from kit.data.folders import Collection, Place, by_core, collect, one_split
from kit.data.masks import Planes
from kit.data.names import (
    MARKER,
    ImageFile,
    describe_file,
    images_among,
    list_files,
    split_of,
    split_words,
)
from kit.data.readers import in_parallel, read_header
from kit.data.rle import RunLengths, unite_runs, write_runs
from kit.errors import UserError, first_five, reason_of

ORDER = "columns from 0"  # of the runs, as COCO has them
HEAD = 1 << 20  # bytes of a file that tell what it is
KEYS = (b'"annotations"', b'"categories"', b'"images"', b'"shapes"')
YOLO = re.compile(r"\d+(\s+-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?){4,}\s*", re.I)
BEYOND = 0.02  # of a side: points further outside are an error, others are drawn up to the edge
CIRCLE = np.linspace(0, 2 * math.pi, 64, endpoint=False)


class Annotations(NamedTuple):
    """The objects of an image."""

    image: ImageFile  # as the annotations name it
    path: Path  # the file that has them
    kind: str  # COCO, YOLO or labelme
    # number for messages, class, and polygons (n, 2) of x, y, or COCO's RLE as a dict
    objects: list[tuple[Any, str, Any]]
    size: tuple[int, int] = (0, 0)  # (h, w) of the image in the file; 0: it does not say
    relative: bool = False  # x and y are shares of width and height

    @property
    def key(self) -> tuple:
        """Equal where two are of one image."""
        return self.image.split, self.image.place, self.image.stem


# --------------------------------------------------------------------------------------------------
#  The layout
# --------------------------------------------------------------------------------------------------


def annotated_images(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images with COCO or labelme json, or YOLO text files; an overlapping class for each label.

    `masks`: a folder of them, or json files with a comma between them. Images that COCO lists
    without an object are empty, and those without a text file among others that have one.
    """
    if not root.is_dir():
        return None
    try:
        files = list_files(root)
        annotations, names = find_annotations(root, masks, images_among(files) or files)
        files = [file._replace(role="") if file.path in annotations else file for file in files]
        images, *_ = one_split(images_among(files), [], masks, training)
        annotations = {i.path: annotations[i.path] for i in images if i.path in annotations}
        annotations |= without_text(images, annotations)
        used = {label for each in annotations.values() for _, label, _ in each.objects}
        values = tuple(name for name in names if name in used)
        pairs = in_parallel(
            lambda pair: read_planes(*pair, values), annotations.items(), "annotations"
        )
    except UserError as error:
        if training or masks != "auto":
            raise
        print(f"no scores: {error}")  # nobody named these annotations
        return None
    if not annotations:
        return None
    planes = dict(zip(annotations, pairs, strict=True))
    kinds = " and ".join(sorted({each.kind for each in annotations.values()}))
    say_objects(kinds, annotations, planes)
    collection = collect(root, images, {})
    collection.samples["mask"] = [planes.get(image.path) for image in images]
    classes = Classes(values, values) if values else Classes()
    return collection._replace(name=f"{kinds} annotations", classes=classes)


def say_objects(
    kinds: str, annotations: dict[Path, Annotations], planes: dict[Path, Planes]
) -> None:
    """Print how many objects there are, and what they lack."""
    empty = sum(not each.objects for each in annotations.values())
    rows = [row for mask in planes.values() for part in mask.parts for row in part.rows]
    thin = sum(not runs for _, runs in rows)
    lost = f"; {thin} objects cover the centre of no pixel and are lost" if thin else ""
    print(f"{kinds}: {len(rows)} objects in {len(annotations)} images, {empty} of them empty{lost}")


def find_annotations(
    root: Path, masks: str, images: list[ImageFile]
) -> tuple[dict[Path, Annotations], list[str]]:
    """{image: its annotations}, and the names of all classes in their order. Raises UserError."""
    found: list[Annotations] = []
    texts: list[ImageFile] = []
    names: list[str] = []
    for place in [root] if masks == "auto" else named_places(root, masks):
        folder = place if place.is_dir() else place.parent
        for path in [place] if place.is_file() else annotation_files(place):
            if path.suffix.lower() == ".json":
                annotations, classes = read_json(path, folder)
                found += annotations
                names += classes
            else:
                texts.append(describe_file(path, folder))
    annotations, classes = read_yolo(root, texts, {image.stem for image in images})
    return pair(images, found + annotations), list(dict.fromkeys(names + classes))


def without_text(
    images: list[ImageFile], annotations: dict[Path, Annotations]
) -> dict[Path, Annotations]:
    """Those of images that have no text file although YOLO's images in their folder do: none."""
    folders = {path.parent for path, each in annotations.items() if each.kind == "YOLO"}
    alone = [i for i in images if i.path.parent in folders and i.path not in annotations]
    if alone:
        few = first_five(image.path.name for image in alone)
        print(f"YOLO: {len(alone)} images have no text file: {few}; read as empty masks")
    return {image.path: Annotations(image, image.path, "YOLO", []) for image in alone}


def named_places(root: Path, masks: str) -> list[Path]:
    """The folders and json files that --masks names. Raises UserError for a json that is lost."""
    places = []
    for name in masks.split(","):
        paths = [path for path in (Path(name), root / name, root.parent / name) if path.exists()]
        if not paths and name.lower().endswith(".json"):
            raise UserError(f"--masks {masks}", f"{name} not found", "name a json of annotations")
        places += paths[:1]
    return places


def annotation_files(folder: Path) -> list[Path]:
    """The json and text files below a folder, sorted; not what the kit has written."""
    paths = []
    for place, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if MARKER not in names and not Path(place, "masks", MARKER).exists():
            paths += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in paths if path.suffix.lower() in (".json", ".txt") and path.is_file()]


def pair(images: list[ImageFile], annotations: list[Annotations]) -> dict[Path, Annotations]:
    """{image: its annotations}, by name and as far as needed by split and folder.

    Raises UserError for annotations without an image, and where an image has those of two files.
    """
    first: dict[tuple, Annotations] = {}
    for each in annotations:
        other = first.setdefault(each.key, each)
        if other is not each:
            raise UserError(
                each.path,
                f"has annotations of {each.image.path.name}, and so has {other.path}",
                "name the files that count, such as --masks train.json,valid.json",
            )
    named = {each.image: each for each in annotations}
    places: list[Place] = [
        lambda file: (file.split, file.place),
        lambda file: (file.split, file.place[-1:]),
        lambda file: file.split,
    ]
    if not {image.split for image in images} & {file.split for file in named} - {""}:
        places += [lambda file: file.place[-1:], lambda file: ()]
    pairs: dict[Path, Annotations] = {}
    for place in places:  # the first that pairs any: never those of another folder or split
        left, right = (by_core(files, ("", ""), place) for files in (images, [*named]))
        pairs = pairs or {left[key].path: named[right[key]] for key in left if key in right}
    paired = {each.key for each in pairs.values()}
    lost = [each for each in annotations if each.key not in paired]
    if lost:
        names = first_five(each.image.path.name for each in lost)
        raise UserError(
            lost[0].path,
            f"{len(lost)} of {len(annotations)} images with annotations are not there: {names}",
            "add them, or name the annotations of the others with --masks",
        )
    return pairs


# --------------------------------------------------------------------------------------------------
#  Files
# --------------------------------------------------------------------------------------------------


def read_json(path: Path, root: Path) -> tuple[list[Annotations], list[str]]:
    """The annotations in a json of COCO or labelme, and its classes; else none. UserError."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            if not any(key in head for key in KEYS):
                return [], []
            content = json.loads(head + file.read())
        if isinstance(content, dict) and "shapes" in content:
            return read_labelme(path, root, content)
        if isinstance(content, dict) and content.keys() >= {"images", "annotations", "categories"}:
            return read_coco(path, root, content)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = f"cannot be read as annotations ({type(error).__name__}: {reason_of(error)})"
        raise UserError(path, problem, "export it again, or take it away") from None
    return [], []


def read_coco(
    path: Path, root: Path, content: dict[str, Any]
) -> tuple[list[Annotations], list[str]]:
    """The annotations in a COCO json. A crowd is foreground, too: CVAT writes masks as crowds."""
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    annotations: dict[Any, Annotations] = {}
    for entry in content["images"]:
        parts = [part for part in re.split(r"[\\/]", entry["file_name"]) if part.strip(".")]
        file = describe_file(path.parent.joinpath(*parts), root)
        file = file._replace(split=file.split or split_of(split_words(path.stem)))
        size = int(entry.get("height") or 0), int(entry.get("width") or 0)
        annotations[entry["id"]] = Annotations(file, path, "COCO", [], size)
    for number, annotation in enumerate(content["annotations"]):
        line, shape = annotation.get("id", number), annotation.get("segmentation")
        for key, known in (("image_id", annotations), ("category_id", names)):
            if annotation[key] not in known:
                problem = f"annotation {line} has {key} {annotation[key]}, which is not in the file"
                raise UserError(path, problem, "export it again, or take the annotation out")
        if not shape:
            problem = f"annotation {line} is a box, not a polygon"
            raise UserError(path, problem, "export polygons or masks (COCO segmentation)")
        if isinstance(shape, list):
            shape = [np.array(numbers, float).reshape(-1, 2) for numbers in shape]
        label = names[annotation["category_id"]]
        annotations[annotation["image_id"]].objects.append((line, label, shape))
    return list(annotations.values()), [names[key] for key in sorted(names)]


def read_labelme(
    path: Path, root: Path, content: dict[str, Any]
) -> tuple[list[Annotations], list[str]]:
    """The annotations in the json of one image. Raises UserError for a shape without an area."""
    objects = []
    for number, shape in enumerate(content["shapes"], 1):
        points = np.array(shape["points"], float).reshape(-1, 2)
        label, kind = str(shape["label"]), shape.get("shape_type") or "polygon"
        if kind == "circle":
            radius = np.hypot(*(points[1] - points[0]))
            points = points[0] + radius * np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], 1)
        elif kind == "rectangle" and len(points) == 2:
            (x, y), (right, bottom) = points
            points = np.array([(x, y), (right, y), (right, bottom), (x, bottom)])
        elif kind == "mask" or len(points) < 3:
            problem = f"shape {number} ({label}) is a {kind} of {len(points)} points"
            raise UserError(path, problem, "draw it as a polygon, or take it out")
        objects.append((number, label, [points]))
    size = int(content.get("imageHeight") or 0), int(content.get("imageWidth") or 0)
    annotations = Annotations(describe_file(path, root), path, "labelme", objects, size)
    return [annotations], list(sort_values(label for _, label, _ in objects))


def read_yolo(
    root: Path, texts: list[ImageFile], stems: set[str]
) -> tuple[list[Annotations], list[str]]:
    """The annotations in text files, and the classes as data.yaml has them, else numbers.

    `stems`: of the images. Other text files, such as a README, are left out. Raises UserError.
    """
    filled = {file for file in texts if YOLO.fullmatch("".join(read_lines(file.path, HEAD)[:1]))}
    folders = {file.path.parent for file in filled}
    names, annotations = read_names(root) if filled else {}, []
    for file in texts:
        if file in filled or (file.path.parent in folders and file.stem in stems):
            lines = enumerate(read_lines(file.path), 1)
            objects = [
                read_line(file.path, number, line, names) for number, line in lines if line.strip()
            ]
            annotations.append(Annotations(file, file.path, "YOLO", objects, relative=True))
    used = {label for each in annotations for _, label, _ in each.objects}
    return annotations, list(names.values()) or list(sort_values(used))


def read_names(root: Path) -> dict[int, str]:
    """{number: name} of the classes in a yaml or classes.txt, in a folder or above. UserError."""
    for path in [*sorted(root.glob("*.y*ml")), *root.parent.glob("data.y*ml")]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, (list, dict)):
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                return {int(number): str(name) for number, name in pairs}
        except (OSError, ValueError, yaml.YAMLError) as error:
            remedy = "fix it, or take it away"
            raise UserError(path, f"cannot be read ({reason_of(error)})", remedy) from None
    text = root / "classes.txt"  # of Label Studio
    lines = read_lines(text) if text.is_file() else []
    return dict(enumerate(line.strip() for line in lines if line.strip()))


def read_lines(path: Path, size: int = -1) -> list[str]:
    """The lines of a text file, of a long one the first. Raises UserError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readlines(size)
    except OSError as error:
        problem = f"cannot be read ({reason_of(error)})"
        raise UserError(path, problem, "fix it, or take it away") from None


def read_line(path: Path, number: int, line: str, names: dict[int, str]) -> tuple[int, str, list]:
    """An object: class number, then x and y of each point. Raises UserError."""
    fields = line.split()
    if not YOLO.fullmatch(line):
        problem, remedy = "is no number of a class and numbers", "export it again"
    elif len(fields) == 5:
        problem, remedy = "is a box (5 numbers), not a polygon", "export polygons (YOLO segment)"
    elif len(fields) % 2 == 0:
        problem, remedy = f"has {len(fields) - 1} numbers for x and y", "export it again"
    elif names and int(fields[0]) not in names:
        problem, remedy = f"is of class {fields[0]}", f"add it to names in data.yaml: {names}"
    else:
        points = np.array(fields[1:], float).reshape(-1, 2)
        return number, names.get(int(fields[0]), fields[0]), [points]
    raise UserError(path, f"line {number} {problem}", remedy)


# --------------------------------------------------------------------------------------------------
#  Shapes to runs
# --------------------------------------------------------------------------------------------------


def read_planes(image: Path, annotations: Annotations, values: tuple[str, ...]) -> Planes:
    """The mask of an image, a plane for each class of `values`. Raises UserError."""
    size = read_header(image).size
    if annotations.size not in ((0, 0), size):
        there, here = (f"{width}x{height}" for height, width in (annotations.size, size))
        problem = f"{image.name} is {there} there, but the image is {here}"
        raise UserError(annotations.path, problem, "take the images that were labelled")
    rows = [
        (number, shape_runs(shape, annotations, number, size), label)
        for number, label, shape in annotations.objects
    ]
    make = functools.partial(RunLengths, annotations.path, order=ORDER)
    return make_planes(annotations.path, rows, values, make)


def shape_runs(shape: Any, annotations: Annotations, number: Any, size: tuple[int, int]) -> str:
    """RLE of an object, by `ORDER`. Raises UserError."""
    where, (height, width) = f"{annotations.path} object {number}", size
    if isinstance(shape, dict):
        return write_runs(decode_counts(shape.get("counts"), shape.get("size"), size, where), ORDER)
    scale = np.array([width, height])
    polygons = [points * scale if annotations.relative else points for points in shape]
    for points in polygons:
        inside = (points >= -BEYOND * scale) & (points <= (1 + BEYOND) * scale)
        if not inside.all():
            x, y = points[~inside.all(1)][0]
            problem = f"the point {x:g},{y:g} is outside of the image, {width}x{height}"
            raise UserError(where, problem, "take the image that was labelled, or fix the point")
    return write_runs(unite_runs([fill(points, size) for points in polygons]), ORDER)


def fill(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The runs of a polygon (n, 2) of x, y, see `rle.find_runs`, by `ORDER`.

    Where an edge crosses the centres of a column of pixels, inside and outside change.
    """
    height, width = size
    ends = np.stack([points, np.roll(points, -1, 0)], 1)
    ends = np.where((ends[:, :1, :1] <= ends[:, 1:, :1]), ends, ends[:, ::-1])  # from left to right
    first, last = np.ceil(ends[..., 0] - 0.5).clip(0, width).astype(np.int64).T
    edge = np.repeat(np.arange(len(ends)), last - first)
    column = np.arange(len(edge)) - np.repeat((last - first).cumsum() - last, last - first)
    (x, y), (right, bottom) = ends[edge].transpose(1, 2, 0)
    row = np.ceil(y + (column + 0.5 - x) / (right - x) * (bottom - y) - 0.5).clip(0, height)
    crossings = np.sort(column * height + row.astype(np.int64)).reshape(-1, 2)
    runs = np.stack([crossings[:, 0], crossings[:, 1] - crossings[:, 0]], 1)
    return runs[runs[:, 1] > 0]


def decode_counts(counts: Any, own: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """The runs of COCO's RLE, compressed or not: lengths of background and object in turn.

    `own`: its [h, w]. Raises UserError where that is not `size`, and for damaged counts.
    """
    try:
        counts = decompress(counts) if isinstance(counts, str) else np.array(counts, np.int64)
        ends, fits = counts.cumsum(), counts.ndim == 1 and (counts >= 0).all()
        fits = fits and tuple(own) == size and ends[-1] == math.prod(size)
    except (ValueError, TypeError, LookupError):  # no numbers, or none at all
        fits = False
    if not fits:
        problem = f"its RLE is damaged, or not of an image of {size[1]}x{size[0]}"
        raise UserError(where, problem, "take the image that was labelled, or export it again")
    runs = np.stack([ends[1::2] - counts[1::2], counts[1::2]], 1)
    return runs[runs[:, 1] > 0]


def decompress(text: str) -> np.ndarray:
    """The counts in COCO's compressed RLE: 5 bits a character, from the third on differences.

    As in pycocotools' maskApi.c, rleFrString.
    """
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(bits & 32 == 0)
    first = np.r_[0, last[:-1] + 1]
    shift = 5 * (np.arange(len(bits)) - np.repeat(first, last - first + 1))
    counts = np.add.reduceat((bits & 31) << shift, first)
    counts -= np.where(bits[last] & 16, 1 << (5 * (last - first + 1)), 0)
    for start in (1, 2):  # each counts from the one before the last
        counts[start::2] = counts[start::2].cumsum()
    return counts
