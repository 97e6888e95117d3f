"""Comparisons, curves and overlays: the mask in green, its errors in colour."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import matplotlib

matplotlib.use("Agg")  # draws into files alone

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import PrecisionRecallDisplay

from classes import ONE_CLASS, Classes
from colours import class_colours, mask_colours
from images import IGNORE

GREEN, BLUE, RED = (46, 204, 64), (30, 100, 255), (255, 45, 45)  # RGB: hit, miss, false alarm
BLACK, GREY = (0, 0, 0), (30, 30, 30)
PANEL_SIZE = (2000, 620)  # largest height and width of an image in a panel
EXAMPLE_SIZE = (360, 480)  # height and width of an image in examples.jpg and augmented.jpg
BAR_WIDTH = 310  # pixels that title and legend need
Colour = tuple[int, int, int]

# --------------------------------------------------------------------------------------------------
#  Images
# --------------------------------------------------------------------------------------------------


def tint(image: np.ndarray, mask: np.ndarray, colour: Colour, strength: float = 0.5) -> np.ndarray:
    """Lay a colour over the pixels of a mask; image (h, w, 3) uint8 in and out.

    `mask`: (h, w) bool, or float32 of 0..1, the part of the strength.
    """
    weight = mask.astype(np.float32) * strength
    return cv2.blendLinear(image, np.full_like(image, colour), 1 - weight, weight)


def comparison(
    image: np.ndarray, ground_truth: np.ndarray | None, mask: np.ndarray, title: str
) -> np.ndarray:
    """Image and prediction and, where there is one, ground truth and errors, in a grid.

    `image` (h, w, 3) uint8, `ground_truth` (h, w) uint8 of 0, 1, 255, or None, `mask` (h, w) bool.
    Up to PANEL_SIZE pixel for pixel, a larger image reduced. Prediction and ground truth are drawn
    alike. Returns RGB uint8.
    """
    small, size, columns = reduce_image(image)
    legend = [("foreground", GREEN)]
    predicted = tint(small, reduce_mask(mask, size), GREEN)
    panels = [panel(small, title), panel(predicted, "prediction", legend)]
    if ground_truth is not None:
        ignored = ground_truth == IGNORE
        known = tint(small, reduce_mask(ground_truth == 1, size), GREEN)
        known = tint(known, reduce_mask(ignored, size), BLACK, 0.7)
        legend += [("ignored", BLACK)] if ignored.any() else []
        panels.append(panel(known, "ground truth", legend))
        kinds = [("hit", GREEN), ("miss", BLUE), ("false alarm", RED)]
        panels.append(panel(errors(small, ground_truth, mask), "errors", kinds))
    return grid(panels, min(columns, len(panels)))


def class_comparison(
    image: np.ndarray,
    ground_truth: np.ndarray | None,
    mask: np.ndarray,
    title: str,
    classes: Classes,
) -> np.ndarray:
    """As `comparison`, of several classes, with a legend of those that occur below.

    The classes lie over the grey image: over its colours they would look like other classes.
    `mask`: numbers (h, w) of exclusive classes, else bool (K, h, w); `ground_truth`: numbers with
    255 (ignored), else (h, w, K) uint8.
    """
    small, size, columns = reduce_image(image)
    layers = mask_colours(mask, classes)
    grey = greyed(small)
    panels = [panel(small, title), panel(paint(grey, layers, size), "prediction")]
    if ground_truth is not None:
        target = ground_truth if classes.exclusive else np.moveaxis(ground_truth == 1, -1, 0)
        known, ignored = mask_colours(target, classes), ignored_pixels(ground_truth)
        drawn = tint(paint(grey, known, size), reduce_mask(ignored, size), BLACK, 0.7)
        panels.append(panel(drawn, "ground truth"))
        wrong = target != mask if classes.exclusive else (target != mask).any(0)
        drawn = tint(grey, reduce_mask(wrong & ~ignored, size), RED, 0.7)
        drawn = tint(drawn, reduce_mask(ignored, size), BLACK, 0.7)
        kinds = [("wrong", RED)] + [("ignored", BLACK)] * bool(ignored.any())
        panels.append(panel(drawn, "errors", kinds))
        layers = layers + known
    drawn = grid(panels, min(columns, len(panels)))
    found = {name: colour for name, colour, _ in layers}
    entries = [(name, found[name]) for name in classes.names if name in found]
    return np.vstack([drawn, legend_rows(entries, drawn.shape[1])])


def paint(
    image: np.ndarray, layers: list[tuple[str, Colour, np.ndarray]], size: tuple[int, int]
) -> np.ndarray:
    """Lay the colours of `mask_colours` over an image that has this (width, height)."""
    for _, colour, mask in layers:
        if colour != BLACK:  # the background stays as it is
            image = tint(image, reduce_mask(mask, size), colour, 0.6)
    return image


def legend_rows(entries: list[tuple[str, Colour]], width: int) -> np.ndarray:
    """Coloured squares with names in as many rows as they need, (rows, width, 3) uint8."""
    bars = [np.full((26, width, 3), 255, np.uint8)]
    font, scale, left = cv2.FONT_HERSHEY_DUPLEX, 0.45, 6
    for name, colour in entries:
        text = printable(name)
        length = cv2.getTextSize(text, font, scale, 1)[0][0] + 40
        if left + length > width and left > 6:
            bars.append(np.full_like(bars[0], 255))
            left = 6
        cv2.rectangle(bars[-1], (left, 6), (left + 14, 20), colour, -1)
        cv2.putText(bars[-1], text, (left + 20, 18), font, scale, GREY, 1, cv2.LINE_AA)
        left += length
    return np.vstack(bars)


def printable(name: str) -> str:
    """A name in letters that OpenCV can draw, at most 24 of them."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return (plain or "?")[:24]


def reduce_image(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int], int]:
    """An image reduced to PANEL_SIZE, its (width, height), and how many panels go in a row."""
    columns = 2 if image.shape[1] >= image.shape[0] else 4  # upright images in one row
    scale = min(1.0, *(limit / n for limit, n in zip(PANEL_SIZE, image.shape, strict=False)))
    size = tuple(max(1, round(scale * n)) for n in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), size, columns


def reduce_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Reduce a mask, bool (h, w), to (width, height) float32 of 0..1.

    The root of the part that it covers: at a tenth of the size a line of one pixel keeps a third of
    its strength, where the nearest pixel would lose most of it.
    """
    covered = cv2.resize(255 * mask.astype(np.uint8), size, interpolation=cv2.INTER_AREA)
    return np.sqrt(covered.astype(np.float32) / 255)


def greyed(image: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) uint8 without its colours, of the same shape."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def errors(image: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Hits green, misses blue, false alarms red over the grey image, which may be reduced."""
    result = greyed(image)
    kinds = (
        ((target == 1) & predicted, GREEN),
        ((target == 1) & ~predicted, BLUE),
        ((target == 0) & predicted, RED),
    )
    for mask, colour in kinds:
        result = tint(result, reduce_mask(mask, image.shape[1::-1]), colour, 0.6)
    return result


def panel(image: np.ndarray, title: str, legend: Iterable[tuple[str, Colour]] = ()) -> np.ndarray:
    """An image under a white bar with its title, and a legend of coloured squares on the right.

    A narrow image is filled up with white on its right.
    """
    missing = max(0, BAR_WIDTH - image.shape[1])
    image = np.pad(image, ((0, 0), (0, missing), (0, 0)), constant_values=255)
    bar = np.full((30, image.shape[1], 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_DUPLEX, 0.5
    cv2.putText(bar, title, (4, 20), font, scale, GREY, 1, cv2.LINE_AA)
    right = bar.shape[1]
    for name, colour in reversed(list(legend)):
        right -= cv2.getTextSize(name, font, scale, 1)[0][0] + 34
        cv2.rectangle(bar, (right, 8), (right + 14, 22), colour, -1)
        cv2.putText(bar, name, (right + 20, 20), font, scale, GREY, 1, cv2.LINE_AA)
    return np.vstack([bar, image])


def examples(
    rows: list[tuple[Any, np.ndarray, np.ndarray]], classes: Classes = ONE_CLASS
) -> np.ndarray:
    """Images with their masks laid over, green, ignored pixels black, in a grid: examples.jpg.

    Several classes have their own colours. `rows`: a sample of `data.scan_dataset`, its image
    (h, w, 3) uint8 and its mask (h, w) uint8, of classes that overlap (h, w, K).
    """
    panels = []
    for row, image, mask in rows:
        image, mask = fit_example(image, mask)
        drawn = image
        for _, colour, one in mask_layers(mask, classes):
            drawn = tint(drawn, one, colour)
        title = f"{row.id[:24]}  {row.width}x{row.height}  {100 * row.share:.1f} %"
        panels.append(panel(tint(drawn, ignored_pixels(mask), BLACK, 0.7), title))
    drawn = grid(panels, 3)
    return np.vstack([drawn, class_legend(classes, drawn.shape[1])]) if classes.names else drawn


def mask_layers(mask: np.ndarray, classes: Classes) -> list[tuple[str, Colour, np.ndarray]]:
    """(name, colour, bool (h, w)) of the foreground, or of each class, in a mask of a data set."""
    if not classes.names:
        return [("foreground", GREEN, mask == 1)]
    layers = mask_colours(mask if classes.exclusive else np.moveaxis(mask == 1, -1, 0), classes)
    return [layer for layer in layers if layer[1] != BLACK]  # the background stays as it is


def ignored_pixels(mask: np.ndarray) -> np.ndarray:
    """Where a mask (h, w), or (h, w, K) in all its classes, is ignored."""
    return (mask == IGNORE).reshape(*mask.shape[:2], -1).all(-1)


def class_legend(classes: Classes, width: int) -> np.ndarray:
    """The legend of all classes."""
    colours = map(tuple, class_colours(classes.names).tolist())
    return legend_rows(list(zip(classes.names, colours, strict=True)), width)


def augmentations(
    dataset: Any, classes: Classes = ONE_CLASS, images: int = 4, draws: int = 4
) -> np.ndarray:
    """Augmented items as the network gets them, masks outlined, ignored black: augmented.jpg.

    `dataset`: a SegmentationDataset with augmentation; each row of the grid shows one of its items.
    """
    panels = []
    for position in np.linspace(0, len(dataset) - 1, images).astype(int).tolist():
        for draw in range(draws):
            dataset.epoch.fill_(draw)
            item = dataset[position]
            image = np.moveaxis(item["image"].numpy(), 0, -1)
            mask = item["mask"].numpy()
            mask = mask[0] if len(mask) == 1 else np.moveaxis(mask, 0, -1)
            image, mask = fit_example(image, mask)
            drawn = tint(image, ignored_pixels(mask), BLACK, 0.7)
            for _, colour, one in mask_layers(mask, classes):
                outlines = (one.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
                cv2.drawContours(drawn, cv2.findContours(*outlines)[0], -1, colour, 1)
            panels.append(panel(drawn, item["name"][:24]))
    return grid(panels, draws)


def fit_example(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, reduced to EXAMPLE_SIZE; small ones enlarged, up to four times."""
    limits = (limit / n for limit, n in zip(EXAMPLE_SIZE, mask.shape[:2], strict=True))
    scale = min(4, *limits)
    size = tuple(max(1, round(scale * n)) for n in mask.shape[1::-1])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return cv2.resize(image, size, interpolation=method), mask


def grid(panels: list[np.ndarray], columns: int) -> np.ndarray:
    """Panels in rows, filled up with white to one size, with white gaps between the columns."""
    height, width = (max(one.shape[axis] for one in panels) for axis in (0, 1))
    sides = [((0, height - one.shape[0]), (0, width - one.shape[1]), (0, 0)) for one in panels]
    panels = [np.pad(*pair, constant_values=255) for pair in zip(panels, sides, strict=True)]
    gap = np.full((height, 6, 3), 255, np.uint8)
    blank = np.full_like(panels[0], 255)
    panels += [blank] * (-len(panels) % columns)
    rows = []
    for start in range(0, len(panels), columns):
        spaced = [part for one in panels[start : start + columns] for part in (one, gap)]
        rows.append(np.hstack(spaced[:-1]))
    return np.vstack(rows)


def stack(images: list[np.ndarray]) -> np.ndarray:
    """Images of different widths one above the other, filled up with white."""
    width = max(image.shape[1] for image in images)
    padded = [((0, 0), (0, width - image.shape[1]), (0, 0)) for image in images]
    pairs = zip(images, padded, strict=True)
    return np.vstack([np.pad(image, pad, constant_values=255) for image, pad in pairs])


# --------------------------------------------------------------------------------------------------
#  Curves
# --------------------------------------------------------------------------------------------------


def draw_training_curves(rows: list[dict[str, float]], kept: float, path: Path) -> None:
    """Losses and scores over the epochs, as PNG. `kept`: the epoch that is in model.pt."""
    table = pd.DataFrame(rows).set_index("epoch")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    losses = table[["train_loss", "val_loss"]].set_axis(["training", "validation"], axis=1)
    losses.plot(ax=left, title="Loss", ylim=(0, None), grid=True)
    names = {"MaxF": "MaxF", "IoU50": "IoU at 0.5", "mIoU": "mIoU", "mDice": "mean Dice"}
    measures = table[[name for name in names if name in table]]
    best = measures.iloc[:, 0]
    low, title = max(0, best.max() - 40), "Validation scores, %"
    measures = measures.rename(columns=names)
    measures.plot(ax=right, title=title, ylim=(low, 100), grid=True, color=["green", "grey"])
    label = f"in model.pt: {best[kept]:.1f} % in epoch {kept:.0f}"
    right.plot(kept, best[kept], "o", color="green", label=label)
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_pr_curves(
    curves: dict[str, tuple[np.ndarray, np.ndarray, dict[str, float]]], path: Path
) -> None:
    """Precision over recall, a line for each category, the point of MaxF marked, as PNG.

    `curves`: {category: (precision, recall, its measures in percent)}.
    """
    figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    low = 0.9
    for name, (precision, recall, best) in curves.items():
        label = f"{name}: MaxF {best['MaxF']:.1f} %, AP {best['AP']:.1f} %"
        display = PrecisionRecallDisplay(precision=precision, recall=recall)
        display.plot(ax=axes, name=label)
        display.line_.set_linewidth(2.5 if name == "all" else 1.2)
        at = best["REC"] / 100, best["PRE"] / 100
        axes.plot(*at, "o", color=display.line_.get_color())
        low = min(low, *at)
    limits = (max(0.0, low - 0.1), 1.005)
    axes.set(title="Precision and recall; o: largest F1", xlim=limits, ylim=limits)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_confusion(table: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    """How the pixels of each class (rows) were predicted (columns), in percent, as PNG.

    `table`: (K, K) counts.
    """
    share = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(40.0, 3 + 0.42 * len(names))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    drawn = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set(xlabel="prediction", ylabel="ground truth", title="% of the pixels of each class")
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True) if len(names) <= 40 else ():
        colour = "white" if share[row, column] < 60 else "black"
        words = f"{share[row, column]:.0f}"
        axes.text(column, row, words, ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(drawn, shrink=0.6)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
#  Video
# --------------------------------------------------------------------------------------------------


class OverlayVideo:
    """An mp4 that is written under a temporary name and renamed when it is whole."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        """`size`: (height, width) of a frame; `rate`: frames per second."""
        self.path, self.part = path, path.with_name(f".{path.stem}.part.mp4")
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        self.writer = cv2.VideoWriter(str(self.part), codec, rate, size[::-1])
        self.opened = self.writer.isOpened()

    def __enter__(self) -> OverlayVideo:
        return self

    def add(self, frame: np.ndarray, mask: np.ndarray, classes: Classes) -> None:
        """Append a frame (h, w, 3) RGB uint8 with its mask, bool (h, w), in green.

        Or with that of several classes in their colours, see `colours.mask_colours`.
        """
        if classes.names:
            drawn = paint(frame, mask_colours(mask, classes), frame.shape[1::-1])
        else:
            drawn = tint(frame, mask, GREEN)
        self.writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.writer.release()
        if kind is None:
            self.part.replace(self.path)
        self.part.unlink(missing_ok=True)
