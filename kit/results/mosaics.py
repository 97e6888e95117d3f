"""Mosaics: images that were read in blocks, or reduced, become whole masks again."""

import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from kit.config import IGNORE, ModelConfig
from kit.data.blocks import is_part, read_at
from kit.data.classes import mask_files
from kit.data.images import each_plane, to_picture, write_image
from kit.data.rasters import Window
from kit.data.rle import block_runs, join_runs
from kit.data.tiffs import TILE, georeference, pack_tiles, write_tiff
from kit.network.model import TrainedModel
from kit.results.predict import enlarge_prediction, of_blocks, postprocess
from kit.results.visualize import comparison

LONGEST = 2000  # pixels of a mosaic's picture along its longer side, about


def add_margins(samples: pd.DataFrame, models: list[TrainedModel]) -> pd.DataFrame:
    """The samples whose blocks are read with a margin, as wide as tiles overlap: no seams."""
    lengths = [max(m.config.height, m.config.width) for m in models if m.config.tiles]
    margin = max((-(-length // 4) for length in lengths), default=0)
    pairs = zip(samples.layers, samples.block, strict=True)
    layers = [read_at(own, b.grow(margin)) if is_part(b) else own for own, b in pairs]
    return samples.assign(layers=layers)


def finish(
    sample: Any, image: np.ndarray, prediction: np.ndarray, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, prediction and mask of a row, without the margin of a block.

    Of reduced images prediction and mask have the image's own resolution; the image stays reduced.
    """
    block, window = sample.block, sample.layers[0].window
    if not block:
        return image, prediction, postprocess(prediction, config)
    prediction = enlarge_prediction(prediction, window, config)
    mask = postprocess(prediction, of_blocks(config) if is_part(block) else config)

    def inside(plane: np.ndarray) -> np.ndarray:
        return block.cut(plane, window.y, window.x)

    y, x = (block.y - window.y) // block.shrink, (block.x - window.x) // block.shrink
    image = image[y : y + block.size[0], x : x + block.size[1]]
    return image, each_plane(inside, prediction), each_plane(inside, mask)


class Mosaic:
    """The mask of an image in compressed tiles, its runs, and a small picture of it."""

    def __init__(self, blocks: list[Window], config: ModelConfig, order: str = "") -> None:
        """`order`: of the runs, see `rle.ORDERS`; "": none are needed."""
        self.left, self.size, self.config, self.order = len(blocks), blocks[0].whole, config, order
        self.tiles: dict[tuple[str, int, int], bytes] = {}
        self.runs: dict[str, list[np.ndarray]] = {value: [] for value in config.classes.values}
        self.factor = max(1, round(max(self.size) / LONGEST))
        small = [-(-length // self.factor) for length in self.size]
        self.image = np.zeros((*small, 3), np.uint8)
        planes = () if config.exclusive else (len(config.classes.names),)
        self.mask = np.zeros((*planes, *small), np.uint8)
        self.ground_truth = np.full_like(self.mask, IGNORE)

    def add(self, sample: Any, image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
        """Add what `finish` made of a block. Returns its ground truth where there is one."""
        block, config = sample.block, self.config
        ground_truth = sample.mask.read(mask.shape[-2:]) if sample.mask else None
        for place, values in mask_files(mask, config.classes).items():
            for row, column, tile in pack_tiles(values):
                self.tiles[place, block.y // TILE + row, block.x // TILE + column] = tile
        for index, value in enumerate(self.runs if self.order else ()):
            plane = mask == index if mask.ndim == 2 else mask[index]
            self.runs[value].append(block_runs(plane, block, self.order))
        self.paste(self.image, to_picture(image, config), block)
        for whole, part in ((self.mask, mask), (self.ground_truth, ground_truth)):
            for target, plane in zip(planes_of(whole), planes_of(part), strict=False):
                self.paste(target, plane.astype(np.uint8), block)
        return ground_truth

    def paste(self, target: np.ndarray, values: np.ndarray, block: Window) -> None:
        """Reduce the values of a block, (h, w) or (h, w, 3) uint8, into the small picture."""
        y, x = block.y // self.factor, block.x // self.factor
        end = -(-(block.y + block.height) // self.factor)
        right = -(-(block.x + block.width) // self.factor)
        method = cv2.INTER_AREA if values.ndim == 3 else cv2.INTER_NEAREST
        target[y:end, x:right] = cv2.resize(values, (right - x, end - y), interpolation=method)

    def done(self, out: Path, sample: Any, comparisons: bool) -> bool:
        """After each block: whether it was the last one. Then the files are written."""
        self.left -= 1
        if not self.left:
            self.write(out, sample, comparisons)
        return not self.left

    def write(self, out: Path, sample: Any, comparisons: bool) -> None:
        """Write masks/ID.tif, with the transform and CRS of the image, and comparisons/ID.jpg."""
        rows, columns = (range(-(-length // TILE)) for length in self.size)
        tags = georeference(sample.layers[0].path)
        for place in {place: None for place, *_ in self.tiles}:
            tiles = (self.tiles[(place, *key)] for key in itertools.product(rows, columns))
            path = out / "masks" / place / f"{sample.image_id}.tif"
            write_tiff(path, tiles, self.size, tags)
        if comparisons:
            mask = self.mask if self.config.exclusive else self.mask == 1
            target, name = self.ground_truth if sample.mask else None, sample.image_id
            drawn = comparison(self.image, target, mask, name, self.config.classes)
            write_image(out / "comparisons" / f"{name}.jpg", drawn)

    def answers(self) -> dict[str, list[str]]:
        """{value of a class: the RLE of its mask}."""
        return {value: [join_runs(runs, self.order)] for value, runs in self.runs.items()}


def planes_of(mask: np.ndarray | None) -> np.ndarray:
    """Planes (K, h, w), or a label map as one; of None none."""
    return np.zeros((0, 0, 0)) if mask is None else mask.reshape(-1, *mask.shape[-2:])
