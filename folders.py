"""The images and masks below a folder: which file is which, by the names of folders and files."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from images import IMAGE_SUFFIXES, MARKER

MASK_WORDS = {
    "mask", "masks", "label", "labels", "annotation", "annotations", "annot", "gt", "groundtruth",
    "truth", "manual", "seg", "segmentation", "segmentations", "segmentationclass", "target",
    "targets", "matte", "mattes",
}  # fmt: skip
IMAGE_WORDS = {
    "image", "images", "img", "imgs", "jpegimages", "photo", "photos", "input", "inputs", "sat",
}  # fmt: skip
SPLIT_WORDS = {
    "train": "train", "training": "train", "tr": "train", "val": "val", "valid": "val",
    "validation": "val", "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
TRAINING_OUTPUTS = {  # the images that train.py writes, the first two into every --out
    "examples.jpg", "augmented.jpg", "validation.jpg",
    "curves.png", "pr_curve.png", "confusion.png",
}  # fmt: skip
NEVER_MASKS = {"SegmentationObject"}  # Pascal VOC's instances, next to its classes


class ImageFile(NamedTuple):
    """An image or a mask below a folder."""

    path: Path
    name: str  # its path below the folder, with "/"
    stem: str  # its name without suffixes of images, or what stands for {stem} in a pattern
    place: tuple[str, ...]  # its folders, without the words of roles and splits
    split: str  # train, val, test, or ""
    role: str  # "" for an image; for a mask the folder or pattern that names its kind
    named: bool = False  # a folder's name says that these are images


def split_words(name: str) -> list[str]:
    """The words of a name: TrainingGroundTruth_01 is training, ground, truth, 01."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?=annot)", " ", name)
    return re.findall(r"[a-z]+|\d+", spaced.lower())


def list_files(root: Path) -> list[ImageFile]:
    """All images and masks below a folder, sorted, with their roles.

    Hidden ones do not count, nor does what the kit has written: the images of train.py, and what
    is marked (`images.MARKER`).
    """
    files = []
    if (root.parent / MARKER).exists():
        return files
    for folder, below, names in os.walk(root, followlinks=True):
        if MARKER in names:
            below.clear()
            continue
        if {"examples.jpg", "augmented.jpg"} <= set(names):
            names = set(names) - TRAINING_OUTPUTS
        below[:] = sorted(n for n in below if not n.startswith(".") and n not in NEVER_MASKS)
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        files += roles_by_name([describe_file(path, root) for path in paths])
    return files


def describe_file(path: Path, root: Path) -> ImageFile:
    """A file with what its folders say."""
    name, stem = path.relative_to(root).as_posix(), path.stem
    while Path(stem).suffix.lower() in IMAGE_SUFFIXES:  # x.jpg.png
        stem = Path(stem).stem
    place, split, role, named = [], "", "", False
    for part in name.split("/")[:-1]:
        words = split_words(part)
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), split)
        if MASK_WORDS & set(words):
            role = part
        elif IMAGE_WORDS & set(words):
            role = ""  # Kvasir-SEG/images: the inner folder decides
        named |= bool(words and set(words) & (IMAGE_WORDS | set(SPLIT_WORDS)))
        rest = [word for word in words if word not in MASK_WORDS | IMAGE_WORDS | set(SPLIT_WORDS)]
        if rest:
            place.append(part if len(rest) == len(words) else "_".join(rest))
    return ImageFile(path, name, stem, tuple(place), split, role, named)


def roles_by_name(files: list[ImageFile]) -> list[ImageFile]:
    """Find the masks among the images of one folder.

    By a word at an end of the name (X_mask), by the suffix (a.jpg and a.png), or because every name
    occurs with more at its end, too (X and X_1stHO).
    """
    if not files or any(file.role for file in files):
        return files
    words = [split_words(file.stem.rstrip("0123456789")) for file in files]
    marked = [next((w for w in (n[-1:] + n[:1]) if w in MASK_WORDS), "") for n in words]
    if any(marked) and not all(marked):
        kinds = [f"{{stem}}_{word}" for word in marked]
        return [
            file._replace(role=kind if word else "")
            for file, kind, word in zip(files, kinds, marked, strict=True)
        ]
    suffixes = sorted({file.path.suffix for file in files}, key=is_lossless)
    by_suffix = [{file.stem for file in files if file.path.suffix == s} for s in suffixes]
    if len(suffixes) == 2 and by_suffix[0] == by_suffix[1]:
        role = "{stem}" + suffixes[1]
        return [file._replace(role=role * (file.path.suffix == suffixes[1])) for file in files]
    stems = {file.stem for file in files}
    tails = [tail_of(file.stem, stems) for file in files]
    counts = Counter(tails)
    if len(counts) < 2 or len(set(counts.values())) > 1 or len(files) == len(counts):
        return files
    kinds = [f"{{stem}}{tail}{file.path.suffix}" for file, tail in zip(files, tails, strict=True)]
    return [
        file._replace(role=kind if tail else "")
        for file, kind, tail in zip(files, kinds, tails, strict=True)
    ]


def is_lossless(suffix: str) -> bool:
    """Whether masks rather than photographs have this suffix."""
    return suffix.lower() not in (".jpg", ".jpeg", ".jfif", ".webp")


def tail_of(stem: str, stems: set[str]) -> str:
    """What a name has more than the longest other name that it starts with, such as _1stHO."""
    ends = [match.start() for match in re.finditer(r"[\W_]", stem)]
    return next((stem[end:] for end in reversed(ends) if stem[:end] in stems), "")
