"""Comparisons, curves and overlays: the classes in colours, and their errors."""

import importlib.util
import unicodedata
from collections.abc import Generator, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from kit.config import IGNORE, Classes, ModelConfig
from kit.data.classes import FOREGROUND, class_colours
from kit.data.images import each_plane, from_tensor, harden, to_picture
from kit.data.masks import plane
from kit.errors import UserError, reason_of

GREEN, BLUE, RED = FOREGROUND, (30, 100, 255), (255, 45, 45)  # RGB: hit, miss, false alarm
BLACK, GREY = (0, 0, 0), (30, 30, 30)
PANEL_SIZE = (2000, 620)  # largest height and width of an image in a panel
EXAMPLE_SIZE = (360, 480)  # height and width of an image in examples.jpg and augmented.jpg
BAR_WIDTH = 310  # pixels that title and legend need
Colour = tuple[int, int, int]
Layer = tuple[str, Colour, np.ndarray]  # a name, its colour, where it is: bool (h, w)

# --------------------------------------------------------------------------------------------------
#  Layers
# --------------------------------------------------------------------------------------------------


def tint(image: np.ndarray, mask: np.ndarray, colour: Colour, strength: float = 0.5) -> np.ndarray:
    """Lay a colour over the pixels of a mask; image (h, w, 3) uint8 in and out.

    `mask`: (h, w) bool, or float32 of 0..1, the share of the strength.
    """
    weight = mask.astype(np.float32) * strength
    return cv2.blendLinear(image, np.full_like(image, colour), 1 - weight, weight)


def mask_layers(mask: np.ndarray, classes: Classes) -> list[Layer]:
    """Each class that occurs in a mask: planes (K, h, w), or a label map (h, w)."""
    layers = []
    colours = map(tuple, class_colours(classes.names).tolist())
    for index, (name, colour) in enumerate(zip(classes.names, colours, strict=True)):
        covered = plane(mask, index) == 1
        if covered.any():
            layers.append((name, colour, covered))
    return layers


def error_layers(ground_truth: np.ndarray, mask: np.ndarray, classes: Classes) -> list[Layer]:
    """Hits, misses and false alarms of one class; of several where any class is wrong."""
    if classes.several:
        wrong = (ground_truth != mask) & (ground_truth != IGNORE)
        return [("wrong", RED, wrong.reshape(-1, *wrong.shape[-2:]).any(0))]
    target, predicted = ground_truth[0], mask[0] == 1
    return [
        ("hit", GREEN, (target == 1) & predicted),
        ("miss", BLUE, (target == 1) & ~predicted),
        ("false alarm", RED, (target == 0) & predicted),
    ]


def paint(image: np.ndarray, layers: Iterable[Layer], strength: float = 0.5) -> np.ndarray:
    """Lay the colours of layers over an image, which may be reduced; black stays as it is."""
    for _, colour, mask in layers:
        if colour != BLACK:  # the background
            image = tint(image, reduce_mask(mask, image.shape[1::-1]), colour, strength)
    return image


def ignored_pixels(mask: np.ndarray) -> np.ndarray:
    """Where a mask is ignored, planes in all classes: bool (h, w)."""
    return (mask == IGNORE).reshape(-1, *mask.shape[-2:]).all(0)


# --------------------------------------------------------------------------------------------------
#  Comparisons
# --------------------------------------------------------------------------------------------------


def comparison(
    image: np.ndarray,
    ground_truth: np.ndarray | None,
    mask: np.ndarray,
    title: str,
    classes: Classes,
) -> np.ndarray:
    """Image and prediction and, where there is one, ground truth and errors, in a grid.

    `image` (h, w, 3) uint8; `mask` bool (K, h, w) or a label map (h, w); `ground_truth` as `mask`,
    uint8, or None. Up to PANEL_SIZE pixel for pixel, a larger image reduced. Several classes lie
    over the grey image, in whose colours they would look like others. Returns RGB uint8.
    """
    small, columns = reduce_image(image)
    base, legend = small, [("foreground", GREEN)]
    if classes.several:  # `add_legend` names them
        base, legend = greyed(small), []
    layers = mask_layers(mask, classes)
    panels = [panel(small, title), panel(paint(base, layers), "prediction", legend)]
    if ground_truth is not None:
        true_layers, ignored = mask_layers(ground_truth, classes), ignored_pixels(ground_truth)
        layers += true_layers
        drawn = paint(base, true_layers)
        drawn = tint(drawn, reduce_mask(ignored, small.shape[1::-1]), BLACK, 0.7)
        legend += [("ignored", BLACK)] * bool(ignored.any())
        panels.append(panel(drawn, "ground truth", legend))
        errors = error_layers(ground_truth, mask, classes)
        kinds = [(name, colour) for name, colour, _ in errors]
        panels.append(panel(paint(greyed(small), errors, 0.6), "errors", kinds))
    drawn = grid(panels, min(columns, len(panels)))
    return add_legend(drawn, classes, {name for name, *_ in layers})


def add_legend(drawn: np.ndarray, classes: Classes, names: Iterable[str]) -> np.ndarray:
    """Several classes get a legend below the panels; `names`: of those that occur."""
    if not classes.several:
        return drawn
    colours = map(tuple, class_colours(classes.names).tolist())
    entries = [pair for pair in zip(classes.names, colours, strict=True) if pair[0] in names]
    return np.vstack([drawn, legend_rows(entries, drawn.shape[1])])


def legend_rows(entries: list[tuple[str, Colour]], width: int) -> np.ndarray:
    """Coloured squares with names in as many rows as they need, (rows, width, 3) uint8."""
    bars = [np.full((26, width, 3), 255, np.uint8)]
    font, scale, left = cv2.FONT_HERSHEY_DUPLEX, 0.45, 6
    for name, colour in entries:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        text = (plain or "?")[:24]  # in letters that OpenCV can draw
        length = cv2.getTextSize(text, font, scale, 1)[0][0] + 40
        if left + length > width and left > 6:
            bars.append(np.full_like(bars[0], 255))
            left = 6
        cv2.rectangle(bars[-1], (left, 6), (left + 14, 20), colour, -1)
        cv2.putText(bars[-1], text, (left + 20, 18), font, scale, GREY, 1, cv2.LINE_AA)
        left += length
    return np.vstack(bars)


def reduce_image(image: np.ndarray) -> tuple[np.ndarray, int]:
    """An image reduced to PANEL_SIZE, and how many panels go in a row."""
    columns = 2 if image.shape[1] >= image.shape[0] else 4  # upright images in one row
    scale = min(1.0, *(limit / n for limit, n in zip(PANEL_SIZE, image.shape, strict=False)))
    size = tuple(max(1, round(scale * n)) for n in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), columns


def reduce_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Reduce a mask, bool (h, w), to (width, height) float32 of 0..1.

    The root of the share that it covers: at a tenth of the size a line of one pixel keeps a third
    of its strength, where the nearest pixel would lose most of it.
    """
    covered = cv2.resize(255 * mask.astype(np.uint8), size, interpolation=cv2.INTER_AREA)
    return np.sqrt(covered.astype(np.float32) / 255)


def greyed(image: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) uint8 without its colours, of the same shape."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


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


def grid(panels: list[np.ndarray], columns: int) -> np.ndarray:
    """Panels in rows, filled up with white to one size, with white gaps between the columns."""
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    sides = [((0, height - p.shape[0]), (0, width - p.shape[1]), (0, 0)) for p in panels]
    panels = [np.pad(*pair, constant_values=255) for pair in zip(panels, sides, strict=True)]
    gap = np.full((height, 6, 3), 255, np.uint8)
    blank = np.full_like(panels[0], 255)
    panels += [blank] * (-len(panels) % columns)
    rows = []
    for start in range(0, len(panels), columns):
        spaced = [item for panel in panels[start : start + columns] for item in (panel, gap)]
        rows.append(np.hstack(spaced[:-1]))
    return np.vstack(rows)


def stack(images: list[np.ndarray]) -> np.ndarray:
    """Images of different widths one above the other, filled up with white."""
    width = max(image.shape[1] for image in images)
    return np.vstack(
        [
            np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=255)
            for image in images
        ]
    )


# --------------------------------------------------------------------------------------------------
#  The data before training
# --------------------------------------------------------------------------------------------------


def examples(rows: Iterable[tuple[Any, np.ndarray, np.ndarray]], config: ModelConfig) -> np.ndarray:
    """Images with their masks laid over, ignored pixels black, in a grid: examples.jpg.

    `rows`: a sample of `samples.scan`, its image (h, w, C) and its mask; a generator keeps one of
    them in memory at a time.
    """
    panels, classes = [], config.classes
    for row, image, mask in rows:
        image, mask = fit_example(to_picture(image, config), mask)
        drawn = paint(image, mask_layers(mask, classes))
        title = f"{row.id[:24]}  {row.width}x{row.height}  {100 * row.share:.1f} %"
        panels.append(panel(tint(drawn, ignored_pixels(mask), BLACK, 0.7), title))
    return add_legend(grid(panels, 3), classes, classes.names)


def augmentations(dataset: Any, images: int = 4, draws: int = 4) -> np.ndarray:
    """Augmented items as the network gets them, masks outlined, ignored black: augmented.jpg.

    `dataset`: a SegmentationDataset with augmentation; each row of the grid shows one of its items.
    """
    panels, classes = [], dataset.config.classes
    for position in np.linspace(0, len(dataset) - 1, images).astype(int).tolist():
        for draw in range(draws):
            dataset.epoch.fill_(draw)
            item = dataset[position]
            mask = item["mask"].numpy()
            mask = mask[0] if classes.exclusive else harden(mask)
            image = to_picture(from_tensor(item["image"]), dataset.config)
            image, mask = fit_example(image, mask)
            drawn = tint(image, ignored_pixels(mask), BLACK, 0.7)
            for _, colour, covered in mask_layers(mask, classes):
                if colour != BLACK:
                    outlines = (covered.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
                    cv2.drawContours(drawn, cv2.findContours(*outlines)[0], -1, colour, 1)
            panels.append(panel(drawn, item["name"][:24]))
    return grid(panels, draws)


def fit_example(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, reduced to EXAMPLE_SIZE; small ones enlarged, up to four times."""
    limits = (limit / n for limit, n in zip(EXAMPLE_SIZE, image.shape, strict=False))
    scale = min(4, *limits)
    size = tuple(max(1, round(scale * n)) for n in image.shape[1::-1])
    method, nearest = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT
    mask = each_plane(lambda plane: cv2.resize(plane, size, interpolation=nearest), mask)
    return cv2.resize(image, size, interpolation=method), mask


# --------------------------------------------------------------------------------------------------
#  Curves
# --------------------------------------------------------------------------------------------------


def subplots(width: float, height: float, columns: int = 1) -> Any:
    """The axes of a new figure of so many inches; not pyplot's, whose figures are the user's."""
    from matplotlib.figure import Figure  # here: slow, and most predictions draw none

    return Figure(figsize=(width, height), layout="constrained").subplots(1, columns)


def draw_training_curves(rows: list[dict[str, float]], exported: float, path: Path) -> None:
    """Losses and scores over the epochs, as PNG. `exported`: the epoch that is in model.pt."""
    table = pd.DataFrame(rows).set_index("epoch")
    left, right = subplots(11, 4, columns=2)
    losses = table[["train_loss", "val_loss"]].set_axis(["training", "validation"], axis=1)
    losses.plot(ax=left, title="Loss", ylim=(0, None), grid=True)
    names = {"MaxF": "MaxF", "IoU50": "IoU at 0.5", "mIoU": "mIoU", "mDice": "mean Dice"}
    measures = table[[name for name in names if name in table]]
    best = measures.iloc[:, 0]
    low, title = max(0, best.max() - 40), "Validation scores, %"
    measures = measures.rename(columns=names)
    measures.plot(ax=right, title=title, ylim=(low, 100), grid=True, color=["green", "grey"])
    label = f"in model.pt: {best[exported]:.1f} % in epoch {exported:.0f}"
    right.plot(exported, best[exported], "o", color="green", label=label)
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.figure.savefig(path, dpi=110, format="png")


def draw_pr_curves(
    curves: dict[str, tuple[np.ndarray, np.ndarray, dict[str, float]]], path: Path
) -> None:
    """Precision over recall, a line for each category, the point of MaxF marked, as PNG.

    `curves`: {category: (precision, recall, its measures in percent)}.
    """
    from sklearn.metrics import PrecisionRecallDisplay  # here: slow, and few images have scores

    axes = subplots(6, 5.5)
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
    axes.figure.savefig(path, dpi=110, format="png")


def draw_confusion(table: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    """How the pixels of each class (rows) were predicted (columns), in percent, as PNG.

    `table`: (K, K) counts.
    """
    from sklearn.metrics import ConfusionMatrixDisplay  # here, as in draw_pr_curves

    share = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(40.0, 3 + 0.42 * len(names))
    axes = subplots(side + 1, side)
    display = ConfusionMatrixDisplay(share, display_labels=names)
    display.plot(
        ax=axes,
        cmap="cividis",
        xticks_rotation="vertical",
        include_values=len(names) <= 40,
        values_format=".0f",
        im_kw={"vmin": 0, "vmax": 100},
        text_kw={"fontsize": 7},
    )
    axes.tick_params(labelsize=8)
    axes.set(xlabel="prediction", ylabel="ground truth", title="% of the pixels of each class")
    axes.figure.savefig(path, dpi=110, format="png")


# --------------------------------------------------------------------------------------------------
#  Video
# --------------------------------------------------------------------------------------------------


Frames = Generator[None, np.ndarray, None]  # takes frames (h, w, 3) RGB uint8, until it is closed


def ffmpeg_frames(path: Path, size: tuple[int, int], rate: float) -> Frames:
    """Write H.264 with the ffmpeg of imageio-ffmpeg."""
    options = {"codec": "libx264", "macro_block_size": 2, "ffmpeg_log_level": "error"}
    start = ["-movflags", "+faststart"]  # a browser plays before it has all of it
    module = importlib.import_module("imageio_ffmpeg")
    return module.write_frames(str(path), size[::-1], fps=rate, output_params=start, **options)


def pyav_frames(path: Path, size: tuple[int, int], rate: float) -> Frames:
    """Write H.264 with PyAV."""
    av = importlib.import_module("av")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        try:
            while True:
                file.mux(stream.encode(av.VideoFrame.from_ndarray((yield), "rgb24")))
        finally:
            file.mux(stream.encode())


def opencv_frames(path: Path, size: tuple[int, int], rate: float) -> Frames:
    """Write MPEG-4 with OpenCV, which has no H.264."""
    print("overlay.mp4: no browser plays it; pip install imageio-ffmpeg for one that they play")
    codec = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), codec, rate, size[::-1])
    if not writer.isOpened():
        raise OSError("OpenCV has no mp4 here")
    try:
        while True:
            writer.write(cv2.cvtColor((yield), cv2.COLOR_RGB2BGR))
    finally:
        writer.release()


WRITERS = {"imageio_ffmpeg": ffmpeg_frames, "av": pyav_frames, "cv2": opencv_frames}


class OverlayVideo:
    """An mp4 that is written under a temporary name and renamed when it is whole."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        """`size`: (height, width) of a frame, made even; `rate`: frames per second. UserError."""
        self.path, self.unfinished = path, path.with_name(f".{path.stem}.part.mp4")
        self.height, self.width = (length - length % 2 for length in size)  # as H.264 halves them
        write = next(WRITERS[name] for name in WRITERS if importlib.util.find_spec(name))
        self.frames = write(self.unfinished, (self.height, self.width), rate)
        self.send(None)

    def __enter__(self) -> "OverlayVideo":
        return self

    def send(self, frame: np.ndarray | None) -> None:
        """Hand a frame to the writer; None starts it. Raises UserError."""
        try:
            self.frames.send(frame)
        except (OSError, RuntimeError) as error:
            problem = f"no mp4 can be written here ({reason_of(error)})"
            where = f"--out {self.path.parent}"
            raise UserError(where, problem, "give single images instead") from None

    def add(self, frame: np.ndarray, mask: np.ndarray, classes: Classes) -> None:
        """Append a frame (h, w, 3) RGB uint8 with its mask in the colours of the classes."""
        drawn = paint(frame, mask_layers(mask, classes))
        self.send(np.ascontiguousarray(drawn[: self.height, : self.width]))

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.frames.close()
        if kind is None:
            self.unfinished.replace(self.path)
        self.unfinished.unlink(missing_ok=True)
