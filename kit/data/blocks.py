"""Blocks: an image larger than memory is several rows of the samples; images at a lower scale."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from kit.data import rasters, slides, tiffs
from kit.data.folds import assign_folds
from kit.data.masks import MaskFile, Planes
from kit.data.rasters import Layer, Window
from kit.data.readers import open_layers
from kit.data.rle import RunLengths
from kit.errors import UserError, first_five

BLOCK = 2048  # reduced pixels along the sides of a block, about
STEP = tiffs.TILE  # the sides are multiples of it, so that a written tile lies in one block
PACKED = 1000  # pixels that a byte of a compressed file holds at most

# --------------------------------------------------------------------------------------------------
#  Cut
# --------------------------------------------------------------------------------------------------


def shrink_of(scale: float) -> int:
    """How many pixels become one along each axis. Raises UserError where it is no whole number."""
    shrink = round(1 / scale)
    if abs(shrink * scale - 1) > 0.02:
        raise UserError(f"--scale {scale:g}", "is not 1, 1/2, 1/3, ...", "take 0.5, 0.33 or 0.25")
    return shrink


def cut_into_blocks(samples: pd.DataFrame, scale: float, reduced: bool) -> pd.DataFrame:
    """The samples with a row for each block of a large image, and for each other image.

    New columns: `block`, its `Window`, None of an image that is read as a whole at its own scale;
    and `image_id`, the former `id`. That of a block ends with its place. Unless `reduced`, image
    and mask are read at the image's own resolution. Raises UserError for an impossible scale.
    """
    shrink, rows = shrink_of(scale), []
    records = samples.to_dict("records")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: find_blocks(row["layers"], shrink), records))
    for row, blocks in zip(records, found, strict=True):
        name = row["id"]
        for block in blocks:
            place = f"_{block.y}_{block.x}" if len(blocks) > 1 else ""
            rows.append(row | {"id": f"{name}{place}", "image_id": name})
    cut = pd.DataFrame(rows, columns=[*samples.columns, "image_id"])
    cut["block"] = pd.Series([block for blocks in found for block in blocks], dtype=object)
    large = [blocks for blocks in found if len(blocks) > 1]
    if large:
        sizes = [f"{width}x{height}" for height, width in dict.fromkeys(b[0].whole for b in large)]
        print(f"slides: {len(large)} of {len(found)} images ({first_five(sizes)}), read in blocks")
    for column, change in (("layers", read_at), ("mask", mask_at)):
        windows = [b if reduced or not b else b._replace(shrink=1) for b in cut.block]
        cut[column] = list(map(change, cut[column], windows))
    return cut


def read_at(layers: tuple[Layer, ...], window: Window | None) -> tuple[Layer, ...]:
    """The layers of an image, of which a window is read."""
    return tuple(layer._replace(window=window) for layer in layers)


def mask_at(mask: Planes | None, window: Window | None) -> Planes | None:
    """A mask, of which a window is read. Raises UserError for a kind that is read as a whole."""
    if not (mask and window):
        return mask
    if not all(isinstance(part, MaskFile | RunLengths) for part in mask.parts if part):
        problem = "masks of this kind are read as a whole and at their own scale"
        raise UserError(mask.path, problem, "leave --scale out, or save them as TIFFs")
    return mask.change(MaskFile, window=window).change(RunLengths, window=window)


def find_blocks(layers: tuple[Layer, ...], shrink: int) -> list[Window | None]:
    """The blocks of an image, row by row; [None] where it is read as a whole at its own scale."""
    path = layers[0].path
    may_be_large = path.suffix.lower() in (*tiffs.SUFFIXES, *slides.SUFFIXES)
    if shrink == 1 and not (may_be_large and path.stat().st_size > rasters.LARGE / PACKED):
        return [None]
    try:
        raster = open_layers(layers)[0]
    except UserError:  # `samples.decode_pairs` names it
        return [None]
    size = raster.size
    if size[0] * size[1] > rasters.LARGE and raster.part:
        rows, columns = (list(cut_length(length, shrink)) for length in size)
        return [Window(y, x, h, w, size, shrink) for y, h in rows for x, w in columns]
    return [Window(0, 0, *size, size, shrink) if shrink > 1 else None]


def cut_length(length: int, shrink: int) -> Iterator[tuple[int, int]]:
    """Start and length of blocks of about the same length along an axis, multiples of `STEP`."""
    count, step = -(-length // (BLOCK * shrink)), STEP * shrink
    starts = [round(number * length / (count * step)) * step for number in range(count)]
    for start, end in itertools.pairwise([*starts, length]):
        yield start, end - start


def is_part(block: Window | None) -> bool:
    """Whether a block is not all of its image."""
    return block is not None and (block.height, block.width) != block.whole


# --------------------------------------------------------------------------------------------------
#  Folds, and what trains
# --------------------------------------------------------------------------------------------------


def assign_folds_to_images(
    samples: pd.DataFrame, folds: int, seed: int, group: str, names: tuple[str, ...]
) -> pd.DataFrame:
    """`folds.assign_folds` of the images, for each of their blocks; of one image by place."""
    if not samples.block.map(is_part).any():
        return assign_folds(samples, folds, seed, group, names)
    images = samples.drop_duplicates("image_id")
    if len(images) == 1:
        return folds_by_place(samples, folds)
    blocks = samples.groupby("image_id", sort=False)
    images = images.assign(id=images.image_id, share=blocks.share.mean().to_numpy())
    images["shares"] = [tuple(np.mean(shares.tolist(), axis=0)) for _, shares in blocks.shares]
    split = assign_folds(images, folds, seed, group, names).set_index(images.image_id)
    return split.loc[samples.image_id].set_index(samples.index)


def folds_by_place(samples: pd.DataFrame, folds: int) -> pd.DataFrame:
    """Folds of the blocks of one image: neighbouring rows of blocks, or columns where it is wide.

    Cut so that each has about as much foreground as the others.
    """
    axis = "y" if samples.block.map(lambda b: b.y).nunique() > 1 else "x"
    height, width = samples.block.iloc[0].whole
    axis = "x" if width > height and samples.block.map(lambda b: b.x).nunique() > 1 else axis
    place = samples.block.map(lambda block: getattr(block, axis))
    amount = (samples.share + 1e-6).groupby(place).sum()  # of each strip; the places are sorted
    middle = (amount.cumsum() - amount / 2) / amount.sum()
    strips = (middle * min(folds, max(2, (amount > 1e-3).sum()))).astype(int)
    strips = strips.rank(method="dense").astype(int) - 1  # no number is left out
    if strips.nunique() == 1:
        strips[:] = np.arange(len(strips)) * 2 // len(strips)
    fold = place.map(strips)
    where = "from top to bottom" if axis == "y" else "from left to right"
    print(f"split: one slide, {fold.nunique()} strips of blocks {where} are the folds")
    return pd.DataFrame({"fold": fold, "group": fold.map(str), "why": "strips of one slide"})


def choose_training(samples: pd.DataFrame) -> np.ndarray:
    """Which rows train, bool (n,): of blocks those with foreground, and as many without; says so.

    Those without are taken evenly over all slides. All blocks validate and are scored.
    """
    blocks = samples.block.map(is_part).to_numpy(bool)
    empty = np.flatnonzero(blocks & (samples.share == 0).to_numpy())
    filled = int(blocks.sum()) - len(empty)
    trains = np.ones(len(samples), bool)
    if len(empty) > filled:
        trains[empty] = False
        trains[empty[np.linspace(0, len(empty) - 1, filled).round().astype(int)]] = True
    if blocks.any():
        taken = filled + int(trains[empty].sum())
        text = f"slides: {blocks.sum()} blocks, {filled} with foreground; {taken} may train"
        print(f"{text} (these, and as many without), all validate")
    return trains
