"""Folders of images with masks: which file is which, by the names of folders and files.

What could be read in two ways is asked about. `Collection` is what every layout returns.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kit.config import Classes
from kit.data.classes import sort_values
from kit.data.images import IMAGE_SUFFIXES
from kit.data.masks import MaskFile, Planes
from kit.errors import UserError, first_five

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
TRAINING_FOLDERS = ("training", "images", "train/images", "train_images", "train", ".")
TEST_FOLDERS = ("testing", "test/images", "test_images", "test")
TRAINING_OUTPUTS = {  # the images that train.py writes, the first two into every --out
    "examples.jpg", "augmented.jpg", "validation.jpg",
    "curves.png", "pr_curve.png", "confusion.png",
}  # fmt: skip
MARKER = ".written_by_segmentation_kit"  # in infer.py's --out: what is there is no data
NEVER_MASKS = {"SegmentationObject"}  # Pascal VOC's instances, next to its classes


class Collection(NamedTuple):
    """A folder of images as a layout understood it."""

    name: str  # of the layout, for people
    samples: pd.DataFrame  # a row for each image, see `samples.find_samples`
    top: float = 0.0  # default of --top
    metric: str = "dice"  # default of --metric
    rle: str = "columns"  # order of RLE in submission.csv, see rle.py
    instances: bool = False  # a csv has a row for each object of an image
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
    named: bool = False  # a folder's name says that these are images


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
    return re.findall(r"[a-z]+|\d+", spaced.lower())


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
    place, split, role, named = [], "", "", False
    for folder in name.split("/")[:-1]:
        words = split_words(folder)
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), split)
        if MASK_WORDS & set(words):
            role = folder
        elif IMAGE_WORDS & set(words):
            role = ""  # Kvasir-SEG/images: the inner folder decides
        named |= bool(words and set(words) & (IMAGE_WORDS | set(SPLIT_WORDS)))
        rest = [word for word in words if word not in MASK_WORDS | IMAGE_WORDS | set(SPLIT_WORDS)]
        if rest:
            place.append(folder if len(rest) == len(words) else "_".join(rest))
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
    stems = {file.stem for file in files}
    tails = [tail_of(file.stem, stems) for file in files]
    counts = Counter(tails)
    lossy = (".jpg", ".jpeg", ".jfif", ".webp")  # of photographs rather than masks
    suffixes = sorted({f.path.suffix for f in files}, key=lambda s: s.lower() not in lossy)
    by_suffix = [{file.stem for file in files if file.path.suffix == s} for s in suffixes]
    roles = [""] * len(files)
    if any(marked) and not all(marked):
        roles = [word and f"{{stem}}_{word}" for word in marked]
    elif len(suffixes) == 2 and by_suffix[0] == by_suffix[1]:
        roles = ["{stem}" + suffixes[1] if f.path.suffix == suffixes[1] else "" for f in files]
    elif len(counts) > 1 and len(set(counts.values())) == 1 and len(files) > len(counts):
        pairs = zip(files, tails, strict=True)
        roles = [tail and f"{{stem}}{tail}{file.path.suffix}" for file, tail in pairs]
    return [file._replace(role=role) for file, role in zip(files, roles, strict=True)]


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
    """The names without an affix."""
    start, end = affix
    return [file.stem[len(start) : len(file.stem) - len(end)] for file in files]


def by_core(files: list[ImageFile], affix: tuple[str, str], place: Place) -> dict[tuple, ImageFile]:
    """{(place, name without the affix): file}; empty where two files share a key."""
    keys = [(place(file), core) for file, core in zip(files, cores(files, affix), strict=True)]
    unique = len(set(keys)) == len(files) and all(core for _, core in keys)
    return dict(zip(keys, files, strict=True)) if unique else {}


def match(images: list[ImageFile], masks: list[ImageFile]) -> Pairs:
    """The masks of each image: names equal, or one-to-one after one affix is taken off each side.

    In equal folders first. Otherwise several masks of an image that has a folder of its own.
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
                return best
    return max(best, match_objects(images, masks), key=len)


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
    return pairs


def mask_candidates(files: list[ImageFile], images: list[ImageFile]) -> dict[str, list[ImageFile]]:
    """{folder or pattern for --masks: its masks}; two kinds in one folder are two candidates."""
    kinds: dict[tuple, list[ImageFile]] = defaultdict(list)
    for file in files:
        words = tuple(word for word in split_words(file.role) if word not in SPLIT_WORDS)
        kinds[words, bool(file.split)].append(file)  # train_masks and val_masks are one kind
    candidates: dict[str, list[ImageFile]] = {}
    stems = {core for affix in affixes(images) for core in cores(images, affix)}
    for masks in kinds.values():
        role = masks[0].role
        tails = [tail_of(mask.stem, stems) for mask in masks]
        counts = Counter(tails)
        if "{stem}" in role or len(counts) < 2 or len(set(counts.values())) > 1 or len(counts) > 9:
            candidates[role] = masks
            continue
        for mask, tail in zip(masks, tails, strict=True):
            folder = "" if tail else f"{role}/"
            pattern = f"{folder}{{stem}}{tail}{mask.path.suffix}"
            candidates.setdefault(pattern, []).append(mask)
    return candidates


def named_masks(root: Path, masks: str, files: list[ImageFile]) -> list[ImageFile]:
    """The masks that --masks names: a folder, or a pattern with {stem}. Raises UserError."""
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
        images = [file for file in images if file.path not in {mask.path for mask in others}]
    elif not others and "test" not in map(SPLIT_WORDS.get, split_words(root.name)):
        others = masks_next_to(root)
    if any(file.named for file in images):
        images = [file for file in images if file.named]
    return images, others


def masks_next_to(root: Path) -> list[ImageFile]:
    """The masks in folders next to a folder of images."""
    folders = [path for path in sorted(root.parent.iterdir()) if path.is_dir() and path != root]
    folders = [path for path in folders if MASK_WORDS & set(split_words(path.name))]
    return [file._replace(role=folder.name) for folder in folders for file in list_files(folder)]


def choose_split(files: list[ImageFile], test: bool) -> list[ImageFile]:
    """The test images alone, or all others."""
    return [file for file in files if (file.split == "test") == test]


def one_split(
    images: list[ImageFile], others: list[ImageFile], masks: str, training: bool
) -> tuple[list[ImageFile], list[ImageFile], bool]:
    """The images and masks of the test, or all others, and whether they are of the test."""
    test = bool(choose_split(images, True)) and not (training and choose_split(images, False))
    images, same = choose_split(images, test), choose_split(others, test)
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
    if "{stem}" in masks:
        return None
    images, others, _ = one_split(*images_and_masks(root, masks), masks, training)
    folders: dict[str, list[ImageFile]] = defaultdict(list)
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
        parts = tuple(file and MaskFile(file[0].path, image=image.path) for file in files)
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
    problem = f"{' and '.join(fitting)} fit the images"
    error = UserError(
        f"--data {root}", problem, f"choose one, such as --masks '{next(iter(fitting))}'"
    )
    if training:
        raise error
    print(f"no scores: {error}")
    return collect(root, images, {})


def fitting_masks(images: list[ImageFile], others: list[ImageFile]) -> dict[str, Pairs]:
    """{folder or pattern for --masks: pairs}, the candidates that fit about as well as the best."""
    if not images:
        return {}
    pairs = {kind: match(images, some) for kind, some in mask_candidates(others, images).items()}
    best = max(map(len, pairs.values()), default=0)
    return {kind: matched for kind, matched in pairs.items() if 2 * len(matched) >= best > 0}


def collect(root: Path, images: list[ImageFile], pairs: Pairs) -> Collection:
    """The samples of paired files, with the column `folder`, and `fold` where folders say so.

    Raises UserError where two images of a folder share a name.
    """
    check_names((image.path, image.stem) for image in images)
    paths = [image.path for image in images]
    masks = []
    for image in images:
        files = [mask.path for mask in pairs.get(image.name, [])]
        file = MaskFile(files[0], more=tuple(files[1:]), image=image.path) if files else None
        masks.append(file and Planes((file,)))
    ids = make_ids(paths, [image.stem for image in images], root)
    samples = pd.DataFrame({"id": ids, "image": paths, "mask": masks})
    samples["folder"] = ["/".join(image.place) for image in images]
    if pairs:
        image = next(image for image in images if image.name in pairs)
        files = pairs[image.name]
        several = f" and {len(files) - 1} more" if len(files) > 1 else ""
        print(f"pairs: {len(pairs)} images, such as {image.name} with {files[0].name}{several}")
    splits = [image.split for image in images]
    if {"train", "val"} <= set(splits):
        samples["fold"] = [0 if split == "val" else 1 for split in splits]
        print(f"split: as given, {splits.count('val')} images in val validate (fold 0)")
    return Collection("one mask file per image", samples)


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
    images = [file for file in list_files(root) if not file.role]
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
    if suffix == ".zip":
        return f"unpack {path.name}: unzip -q {path} -d {path.with_suffix('')}"
    if suffix != ".json":
        return ""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    kind = "labelme" if b'"shapes"' in head else "COCO" if b'"annotations"' in head else ""
    return f"{kind} json is not read: convert it to mask files" if kind else ""
