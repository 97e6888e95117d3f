"""Bands: images whose channels are in several files each, by patterns or by the names of bands.

An entry in `samples.LAYOUTS`.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from kit.data import arrays, csvs, folders
from kit.data.folders import Collection
from kit.data.names import (
    SPLIT_WORDS,
    ImageFile,
    describe_file,
    describe_folder,
    list_files,
    split_words,
    tail_of,
    words_of_place,
)
from kit.data.rasters import Layer
from kit.data.readers import open_layers
from kit.errors import UserError, first_five

BAND = r"(band[_-]?\d{1,2}|b\d{1,2}a?|red|green|blue|nir|swir\d?|vv|vh|hh|hv)"
ENDS_IN_BAND = re.compile(rf"(?:(.+)[_\-. ])?{BAND}", re.IGNORECASE)  # x_B02, or B02
STARTS_WITH_BAND = re.compile(rf"{BAND}[_\-. ](.+)", re.IGNORECASE)  # red_x
COLOURS = ("red", "green", "blue")  # in this order, and before others


def band_files(
    root: Path, masks: str, target: str, training: bool, channels: str = "auto"
) -> Collection | None:
    """A layout: several files for each image, and masks as any other layout has them.

    `channels`: patterns of the files with a comma between them, else what names of bands tell in
    the images to train on, which is printed. Raises UserError where an image lacks a band.
    """
    if not root.is_dir():
        if "{stem}" in channels:
            problem = f"an image of the model is in several files ({channels})"
            raise UserError(f"--data {root}", problem, "name their folder, or list them in a csv")
        return None
    files = list_files(root)
    patterns = tuple(name.strip() for name in channels.split(","))
    if "{stem}" not in channels:
        patterns = find_patterns(files) if training else ()
        if not patterns:
            return None
        print(f"channels: {len(patterns)} files for each image, --channels '{','.join(patterns)}'")
    images = join_bands(root, files, patterns)
    listing = images + leave_to_masks(files, images)
    layers = {image.path: image.layers for image in images}
    for layout in (
        csvs.csv_of_masks,
        folders.class_folders,
        folders.paired_folders,
        folders.images_alone,
    ):
        collection = layout(root, masks, target, training, listing)
        if collection:
            samples = collection.samples
            samples["layers"] = [layers[image] for image in samples.image]
            return collection._replace(bands=patterns)
    return None


# --------------------------------------------------------------------------------------------------
#  By patterns
# --------------------------------------------------------------------------------------------------


def compile_pattern(pattern: str) -> re.Pattern:
    """What the paths of a pattern's files match, with the groups `above` and `stem`.

    A split in the name of a folder, such as train_red, stands for any: test_red.
    """
    any_split = f"(?:{'|'.join(SPLIT_WORDS)})"

    def loosened(folder: str) -> str:
        words = re.split(r"([A-Za-z]+)", folder)
        return "".join(any_split if w.lower() in SPLIT_WORDS else re.escape(w) for w in words)

    *places, name = pattern.split("/")
    text = "/".join([*map(loosened, places), re.escape(name)])
    text = re.sub(r"\\?\{stem\\?\}", "(?P<stem>[^/]+)", text, count=1)
    text = re.sub(r"\\?\{stem\\?\}", "(?P=stem)", text)
    return re.compile(rf"(?P<above>(?:.*/)?){text}", re.DOTALL)


def join_bands(root: Path, files: list[ImageFile], patterns: tuple[str, ...]) -> list[ImageFile]:
    """The images that have a file for each pattern: the first one, with all as `layers`.

    Files in folders of masks are none. Raises UserError where an image lacks a file, or for none.
    """
    expressions = list(enumerate(map(compile_pattern, patterns)))
    bands: dict[tuple[str, str, str], dict[int, ImageFile]] = defaultdict(dict)
    for file, (number, expression) in itertools.product(files, expressions):
        fits = expression.fullmatch(file.path.as_posix())
        if fits and (not file.role or "{stem}" in file.role):
            bands[fits["above"], file.split, fits["stem"]][number] = file
    whole = {key: own for key, own in bands.items() if len(own) == len(patterns)}
    stems = {stem for *_, stem in whole}
    lacking = [
        f"{stem} has no {pattern.replace('{stem}', stem)}"
        for (*_, stem), own in bands.items()
        if len(own) < len(patterns) and not tail_of(stem, stems)  # x_mask is no image next to x
        for number, pattern in enumerate(patterns)
        if number not in own
    ]
    if lacking or not whole:
        problem = first_five(lacking) or f"no file fits {first_five(patterns)}"
        remedy = "add the files, or move these images away" if lacking else describe_folder(root)
        raise UserError(f"--data {root}", problem, remedy)
    images = []
    for (above, split, stem), own in whole.items():
        files = [own[number] for number in range(len(patterns))]
        inside = Path(above).is_relative_to(root)
        place = describe_file(Path(above, stem), root).place if inside else ()
        layers = tuple(Layer(file.path) for file in files)
        images.append(ImageFile(files[0].path, files[0].name, stem, place, split, "", 2, layers))
    return images


def leave_to_masks(files: list[ImageFile], images: list[ImageFile]) -> list[ImageFile]:
    """The files that are no bands: masks, or not used unless --masks names them.

    A mask in the folder of an image is that image's: {stem}/mask.npy.
    """
    used = {layer.path for image in images for layer in image.layers}
    owners = {image.path.parent: image for image in images if image.path.parent.name == image.stem}
    rest = []
    for file in files:
        owner = owners.get(file.path.parent)
        if owner and file.role and owner.stem not in file.stem:
            role = f"{{stem}}/{file.path.name}"
            file = file._replace(stem=owner.stem, place=owner.place, role=role)
        if file.path not in used:
            rest.append(file._replace(rank=-1))
    return rest


# --------------------------------------------------------------------------------------------------
#  By names of bands
# --------------------------------------------------------------------------------------------------


def find_patterns(files: list[ImageFile]) -> tuple[str, ...]:
    """The patterns of images in several files, in the order of bands; () where it is not clear.

    Each image file is named as a band, or is in a folder named so; most images have all bands, a
    file of one channel each, and no mask belongs to a single band.
    """
    images = [file for file in files if not file.role]
    named = [(file, pattern_of(file)) for file in images]
    named = [(file, pattern) for file, pattern in named if pattern or file.rank >= 0]
    counts = Counter(compile_pattern(pattern).pattern for _, pattern in named)
    clear = len(counts) > 1 and all(pattern for _, pattern in named)
    if not clear or 2 * min(counts.values()) <= max(counts.values()):
        return ()
    stems = {file.stem for file, pattern in named if pattern.startswith("{stem}")}
    if any(file.role and (file.stem in stems or tail_of(file.stem, stems)) for file in files):
        return ()
    first = {compile_pattern(pattern).pattern: (pattern, file) for file, pattern in named[::-1]}
    if not all(has_one_channel(file.path) for _, file in first.values()):
        return ()
    return tuple(sorted((pattern for pattern, _ in first.values()), key=order_of_band))


def pattern_of(file: ImageFile) -> str:
    """The pattern of a file that is called a band, by its folder or itself; "" for any other."""
    folder, stem, suffix = file.path.parent.name, file.path.stem, file.path.suffix
    above, name = ENDS_IN_BAND.fullmatch(folder), ENDS_IN_BAND.fullmatch(stem)
    led = STARTS_WITH_BAND.fullmatch(stem)
    rest = stem[name.end(1) :] if name and name[1] else ""
    if above and "/" in file.name and not words_of_place(split_words(above[1] or "")):
        return f"{folder}/{stem[: led.start(2)] if led else ''}{{stem}}{rest}{suffix}"
    if not name:
        return ""
    return f"{{stem}}{rest}{suffix}" if name[1] else f"{{stem}}/{stem}{suffix}"


def has_one_channel(path: Path) -> bool:
    """Whether an image is grey, or an array: of bands in time."""
    try:
        return path.suffix.lower() in arrays.SUFFIXES or open_layers(path)[0].bands == 1
    except UserError:  # `samples.decode_pairs` names it
        return True


def order_of_band(pattern: str) -> tuple:
    """Red, green and blue first, then by name, numbers as such: B2, B8, B8A, B11."""
    band = re.findall(BAND, pattern, re.IGNORECASE)[-1].lower()
    parts: Iterable[str] = re.split(r"(\d+)", band)
    parts = [part.zfill(3) if part.isdecimal() else part for part in parts]
    return (COLOURS.index(band) if band in COLOURS else len(COLOURS), parts)
