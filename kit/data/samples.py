"""From a folder to a table of samples: layouts, one pass over all files.

A new layout is one function and one entry in `LAYOUTS`.
"""

import functools
import os
import re
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from kit.config import Classes, ModelConfig
from kit.data import annotations, bands, blocks, csvs, folders, kitti, volumes
from kit.data.cache import choose_store
from kit.data.classes import ClassRequest, class_request, mask_folders, write_mask
from kit.data.folders import Collection
from kit.data.images import prepare_pair
from kit.data.masks import (
    DecodedFiles,
    MaskFile,
    Opener,
    Planes,
    choose_masks,
    measure,
)
from kit.data.names import MARKER, describe_folder
from kit.data.rasters import Layer, middle_slice, parse_steps
from kit.data.readers import (
    IMAGE_SUFFIXES,
    decide_channels,
    find_value_range,
    in_parallel,
    may_have_floats,
    open_image,
    read_header,
    read_image,
)
from kit.data.rle import RunLengths, decide_order
from kit.data.values import decide_files
from kit.errors import UserError, first_five, reason_of
from kit.files import MOUNTS, walk_mount, writable_folder, write_file

DEFAULT_DATASET = "sakshaymahna/kittiroadsegmentation"  # on Kaggle, for --data auto

# A layout is a function of (root, masks, target, training): it recognises a folder, or returns None
LAYOUTS = [
    kitti.kitti_road,
    csvs.manifest,
    bands.band_files,
    csvs.csv_of_masks,
    folders.class_folders,
    folders.paired_folders,
    annotations.annotated_images,
    folders.images_alone,
]

# --------------------------------------------------------------------------------------------------
#  Load: find, decide, scan, split
# --------------------------------------------------------------------------------------------------


LOADED = (  # what `load` takes of train.py's settings
    "masks", "target", "foreground", "ignore", "rle", "missing", "classes", "window", "channels",
    "neighbours", "soft", "scale", "folds", "seed", "group",
)  # fmt: skip


def load(
    data: str,
    *,
    channels: str,
    window: str,
    folds: int,
    seed: int,
    group: str,
    neighbours: str = "",
    **reading: Any,
) -> tuple[Collection, DecodedFiles]:
    """Find the samples to train on, read all masks, split into folds; prints what was understood.

    `reading`: other settings that `find_samples` takes. Returns the collection, whose samples have
    the columns of `find_samples`, `scan` and `fold`, and its mask files as decoded. Raises
    UserError.
    """
    opener, steps = DecodedFiles(), parse_steps(neighbours)
    options = {"channels": channels, "neighbours": steps, "opener": opener} | reading
    collection = find_samples(data, training=True, **options)
    samples = scan(collection.samples, collection.classes, opener)
    collection = decide_channels_and_range(samples, collection, steps, channels, window)
    names = collection.classes.names
    split = blocks.assign_folds_to_images(samples, folds, seed, group, names)
    samples[["fold", "group", "why"]] = split
    print(describe(collection), flush=True)
    return collection, opener


def decide_channels_and_range(
    samples: pd.DataFrame,
    collection: Collection,
    steps: tuple[int, ...],
    channels: str,
    window: str,
) -> Collection:
    """With the samples of `scan`, the channels of an image, and what is black and white in it."""
    slices = 2 * len(steps) + 1  # each with the same channels, and the same range
    count = decide_channels(samples, channels, slices, collection.bands)
    deep = [middle_slice(layers, steps) for layers in samples.layers[samples.deep]]
    limits = find_value_range(deep, window, count // slices, collection.bands)
    limits = limits if len(limits) == 2 else slices * limits
    changes = {"channels": count, "neighbours": steps, "value_range": limits}
    return collection._replace(samples=samples, **changes)


def find_samples(
    data: str,
    *,
    masks: str = "auto",
    target: str = "road",
    foreground: str = "",
    ignore: str = "",
    training: bool = False,
    rle: str = "auto",
    missing: str = "error",
    classes: str | Classes = "auto",
    channels: str = "auto",
    neighbours: tuple[int, ...] = (),
    soft: bool = False,
    opener: Opener = open_image,
    scale: float = 1.0,
) -> Collection:
    """Understand a folder by the first layout that recognises it, and the values of its masks.

    The samples table has a row for each image, or block of a large one, with the columns `id`,
    `image_id` (names the outputs) and `block`, see `blocks.cut_into_blocks`, `image` (path),
    `layers` (of the image, see `rasters.Layer`), `mask` (None, `masks.Planes` or `masks.LabelMap`),
    `category` (scored by itself), `views` (scored too), `fields` (a csv's other columns, or None);
    where known also `group`, `fold`, `volume` and `slice`. Raises UserError.
    `foreground`, `ignore`: values of mask files; `rle`: order of the runs; `missing`: "empty" takes
    images without a mask for images without foreground, "leave_out" leaves them out; `classes`: as
    --classes, or a model's; `channels`: as --channels; `neighbours`, `soft`: see `ModelConfig`.
    """
    root = find_root(data, target, training)
    collection = recognise(root, data, masks, target, training, channels)
    count = int(channels) if channels.isdecimal() else 0
    samples = complete(collection.samples, count)
    samples = volumes.arrange(samples, root, neighbours, count, training)
    samples = check_samples(samples, root, target, missing, collection.classes, training)
    samples = blocks.cut_into_blocks(samples, scale, reduced=training)
    check_count(samples, root, training)
    request = class_request(classes, root, samples.image[0])
    order = decide_order(samples, rle, training or masks != "auto" or rle != "auto")
    collection = collection._replace(samples=samples, rle=order)
    collection = decide_classes(collection, request, foreground, ignore, training, opener, soft)
    layers = [middle_slice(layers, neighbours) for layers in samples.layers]
    samples["mask"] = list(map(ignore_without_data, samples["mask"], layers))
    samples["layers"] = list(map(blocks.read_at, samples.layers, samples.block))
    return csvs.follow_csv(collection, root, rle) if training else collection


def check_samples(
    samples: pd.DataFrame,
    root: Path,
    target: str,
    missing: str,
    classes: Classes,
    training: bool,
) -> pd.DataFrame:
    """The samples that are used: to train on, those with masks. Raises UserError."""
    place = samples.image[0].parent
    if training:
        empty = Planes((RunLengths(root),) * len(classes.names))
        samples = leave_out(samples, root, missing, empty)
        check_pairs(samples, root, target)
        say_unused(samples, root)
    elif samples["mask"].isna().all() and "test" in str(place)[len(str(root)) :]:
        print(f"--data {root}: predicts {place}; to score images with masks, name their folder")
    return split_as_given(samples)


def complete(samples: pd.DataFrame, channels: int = 0) -> pd.DataFrame:
    """The samples of a layout with the columns that it left out; `channels`: that are asked for."""
    for column, default in (("category", ""), ("views", ()), ("fields", None)):
        if column not in samples:
            samples[column] = [default] * len(samples)
    if "layers" not in samples:
        samples["layers"] = [(Layer(image),) for image in samples.image]
    samples["layers"] = [
        layers if len(layers) > 1 else (layers[0]._replace(channels=channels),)
        for layers in samples.layers
    ]
    return samples


def ignore_without_data(mask: Any, layers: tuple[Layer, ...]) -> Any:
    """The mask of an image, to be ignored where an image of floats is NaN or infinity."""
    return replace(mask, image=layers) if mask and may_have_floats(layers) else mask


def name_of(sample: Any) -> str:
    """What people call an image: its file, of several files its id."""
    return sample.image.name if len(sample.layers) == 1 else sample.id


def leave_out(samples: pd.DataFrame, root: Path, missing: str, empty: Planes) -> pd.DataFrame:
    """Without images that have no mask: all with --missing leave_out, else those of whole folders.

    Where the images of some folders all have masks, the folders without one are left out: previews,
    unlabelled images. Folders that differ in numbers (patient_3) are one. With --missing empty
    they have the mask `empty`.
    """
    if missing == "empty":
        return samples.assign(mask=[mask or empty for mask in samples["mask"]])
    alone = samples["mask"].isna()
    pairs = zip(samples.image, samples.id, strict=True)  # an image's own folder is none of images
    places = [
        os.path.relpath(image.parents[image.parent.name == name], root) for image, name in pairs
    ]
    places = pd.Series([re.sub(r"\d+", "#", place) for place in places], samples.index)
    by_folder = alone.groupby(places)
    drop = alone & (missing == "leave_out" or by_folder.transform("all"))
    if not drop.any() or (missing != "leave_out" and by_folder.any().all()):
        return samples
    folders = (f"{count} of {place}" for place, count in places[drop].value_counts().items())
    print(f"left out: {drop.sum()} images without a mask: {first_five(folders)}")
    return samples[~drop].reset_index(drop=True)


def split_as_given(samples: pd.DataFrame) -> pd.DataFrame:
    """With the column `fold` where the column `split`, which is taken out, says so."""
    splits = samples.get("split", pd.Series(dtype=str))
    if {"train", "val"} <= set(splits):
        samples["fold"] = (splits != "val").astype(int)
        print(f"split: as given, {(splits == 'val').sum()} images in val validate (fold 0)")
    return samples.drop(columns="split", errors="ignore")


def say_unused(samples: pd.DataFrame, root: Path) -> None:
    """Print which images below a folder are neither images nor masks of these samples."""
    used = {str(layer.path) for layers in samples.layers for layer in layers}
    used |= {name for mask in samples["mask"] if mask for name in mask.source.split("; ")}
    files = [file for file in folders.list_files(root) if file.split != "test"]
    rest = [os.path.dirname(file.name) or "." for file in files if str(file.path) not in used]
    if rest:
        counts = (f"{count} in {place}" for place, count in Counter(rest).most_common())
        print(f"not used: {len(rest)} files, {first_five(counts)}")


def find_root(data: str, target: str, training: bool) -> Path:
    """The folder or file meant by --data. "auto": where the first layout finds its own.

    Looks below `MOUNTS`, then asks kagglehub. Raises UserError.
    """
    if data != "auto":
        if not Path(data).exists():
            raise UserError(
                f"--data {data}", "not found", "name a folder of images, an image, or auto"
            )
        return Path(os.path.abspath(data))  # not resolved: a link may have another name
    attached = (folder for mount in MOUNTS for folder, _ in walk_mount(mount))
    fitting = (folder for folder in attached if LAYOUTS[0](folder, "auto", target, training))
    root = next(fitting, None) or download_default()
    print(f"--data auto: {root}")
    return root


def download_default() -> Path:
    """Fetch the default dataset with kagglehub. Raises UserError where that is impossible."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):  # here kagglehub waits forever
        raise UserError(
            "--data auto", "no KITTI Road attached", f"add {DEFAULT_DATASET}, or name a folder"
        )
    try:
        import kagglehub  # here: nothing else needs it

        return Path(kagglehub.dataset_download(DEFAULT_DATASET))
    except Exception as error:  # whatever kagglehub or the network raise
        raise UserError(
            "--data auto",
            f"not attached, and {DEFAULT_DATASET} cannot be fetched ({reason_of(error)})",
            "download it and give its folder",
        ) from None


def recognise(
    root: Path, data: str, masks: str, target: str, training: bool, channels: str
) -> Collection:
    """What the first layout that recognises a folder makes of it. Raises UserError for none."""
    suffixes = (".csv",) if training else (".csv", *IMAGE_SUFFIXES)
    if root.is_file() and root.suffix.lower() not in suffixes:
        kinds = f"a folder, a csv, a video or an image ({', '.join(IMAGE_SUFFIXES)})"
        raise UserError(
            f"--data {data}",
            "is a file",
            f"name {'a folder of images with masks, or a csv of pairs' if training else kinds}",
        )
    layouts = LAYOUTS
    if "{stem}" in channels:
        layouts = [csvs.manifest, functools.partial(bands.band_files, channels=channels)]
    elif masks.lower().endswith(".json"):
        layouts = [annotations.annotated_images]
    elif (
        channels not in ("auto", "rgb")
        and not channels.isdecimal()
        and root.suffix.lower() != ".csv"
    ):
        raise UserError(
            f"--channels {channels}",
            "names files, but not which are those of an image",
            "take a number, patterns such as {stem}_B02.tif,{stem}_B03.tif, or list the files "
            "with ; between in the column image of a csv",
        )
    collections = (layout(root, masks, target, training) for layout in layouts)
    collection = next(filter(None, collections), None)
    if not collection:
        remedy = "expected training/image_2 and training/gt_image_2 (KITTI), images and masks"
        remedy += f", or train/ and train.csv; {describe_folder(root)}"
        raise UserError(f"--data {data}", "no images in it", remedy)
    return collection


def check_pairs(samples: pd.DataFrame, data: Path, target: str) -> None:
    """Raise UserError where an image has no mask."""
    if target != "road" and not samples.category.str.endswith(target).any():
        raise UserError(
            f"--target {target}",
            f"{data} is not in the KITTI layout, which alone has lanes",
            "leave the flag out",
        )
    alone = samples["mask"].isna()
    pairs = f"{len(samples) - alone.sum()} pairs"
    if alone.any():
        problem = f"{alone.sum()} of {len(samples)} images have no mask ({pairs} are complete)"
        names = first_five(map(name_of, samples[alone].itertuples()))
        remedy = remedy_for_missing(samples, data)
        raise UserError(f"--data {data}", f"{problem}: {names}", remedy)


def check_count(samples: pd.DataFrame, data: Path, training: bool) -> None:
    """Raise UserError where there are too few pairs to train."""
    if training and len(samples) < 2:
        for image in samples.image:  # an image of many pages is no data set
            open_image(image)
        pairs = f"{len(samples)} pairs"
        raise UserError(f"--data {data}", pairs, "at least 2 are needed, to train and to validate")


def remedy_for_missing(samples: pd.DataFrame, data: Path) -> str:
    """What to do about images without a mask: only what pairs is proposed."""
    paired = samples[samples["mask"].notna()]
    if paired.empty:
        flags = folders.propose_flags(data)
        masks = f"name them with {' or '.join(flags[:3])}" if flags else "add the masks"
        csv = "list both in a csv with the columns image,mask and name that with --data"
        return f"{masks}, or {csv}; {describe_folder(data)}"
    remedy = "leave these images out with --missing leave_out, add the masks"
    files = [mask.parts[0].path for mask in paired["mask"] if isinstance(mask.parts[0], MaskFile)]
    if 2 * len(paired) > len(samples) and folders.colours(files) <= 2:
        remedy += ", or take them as empty with --missing empty"
    return remedy


# --------------------------------------------------------------------------------------------------
#  Decide the classes
# --------------------------------------------------------------------------------------------------


def decide_classes(
    collection: Collection,
    request: ClassRequest,
    foreground: str,
    ignore: str,
    training: bool,
    opener: Opener,
    soft: bool,
) -> Collection:
    """Decide which classes the masks tell apart, and how they are read. Raises UserError."""
    samples = collection.samples
    masks, classes = choose_masks(samples["mask"], collection.classes, request, soft)
    values = request, foreground, ignore, training, opener, soft
    masks, classes = decide_files(masks, classes, *values)
    if training and request.asks_for_labels and not classes.several:
        raise UserError(request.where, "the masks are of one class", "leave the flag out")
    if request.model and classes != request.model and any(masks):
        own, other = request.model.describe(), classes.describe()
        print(f"no scores: the model has {own}, the masks have {other}")
        masks = [None] * len(masks)
    samples["mask"] = masks
    return collection._replace(classes=classes)


# --------------------------------------------------------------------------------------------------
#  Read everything once
# --------------------------------------------------------------------------------------------------


def scan(samples: pd.DataFrame, classes: Classes, opener: Opener = open_image) -> pd.DataFrame:
    """Read image headers and masks: the samples with more columns.

    `height`, `width` and `channels` of the image; `turn`, EXIF's orientation; `deep`, whether it
    has more than 8 bits; `share` of foreground, 0..1; `shares`, that of each class; `above`, how
    much of the height is above the foreground, 0..1 (1 for an empty mask); `thickness` of the
    mask's thinner side, see `masks.thickness`; `digest` of the mask's pixels; `trains`, see
    `blocks.choose_training`. A pair that cannot be read is 1x1 and empty here; `decode_pairs` names
    it.
    """
    rows = in_parallel(
        lambda sample: scan_sample(sample, classes, opener), samples.itertuples(), "scan"
    )
    samples = samples.join(pd.DataFrame(rows, index=samples.index))
    return samples.assign(trains=blocks.choose_training(samples))


def scan_sample(sample: Any, classes: Classes, opener: Opener) -> dict[str, Any]:
    """A row of `scan`."""
    channels = 0
    try:
        header = read_header(sample.layers)
        channels = header.channels
        mask = sample.mask.read(header.size, opener)
    except UserError:
        bad = {"height": 1, "width": 1, "channels": channels, "turn": 1, "deep": False}
        bad |= {"share": 0.0, "above": 1.0, "thickness": 0.0, "digest": 0}
        return bad | {"shares": (0.0,) * len(classes.names)}
    image = {"height": header.size[0], "width": header.size[1]}
    image |= {"channels": header.channels, "turn": header.turn, "deep": header.deep}
    return image | measure(mask, classes) | {"digest": zlib.crc32(mask.tobytes())}


def portable_rows(samples: pd.DataFrame) -> list[SimpleNamespace]:
    """The rows of the samples; those of `itertuples` do not reach workers that are spawned."""
    return [SimpleNamespace(**row) for row in samples.to_dict("records")]


def read_sample(
    sample: Any,
    channels: int = 3,
    value_range: tuple[float, ...] = (),
    opener: Opener = open_image,
    soft: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The image (h, w, channels) and its mask, (K, h, w) or (h, w) uint8. Raises UserError.

    `value_range`: see `rasters.to_pixels`; `soft`: see `images.encode_shares`.
    """
    image = read_image(sample.layers, channels, value_range)
    return image, sample.mask.read(image.shape[:2], opener, soft)


def read_pair(
    sample: Any, config: ModelConfig, opener: Opener = open_image
) -> tuple[np.ndarray, np.ndarray]:
    """The same at the network's size, see `images.prepare_pair`, and with soft masks."""
    pair = read_sample(sample, config.channels, config.value_range, opener, True)
    return prepare_pair(*pair, config)


def decode_pairs(
    samples: pd.DataFrame,
    config: ModelConfig,
    memory: int,
    opener: Opener = open_image,
    cache: str = "none",
) -> pd.DataFrame:
    """Decode every pair, which checks it: the samples with a column `pair`.

    It is what `images.prepare_pair` makes, or where all would take more bytes than `memory` a
    `StoredPair` in a file, or None; `cache`: see `choose_store`. Raises UserError for bad files.
    """
    if samples.block.map(blocks.is_part).any():  # they are not meant to be in memory all at once
        memory //= 8
    pixels = (samples.height * samples.width).sum()
    pixels = pixels if config.tiles else len(samples) * config.height * config.width
    depth = 2 if config.value_range else 1
    channels = depth * config.channels + max(1, config.classes.planes)  # bytes of a pixel
    fits = channels * pixels < memory
    keep = choose_store(cache, channels * pixels, fits)

    def decode(sample: Any) -> Any:
        try:
            pair = read_pair(sample, config, opener)
            for view in sample.views:
                view.check()
        except UserError as error:
            return error
        return keep(pair) if keep else pair if fits else None

    pairs = in_parallel(decode, samples.itertuples(), "decode")
    bad = [pair for pair in pairs if isinstance(pair, UserError)]
    if bad:
        raise UserError(
            f"--data {samples.image.iloc[0].parent}",
            f"{len(bad)} of {len(samples)} pairs cannot be used: {first_five(bad, ' | ')}",
        )
    for share, kind in ((0, "empty (no foreground)"), (1, "full (no background)")):
        if config.classes.planes and (samples.share == share).all():  # else `decide_labels` looked
            remedy = "name other masks with --masks, or the foreground's values with --foreground"
            raise UserError("--data", f"all {len(samples)} masks are {kind}", remedy)
    return samples.assign(pair=pairs)


# --------------------------------------------------------------------------------------------------
#  What was understood, for people
# --------------------------------------------------------------------------------------------------


def describe(collection: Collection) -> str:
    """What was understood, in one line."""
    samples = collection.samples
    sizes = sorted(zip(samples.height, samples.width, strict=True))
    smallest, largest = (f"{width}x{height}" for height, width in (sizes[0], sizes[-1]))
    unclear = samples[(samples.turn > 1) & ((samples.turn < 5) | (samples.height == samples.width))]
    turned = f"{len(unclear)} images are turned by EXIF, their masks are taken as upright"
    turned = f" · {turned}: see examples.jpg" if len(unclear) else ""
    start = f"data: {collection.name} · {len(samples)} pairs · {smallest} to {largest}"
    if collection.classes.several:
        shares = describe_shares(collection.classes, np.stack(samples.shares))
    else:
        empty = f"{100 * (samples.share == 0).mean():.0f} % of the masks empty"
        shares = f"{100 * samples.share.mean():.1f} % foreground · {empty}"
    return f"{start} · {shares}{turned}"


def describe_shares(classes: Classes, shares: np.ndarray) -> str:
    """Each class with its share of the pixels and of the images."""
    pixels, images = shares.mean(0), (shares > 0).mean(0)
    texts = [
        f"{name} {100 * share:.1f} % in {100 * occurs:.0f} % of the images"
        for name, share, occurs in zip(classes.names, pixels, images, strict=True)
    ]
    rest = f", ... ({len(texts)} in all)" if len(texts) > 40 else ""
    return f"{len(texts)} classes that {classes.kind}: {', '.join(texts[:40])}{rest}"


def spread(samples: pd.DataFrame, count: int) -> pd.DataFrame:
    """So many samples, evenly over the range of their shares of foreground, the largest first."""
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return samples.sort_values("share", ascending=False, kind="stable").iloc[places]


def write_understood(
    samples: pd.DataFrame, classes: Classes, out: Path, opener: Opener = open_image
) -> None:
    """Write samples.csv, a row for each image of `load`, and the masks as they were understood."""
    for folder in ("", *mask_folders(classes)):
        (writable_folder(out / "masks" / folder) / MARKER).touch()  # what is there is no data

    def write(row: Any) -> None:
        mask = row.mask.read((row.height, row.width), opener)
        write_mask(out / "masks", row.id, mask, classes)

    in_parallel(write, samples.itertuples(), "masks")
    table = samples[["id", "image", "height", "width"]]
    table = table.assign(masks=[getattr(mask, "source", mask.path) for mask in samples["mask"]])
    shares = np.stack(samples.shares)
    for index, name in enumerate(classes.names):
        table[f"share of {name}"] = shares[:, index].round(6)
    table = table.join(samples[["category", "fold", "group", "why"]])
    write_file(out / "samples.csv", table.to_csv(index=False))
    print(f"look at {out / 'samples.csv'} and {out / 'masks'}", flush=True)
