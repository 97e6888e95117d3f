"""Folders of images with masks: which file is which, by the names of folders and files.

What could be read in two ways is asked about. `Collection` is what every layout returns.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.classes import sort_values
from kit.data.masks import MaskFile, Planes
from kit.data.names import (
    MASK_WORDS,
    SHOWN,
    SPLIT_WORDS,
    ImageFile,
    Listing,
    check_names,
    choose_split,
    colours,
    image_paths,
    images_among,
    list_files,
    list_images,
    make_ids,
    named_masks,
    split_of,
    split_words,
    tail_of,
    words_of_place,
)
from kit.data.readers import IMAGE_SUFFIXES, open_image
from kit.errors import UserError, first_five

TRAINING_FOLDERS = ("training", "images", "train/images", "train_images", "train", ".")
TEST_FOLDERS = ("testing", "test/images", "test_images", "test")
MASK_COLOURS = 64  # files with more are rather images
PROPOSED = 20  # names that are tried before one is proposed


class Collection(NamedTuple):
    """A folder of images as a layout understood it."""

    name: str  # of the layout, for people
    samples: pd.DataFrame  # a row for each image, see `samples.find_samples`
    top: float = 0.0  # default of --top
    metric: str = "dice"  # default of --metric
    rle: str = "columns"  # order of RLE in submission.csv, see rle.py
    instances: bool = False  # a csv has a row for each object of an image
    classes: Classes = Classes()  # that the masks tell apart
    channels: int = 3  # of each image
    bands: tuple[str, ...] = ()  # the files of an image's channels, see `bands`; (): it is one
    neighbours: tuple[int, ...] = ()  # see `ModelConfig`
    value_range: tuple[float, ...] = ()  # of images of more than 8 bits, see `rasters.to_pixels`


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
    """The masks of each image: of its name, or with words for masks or a number after it."""
    owners = {(place(image), image.stem): image.name for image in images}
    stems = {image.stem for image in images}
    pairs: Pairs = defaultdict(list)
    for mask in masks:
        tail = "" if mask.stem in stems else tail_of(mask.stem, stems)
        owner = owners.get((place(mask), mask.stem.removesuffix(tail)))
        if owner and not other_words(tail):
            pairs[owner].append(mask)
    one_folder = all(len({mask.path.parent for mask in some}) == 1 for some in pairs.values())
    return pairs if one_folder and len(owners) == len(images) else {}


def other_words(tail: str) -> set[str]:
    """The words at the end of a mask's name that tell its kind: no words for masks, no numbers."""
    return {word for word in split_words(tail) if not word.isdecimal()} - MASK_WORDS


def add_objects(pairs: Pairs, masks: list[ImageFile]) -> Pairs:
    """With masks of further objects: named as the mask of an image, and a number after it."""
    owners = {(files[0].path.parent, files[0].stem): name for name, files in pairs.items()}
    stems = {stem for _, stem in owners}
    used = {mask.path for files in pairs.values() for mask in files}
    for mask in masks:
        tail = tail_of(mask.stem, stems) if mask.path not in used else ""
        owner = owners.get((mask.path.parent, mask.stem.removesuffix(tail)))
        if tail and owner and not other_words(tail):
            pairs[owner].append(mask)
    return pairs


def match_objects(images: list[ImageFile], masks: list[ImageFile]) -> Pairs:
    """Masks of single objects, in a folder for each image: ID/masks/*.png, or masks/ID/*.png."""
    pairs: Pairs = defaultdict(list)
    for key in (lambda image: image.place[-1:], lambda image: (image.stem,)):
        owners = {key(image): image.name for image in images}
        if len(owners) == len(images) > 1 and all(mask.place[-1:] in owners for mask in masks):
            for mask in masks:
                pairs[owners[mask.place[-1:]]].append(mask)
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
    tails = ["" if mask.stem in stems else tail_of(mask.stem, stems) for mask in masks]
    counts = Counter(tails)
    words = {frozenset(other_words(tail)) for tail in counts}
    equal = len(set(counts.values())) == 1 and len(counts) < 10
    named = all(words) and len(words) == len(counts)
    return tails if len(counts) > 1 and (equal or named) else []


def images_and_masks(
    root: Path, masks: str, files: Listing = None
) -> tuple[list[ImageFile], list[ImageFile]]:
    """The images below a folder, and the masks there or in a folder next to it."""
    if not root.is_dir() or masks.endswith(".csv"):
        return [], []
    files = list_files(root) if files is None else files
    if masks == "auto":
        others = [file for file in files if file.role] or masks_next_to(root, files)
    else:
        others = named_masks(root, masks, files)
    return images_among(files, others), others


def propose_flags(root: Path) -> list[str]:
    """The flags that name folders or ends of names which pair and look like masks.

    Without any, those of `propose_folders`.
    """
    files = list_files(root)
    tests = {file.path for file in choose_split(files, True) if not file.role}
    rest = choose_split(files, False)
    stems = {file.stem for file in rest}
    names = Counter(folder for file in rest for folder in file.name.split("/")[:-1])
    names.update(f"{{stem}}{tail_of(f.stem, stems)}{f.path.suffix}" for f in rest)
    proposals = {}
    for name, _ in names.most_common(PROPOSED):
        masks = named_masks(root, name, files)
        if tests & {mask.path for mask in masks}:
            continue
        images = choose_split(images_among(files, masks), False)
        masks = choose_split(masks, False)
        pairs = match(images, masks)
        paths = [mask.path for some in pairs.values() for mask in some]
        if len(pairs) > 1 and 2 * len(paths) > len(masks) and colours(paths) <= MASK_COLOURS:
            proposals[name] = len(pairs)
    most = max(proposals.values(), default=0)
    flags = [f"--masks '{name}'" for name, count in proposals.items() if count == most]
    return flags or propose_folders(root, files)


def propose_folders(root: Path, files: list[ImageFile]) -> list[str]:
    """The flags with which masks fit one folder of images, or the test images.

    None where the same masks fit two folders: nothing says whose they are.
    """
    masks = [file for file in files if file.role] or masks_next_to(root, files)
    groups, fitting, taken = defaultdict(list), [], Counter()
    for image in sorted(images_among(files), key=lambda image: image.split != "test"):
        tests = (p for p in image.path.parents if split_of(split_words(p.name)) == "test")
        folder = next(tests) if image.split == "test" else image.path.parent
        groups[folder].append(image._replace(split=""))
    for folder, some in groups.items():
        paths = [mask.path for files in match(some, masks).values() for mask in files]
        taken.update(paths)
        if len(paths) > 1 and 2 * len(paths) >= len(some) and folder != root:
            fitting.append(f"--data {folder} --masks {os.path.commonpath(p.parent for p in paths)}")
    return fitting if max(taken.values(), default=0) < 2 else []


def masks_next_to(root: Path, files: list[ImageFile]) -> list[ImageFile]:
    """The masks in folders next to a folder of images, `files`, which belong to it by all names.

    Those of the folders have the same words, or a folder has none but those of masks and splits;
    those of nearly all files are those of images. None next to test images.
    """
    images = [file for file in files if not file.role]
    own, masks = split_words(root.name), []
    if split_of(own) == "test":
        return []
    for folder in sorted(path for path in root.parent.iterdir() if path.is_dir() and path != root):
        words = split_words(folder.name)
        if MASK_WORDS & set(words) and words_of_place(words) in ([], words_of_place(own)):
            others = [file._replace(role=folder.name) for file in list_files(folder)]
            matched = sum(map(len, match(images, others).values()))
            masks += others if 10 * matched >= 9 * min(len(others), len(images)) > 0 else []
    return masks


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


def image_folder(root: Path, training: bool) -> Path | None:
    """The folder of images in `root`; test images first where they are not for training."""
    names = TRAINING_FOLDERS if training else TEST_FOLDERS + TRAINING_FOLDERS
    return next((root / name for name in names if image_paths(root / name)), None)


def class_folders(
    root: Path, masks: str, target: str, training: bool, files: Listing = None
) -> Collection | None:
    """Images with one folder of masks for each class, masks/NAME/STEM.png; they may overlap.

    Or with several kinds of masks that --masks lists. A class without a mask is empty. Folders that
    are named like images or like folders of images are no classes.
    """
    images, others, _ = one_split(*images_and_masks(root, masks, files), masks, training)
    listed = "," in masks
    folders: dict[str, list[ImageFile]] = defaultdict(list)
    for mask in others:
        if listed:
            folders[re.sub(r"\{stem\}[\W_]*", "", Path(mask.role).stem)].append(mask)
            continue
        name, *above = [folder.name for folder in mask.path.parents]
        last = mask.place[-1:] == (name,)  # else the name is that of a split, or of all masks
        if not last or Path(mask.role).name not in above:
            return None
        folders[name].append(mask._replace(place=mask.place[:-1]))
    taken = {image.stem for image in images} | {name for image in images for name in image.place}
    if not listed and (len(folders) < 2 or taken & set(folders)):
        return None
    pairs = {name: match(images, files) for name, files in folders.items()}
    all_match = all(len(pairs[name]) >= len(files) for name, files in folders.items())
    return collect_classes(root, images, pairs) if listed or all_match else None


def collect_classes(root: Path, images: list[ImageFile], pairs: dict[str, Pairs]) -> Collection:
    """The samples, of the pairs of each class."""
    names = sort_values(pairs)
    united: Pairs = defaultdict(list)
    for name in names:
        for image, files in pairs[name].items():
            united[image] += files
    collection = collect(root, images, united, "a mask for each class")
    parts = [
        tuple(mask_file(pairs[name].get(image.name), image) for name in names) for image in images
    ]
    collection.samples["mask"] = [Planes(each) if any(each) else None for each in parts]
    missing = sum(each.count(None) for each in parts if any(each))
    if missing:
        print(f"classes: {missing} masks of a class are not there, they are read as empty")
    return collection._replace(name="one folder of masks per class", classes=Classes(names, names))


def paired_folders(
    root: Path, masks: str, target: str, training: bool, files: Listing = None
) -> Collection | None:
    """Images and masks below a folder, or masks in a folder next to it."""
    every_image, every_mask = images_and_masks(root, masks, files)
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
    every = f"--masks '{','.join(kinds)}'"
    binary = all(colours([mask.path for mask in masks]) <= 2 for masks in kinds.values())
    if binary and apart(kinds, images):
        remedy += f", or take each for a class with {every} (and --classes one: united)"
    elif binary and all("{stem}" in kind for kind in kinds):
        remedy += f", or average annotators: {every} --classes one --soft true"
    return UserError(f"--data {root}", f"{first_five(fitting, ' and ')} fit the images", remedy)


def apart(kinds: dict[str, list[ImageFile]], images: list[ImageFile]) -> bool:
    """Whether kinds of binary masks hardly overlap in the first images."""
    pairs = [match(images, masks) for masks in kinds.values()]
    for image in images[:SHOWN]:
        files = [mask for matched in pairs for mask in matched.get(image.name, [])]
        planes = [np.asarray(open_image(file.path).convert("L")) > 0 for file in files]
        if len({plane.shape for plane in planes}) > 1 or (planes and np.sum(planes, 0).max() > 1):
            return False
    return True


def fitting_masks(images: list[ImageFile], others: list[ImageFile]) -> dict[str, Pairs]:
    """{folder or pattern for --masks: pairs}, the candidates that fit about as well as the best."""
    if not images:
        return {}
    pairs = {kind: match(images, some) for kind, some in mask_candidates(others, images).items()}
    best = max(map(len, pairs.values()), default=0)
    return {kind: matched for kind, matched in pairs.items() if 2 * len(matched) >= best > 0}


def collect(
    root: Path, images: list[ImageFile], pairs: Pairs, several: str = "united"
) -> Collection:
    """The samples of paired files, with the columns `folder` and `split`.

    `several`: what several masks of an image are, for people. Raises UserError where two images of
    a folder share a name.
    """
    check_names((image.path, image.stem) for image in images)
    paths = [image.path for image in images]
    files = [mask_file(pairs.get(image.name), image) for image in images]
    samples = pd.DataFrame(
        {
            "id": make_ids(paths, [image.stem for image in images], root),
            "image": paths,
            "mask": [file and Planes((file,)) for file in files],
            "folder": ["/".join(image.place) for image in images],
            "split": [image.split for image in images],
        }
    )
    if pairs:
        name, masks = max(pairs.items(), key=lambda pair: len(pair[1]))
        more = f" and {len(masks) - 1} more, {several}" if len(masks) > 1 else ""
        print(f"pairs: {len(pairs)} images, such as {name} with {masks[0].name}{more}")
    return Collection("one mask file per image", samples)


def mask_file(files: list[ImageFile] | None, image: ImageFile) -> MaskFile | None:
    """The mask of an image in one file, or in several that are united; None without any."""
    if not files:
        return None
    first, *more = (file.path for file in files)
    return MaskFile(first, more=tuple(more), image=image.path)


def images_alone(
    root: Path, masks: str, target: str, training: bool, files: Listing = None
) -> Collection | None:
    """Images without masks, to predict: a folder, or one file."""
    if root.is_file():
        is_image = root.suffix.lower() in IMAGE_SUFFIXES
        samples = pd.DataFrame({"id": [root.stem], "image": [root], "mask": [None]})
        return Collection("one image", samples) if is_image else None
    folder = image_folder(root, training) if files is None else None
    if folder:
        paths = list_images(folder)
        samples = pd.DataFrame({"id": list(paths), "image": list(paths.values())})
        return Collection("images without masks", samples.assign(mask=None))
    images = images_among(list_files(root) if files is None else files)
    images = choose_split(images, not training) or images
    return collect(root, images, {})._replace(name="images without masks") if images else None
