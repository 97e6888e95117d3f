"""Folders of images with masks: which image belongs to which mask, and what is in a folder.

Roles follow from the names of folders and files; what could be read in two ways is asked about.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from folders import MASK_WORDS, SPLIT_WORDS, ImageFile, list_files, split_words, tail_of
from images import IMAGE_SUFFIXES, Collection, image_folder, list_images, open_header
from masks import MaskFile
from utils import UserError, first_five

# --------------------------------------------------------------------------------------------------
#  Pairs
# --------------------------------------------------------------------------------------------------

Pairs = dict[str, list[ImageFile]]  # {name of an image: its masks}


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


def by_core(
    files: list[ImageFile], affix: tuple[str, str], where: Callable
) -> dict[tuple, ImageFile]:
    """{(place, name without the affix): file}; empty where two files share a key."""
    keys = [(where(file), core) for file, core in zip(files, cores(files, affix), strict=True)]
    unique = len(set(keys)) == len(files) and all(core for _, core in keys)
    return dict(zip(keys, files, strict=True)) if unique else {}


def match(images: list[ImageFile], masks: list[ImageFile]) -> Pairs:
    """The masks of each image: names equal, or one-to-one after one affix is taken off each side.

    In equal folders first. Otherwise several masks of an image that has a folder of its own.
    """
    places: list[Callable] = [lambda file: (file.split, file.place), lambda file: file.split]
    if not {mask.split for mask in masks} & {image.split for image in images} - {""}:
        places += [lambda file: file.place, lambda file: ()]
    best: Pairs = {}
    for where in places:
        right = [by_core(masks, affix, where) for affix in affixes(masks)]
        for affix in affixes(images):
            left = by_core(images, affix, where)
            for candidates in right:
                both = [key for key in left if key in candidates]
                if len(both) > len(best):
                    best = {left[key].name: [candidates[key]] for key in both}
            if len(best) == len(images):
                return best
    return max(best, unite(images, masks), key=len)


def unite(images: list[ImageFile], masks: list[ImageFile]) -> Pairs:
    """Masks of single objects, in a folder for each image: ID/masks/*.png, or masks/ID/*.png."""
    pairs: Pairs = defaultdict(list)
    ways: tuple[tuple[Callable, Callable], ...] = (
        (lambda image: image.place[-1:], lambda mask: mask.place[-1:]),
        (lambda image: (image.stem,), lambda mask: mask.place[-1:]),
    )
    for of_image, of_mask in ways:
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
        before, after = (re.escape(part) for part in masks.split("{stem}", 1))
        pattern = re.compile(rf"(?:.*/)?{before}([^/]+){after}(\.\w+)?")
        absolute = os.path.isabs(masks)
        names = [str(file.path) if absolute else file.name for file in files]
        found = [(f, pattern.fullmatch(name)) for f, name in zip(files, names, strict=True)]
        chosen = [file._replace(role=masks, stem=match[1]) for file, match in found if match]
        if not chosen:
            raise UserError(f"--masks {masks}: no file fits; {describe_folder(root)}")
        return chosen
    folders = {path for file in files for path in file.path.parents if path.name == masks}
    folders |= {Path(masks).absolute(), root / masks, root.parent / masks}
    folders = {path for path in folders if path.is_dir()}
    if not folders:
        wanted = "a folder of masks, a csv of RLE, or a pattern such as labels/{stem}_mask.png"
        raise UserError(f"--masks {masks}: not found, and no {{stem}} in it; name {wanted}")
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


def one_split(
    images: list[ImageFile], others: list[ImageFile], masks: str, training: bool
) -> tuple[list[ImageFile], list[ImageFile], bool]:
    """The images and masks of the test, or all others, and whether they are of the test."""
    test = bool(choose_split(images, True)) and not (training and choose_split(images, False))
    images, same = choose_split(images, test), choose_split(others, test)
    others = same if masks == "auto" else same or others  # never the masks of other images
    return images, others, test


def paired_folders(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images and masks below a folder, or masks in a folder next to it."""
    every_image, every_mask = images_and_masks(root, masks)
    images, others, test = one_split(every_image, every_mask, masks, training)
    if not images or not others:
        return None
    check_names(images)
    fitting = fitting_masks(images, others)
    if test and len(fitting) == 1 and masks == "auto":  # what is in doubt there is in doubt here
        rest = [choose_split(group, False) for group in (every_image, every_mask)]
        fitting = max(fitting, fitting_masks(*rest), key=len)
    if len(fitting) < 2:
        return collect(root, images, next(iter(fitting.values()), {}))
    both = " and ".join(fitting)
    reason = f"{both} fit the images; choose one, such as --masks '{next(iter(fitting))}'"
    if training:
        raise UserError(f"--data {root}: {reason}")
    print(f"--data {root}: no scores, {reason}")
    return collect(root, images, {})


def fitting_masks(images: list[ImageFile], others: list[ImageFile]) -> dict[str, Pairs]:
    """{folder or pattern for --masks: pairs}, the candidates that fit about as well as the best."""
    if not images:
        return {}
    found = {kind: match(images, some) for kind, some in mask_candidates(others, images).items()}
    best = max(map(len, found.values()), default=0)
    return {kind: pairs for kind, pairs in found.items() if 2 * len(pairs) >= best > 0}


def masks_next_to(root: Path) -> list[ImageFile]:
    """The masks in folders next to a folder of images."""
    folders = [path for path in sorted(root.parent.iterdir()) if path.is_dir() and path != root]
    folders = [path for path in folders if MASK_WORDS & set(split_words(path.name))]
    return [file._replace(role=folder.name) for folder in folders for file in list_files(folder)]


def choose_split(files: list[ImageFile], test: bool) -> list[ImageFile]:
    """The test images alone, or all others."""
    return [file for file in files if (file.split == "test") == test]


def check_names(images: Iterable[ImageFile]) -> None:
    """Raise UserError where two images of a folder share a name."""
    known: dict[Path, Path] = {}
    for image in images:
        key = image.path.with_name(image.stem)
        if key in known:
            both = f"{known[key].name} and {image.path.name}"
            raise UserError(f"{image.path.parent}: {both} share a name; rename one of them")
        known[key] = image.path


def collect(root: Path, images: list[ImageFile], pairs: Pairs) -> Collection:
    """The samples of paired files, with the columns `fold` and `group` where folders say so."""
    unique = len({image.stem for image in images}) == len(images)
    names = [image.name.rpartition(".")[0].replace("/", "_") for image in images]
    masks = [pairs.get(image.name, []) for image in images]
    samples = pd.DataFrame(
        {
            "id": [image.stem for image in images] if unique else names,
            "image": [image.path for image in images],
            "mask": [
                MaskFile(files[0].path, None, tuple(m.path for m in files[1:]), image.path)
                if files
                else None
                for image, files in zip(images, masks, strict=True)
            ],
        }
    )
    if pairs:
        image, files = next((i, files) for i, files in zip(images, masks, strict=True) if files)
        several = f" and {len(files) - 1} more" if len(files) > 1 else ""
        print(f"pairs: {len(pairs)} images, such as {image.name} with {files[0].name}{several}")
    groups = ["/".join(image.place) for image in images]
    if 1 < len(set(groups)) < len(images):
        samples["group"] = groups
    splits = [image.split for image in images]
    if {"train", "val"} <= set(splits):
        samples["fold"] = [0 if split == "val" else 1 for split in splits]
        print(f"split: as given, {splits.count('val')} images in val validate (fold 0)")
    return Collection("one mask file per image", samples)


def images_alone(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images without masks, to predict: a folder, or one file."""
    if root.is_file():
        known = root.suffix.lower() in IMAGE_SUFFIXES
        samples = pd.DataFrame({"id": [root.stem], "image": [root], "mask": [None]})
        return Collection("one image", samples) if known else None
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
    words = f"there is {first_five(folders)}" if folders else "it is empty"
    return "; ".join([words, *dict.fromkeys(notes), *closest_masks(root)])


def closest_masks(root: Path) -> list[str]:
    """Two folders whose names fit each other, and the flag that makes one of them the masks."""
    folders: dict[Path, list[ImageFile]] = defaultdict(list)
    for file in list_files(root):
        folders[file.path.parent].append(file._replace(place=(), split=""))
    largest = sorted(folders.values(), key=len)[-6:]
    fits = [(len(match(a, b)), a, b) for a in largest for b in largest if a is not b]
    count, first, second = max(fits, key=lambda fit: fit[0], default=(0, [], []))
    if not count:
        return []
    both = [Path(files[0].name).parent.as_posix() for files in (first, second)]
    if open_header(first[0].path).mode in ("1", "L", "P"):  # masks rather than photographs
        both.reverse()
    return [f"{both[1]}/ fits the names in {both[0]}/: --masks {both[1]} takes it for the masks"]


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
