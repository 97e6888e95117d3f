"""The files below a folder: what their names say, which are masks, and of which split."""

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

from kit.data.rasters import Layer
from kit.data.readers import IMAGE_SUFFIXES, open_image
from kit.errors import UserError, first_five

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
NOT_READ = {".h5", ".hdf5", ".mat", ".nii", ".mha", ".nrrd", ".dcm", ".dicom"}


class ImageFile(NamedTuple):
    """An image or a mask below a folder."""

    path: Path
    name: str  # its path below the folder, with "/"
    stem: str  # its name without suffixes of images, or what stands for {stem} in a pattern
    place: tuple[str, ...]  # its folders, without the words of roles and splits
    split: str  # train, val, test, or ""
    role: str  # "" for an image; for a mask the folder or pattern that names its kind
    rank: int = 0  # 2: a folder's name says images; 1: it names a split; -1: made of other images
    layers: tuple[Layer, ...] = ()  # of an image in several files


Listing = list[ImageFile] | None  # what a layout takes for the files below a folder, if any


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
        # train_1, testA_1
        files = [file._replace(split=split) for file, split in zip(files, splits, strict=True)]
    if not files or any(file.role for file in files):
        return files
    stems = {file.stem for file in files}
    tails = [tail_of(file.stem, stems) for file in files]
    kinds: dict[bool, list[ImageFile]] = defaultdict(list)  # True: made of images
    for file, tail in zip(files, tails, strict=True):
        kinds[bool(AUXILIARY_WORDS & set(split_words(tail)))].append(file)
    if kinds[True]:
        return roles_by_name(kinds[False]) + [file._replace(rank=-1) for file in kinds[True]]
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
    return max(map(count_colours, itertools.islice(paths, SHOWN)), default=0)


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


# --------------------------------------------------------------------------------------------------
#  Choose: the masks that --masks names, the images, a split
# --------------------------------------------------------------------------------------------------


def named_masks(root: Path, masks: str, files: list[ImageFile]) -> list[ImageFile]:
    """The masks that --masks names: a folder, or a pattern with {stem}. Raises UserError.

    Also several of these with a comma between them.
    """
    if "," in masks and not (root / masks).exists():
        return [f for name in masks.split(",") for f in named_masks(root, name.strip(), files)]
    if "{stem}" in masks:
        before, after = map(re.escape, masks.split("{stem}", 1))
        pattern = re.compile(rf"(?:.*/)?{before}([^/]+){after}(\.\w+)?")
        names = [str(file.path) if os.path.isabs(masks) else file.name for file in files]
        matches = zip(files, map(pattern.fullmatch, names), strict=True)
        chosen = [file._replace(role=masks, stem=match[1]) for file, match in matches if match]
        if not chosen:
            raise UserError(f"--masks {masks}", "no file fits", describe_folder(root))
        return chosen
    folders = {path for file in files for path in file.path.parents if path.name == masks}
    folders |= {Path(masks).absolute(), root / masks, root.parent / masks}
    folders = {path for path in folders if path.is_dir()}
    if not folders:
        raise UserError(
            f"--masks {masks}",
            "not found, and no {stem} in it",
            "name a folder of masks, a csv of RLE, or a pattern such as labels/{stem}_mask.png",
        )
    inside = [file for file in files if folders & set(file.path.parents)]
    outside = [file for folder in sorted(folders) for file in list_files(folder)]
    return [file._replace(role=masks) for file in inside or outside]


def images_among(files: list[ImageFile], masks: Iterable[ImageFile] = ()) -> list[ImageFile]:
    """The images among files, without `masks` and what is made of images, by a word or a folder.

    Where a name occurs again, the folder counts that is named as one of images.
    """
    paths = {mask.path for mask in masks}
    images = [file for file in files if not file.role and file.path not in paths]
    ranks: dict[tuple, int] = defaultdict(int)
    for image in images:
        key = (image.split, image.stem)
        ranks[key] = max(ranks[key], image.rank)
    lowest = 1 if any(image.rank > 0 for image in images) else min(ranks.values(), default=0)
    images = [i for i in images if i.rank >= max(lowest, 2 * (ranks[i.split, i.stem] == 2))]
    return without_copies(images)


def without_copies(images: list[ImageFile]) -> list[ImageFile]:
    """The images without those that a folder or a suffix holds again in another format."""
    kinds: dict[tuple[Path, str], dict[str, ImageFile]] = defaultdict(dict)
    for image in images:
        kinds[image.path.parent, image.path.suffix.lower()][image.stem] = image
    first: dict[frozenset[str], list[tuple[Path, str]]] = defaultdict(list)
    copies: set[Path] = set()
    for kind in sorted(kinds, key=lambda kind: kind[1] in LOSSY):
        stems = frozenset(kinds[kind])
        others = [kinds[other] for other in first[stems] if other[1] != kind[1]]
        if len(stems) > 1 and any(alike(kinds[kind], other) for other in others):
            copies |= {image.path for image in kinds[kind].values()}
        first[stems].append(kind)
    return [image for image in images if image.path not in copies]


def alike(some: dict[str, ImageFile], others: dict[str, ImageFile]) -> bool:
    """Whether the first images of the same names, {stem: image}, show the same."""
    try:
        pairs = [
            [open_image(each[stem].path) for each in (some, others)] for stem in [*some][:SHOWN]
        ]
    except UserError:  # `samples.decode_pairs` names the file
        return False
    small = [[np.asarray(i.convert("L").resize((32, 32)), float) for i in pair] for pair in pairs]
    return all(a.size == b.size for a, b in pairs) and all(abs(a - b).mean() < 4 for a, b in small)


def choose_split(files: list[ImageFile], test: bool) -> list[ImageFile]:
    """The test images alone, or all others."""
    return [file for file in files if (file.split == "test") == test]


# --------------------------------------------------------------------------------------------------
#  What is in a folder, for a refusal
# --------------------------------------------------------------------------------------------------


def describe_folder(root: Path) -> str:
    """The folders with their first three files, and what is there but not read."""
    folders, notes = [], []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        if names:
            shown = ", ".join(names[:3]) + (f", ... ({len(names)} files)" if names[3:] else "")
            place = os.path.relpath(folder, root)
            folders.append(shown if place == "." else f"{place}/ ({shown})")
        notes += [note for name in names[:20] if (note := not_read(Path(folder, name)))]
    there = f"there is {first_five(folders)}" if folders else "it is empty"
    return "; ".join([there, *dict.fromkeys(notes)])


def not_read(path: Path) -> str:
    """What to do with a file that the kit does not read: an archive, a volume; else ""."""
    suffix = path.suffix.lower()
    if suffix == ".gz" or suffix in NOT_READ:
        return f"{''.join(path.suffixes[-2:])} is not read: save each image as a PNG or TIFF"
    if suffix == ".zip":
        return f"unpack {path.name}: unzip -q {path} -d {path.with_suffix('')}"
    return ""
