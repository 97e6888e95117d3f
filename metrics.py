"""From pixel counts to the KITTI Road measures, the choice of thresholds, one evaluation for all.

Measures: Fritsch, Kuehnl, Geiger, ITSC 2013. Pixel counts are pooled over images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from images import IGNORE, ModelConfig, decode_image, encode_image, read_image, write_image
from utils import write_file
from visualize import comparison, draw_pr_curves, stack

# --------------------------------------------------------------------------------------------------
#  Measures
# --------------------------------------------------------------------------------------------------


def pixel_counts(
    probability: np.ndarray | torch.Tensor, ground_truth: np.ndarray | torch.Tensor
) -> torch.Tensor:
    """Count pixels by ground truth and probability: int64 (2, 256), row 1 is foreground.

    `probability` (h, w) uint8, `ground_truth` (h, w) uint8 of 0, 1 and 255 (ignored). Every measure
    follows from these counts and their sums. torchmetrics would loop over the 256 thresholds.
    """
    target = torch.as_tensor(ground_truth, dtype=torch.int64)
    cells = target << 8 | torch.as_tensor(probability, dtype=torch.int64)
    return torch.bincount(cells.flatten(), minlength=512)[:512].reshape(2, 256)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 0 / 0 is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def at_thresholds(counts: np.ndarray) -> np.ndarray:
    """Counts (..., 2, 256) to false and true positives at each threshold, float (..., 2, 256)."""
    return counts[..., ::-1].cumsum(-1)[..., ::-1].astype(float)


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at the thresholds that find any foreground, float (n,) each."""
    fp, tp = at_thresholds(counts)
    return ratio(tp, tp + fp)[tp > 0], ratio(tp, tp[:1])[tp > 0]


def scores(counts: np.ndarray) -> dict[str, float]:
    """The measures in percent, from (2, 256) counts.

    A pixel is foreground at the threshold t/255 when its 8-bit probability is at least t. MaxF is
    the largest F1; PRE, REC, FPR, FNR, IoU, F1 and "threshold" (0..1, the lowest of equals) belong
    to it. AP is the 11-point Pascal VOC average precision, IoU50 is the IoU at 0.5. Without any
    foreground MaxF is 0 and the threshold 0.5.
    """
    fp, tp = at_thresholds(counts)
    fn = tp[0] - tp
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp[:1])
    f1, iou = ratio(2 * tp, 2 * tp + fp + fn), ratio(tp, tp + fp + fn)
    best = int(f1.argmax()) if f1.any() else 128
    levels = np.arange(0, 1.1, 0.1)
    reached = [precision[(recall >= level) & (tp > 0)].max(initial=0) for level in levels]
    measures = {
        "MaxF": f1[best],
        "AP": np.mean(reached),
        "PRE": precision[best],
        "REC": recall[best],
        "FPR": ratio(fp, fp[:1])[best],
        "FNR": 1 - recall[best] if tp[0] else 0.0,
        "IoU": iou[best],
        "F1": f1[best],
        "IoU50": iou[128],
    }
    percent = {name: round(100 * float(value), 4) for name, value in measures.items()}
    return percent | {"threshold": best / 255}


EMPTY_SCORES = {"1": 1.0, "0": 0.0, "skip": math.nan}  # where neither has any foreground


def mask_scores(
    mask: np.ndarray, ground_truth: np.ndarray, empty_score: str = "1"
) -> tuple[float, float]:
    """(Dice, IoU) of a mask, bool (h, w), 0..1, without ignored pixels.

    Where both are empty they are what `EMPTY_SCORES` says; NaN does not count in a mean.
    """
    target = ground_truth == 1
    both = int((mask & target).sum())
    union = int(((mask & (ground_truth != IGNORE)) | target).sum())
    if not union:
        return EMPTY_SCORES[empty_score], EMPTY_SCORES[empty_score]
    return 2 * both / (both + union), both / union


def mean_of(values: list[Any] | np.ndarray) -> np.ndarray:
    """The mean over the first axis of rows (n, 2), without those that are NaN; 0 without any."""
    rows = np.array(values, float).reshape(-1, 2)
    rows = rows[~np.isnan(rows[:, 0])]
    return np.mean(rows, axis=0) if len(rows) else np.zeros(2)


# --------------------------------------------------------------------------------------------------
#  Choice of threshold and minimum component area
# --------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """One validation image, predicted by a model that was not trained on it."""

    sample: Any
    pngs: tuple[bytes, ...]  # its probability, of several classes each: many images fit into memory
    config: ModelConfig  # of the model

    @property
    def image(self) -> np.ndarray:
        """(h, w, 3) uint8."""
        return read_image(self.sample.image, self.config.value_range)

    @property
    def probability(self) -> np.ndarray:
        """(h, w) uint8; of several classes (K, h, w), see `predict.to_prediction`."""
        planes = [decode_image(png) for png in self.pngs]
        return planes[0] if len(planes) == 1 else np.stack(planes)

    @property
    def ground_truth(self) -> np.ndarray:
        """(h, w) uint8 of 0, 1 and 255, or what the mask of several classes reads."""
        size = decode_image(self.pngs[0]).shape
        return self.sample.mask.read(size) if self.sample.mask else np.zeros(size, np.uint8)

    def part(self, index: int) -> Prediction:
        """That of one of several classes that may overlap."""
        sample = self.sample._replace(mask=self.sample.mask.parts[index])
        return self._replace(sample=sample, pngs=self.pngs[index : index + 1])


def store(sample: Any, probability: np.ndarray, config: ModelConfig) -> Prediction:
    """A prediction (h, w) or (K, h, w) uint8, kept small."""
    planes = probability if probability.ndim == 3 else [probability]
    return Prediction(sample, tuple(encode_image(plane, ".png") for plane in planes), config)


def tune(
    predictions: list[Prediction],
    metric: str,
    min_pixels: int,
    postprocess: Callable,
    empty_score: str = "1",
) -> tuple[float, int]:
    """The threshold, and the minimum component area, that serve a metric best.

    `min_pixels`: fixed, or -1 to choose it too (not for maxf). `postprocess`: that of predict.py.
    """
    counts = [pixel_counts(p.probability, p.ground_truth).numpy() for p in predictions]
    threshold = choose_threshold(scores_by_threshold(counts, metric, empty_score))
    if metric == "maxf" or min_pixels >= 0:
        return threshold, max(0, min_pixels)
    area = np.median([int(pixels.sum()) for pixels in counts])
    sizes = [int(area * part) for part in (0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]
    values = np.zeros((len(predictions), len(sizes)))
    for row, prediction in enumerate(predictions):
        probability, target = prediction.probability, prediction.ground_truth
        for column, size in enumerate(sizes):
            mask = postprocess(probability, threshold, size)
            dice, iou = mask_scores(mask, target, empty_score)
            values[row, column] = iou if metric == "iou" else dice
    return threshold, sizes[int(fill_nan(values).mean(0).argmax())]


def write_validation(
    out: Path,
    predictions: list[Prediction],
    evaluation: Evaluation,
    make_mask: Callable,
    words: str,
    threshold: Any,
    title: str = "validation",
) -> dict[str, Any]:
    """Write metrics.json, its curves and validation.jpg; returns the report.

    `evaluation`: an empty one; `make_mask`: from a probability; `words`: how, for people.
    """
    for prediction in predictions:
        probability = prediction.probability
        mask = make_mask(probability)
        evaluation.add(prediction.sample, probability, mask, prediction.ground_truth)
    ious = evaluation.image_ious
    order = np.argsort(ious, kind="stable")
    rows = []
    for name, index in zip(
        ("worst", "median", "best"), order[[0, len(order) // 2, -1]], strict=True
    ):
        sample, target = predictions[index].sample, predictions[index].ground_truth
        mask = make_mask(predictions[index].probability)
        caption = f"{name}: {sample.id[:24]}, IoU {100 * ious[index]:.1f} %"
        rows.append(evaluation.comparison(predictions[index].image, target, mask, caption))
    write_image(out / "validation.jpg", stack(rows))
    print(f"{title}: {evaluation.summary()}, {words}")
    return evaluation.write(out, threshold)


def fill_nan(values: np.ndarray) -> np.ndarray:
    """Values (n, m) with the mean of their column where they are NaN, which changes no mean."""
    missing = np.isnan(values)
    if not missing.any():
        return values
    known = (~missing).sum(0)
    means = np.where(missing, 0, values).sum(0) / np.maximum(known, 1)
    return np.where(missing, means, values)


def scores_by_threshold(
    counts: list[np.ndarray], metric: str, empty_score: str = "1"
) -> np.ndarray:
    """A metric of each of n images at each of the 256 thresholds, (n, 256), 0..1.

    "dice" and "iou" are the image's own; without foreground 0, or where none is found what
    `EMPTY_SCORES` says. "maxf" is the pooled F1 plus the image's part in it, to first order: the
    mean over images is the pooled F1, their spread its error.
    """
    fp, tp = at_thresholds(np.stack(counts)).transpose(1, 0, 2)
    union = fp + tp[:, :1]
    above, below = (tp, union) if metric == "iou" else (2 * tp, union + tp)
    if metric != "maxf":
        return fill_nan(np.where(below > 0, ratio(above, below), EMPTY_SCORES[empty_score]))
    pooled = ratio(above.sum(0), below.sum(0))
    mean = np.broadcast_to(below.mean(0), below.shape)
    return pooled + ratio(above - pooled * below, mean)


def choose_threshold(values: np.ndarray) -> float:
    """From `scores_by_threshold`: the one nearest to 0.5 within two standard errors of the best.

    The best threshold of a few images is luck (docs/results.md): with one or two it is 0.5.
    """
    if len(values) <= 2:
        return 0.5
    worse = values[:, [values.mean(0).argmax()]] - values
    error = worse.std(0, ddof=1) / math.sqrt(len(values))
    good = np.flatnonzero(worse.mean(0) <= 2 * error + 1e-12)
    level = good[np.abs(good - 128).argmin()]
    return max(0.0, float(level) - 0.5) / 255  # between two levels: 128 is the first from 0.5 on


# --------------------------------------------------------------------------------------------------
#  Evaluation
# --------------------------------------------------------------------------------------------------


class Evaluation:
    """Adds up images and writes metrics.json and pr_curve.png, for training and inference alike."""

    logged: tuple[str, ...] = ("MaxF", "AP", "IoU50")  # after each epoch; the first one decides

    def __init__(self, empty_score: str = "1") -> None:
        self.empty_score = empty_score
        self.counts: dict[str, dict[str, torch.Tensor]] = {}  # {view: {category: counts}}
        self.images: dict[tuple[str, str], int] = {}  # {(view, category): number of images}
        self.masks: list[tuple[float, float]] = []  # `mask_scores` of each image and class

    @property
    def image_ious(self) -> list[float]:
        """The IoU of each image."""
        return [0.0 if math.isnan(iou) else iou for _, iou in self.masks]

    def count(self, probability: torch.Tensor, ground_truth: torch.Tensor) -> None:
        """Add the pixels of an image, (h, w) uint8 each, without a mask."""
        self.add_counts("image", "", pixel_counts(probability, ground_truth))

    def add(
        self, sample: Any, probability: np.ndarray, mask: np.ndarray, ground_truth: np.ndarray
    ) -> None:
        """Add one image, all (h, w): uint8 probability, bool mask, uint8 ground truth."""
        self.masks.append(mask_scores(mask, ground_truth, self.empty_score))
        self.add_counts("image", sample.category, pixel_counts(probability, ground_truth))
        for view in sample.views:
            warped = view.warp(probability), view.warp(ground_truth, IGNORE)
            self.add_counts(view.name, sample.category, pixel_counts(*warped))

    def add_counts(self, view: str, category: str, counts: torch.Tensor, images: int = 1) -> None:
        """Add the counts of images to those of their category and to "all"."""
        sums = self.counts.setdefault(view, {})
        for name in ("all", category) if category else ("all",):
            sums[name] = sums.get(name, 0) + counts
            self.images[view, name] = self.images.get((view, name), 0) + images

    def merge(self, other: Evaluation) -> None:
        """Add what another process has evaluated."""
        self.masks += other.masks
        for view, sums in other.counts.items():
            own = self.counts.setdefault(view, {})
            for name, counts in sums.items():
                own[name] = own.get(name, 0) + counts
                count = self.images.get((view, name), 0) + other.images[view, name]
                self.images[view, name] = count

    def reduce(self, view: str, reduce: Callable, device: torch.device) -> None:
        """Sum the counts of a view over processes, with Lightning's `strategy.reduce`."""
        sums = self.counts.setdefault(view, {})
        own = sums.get("all", torch.zeros(2, 256, dtype=torch.int64, device=device))
        sums["all"] = reduce(own, reduce_op="sum")
        self.images.setdefault((view, "all"), 0)  # this process may have had no image

    def report(self) -> dict[str, dict[str, dict[str, float]]]:
        """{view: {category: measures, with the number of images}}."""
        report: dict[str, dict[str, dict[str, float]]] = {}
        for view, sums in self.counts.items():
            report[view] = {}
            for name, counts in sums.items():
                measures = scores(counts.cpu().numpy())
                report[view][name] = measures | {"images": self.images[view, name]}
        return report

    def mean(self) -> dict[str, float]:
        """The mean Dice and IoU of the masks, in percent."""
        dice, iou = (100 * mean_of(self.masks)).round(4).tolist()
        return {"Dice": dice, "IoU": iou}

    def write(self, out: Path, threshold: float) -> dict[str, Any]:
        """Write metrics.json and pr_curve.png; returns the report. `threshold`: of the masks."""
        report = self.report()
        content = {"threshold": threshold, "mean": self.mean()} | report
        write_file(out / "metrics.json", json.dumps(content, indent=2) + "\n")
        curves = {
            name: (*precision_recall(counts.cpu().numpy()), report["image"][name])
            for name, counts in self.counts["image"].items()
        }
        write_file(out / "pr_curve.png", lambda part: draw_pr_curves(curves, part))
        return report

    def summary(self) -> str:
        """The pooled measures in one line for people."""
        parts = []
        for view, measures in self.report().items():
            pooled = measures["all"]
            values = "  ".join(f"{name} {pooled[name]:.2f} %" for name in ("MaxF", "AP", "IoU"))
            title = "" if view == "image" else f"{view}: "
            parts.append(f"{title}{values}  ({pooled['images']} images)")
        return "; ".join([*parts, f"mean Dice of the masks {self.mean()['Dice']:.2f} %"])

    def comparison(
        self, image: np.ndarray, ground_truth: np.ndarray | None, mask: np.ndarray, title: str
    ) -> np.ndarray:
        """The image, prediction, ground truth and errors, see `visualize.comparison`."""
        return comparison(image, ground_truth, mask, title)
