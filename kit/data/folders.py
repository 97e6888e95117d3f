"""Folders of images with masks: which file is which, by the names of folders and files.

What could be read in two ways is asked about. `Collection` is what every layout returns.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.classes import sort_values
from kit.data.images import IMAGE_SUFFIXES, open_image
from kit.data.masks import MaskFile, Planes
from kit.errors import UserError, first_five

MASK_WORDS = {
    "mask", "masks", "msk", "label", "labels", "lab", "lbl", "annotation", "annotations", "annot",
    "anno", "gt", "gts", "groundtruth", "truth", "manual", "seg", "segmentation", "segmentations",
    "segmentationclass", "semantic", "target", "targets", "matte", "mattes",
}  # fmt: skip
IMAGE_WORDS = {
    "image", "images", "img", "imgs", "jpegimages", "original", "originals", "photo", "photos",
    "input", "inputs", "sat",
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
OF_ONE_MASK = re.compile(  # the end of x_mask, x_mask_2, or the start of mask_x
    rf"[\s_.-]+(?:{'|'.join(MASK_WORDS)})(?:[\W_]*\d+)?$|^(?:{'|'.join(MASK_WORDS)})[\W_]+", re.I
)
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")  # of photographs rather than masks
MASK_COLOURS = 64  # files with more are rather images
PROPOSED = 20  # names that are tried before one is proposed
SHOWN = 3  # files of a kind that are opened to see whether they are masks
TRAINING_FOLDERS = ("training", "images", "train/images", "train_images", "train", ".")
TEST_FOLDERS = ("testing", "test/images", "test_images", "test")
TRAINING_OUTPUTS = {  # the images that train.py writes, the first two into every --out
    "examples.jpg", "augmented.jpg", "validation.jpg",
    "curves.png", "pr_curve.png", "confusion.png",
}  # fmt: skip
NOT_READ = {".npy", ".npz", ".h5", ".hdf5", ".mat", ".nii", ".mha", ".nrrd", ".dcm", ".dicom"}
MARKER = ".written_by_segmentation_kit"  # in infer.py's --out: what is there is no data
NEVER_MASKS = {"SegmentationObject"}  # Pascal VOC's instances, next to its classes


class Collection(NamedTuple):
    """A folder of images as a layout understood it."""

    name: str  # of the layout, for people
    samples: pd.DataFrame  # a row for each image, see `samples.find_samples`
    top: float = 0.0  # default of --top
    metric: str = "dice"  # default of --metric
    rle: str = "columns"  # order of RLE in submission.csv, see rle.py
    classes: Classes = Classes()  # that the masks tell apart
    value_range: tuple[float, ...] = ()  # of images of more than 8 bits, see `images.read_image`


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


def image_folder(root: Path, training: bool) -> Path | None:
    """The folder of images in `root`; test images first where they are not for training."""
    names = TRAINING_FOLDERS if training else TEST_FOLDERS + TRAINING_FOLDERS
    return next((root / name for name in names if image_paths(root / name)), None)


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


def colours(paths: list[Path]) -> float:
    """The most colours of any of the first files: few in masks. Infinite for lossy ones."""
    if paths[0].suffix.lower() in LOSSY:
        return math.inf
    try:
        shown = [np.asarray(open_image(path)) for path in paths[:SHOWN]]
    except UserError:  # `samples.decode_pairs` names the file
        return math.inf
    parts = [pixels[:: 1 + len(pixels) // 256, :: 1 + pixels.shape[1] // 256] for pixels in shown]
    return max(len(np.unique(part.reshape(-1, *part.shape[2:]), axis=0)) for part in parts)


def tail_of(stem: str, stems: set[str]) -> str:
    """What a name has more than the longest other name that it starts with, such as _1stHO."""
    ends = [match.start() for match in re.finditer(r"[\W_]", stem)]
    return next((stem[end:] for end in reversed(ends) if stem[:end] in stems), "")


# --------------------------------------------------------------------------------------------------
#  Pairs
# --------------------------------------------------------------------------------------------------

Pairs = dict[str, list[ImageFile]]  # {name of an image: its masks}
Place = Callable[[ImageFile], tuple]  # what files must share to be compared


def affixes(files: list[ImageFile]) -> list[tuple[str, str]]:
    """What may be taken off at both ends of the names: nothing, or what all have in common."""
    stems = [file.stem for file in files]
    prefix = os.path.commonprefix(stems).rstrip("0123456789")
    suffix = os.path.commonprefix([stem[::-1] for stem in stems])[::-1].lstrip("0123456789")
    first, last = re.match(r"[^\W_]+[\W_]+", prefix), re.search(r"[\W_]+[^\W_]+$", suffix)
    prefixes = dict.fromkeys(["", first[0] if first else "", prefix])
    suffixes = dict.fromkeys(["", last[0] if last else "", suffix])
    return [(start, end) for start in prefixes for end in suffixes]


def cores(files: list[ImageFile], affix: tuple[str, str]) -> list[str]:
    """The names without an affix, and numbers without leading zeros."""
    start, end = affix
    names = [file.stem[len(start) : len(file.stem) - len(end)] for file in files]
    return [str(int(name)) if name.isdecimal() else name for name in names]


def by_core(files: list[ImageFile], affix: tuple[str, str], place: Place) -> dict[tuple, ImageFile]:
    """{(place, name without the affix): file}; empty where two files share a key."""
    keys = [(place(file), core) for file, core in zip(files, cores(files, affix), strict=True)]
    unique = len(set(keys)) == len(files) and all(core for _, core in keys)
    return dict(zip(keys, files, strict=True)) if unique else {}


def match(images: list[ImageFile], masks: list[ImageFile]) -> Pairs:
    """The masks of each image: names equal, or one-to-one after one affix is taken off each side.

    In equal folders first. Otherwise several masks of an image: in a folder of its own, or of its
    name with a word for masks and perhaps a number, x_mask and x_mask_1.
    """
    places: list[Place] = [lambda file: (file.split, file.place), lambda file: file.split]
    if not {mask.split for mask in masks} & {image.split for image in images} - {""}:
        places += [lambda file: file.place, lambda file: ()]
    best: Pairs = {}
    for place in places:
        right = [by_core(masks, affix, place) for affix in affixes(masks)]
        for affix in affixes(images):
            left = by_core(images, affix, place)
            for candidates in right:
                both = [key for key in left if key in candidates]
                if len(both) > len(best):
                    best = {left[key].name: [candidates[key]] for key in both}
            if len(best) == len(images):
                return add_objects(best, masks)
    by_words = (match_words(images, masks, place) for place in places)
    best = max(best, match_objects(images, masks), *by_words, key=len)
    return add_objects(best, masks)


def match_words(images: list[ImageFile], masks: list[ImageFile], place: Place) -> Pairs:
    """The masks of each image whose names are equal without the words for masks."""
    owners = {(place(image), image.stem): image.name for image in images}
    pairs: Pairs = defaultdict(list)
    for mask in masks:
        owner = owners.get((place(mask), OF_ONE_MASK.sub("", mask.stem)))
        if owner:
            pairs[owner].append(mask)
    one_folder = all(len({mask.path.parent for mask in some}) == 1 for some in pairs.values())
    return pairs if one_folder and len(owners) == len(images) else {}


def add_objects(pairs: Pairs, masks: list[ImageFile]) -> Pairs:
    """With masks of further objects: named as the mask of an image, and a number after it."""
    owners = {(files[0].path.parent, files[0].stem): name for name, files in pairs.items()}
    stems = {stem for _, stem in owners}
    used = {mask.path for files in pairs.values() for mask in files}
    for mask in masks:
        tail = tail_of(mask.stem, stems) if mask.path not in used else ""
        owner = owners.get((mask.path.parent, mask.stem.removesuffix(tail)))
        if tail and owner and set(split_words(re.sub(r"\d", "", tail))) <= MASK_WORDS:
            pairs[owner].append(mask)
    return pairs


def match_objects(images: list[ImageFile], masks: list[ImageFile]) -> Pairs:
    """Masks of single objects, in a folder for each image: ID/masks/*.png, or masks/ID/*.png."""
    pairs: Pairs = defaultdict(list)
    keys: tuple[tuple[Place, Place], ...] = (
        (lambda image: image.place[-1:], lambda mask: mask.place[-1:]),
        (lambda image: (image.stem,), lambda mask: mask.place[-1:]),
    )
    for of_image, of_mask in keys:
        owners = {of_image(image): image.name for image in images}
        if len(owners) == len(images) > 1 and all(of_mask(mask) in owners for mask in masks):
            for mask in masks:
                pairs[owners[of_mask(mask)]].append(mask)
            break
    return pairs if 2 * len(pairs) >= len(images) else {}


def mask_candidates(files: list[ImageFile], images: list[ImageFile]) -> dict[str, list[ImageFile]]:
    """{folder or pattern for --masks: its masks}; two kinds in one folder are two candidates."""
    kinds: dict[tuple, list[ImageFile]] = defaultdict(list)
    for file in files:
        words = tuple(word for word in split_words(file.role) if word not in SPLIT_WORDS)
        kinds[words, bool(file.split)].append(file)  # train_masks and val_masks are one kind
    candidates: dict[str, list[ImageFile]] = {}
    for masks in kinds.values():
        role = masks[0].role
        tails = [] if "{stem}" in role else tails_of_kinds(masks, images)
        if not tails:
            candidates[role_of(masks, files)] = masks
        for mask, tail in zip(masks, tails, strict=bool(tails)):
            folder = "" if tail else f"{role}/"
            pattern = f"{folder}{{stem}}{tail}{mask.path.suffix}"
            candidates.setdefault(pattern, []).append(mask)
    return candidates


def role_of(masks: list[ImageFile], files: list[ImageFile]) -> str:
    """What names these masks alone among all: their role, or their last common folder."""
    role = masks[0].role
    common = os.path.commonprefix([Path(file.name).parts[:-1] for file in masks])
    paths = {file.path for file in masks}
    others = (file.path.parts for file in files if file.path not in paths)
    return common[-1] if common and any(role in parts for parts in others) else role


def tails_of_kinds(masks: list[ImageFile], images: list[ImageFile]) -> list[str]:
    """The tail of each mask's name where tails tell kinds of masks: annotators, or classes.

    As many of each, or of different words; [] where further masks of an image have a number.
    """
    stems = {core for affix in affixes(images) for core in cores(images, affix)}
    digits = len(re.match(r"\d*", masks[0].stem)[0])  # the masks of 7 may start with 00007
    stems |= {stem.zfill(digits) for stem in stems if stem.isdecimal()}
    tails = [tail_of(mask.stem, stems) for mask in masks]
    counts = Counter(tails)
    words = {tuple(w for w in split_words(tail) if not w.isdecimal()) for tail in counts}
    equal = len(set(counts.values())) == 1 and len(counts) < 10
    named = all(set(each) - MASK_WORDS for each in words) and len(words) == len(counts)
    return tails if len(counts) > 1 and (equal or named) else []


def named_masks(root: Path, masks: str, files: list[ImageFile]) -> list[ImageFile]:
    """The masks that --masks names: a folder, or a pattern with {stem}. Raises UserError.

    Also several of these with a comma between them.
    """
    if "," in masks and not (root / masks).exists():
        return [f for name in masks.split(",") for f in named_masks(root, name.strip(), files)]
    if "{stem}" in masks:
        before, after = map(re.escape, masks.split("{stem}", 1))
        pattern = re.compile(rf"(?:.*/)?{before}([^/]+){after}(\.\w+)?")
        absolute = os.path.isabs(masks)
        names = [str(file.path) if absolute else file.name for file in files]
        matches = [(f, pattern.fullmatch(name)) for f, name in zip(files, names, strict=True)]
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


def images_and_masks(root: Path, masks: str) -> tuple[list[ImageFile], list[ImageFile]]:
    """The images below a folder, and the masks there or in a folder next to it."""
    if not root.is_dir() or masks.endswith(".csv"):
        return [], []
    files = list_files(root)
    images = [file for file in files if not file.role]
    others = [file for file in files if file.role]
    if masks != "auto":
        others = named_masks(root, masks, files)
        named = {mask.path for mask in others}
        images = [file for file in images if file.path not in named]
    elif not others and split_of(split_words(root.name)) != "test":
        others = masks_next_to(root)
    return without_auxiliary(images), others


def propose_masks(root: Path) -> list[str]:
    """What --masks may name: folders or ends of names that pair and look like masks, best first."""
    tests, files = (choose_split(list_files(root), test) for test in (True, False))
    not_masks = {file.path for file in tests if not file.role}
    stems = {file.stem for file in files}
    names = Counter(file.path.parent.name for file in files if file.path.parent != root)
    names.update(f"{{stem}}{tail_of(f.stem, stems)}{f.path.suffix}" for f in files)
    proposals = {}
    for name, _ in names.most_common(PROPOSED):
        images, others = images_and_masks(root, name)
        if not_masks & {mask.path for mask in others}:
            continue
        images, others, _ = one_split(images, others, name, training=True)
        pairs = match(images, others)
        paths = [mask.path for masks in pairs.values() for mask in masks]
        if len(pairs) > 1 and 2 * len(paths) > len(others) and colours(paths) <= MASK_COLOURS:
            proposals[name] = len(pairs)
    return sorted(proposals, key=lambda name: -proposals[name])


def propose_folders(root: Path) -> str:
    """The flags with which masks fit one folder of images, or the test images; "" for none."""
    images, masks = images_and_masks(root, "auto")
    groups: dict[Path, list[ImageFile]] = defaultdict(list)
    for image in images:
        groups[image.path.parent].append(image._replace(split="", place=()))
    tests = [image._replace(split="") for image in choose_split(images, True)]
    if tests:
        groups[Path(os.path.commonpath([image.path.parent for image in tests]))] = tests
    for folder, some in groups.items():
        paths = [mask.path.parent for files in match(some, masks).values() for mask in files]
        if len(paths) > 1 and 2 * len(paths) >= max(len(masks), len(some)):
            return f"--data {folder} --masks {os.path.commonpath(paths)}"
    return ""


def without_auxiliary(images: list[ImageFile]) -> list[ImageFile]:
    """The images without those that are made of them: by a word, or where a name occurs again.

    Of these the folder counts that is named as one of images.
    """
    ranks: dict[tuple, int] = defaultdict(int)
    for image in images:
        key = (image.split, image.stem)
        ranks[key] = max(ranks[key], image.rank)
    lowest = 1 if any(image.rank > 0 for image in images) else min(ranks.values(), default=0)
    return [i for i in images if i.rank >= max(lowest, 2 * (ranks[i.split, i.stem] == 2))]


def masks_next_to(root: Path) -> list[ImageFile]:
    """The masks in folders next to a folder of images, which belong to it by all names.

    Those of the folders have the same words, or a folder has none but those of masks and splits;
    those of nearly all files are those of images.
    """
    images = [file for file in list_files(root) if not file.role]
    own, masks = words_of_place(split_words(root.name)), []
    for folder in sorted(path for path in root.parent.iterdir() if path.is_dir() and path != root):
        words = split_words(folder.name)
        if MASK_WORDS & set(words) and words_of_place(words) in ([], own):
            files = [file._replace(role=folder.name) for file in list_files(folder)]
            matched = sum(map(len, match(images, files).values()))
            masks += files if 10 * matched >= 9 * min(len(files), len(images)) > 0 else []
    return masks


def choose_split(files: list[ImageFile], test: bool) -> list[ImageFile]:
    """The test images alone, or all others."""
    return [file for file in files if (file.split == "test") == test]


def one_split(
    images: list[ImageFile], others: list[ImageFile], masks: str, training: bool
) -> tuple[list[ImageFile], list[ImageFile], bool]:
    """The images and masks of the test, or all others, and whether they are of the test."""
    test = bool(choose_split(images, True)) and not (training and choose_split(images, False))
    rest, images = choose_split(images, not test), choose_split(images, test)
    of_rest = {image.place for image in rest} - {image.place for image in images}
    others = [mask for mask in others if mask.split or mask.place not in of_rest]
    same = choose_split(others, test)
    others = same if masks == "auto" else same or others  # never the masks of other images
    return images, others, test


# --------------------------------------------------------------------------------------------------
#  Layouts
# --------------------------------------------------------------------------------------------------


def class_folders(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images with one folder of masks for each class, masks/NAME/STEM.png; they may overlap.

    A class without a mask is empty. Folders that are named like images or like folders of images
    are no classes.
    """
    images, others, _ = one_split(*images_and_masks(root, masks), masks, training)
    folders: dict[str, list[ImageFile]] = defaultdict(list)
    if "," in masks:
        for mask in others:
            folders[re.sub(r"\{stem\}[\W_]*", "", Path(mask.role).stem)].append(mask)
        pairs = {name: match(images, files) for name, files in folders.items()}
        return collect_classes(root, images, pairs)
    if "{stem}" in masks:
        return None
    for mask in others:
        above = [folder.name for folder in mask.path.parents]
        last = mask.place[-1:] == (above[0],)  # else the name is that of a split, or of all masks
        if not last or Path(mask.role).name not in above[1:]:
            return None
        folders[above[0]].append(mask._replace(place=mask.place[:-1]))
    taken = {image.stem for image in images} | {name for image in images for name in image.place}
    if len(folders) < 2 or taken & set(folders):
        return None
    pairs = {name: match(images, files) for name, files in folders.items()}
    if any(len(pairs[name]) < len(files) for name, files in folders.items()):
        return None
    return collect_classes(root, images, pairs)


def collect_classes(root: Path, images: list[ImageFile], pairs: dict[str, Pairs]) -> Collection:
    """The samples, of the pairs of each class."""
    names = sort_values(pairs)
    united: Pairs = defaultdict(list)
    for name in names:
        for image, files in pairs[name].items():
            united[image] += files
    collection, missing = collect(root, images, united), 0
    masks: list[Planes | None] = []
    for image in images:
        files = [pairs[name].get(image.name) for name in names]
        parts = tuple(some and mask_file(some, image) for some in files)
        masks.append(Planes(parts) if any(parts) else None)
        missing += sum(part is None for part in parts) if any(parts) else 0
    if missing:
        print(f"classes: {missing} masks of a class are not there, they are read as empty")
    collection.samples["mask"] = masks
    return collection._replace(name="one folder of masks per class", classes=Classes(names, names))


def paired_folders(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images and masks below a folder, or masks in a folder next to it."""
    every_image, every_mask = images_and_masks(root, masks)
    images, others, test = one_split(every_image, every_mask, masks, training)
    if not images or not others:
        return None
    fitting = fitting_masks(images, others)
    if test and len(fitting) == 1 and masks == "auto":  # what is in doubt there is in doubt here
        rest = [choose_split(group, False) for group in (every_image, every_mask)]
        fitting = max(fitting, fitting_masks(*rest), key=len)
    if len(fitting) < 2:
        return collect(root, images, next(iter(fitting.values()), {}))
    error = several_fit(root, images, others, fitting)
    if training:
        raise error
    print(f"no scores: {error}")
    return collect(root, images, {})


def several_fit(
    root: Path, images: list[ImageFile], others: list[ImageFile], fitting: dict[str, Pairs]
) -> UserError:
    """The question which masks are meant: one kind, or each a class where all are binary."""
    kinds = mask_candidates(others, images)
    first = max(fitting, key=lambda name: len(MASK_WORDS & set(split_words(name))))
    remedy = f"choose one, such as --masks '{first}'"
    if all(colours([mask.path for mask in masks]) <= 2 for masks in kinds.values()):
        remedy += f", or take each for a class with --masks '{','.join(kinds)}'"
        remedy += " (and --classes one: united)"
    names = first_five(fitting, " and ")
    return UserError(f"--data {root}", f"{names} fit the images", remedy)


def fitting_masks(images: list[ImageFile], others: list[ImageFile]) -> dict[str, Pairs]:
    """{folder or pattern for --masks: pairs}, the candidates that fit about as well as the best."""
    if not images:
        return {}
    pairs = {kind: match(images, some) for kind, some in mask_candidates(others, images).items()}
    best = max(map(len, pairs.values()), default=0)
    return {kind: matched for kind, matched in pairs.items() if 2 * len(matched) >= best > 0}


def collect(root: Path, images: list[ImageFile], pairs: Pairs) -> Collection:
    """The samples of paired files, with the columns `folder` and `split`.

    Raises UserError where two images of a folder share a name.
    """
    check_names((image.path, image.stem) for image in images)
    paths = [image.path for image in images]
    masks = []
    for image in images:
        files = pairs.get(image.name)
        masks.append(files and Planes((mask_file(files, image),)))
    ids = make_ids(paths, [image.stem for image in images], root)
    samples = pd.DataFrame({"id": ids, "image": paths, "mask": masks})
    samples["folder"] = ["/".join(image.place) for image in images]
    samples["split"] = [image.split for image in images]
    if pairs:
        name, files = max(pairs.items(), key=lambda pair: len(pair[1]))
        several = f" and {len(files) - 1} more, united" if len(files) > 1 else ""
        print(f"pairs: {len(pairs)} images, such as {name} with {files[0].name}{several}")
    return Collection("one mask file per image", samples)


def mask_file(files: list[ImageFile], image: ImageFile) -> MaskFile:
    """The mask of an image in one file, or in several that are united."""
    first, *more = (file.path for file in files)
    return MaskFile(first, more=tuple(more), image=image.path)


def images_alone(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images without masks, to predict: a folder, or one file."""
    if root.is_file():
        is_image = root.suffix.lower() in IMAGE_SUFFIXES
        samples = pd.DataFrame({"id": [root.stem], "image": [root], "mask": [None]})
        return Collection("one image", samples) if is_image else None
    folder = image_folder(root, training)
    if folder:
        paths = list_images(folder)
        samples = pd.DataFrame({"id": list(paths), "image": list(paths.values())})
        return Collection("images without masks", samples.assign(mask=None))
    images = without_auxiliary([file for file in list_files(root) if not file.role])
    images = choose_split(images, not training) or images
    return collect(root, images, {})._replace(name="images without masks") if images else None


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
    """What to do with a file that the kit does not read: an archive, COCO or labelme; else ""."""
    suffix = path.suffix.lower()
    if suffix == ".gz" or suffix in NOT_READ:
        return f"{''.join(path.suffixes[-2:])} is not read: save each image as a PNG or TIFF"
    if suffix == ".zip":
        return f"unpack {path.name}: unzip -q {path} -d {path.with_suffix('')}"
    if suffix != ".json":
        return ""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    kind = "labelme" if b'"shapes"' in head else "COCO" if b'"annotations"' in head else ""
    return f"{kind} json is not read: convert it to mask files" if kind else ""
