"""Names: what the names of files and folders say, which are masks, and of which split."""

import functools
import itertools
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kit.data.photos import open_image
from kit.data.readers import IMAGE_SUFFIXES
from kit.errors import UserError

MASK_WORDS = {
    "mask", "masks", "msk", "label", "labels", "lab", "lbl", "annotation", "annotations", "annot",
    "anno", "ann", "gt", "gts", "groundtruth", "truth", "manual", "seg", "segmentation",
    "segmentations", "segmentationclass", "semantic", "target", "targets", "matte", "mattes",
}  # fmt: skip
IMAGE_WORDS = {
    "image", "images", "img", "imgs", "jpegimages", "original", "originals", "photo", "photos",
    "input", "inputs", "rgb", "sat",
}  # fmt: skip
AUXILIARY_WORDS = {  # what lies next to images and is made of them
    "chart", "charts", "collage", "collages", "edges", "instance", "instances", "lr", "nir",
    "overlay", "overlays", "panoptic", "preview", "previews", "superpixels", "thumb", "thumbs",
    "thumbnail", "thumbnails",
}  # fmt: skip
SPLIT_WORDS = {
    "train": "train", "training": "train", "tr": "train", "val": "val", "valid": "val",
    "validation": "val", "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
ROLE_WORDS = MASK_WORDS | IMAGE_WORDS | set(SPLIT_WORDS) | {"ground"}
JOINED_SPLIT = re.compile(  # traincrop, testdata, valimages: two words
    r"\b(?:training|train|testing|test|validation|valid|val)"
    rf"(?=(?:{'|'.join({*MASK_WORDS, *IMAGE_WORDS, 'crop', 'crops', 'data', 'set', 'val'})})\b)"
)
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")  # of photographs rather than masks
SHOWN = 3  # files of a kind that are opened to see whether they are masks
TRAINING_OUTPUTS = {  # the images that train.py writes, the first two into every --out
    "examples.jpg", "augmented.jpg", "validation.jpg",
    "curves.png", "pr_curve.png", "confusion.png",
}  # fmt: skip
MARKER = ".written_by_segmentation_kit"  # in infer.py's --out: what is there is no data
NEVER_MASKS = {"SegmentationObject"}  # Pascal VOC's instances, next to its classes


class ImageFile(NamedTuple):
    """An image or a mask below a folder."""

    path: Path
    name: str  # its path below the folder, with "/"
    stem: str  # its name without suffixes of images, or what stands for {stem} in a pattern
    place: tuple[str, ...]  # its folders, without the words of roles and splits
    split: str  # train, val, test, or ""
    role: str  # "" for an image; for a mask the folder or pattern that names its kind
    rank: int = 0  # 2: a folder's name says images; 1: it names a split; -1: made of other images


# --------------------------------------------------------------------------------------------------
#  List
# --------------------------------------------------------------------------------------------------


def image_paths(folder: Path, names: Iterable[str] | None = None) -> list[Path]:
    """The images in a folder, or those of its `names`, sorted; hidden ones do not count.

    What the kit has written is no data: a folder with, or next to, its `MARKER` counts as empty.
    """
    if not folder.is_dir() or (folder / MARKER).exists() or (folder.parent / MARKER).exists():
        return []
    names = sorted(os.listdir(folder) if names is None else names)
    paths = [folder / name for name in names if not name.startswith(".")]
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def list_images(folder: Path) -> dict[str, Path]:
    """{stem: path} of the images in a folder, sorted. Raises UserError where two share a stem."""
    paths = image_paths(folder)
    check_names((path, path.stem) for path in paths)
    return {path.stem: path for path in paths}


def check_names(images: Iterable[tuple[Path, str]]) -> None:
    """Raise UserError where two images, (path, stem) each, of a folder share a stem."""
    first: dict[Path, Path] = {}
    for path, stem in images:
        other = first.setdefault(path.with_name(stem), path)
        if other != path:
            raise UserError(
                path.parent, f"{other.name} and {path.name} share a name", "rename one of them"
            )


def make_ids(paths: list[Path], stems: list[str], root: Path) -> list[str]:
    """The ids of images: their stems, or where these repeat their paths below `root` with "_"."""
    if len(set(stems)) == len(stems):
        return stems
    places = (os.path.relpath(path.with_suffix(""), root) for path in paths)
    return [re.sub(r"[\\/:]+", "_", place) for place in places]


def split_words(name: str) -> list[str]:
    """The words of a name: TrainingGroundTruth_01 is training, ground, truth, 01."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?=annot)", " ", name)
    words = re.findall(r"[a-z]+|\d+", spaced.lower())
    return JOINED_SPLIT.sub(r"\g<0> ", " ".join(words)).split()


def split_of(words: list[str], otherwise: str = "") -> str:
    """The split that words name: train, val or test; "" for several, such as trainval."""
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return "" if len(splits) > 1 else next(iter(splits), otherwise)


def list_files(root: Path) -> list[ImageFile]:
    """All images and masks below a folder, sorted, with their roles; not the kit's own images."""
    files = []
    for folder, below, names in os.walk(root, followlinks=True):
        if MARKER in names:
            below.clear()
            continue
        if {"examples.jpg", "augmented.jpg"} <= set(names):
            names = set(names) - TRAINING_OUTPUTS
        below[:] = sorted(n for n in below if not n.startswith(".") and n not in NEVER_MASKS)
        paths = image_paths(Path(folder), names)
        files += roles_by_name([describe_file(path, root) for path in paths])
    return files


def describe_file(path: Path, root: Path) -> ImageFile:
    """A file with what its folders say."""
    name, stem = path.relative_to(root).as_posix(), path.stem
    while Path(stem).suffix.lower() in IMAGE_SUFFIXES:  # x.jpg.png
        stem = Path(stem).stem
    place, split, role, rank = [], "", "", 0
    for folder in name.split("/")[:-1]:
        words = split_words(folder)
        split = split_of(words, split)
        if MASK_WORDS & set(words):
            role = folder
        elif IMAGE_WORDS & set(words):
            role = ""  # Kvasir-SEG/images: the inner folder decides
        by_words = 2 if IMAGE_WORDS & set(words) else 1 if SPLIT_WORDS.keys() & set(words) else 0
        rank = -1 if AUXILIARY_WORDS & set(words) else max(rank, by_words)
        if folder_words := words_of_place(words):
            place.append(folder if len(folder_words) == len(words) else "_".join(folder_words))
    return ImageFile(path, name, stem, tuple(place), split, role, rank)


def words_of_place(words: list[str]) -> list[str]:
    """The words of a folder's name without those of roles and splits."""
    return [word for word in words if word not in ROLE_WORDS]


def roles_by_name(files: list[ImageFile]) -> list[ImageFile]:
    """Find the masks among the images of one folder.

    By a word at an end of the name (X_mask), by the suffix (a.jpg and a.png), or because every name
    occurs with more at its end, too (X and X_1stHO).
    """
    words = [split_words(file.stem) for file in files]
    splits = [split_of(name) for name in words]
    if len(set(splits)) > 1 and all(splits) and not any(file.split for file in files):
        pairs = zip(files, splits, strict=True)  # train_1, testA_1
        files = [file._replace(split=split) for file, split in pairs]
    if not files or any(file.role for file in files):
        return files
    stems = {file.stem for file in files}
    tails = [tail_of(file.stem, stems) for file in files]
    made = [bool(AUXILIARY_WORDS & set(split_words(tail))) for tail in tails]
    if any(made):
        rest = [file for file, aux in zip(files, made, strict=True) if not aux]
        others = [file._replace(rank=-1) for file, aux in zip(files, made, strict=True) if aux]
        return roles_by_name(rest) + others
    words = [split_words(file.stem.rstrip("0123456789")) for file in files]
    marked = [next((w for w in (n[-1:] + n[:1]) if w in MASK_WORDS), "") for n in words]
    counts = Counter(tails)
    roles = [""] * len(files)
    if any(marked) and not all(marked):
        roles = [word and f"{{stem}}_{word}" for word in marked]
    elif suffix := suffix_of_masks(files):
        roles = ["{stem}" + suffix if file.path.suffix == suffix else "" for file in files]
    elif len(counts) > 1 and len(set(counts.values())) == 1 and len(files) > len(counts):
        pairs = zip(files, tails, strict=True)
        roles = [tail and f"{{stem}}{tail}{file.path.suffix}" for file, tail in pairs]
    return [file._replace(role=role) for file, role in zip(files, roles, strict=True)]


def suffix_of_masks(files: list[ImageFile]) -> str:
    """The suffix of the masks where each name occurs with two, by content; "" where none is sure.

    It is lossless, has fewer colours than the other, and no more than grey levels.
    """
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        kinds[file.path.suffix].append(file.path)
    if len(kinds) != 2 or len({file.stem for file in files}) * 2 != len(files):
        return ""
    few, many = sorted(kinds, key=lambda suffix: colours(kinds[suffix]))
    limit = 256 if many.lower() in LOSSY else colours(kinds[many]) / 4
    return few if colours(kinds[few]) <= limit else ""


def colours(paths: Iterable[Path]) -> float:
    """The most colours of any of the first files: few in masks."""
    return max(map(count_colours, itertools.islice(paths, SHOWN)))


@functools.cache
def count_colours(path: Path) -> float:
    """The colours of a file, of 256x256 of its pixels; infinite for a lossy one."""
    if path.suffix.lower() in LOSSY:
        return math.inf
    try:
        pixels = np.asarray(open_image(path))
    except UserError:  # `samples.decode_pairs` names the file
        return math.inf
    pixels = pixels[:: 1 + pixels.shape[0] // 256, :: 1 + pixels.shape[1] // 256]
    return len(np.unique(pixels.reshape(-1, *pixels.shape[2:]), axis=0))


def tail_of(stem: str, stems: set[str]) -> str:
    """What a name has more than the longest other name that it starts with, such as _1stHO."""
    ends = [match.start() for match in re.finditer(r"[\W_]", stem)]
    return next((stem[end:] for end in reversed(ends) if stem[:end] in stems), "")
