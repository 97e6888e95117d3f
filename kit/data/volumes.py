"""Volumes: slices in files or pages, and their neighbours as further channels.

A volume is a folder of numbered images, the pages of a TIFF, an array (D, h, w), or what a
manifest's columns `volume` and `slice` say.
"""

import itertools
import os
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from PIL import Image

from kit.config import Classes
from kit.data import arrays, tiffs
from kit.data.classes import mask_folders
from kit.data.masks import MaskFile, Planes
from kit.data.rasters import Layer
from kit.data.readers import read_header
from kit.errors import UserError, first_five
from kit.files import write_file


def arrange(
    samples: pd.DataFrame,
    root: Path,
    steps: tuple[int, ...],
    channels: int = 0,
    training: bool = True,
) -> pd.DataFrame:
    """The samples with a row for each page of a stack, and with the layers of their neighbours.

    `steps`: see `rasters.parse_steps`; `channels`: of a slice for the model that predicts.
    Where volumes are known there are the columns `volume` and `slice`. Raises UserError.
    """
    samples = split_stacks(samples, steps, 0 if training else channels)
    if not steps:
        return samples
    samples = name_volumes(samples, root)
    check_volumes(samples, steps, training)
    say_gaps(samples)
    return samples.assign(layers=with_neighbours(samples, steps))


# --------------------------------------------------------------------------------------------------
#  Stacks: several slices in a file
# --------------------------------------------------------------------------------------------------


def list_slices(path: Path) -> list[tuple[Layer, ...]]:
    """The layers of each slice in a file; [] for what is no stack. Raises UserError."""
    if path.suffix.lower() == ".npy":
        shape = arrays.load_array(path).shape
        is_stack = len(shape) == 3 and arrays.page_axis(shape) == 0
        return [(Layer(path, n),) for n in range(shape[0])] if is_stack else []
    found = tiffs.list_pages(path) if path.suffix.lower() in tiffs.SUFFIXES else None
    if not found or len(found.pages) < 2:
        return []
    numbers = np.arange(len(found.pages))[:, None]
    if len(found.axes) > 1:  # slices of several channels
        others = found.axes.replace("C", "")
        if len(others) > 1:
            raise UserError(
                path, f"is a stack of {others}", "save a file for each volume, with slices alone"
            )
        numbers = numbers.reshape(found.lengths)
        numbers = numbers.T if found.axes[0] == "C" else numbers
    return [tuple(Layer(path, int(n)) for n in row) for row in numbers]


def split_stacks(samples: pd.DataFrame, steps: tuple[int, ...], channels: int) -> pd.DataFrame:
    """The samples with a row for each slice of a stack: its id and a number, 0001 the first."""
    rows, lengths = [], {}
    for row in samples.to_dict("records"):
        slices = slices_of(row, steps, channels)
        rows += [] if slices else [row]
        for number, layers in enumerate(slices, 1):
            mask = row["mask"] and page_of_mask(row["mask"], number - 1)
            changes = {"id": f"{row['id']}_{number:04d}", "layers": layers, "mask": mask}
            rows.append(row | changes | {"volume": row["id"], "slice": number})
        if slices:
            lengths[row["image"].name] = len(slices)
    if not lengths:
        return samples
    twice = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        problem = f"pages and images share names: {first_five(twice)}"
        raise UserError("--data", problem, "rename the files")
    name, sizes = next(iter(lengths)), sorted(lengths.values())
    stacks = f"{len(lengths)} files of {sizes[0]} to {sizes[-1]} slices, such as {name}"
    print(f"volumes: {stacks}: each slice is an image, {len(rows)} in all")
    return pd.DataFrame(rows).fillna({"volume": ""})


def slices_of(
    row: dict[str, Any], steps: tuple[int, ...], channels: int
) -> list[tuple[Layer, ...]]:
    """The slices of a sample that is a stack; [] where pages are bands, or there are none.

    It is one where its masks have as many; without masks where neighbours are asked for, or for a
    model that takes another number of channels. Raises UserError where masks have other numbers.
    """
    [first, *more] = row["layers"]
    slices = list_slices(first.path) if not more and first.page < 0 else []
    slices = [] if first.channels == len(slices) > 1 else slices  # as many as are asked for
    parts = row["mask"].parts if slices and row["mask"] else ()
    files = [part.path for part in parts if isinstance(part, MaskFile)]
    counts = {path: len(list_slices(path)) or 1 for path in files}
    if set(counts.values()) == {len(slices)}:
        return slices
    wrong = [path for path, count in counts.items() if count > 1]
    if wrong:
        problem = f"has {counts[wrong[0]]} pages, its image {first.path.name} has {len(slices)}"
        raise UserError(wrong[0], problem, "a mask has one page, or as many as its image")
    if not slices or parts:
        return []
    if channels:
        try:
            own = read_header(row["layers"]).channels
        except UserError:  # pages of several sizes
            own = 0
        return slices if own != channels else []
    return slices if steps and first.path.suffix.lower() in tiffs.SUFFIXES else []


def page_of_mask(mask: Planes, place: int) -> Planes:
    """The mask of a slice, of the mask of its stack."""

    def choose(part: MaskFile) -> MaskFile:
        return replace(part, page=list_slices(part.path)[place][0].page)

    return replace(mask, parts=tuple(part and choose(part) for part in mask.parts))


# --------------------------------------------------------------------------------------------------
#  Which slices are a volume
# --------------------------------------------------------------------------------------------------


def name_volumes(samples: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The samples with the columns `volume` and `slice`. Raises UserError.

    Where these are not known yet a volume is the images of a folder whose names differ in one
    number, that of the slice.
    """
    if "volume" in samples and "slice" not in samples:
        raise UserError(f"--data {root}", "a column volume, but no column slice", "add it")
    names = samples["volume"].tolist() if "volume" in samples else [""] * len(samples)
    slices = samples["slice"].tolist() if "slice" in samples else [0] * len(samples)
    groups: dict[Path, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, path in enumerate(samples.image):
        if not names[place]:
            groups[path.parent][re.sub(r"\d+", "#", path.stem)].append(place)
    root = root.parent if root.is_file() else root
    for folder, patterns in groups.items():
        label = os.path.relpath(folder, root) if folder != root else folder.name
        for pattern, places in patterns.items():
            numbers = slice_numbers(folder, [samples.image.iloc[place].stem for place in places])
            for place, number in zip(places, numbers, strict=True):
                names[place] = label if len(patterns) == 1 else f"{label}/{pattern}"
                slices[place] = number
    try:
        return samples.assign(volume=names, slice=[float(number) for number in slices])
    except ValueError:
        problem = f"column slice holds {first_five(map(repr, slices))}"
        raise UserError(f"--data {root}", problem, "it takes numbers") from None


def slice_numbers(folder: Path, stems: list[str]) -> list[int]:
    """The number in which names differ. Raises UserError where it is not one."""
    numbers = np.array([[int(n) for n in re.findall(r"\d+", stem)] or [0] for stem in stems])
    differ = np.flatnonzero((numbers != numbers[0]).any(0))
    if len(differ) > 1:
        problem = f"names differ in {len(differ)} numbers: {first_five(stems[:1] + stems[-1:])}"
        remedy = "name volume and slice in two columns of a manifest csv"
        raise UserError(folder, f"{problem}; which is the slice?", remedy)
    return numbers[:, differ[0] if len(differ) else -1].tolist()


def check_volumes(samples: pd.DataFrame, steps: tuple[int, ...], training: bool) -> None:
    """Raise UserError where volumes have no neighbours; a model that predicts repeats slices."""
    flag = f"--neighbours {','.join(map(str, steps))}"
    again = samples[samples.duplicated(["volume", "slice"])]
    if len(again):
        volume, number = again.volume.iloc[0], again["slice"].iloc[0]
        same = samples[(samples.volume == volume) & (samples["slice"] == number)]
        named = first_five(path.name for path in same.image)
        raise UserError(flag, f"{volume} has slice {number:g} twice: {named}", "rename one")
    used = samples[samples["mask"].notna()] if training else samples
    counts = samples.volume[samples.volume.isin(used.volume)].value_counts()
    small = counts[counts <= steps[-1]]
    named = first_five(f"{name} ({count})" for name, count in small.items())
    if training and (counts == 1).all():
        problem = f"all {len(counts)} volumes have one slice, such as {counts.index[0]}"
        remedy = "slices are images of a folder whose names differ in one number, pages of a TIFF, "
        raise UserError(flag, problem, remedy + "or named by a manifest's columns volume and slice")
    if training and len(small):
        problem = f"{len(small)} of {len(counts)} volumes have no more slices than that: {named}"
        raise UserError(flag, problem, "take fewer, or leave these volumes out")
    count = f"{2 * len(steps) + 1} slices of a volume are the channels of an image"
    lengths = f"{len(counts)} volumes of {counts.min()} to {counts.max()} slices"
    few = f"; few slices, which are repeated: {named}" if len(small) else ""
    print(f"neighbours: {count}, {lengths}, such as {counts.index[0]}{few}")


def say_gaps(samples: pd.DataFrame) -> None:
    """Print where the numbering of slices has gaps."""
    ordered = samples.sort_values(["volume", "slice"], kind="stable")
    apart = ordered.groupby("volume")["slice"].diff()
    gaps = ordered[["volume", "slice"]].shift()[apart > apart.mode().min()]
    if len(gaps):
        named = first_five(f"{row.volume} after {row.slice:g}" for row in gaps.itertuples())
        print(f"neighbours: gaps in the numbering, the next slice there is counts: {named}")


def with_neighbours(samples: pd.DataFrame, steps: tuple[int, ...]) -> list[tuple[Layer, ...]]:
    """The layers of each sample and of its neighbours, those before it first.

    At the ends of a volume its last slice is repeated.
    """
    offsets = [*(-step for step in reversed(steps)), 0, *steps]
    layers, result = samples.layers.tolist(), [()] * len(samples)
    for places in samples.groupby("volume", sort=False).indices.values():
        order = places[np.argsort(samples["slice"].to_numpy()[places])]
        for number, place in enumerate(order):
            chosen = (min(max(number + offset, 0), len(order) - 1) for offset in offsets)
            result[place] = tuple(itertools.chain(*(layers[order[other]] for other in chosen)))
    return result


# --------------------------------------------------------------------------------------------------
#  A stack in, a stack of masks out
# --------------------------------------------------------------------------------------------------


def join_pages(
    samples: pd.DataFrame, folder: Path, classes: Classes, failed: list[tuple[str, str]]
) -> None:
    """Make the mask images of a stack's pages the pages of a TIFF, in order: STEM.tif.

    `folder`: of the masks; `failed`: ids and messages, a stack with one of them stays images.
    """
    names = {name for name, _ in failed}
    if "volume" not in samples:
        return
    paged = [any(layer.page >= 0 for layer in layers) for layers in samples.layers]
    for volume, rows in samples[paged].groupby("volume", sort=False):
        if names & set(rows.id):
            continue
        for kind in mask_folders(classes):
            paths = [folder / kind / f"{name}.png" for name in rows.id]
            write_file(folder / kind / f"{volume}.tif", lambda part, p=paths: write_pages(part, p))
            for path in paths:
                path.unlink()


def write_pages(path: Path, pages: list[Path]) -> None:
    """Write images of one channel, or with a palette, as the pages of a TIFF."""
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            image = Image.open(page)
            palette = image.getpalette() and np.array(image.getpalette("RGB")).reshape(-1, 3)
            options: dict[str, Any] = {"photometric": "minisblack"}
            if palette is not None:
                colours = np.zeros((256, 3), np.uint16)
                colours[: len(palette)] = 257 * palette
                options = {"photometric": "palette", "colormap": colours.T}
            pixels = np.asarray(image)
            file.write(pixels, compression="zlib", metadata=None, contiguous=False, **options)
