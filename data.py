"""From a folder to a table of samples: layouts, a scan of all masks, folds.

A new layout is one function and one entry in `LAYOUTS`.
"""

import math
import os
import re
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

import class_folders
import classes
import images
import kitti
import layouts
import masks as mask_files
import rle
import tables
from classes import ONE_CLASS, Classes
from images import Collection
from utils import UserError, closest, first_five, reason_of

DEFAULT_DATASET = "sakshaymahna/kittiroadsegmentation"  # on Kaggle, for --data auto
TILES_FROM = 2e6  # pixels of the median image
THINNEST = 3.0  # pixels of the input that the thinnest parts of masks need
LARGER = 4.0  # times as many pixels as the device takes well
BLOCK = 8  # consecutive frames show one street: they stay in one fold (fewer where images are few)

# --------------------------------------------------------------------------------------------------
#  Layouts: each function recognises a folder, or returns None
# --------------------------------------------------------------------------------------------------


LAYOUTS = [
    kitti.kitti_road,
    tables.manifest,
    tables.csv_of_masks,
    class_folders.class_folders,
    layouts.paired_folders,
    layouts.images_alone,
]

# --------------------------------------------------------------------------------------------------
#  The samples table
# --------------------------------------------------------------------------------------------------


def find_root(data: str, target: str, training: bool) -> Path:
    """The folder or file meant by --data. "auto": where the first layout finds its own.

    Looks below /kaggle/input, then ../input, then asks kagglehub. Raises UserError.
    """
    if data != "auto":
        if not Path(data).exists():
            raise UserError(f"--data {data}: not found; name a folder of images, an image, or auto")
        return Path(os.path.abspath(data))  # not resolved: a link may have another name
    root = find_attached(target, training) or download_default()
    print(f"--data auto: {root}")
    return root


def find_attached(target: str, training: bool) -> Path | None:
    """The first folder below Kaggle's mounts that the first layout recognises."""
    for mount in ("/kaggle/input", "../input"):
        for folder, below, _ in os.walk(mount, followlinks=True):
            below.sort()
            if LAYOUTS[0](Path(folder), "auto", target, training):
                return Path(folder)
    return None


def download_default() -> Path:
    """Fetch the default dataset with kagglehub. Raises UserError where that is impossible."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):  # here kagglehub waits forever
        raise UserError(f"--data auto: no KITTI Road attached; add {DEFAULT_DATASET}, or a folder")
    try:
        import kagglehub  # here: nothing else needs it

        return Path(kagglehub.dataset_download(DEFAULT_DATASET))
    except Exception as error:  # whatever kagglehub or the network raise
        reason = f"not attached, and {DEFAULT_DATASET} cannot be fetched ({reason_of(error)})"
        raise UserError(f"--data auto: {reason}; download it and give its folder") from None


def find_samples(
    data: str,
    masks: str = "auto",
    target: str = "road",
    foreground: str = "",
    training: bool = False,
    runs: str = "auto",
    missing: str = "error",
    wanted: str | Classes = "auto",
) -> Collection:
    """Understand a folder by the first layout that recognises it, and the values of its masks.

    The samples table has a row for each image, with the columns `id` (names the outputs), `image`
    (path), `mask` (None or an object with `read(size)`), `category` (a group that is scored by
    itself, or ""), `views` (such as BEV, scored too) and `fields` (a csv's other columns, or None);
    where folders say so also `group` and `fold`. With `training` every image has a mask.
    `foreground`: values of mask files; `runs`: the order of RLE; `missing`: "empty" takes images
    without a mask for images without foreground; `wanted`: --classes, or the classes of a model.
    Raises UserError.
    """
    root = find_root(data, target, training)
    suffixes = (".csv",) if training else (".csv", *images.IMAGE_SUFFIXES)
    if root.is_file() and root.suffix.lower() not in suffixes:
        kinds = f"a folder, a csv, a video or an image ({', '.join(images.IMAGE_SUFFIXES)})"
        wanted = "a folder of images with masks, or a csv of pairs" if training else kinds
        raise UserError(f"--data {data}: is a file; name {wanted}")
    found = (layout(root, masks, target, training) for layout in LAYOUTS)
    collection = next(filter(None, found), None)
    if not collection:
        expected = "expected training/image_2 and training/gt_image_2 (KITTI), images and masks"
        there = f"or train/ and train.csv; {layouts.describe_folder(root)}"
        raise UserError(f"--data {data}: no images in it; {expected}, {there}")
    samples = collection.samples
    for column, default in (("category", ""), ("views", ()), ("fields", None)):
        if column not in samples:
            samples[column] = [default] * len(samples)
    if training and missing == "empty":
        samples["mask"] = [mask or rle.RunLengths(root) for mask in samples["mask"]]
    if training:
        check_pairs(samples, root, target)
    elif root.is_dir():
        name_test_images(samples, root)
    chosen = classes.find_wanted(wanted, root, samples.image[0])
    needed = training or masks != "auto" or runs != "auto"
    return mask_files.decide_classes(collection, foreground, training, runs, needed, chosen)


def image_splits(root: Path) -> dict[Path, str]:
    """{image: train, val, test, or ""} below a folder, by the names of the folders."""
    return {file.path: file.split for file in layouts.list_files(root) if not file.role}


def name_test_images(samples: pd.DataFrame, root: Path) -> None:
    """Say that test images are predicted, where --data has others too."""
    folder = Path(samples.image[0]).parent
    if samples["mask"].isna().all() and "test" in str(folder.relative_to(root)):
        print(f"--data {root}: predicts {folder}; to score images with masks, name their folder")


def check_pairs(samples: pd.DataFrame, data: Path, target: str) -> None:
    """Raise UserError where an image has no mask or there are too few pairs to train."""
    if target != "road" and not samples.category.str.endswith(target).any():
        reason = "not in the KITTI layout, which alone has lanes; leave the flag out"
        raise UserError(f"--target {target}: {data} is {reason}")
    alone = [path.name for path in samples.image[samples["mask"].isna()]]
    pairs = f"{len(samples) - len(alone)} pairs"
    if alone:
        count = f"{len(alone)} of {len(samples)} images have no mask ({pairs} are complete)"
        empty = "" if len(alone) == len(samples) else ", take them as empty with --missing empty"
        remedy = f"add the masks, name them with --masks{empty}, or move away"
        there = "" if len(alone) < len(samples) else f"; {layouts.describe_folder(data)}"
        raise UserError(f"--data {data}: {count}; {remedy}: {first_five(alone)}{there}")
    if len(samples) < 2:
        images.open_image(samples.image[0])  # an image of many pages is no data set
        raise UserError(f"--data {data}: {pairs}; at least 2 are needed, to train and to validate")


def in_parallel(function: Callable, samples: pd.DataFrame) -> list[Any]:
    """Call the function for each row of the samples in threads; the results in order."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, samples.itertuples()))


def scan_dataset(samples: pd.DataFrame, found: Classes = ONE_CLASS) -> pd.DataFrame:
    """Read image headers and masks: the samples with more columns.

    `height`, `width` of the image; `turn`, EXIF's orientation; `deep`, whether it has more than 8
    bits; `share` of foreground, 0..1; `shares`, that of each class; `above`, how much of the height
    is above the foreground, 0..1 (1 for an empty mask); `thickness` of the mask's thinner side, see
    `images.thickness`; `digest` of the mask's pixels. A pair that cannot be read is 1x1 and empty
    here; `decode_samples` names it.
    """
    bad = {"height": 1, "width": 1, "turn": 1, "deep": False, "share": 0.0, "above": 1.0}
    bad["thickness"] = 0.0

    def scan(sample: Any) -> dict[str, Any]:
        try:
            header = images.read_header(sample.image)
            height, width = header.size
            mask = sample.mask.read(header.size)
        except UserError:
            return bad | {"digest": 0, "shares": (0.0,) * len(found.names)}
        foreground = mask != images.IGNORE if found.exclusive else mask == 1
        foreground = foreground.any(2) if foreground.ndim == 3 else foreground
        rows = foreground.any(1)
        return {
            "height": height,
            "width": width,
            "turn": header.turn,
            "deep": header.deep,
            "share": float(foreground.mean()),
            "shares": classes.shares_of(mask, found),
            "above": float(rows.argmax() / height) if rows.any() else 1.0,
            "thickness": math.inf if found.exclusive else images.thickness(foreground),
            "digest": zlib.crc32(mask.tobytes()),
        }

    return samples.join(pd.DataFrame(in_parallel(scan, samples), index=samples.index))


def describe(collection: Collection, samples: pd.DataFrame) -> str:
    """What was understood, in one line for people. `samples`: from `scan_dataset`."""
    sizes = sorted(zip(samples.height, samples.width, strict=True))
    smallest, largest = (f"{width}x{height}" for height, width in (sizes[0], sizes[-1]))
    unclear = samples[(samples.turn > 1) & ((samples.turn < 5) | (samples.height == samples.width))]
    turned = f"{len(unclear)} images are turned by EXIF, their masks are taken as upright"
    turned = f" · {turned}: see examples.jpg" if len(unclear) else ""
    start = f"data: {collection.name} · {len(samples)} pairs · {smallest} to {largest} · "
    if collection.classes.names:
        shares = np.stack(samples.shares)
        return start + classes.describe_shares(collection.classes, shares) + turned
    return (
        f"{start}{100 * samples.share.mean():.1f} % foreground · "
        f"{100 * (samples.share == 0).mean():.0f} % of the masks empty"
    ) + turned


def check_shares(samples: pd.DataFrame) -> None:
    """Raise UserError where no mask of `scan_dataset` has foreground, or none has background."""
    for share, what in ((0, "empty (no foreground)"), (1, "full (no background)")):
        if (samples.share == share).all():
            remedy = "name other masks with --masks, or the foreground's values with --foreground"
            raise UserError(f"--data: all {len(samples)} masks are {what}; {remedy}")


def read_sample(sample: Any, value_range: tuple[float, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The image (h, w, 3) uint8 and its mask (h, w) uint8. Raises UserError.

    `value_range`: see `images.read_image`.
    """
    image = images.read_image(sample.image, value_range)
    return image, sample.mask.read(image.shape[:2])


def read_pair(sample: Any, config: images.ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The same at the network's size, see `images.prepare_pair`."""
    return images.prepare_pair(*read_sample(sample, config.value_range), config)


def decode_samples(samples: pd.DataFrame, config: images.ModelConfig, memory: int) -> list:
    """Decode every pair once, to check it: what `images.prepare_pair` makes of each.

    None for each where all would take more bytes than `memory`. Raises UserError for bad files.
    """
    pixels = (samples.height * samples.width).sum()
    pixels = pixels if config.tiles else len(samples) * config.height * config.width
    channels = 3 + (1 if config.exclusive else config.classes)  # of an image and its mask

    def decode(sample: Any) -> Any:
        try:
            pair = read_sample(sample, config.value_range)
            for view in sample.views:
                view.check()
        except UserError as error:
            return error
        return images.prepare_pair(*pair, config) if channels * pixels < memory else None

    pairs = in_parallel(decode, samples)
    bad = [pair for pair in pairs if isinstance(pair, UserError)]
    if bad:
        where = f"--data {samples.image.iloc[0].parent}: {len(bad)} of {len(samples)} pairs"
        raise UserError(f"{where} cannot be used: {first_five(bad, ' | ')}")
    if not config.exclusive:  # there `labels.decide_labels` has looked
        check_shares(samples)
    return pairs


# --------------------------------------------------------------------------------------------------
#  Folds
# --------------------------------------------------------------------------------------------------


def resolve_top(top: float | str, tiles: bool, collection: Collection, fold: int) -> float:
    """The share of the height that is cut off at the top; -1: down to the highest training mask.

    Tiles cover whole images. Raises UserError for a `top` of the user's with tiles.
    """
    if tiles and top not in ("auto", 0):
        reason = "the images are cut into tiles, which cover all of their height"
        raise UserError(f"--top {top}: {reason}; take --tiles false, or leave --top out")
    if tiles:
        return 0.0
    top = collection.top if top == "auto" else top
    if top >= 0:
        return top
    samples = collection.samples
    highest = float(samples.above[samples.fold != fold].min())
    return min(0.9, round(highest - 0.05, 2)) if 0.15 < highest < 1 else 0.0  # less is not worth it


def resolve_detail(
    samples: pd.DataFrame, tiles: bool | str, pixels: float, given: int
) -> tuple[bool, float]:
    """Whether images are cut into tiles, and the pixels of an input; the device likes `pixels`.

    Unless a height or width is `given`, the thinnest parts of the masks stay `THINNEST` pixels
    wide: by a larger input, or by tiles where it would be over `LARGER` times as large. `tiles`:
    the user's choice, or "auto".
    """
    area = float((samples.height * samples.width).median())
    known = samples.thickness[samples.thickness > 0]
    part = min(1.0, THINNEST / known.median()) if len(known) and not given else 0.0
    needed = area * part**2
    if tiles == "auto":
        tiles = bool(area > TILES_FROM or needed > LARGER * pixels)
    return tiles, 2 * pixels if tiles else max(pixels, needed)


def spread(samples: pd.DataFrame, count: int) -> pd.DataFrame:
    """So many samples, evenly over the range of their shares of foreground, the largest first."""
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return samples.sort_values("share", ascending=False, kind="stable").iloc[places]


def assign_folds(samples: pd.DataFrame, folds: int, seed: int, group: str = "") -> np.ndarray:
    """Split the samples of `scan_dataset` into folds; what belongs together stays in one.

    Together stay equal values of the csv's column `group`, otherwise of the samples' own column
    `group`, otherwise `BLOCK` consecutive frames. A given column `fold` is taken as it is.
    Stratified by category, or where there is none by the rarest class of an image, or for one class
    by the foreground's share: empty, little, more, much. Returns int (n,), each sample's fold. Few
    samples make fewer folds, at least two.
    """
    if "fold" in samples:
        return samples.fold.to_numpy()
    sizes = samples.category.value_counts()
    if group:
        groups = columns_of(samples, group)
    else:
        blocks = frame_blocks(samples, sizes.min() // folds)
        groups = samples.group.tolist() if "group" in samples else blocks
    count = max(2, min(folds, len(set(groups)), sizes.max()))
    strata = samples.category
    if not strata.any():
        thirds = samples.share.rank(pct=True).mul(3).round()
        strata = pd.Series(np.where(samples.share > 0, thirds, -1))
    shares = np.array(samples.shares.tolist()) if "shares" in samples else np.empty(0)
    if shares.size and not samples.category.any():
        strata = pd.Series(classes.rarest_class(shares))
    if strata.value_counts().max() < count:  # a handful of images
        strata = pd.Series(0, samples.index)
    fold = np.zeros(len(samples), int)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images of a category are fine
        for number, (_, part) in enumerate(splitter.split(samples, strata, groups)):
            fold[part] = number
    return fold


def frame_blocks(samples: pd.DataFrame, most: int) -> list[str]:
    """Names of blocks of consecutive numbers, at most `most` and `BLOCK` long."""
    names = [re.fullmatch(r"(.*?)(\d*)", name, re.DOTALL) for name in samples.id]
    return [f"{name[1]}{int(name[2] or 0) // max(1, min(BLOCK, most))}" for name in names]


def columns_of(samples: pd.DataFrame, column: str) -> list[str]:
    """A column of the csv, for each sample; the id where it has no row. Raises UserError."""
    header = next((list(fields) for fields in samples.fields if fields), [])
    if column not in header:
        raise UserError(f"--group {column}: no such column{closest(column, header)}")
    pairs = zip(samples.fields, samples.id, strict=True)
    return [fields[column] if fields else name for fields, name in pairs]


def chosen_folds(samples: pd.DataFrame, fold: int | str) -> list[int]:
    """The folds to train: one, or all. Raises UserError for one that there is not."""
    folds = sorted(set(samples.fold))
    if fold != "all" and fold not in folds:
        raise UserError(
            f"--fold {fold}: {len(samples)} pairs have folds {first_five(folds)}, or all"
        )
    return folds if fold == "all" else [fold]


def describe_folds(samples: pd.DataFrame, fold: int) -> str:
    """How many pairs train and validate, in a line for people."""
    counts = (samples.fold != fold).sum(), (samples.fold == fold).sum()
    return "fold {}: {} pairs to train and {} to validate on".format(fold, *counts)
