"""Scores: the KITTI Road measures, IoU and Dice; one evaluation for training and inference.

Measures: Fritsch, Kuehnl, Geiger, ITSC 2013. Pixel counts are pooled over images.
"""

import functools
import json
import operator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from kit.config import IGNORE, Classes
from kit.data.images import each_plane
from kit.files import write_file
from kit.results import visualize

EMPTY_SCORES = {"1": 1.0, "0": 0.0, "skip": np.nan}  # where neither mask has any foreground

# --------------------------------------------------------------------------------------------------
#  Measures
# --------------------------------------------------------------------------------------------------


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 0 / 0 is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


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


def count_hits(mask: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
    """True positives, false positives and misses of each of K planes, float64 (3, K).

    `mask`: bool (K, h, w); ignored pixels do not count. Of a plane that is ignored as a whole they
    are NaN.
    """
    hits = np.zeros((3, len(mask)))
    for k, target in enumerate(ground_truth):
        positive = mask[k] == 1
        kinds = (target == 1) & positive, (target == 0) & positive, (target == 1) & ~positive
        ignored = (target == IGNORE).all()
        hits[:, k] = np.nan if ignored else list(map(np.count_nonzero, kinds))
    return hits


class Sums(NamedTuple):
    """Pixels of an image, or added up over images."""

    # of planes `pixel_counts`, (K, 2, 256); of label maps by ground truth and prediction, (K, K)
    counts: torch.Tensor
    hits: np.ndarray  # of each class (3, K), see `count_hits`
    wrong: float  # of label maps, or of all planes together
    images: int = 1


def count_image(
    prediction: Any, ground_truth: Any, classes: Classes, mask: np.ndarray | None = None
) -> Sums:
    """Count the pixels of an image; without a `mask` planes are foreground from 0.5 on.

    `prediction`: see `predict.to_prediction`. Arrays, or tensors on any device.
    """
    prediction, target = torch.as_tensor(prediction), torch.as_tensor(ground_truth)
    if classes.exclusive:  # one pass, however many classes there are
        count = len(classes.names)
        counted = target < count
        cells = target[counted].long() * count + prediction[0][counted].long()
        counts = torch.bincount(cells, minlength=count * count).reshape(count, count).cpu()
        table = counts.numpy().astype(float)
        right = table.diagonal()
        hits = np.stack([right, table.sum(0) - right, table.sum(1) - right])
        return Sums(counts, hits, hits[1].sum())
    counts = torch.stack(list(map(pixel_counts, prediction, target))).cpu()
    if mask is None:
        table = counts.numpy().astype(float)
        above, below = table[:, :, 128:].sum(2), table[:, :, :128].sum(2)
        hits = np.stack([above[:, 1], above[:, 0], below[:, 1]])
    else:
        hits = np.nan_to_num(count_hits(mask, ground_truth))
    return Sums(counts, hits, hits[1:].sum())


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
    return in_percent(measures) | {"threshold": best / 255}


def in_percent(measures: dict[str, float]) -> dict[str, float]:
    """Measures of 0..1 in percent, rounded for a file."""
    return {name: round(100 * float(value), 4) for name, value in measures.items()}


def sum_by_image(ids: list[Any], values: list[np.ndarray]) -> list[np.ndarray]:
    """The values of the blocks of each image added up; NaN does not count, unless all are."""
    blocks: dict[Any, list[np.ndarray]] = {}
    for name, value in zip(ids, values, strict=True):
        blocks.setdefault(name, []).append(value)
    sums = [(np.nansum(some, axis=0), np.isnan(some).all(0)) for some in blocks.values()]
    return [np.where(nothing, np.nan, total) for total, nothing in sums]


def mask_scores(hits: np.ndarray, empty_score: str = "1") -> np.ndarray:
    """Dice and IoU of each class of an image, (K, 2), 0..1, from `count_hits`.

    Where neither mask has any foreground they are what `EMPTY_SCORES` says, where all is ignored
    NaN, which does not count in a mean.
    """
    both, union = hits[0], hits.sum(0)
    values = np.stack([ratio(2 * both, both + union), ratio(both, union)], 1)
    values[union == 0] = EMPTY_SCORES[empty_score]
    values[np.isnan(union)] = np.nan
    return values


# --------------------------------------------------------------------------------------------------
#  Evaluation
# --------------------------------------------------------------------------------------------------


class Evaluation:
    """Adds up images and writes metrics.json and its curves, for training and inference alike."""

    def __init__(self, classes: Classes, empty_score: str = "1") -> None:
        self.classes, self.empty_score = classes, empty_score
        self.sums: dict[tuple[str, str], Sums] = {}  # {(view, category): of its images}
        self.ids: list[str] = []  # of the images, also where a row is a block
        self.image_hits: list[np.ndarray] = []  # of each image or block, (3, K)
        # after each epoch, the first one decides; and in the summary
        self.logged, self.shown = ("MaxF", "AP", "IoU50"), ("MaxF", "AP", "IoU")
        if classes.several:
            self.logged = self.shown = ("mIoU", "mDice", "accuracy")

    def count(self, prediction: torch.Tensor, ground_truth: torch.Tensor) -> None:
        """Add an image without a mask: planes count at the threshold 0.5."""
        self.add_sums("image", "all", count_image(prediction, ground_truth, self.classes))

    def add(
        self, sample: Any, prediction: np.ndarray, mask: np.ndarray, ground_truth: np.ndarray
    ) -> None:
        """Add an image with its mask, see `predict.postprocess`, in all its views."""
        seen = {"image": (prediction, mask, ground_truth)}
        for view in sample.views:
            outside = functools.partial(view.warp, outside=IGNORE)
            warped = each_plane(view.warp, prediction), each_plane(view.warp, mask)
            seen[view.name] = (*warped, each_plane(outside, ground_truth))
        for view, (planes, final, target) in seen.items():
            sums = count_image(planes, target, self.classes, final)
            first = sample.image_id not in self.ids  # of the blocks of an image
            sums = sums._replace(images=int(first))
            if view == "image":
                counted = sums.counts.numpy().any(None if self.classes.exclusive else (1, 2))
                self.image_hits.append(np.where(counted, sums.hits, np.nan))
            for category in dict.fromkeys(("all", sample.category or "all")):
                self.add_sums(view, category, sums)
        self.ids.append(sample.image_id)

    def add_sums(self, view: str, category: str, sums: Sums) -> None:
        """Add the sums of one image, or of many."""
        earlier = self.sums.get((view, category))
        self.sums[view, category] = Sums(*map(operator.add, earlier, sums)) if earlier else sums

    def merge(self, other: "Evaluation") -> None:
        """Add what another process has evaluated."""
        self.ids += other.ids
        self.image_hits += other.image_hits
        for (view, category), sums in other.sums.items():
            self.add_sums(view, category, sums)

    def gather(self) -> None:
        """Add what the other processes of a training have evaluated."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, self)
            self.sums, self.ids, self.image_hits = {}, [], []
            for evaluation in gathered:  # with this one
                self.merge(evaluation)

    def report(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{view: {category: measures in percent, with the number of images}}.

        Of several planes also {view: {class: measures}}, unless a category has its name.
        """
        report: dict[str, dict[str, dict[str, Any]]] = {}
        for (view, category), sums in self.sums.items():
            measures = {} if self.classes.exclusive else scores(sums.counts.sum(0).numpy())
            block = self.class_report(view, category)
            measures |= {name: block[name] for name in self.logged if name in block}
            report.setdefault(view, {})[category] = measures | {"images": sums.images}
        for view, blocks in report.items():
            images = {"images": blocks["all"]["images"]}
            curves = {n: c for n, c in self.curves(view).items() if n not in blocks}
            blocks |= {name: scores(curve) | images for name, curve in curves.items()}
        return report

    def curves(self, view: str) -> dict[str, np.ndarray]:
        """Counts (2, 256) by name: of each category, of several planes of each; none of labels."""
        if self.classes.exclusive:
            return {}
        if self.classes.several:
            planes = self.sums[view, "all"].counts.numpy()
            return dict(zip(self.classes.names, planes, strict=True))
        return {c: s.counts[0].numpy() for (v, c), s in self.sums.items() if v == view}

    def class_report(self, view: str = "image", category: str = "all") -> dict[str, Any]:
        """The block "classes": the means over classes that occur, and each class, in percent.

        A class without a pixel in the ground truth is left out of the means, and named.
        """
        sums = self.sums[view, category]
        hits, false, missed = sums.hits
        measures = {
            "IoU": ratio(hits, hits + false + missed),
            "Dice": ratio(2 * hits, 2 * hits + false + missed),
            "precision": ratio(hits, hits + false),
            "recall": ratio(hits, hits + missed),
        }
        table = pd.DataFrame(measures, list(self.classes.names))
        occurring = table[hits + missed > 0]
        means = occurring.mean().fillna(0.0)
        # of labels, or of each class's yes and no
        accuracy = 1 - sums.wrong / max(1, int(sums.counts.sum()))
        return in_percent({"mIoU": means.IoU, "mDice": means.Dice, "accuracy": accuracy}) | {
            "absent": table.index.difference(occurring.index, sort=False).tolist(),
            "per_class": {name: in_percent(row) for name, row in table.to_dict("index").items()},
        }

    def mean(self) -> dict[str, float]:
        """The mean Dice and IoU of the masks, over images and classes, in percent."""
        images = sum_by_image(self.ids, self.image_hits)
        rows = np.concatenate([mask_scores(hits, self.empty_score) for hits in images])
        rows = rows[~np.isnan(rows[:, 0])]
        dice, iou = (100 * rows.sum(0) / max(1, len(rows))).round(4).tolist()
        return {"Dice": dice, "IoU": iou}

    def image_table(self) -> pd.DataFrame:
        """Pixels of each image and class: tp, fp, fn; without those that are ignored."""
        names = dict.fromkeys(self.ids), self.classes.names
        index = pd.MultiIndex.from_product(names, names=["id", "class"])
        images = sum_by_image(self.ids, self.image_hits)
        hits = np.concatenate([hits.T for hits in images])
        table = pd.DataFrame(hits, index, ["tp", "fp", "fn"])
        return table.dropna().astype(int).reset_index()

    def image_iou(self, hits: np.ndarray) -> float:
        """The IoU of an image, the mean over the classes that occur in it."""
        values = mask_scores(hits, self.empty_score)[:, 1]
        occurs = hits.sum(0) > 0
        return float(np.nan_to_num(values[occurs].mean() if occurs.any() else values[0]))

    def write(
        self, out: Path, thresholds: tuple[float, ...], further: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write metrics.json, scores.csv, pr_curve.png or confusion.png; returns the report.

        `further`: blocks of metrics.json.
        """
        report, names = self.report(), self.classes.names
        content = {"threshold": thresholds[0] if thresholds else None, "mean": self.mean()} | report
        content |= further or {}
        if self.classes.several:
            content["classes"] = self.class_report()
            content["threshold"] = dict(zip(names, thresholds, strict=False)) or None
        write_file(out / "metrics.json", json.dumps(content, indent=2) + "\n")
        write_file(out / "scores.csv", self.image_table().to_csv(index=False))
        curves = {n: (*precision_recall(c), scores(c)) for n, c in self.curves("image").items()}
        table = self.sums["image", "all"].counts.numpy()
        if curves:
            write_file(out / "pr_curve.png", lambda part: visualize.draw_pr_curves(curves, part))
        else:
            write_file(out / "confusion.png", lambda p: visualize.draw_confusion(table, names, p))
        return report

    def summary(self) -> str:
        """The pooled measures in one line for people."""
        texts = []
        for view, measures in self.report().items():
            values = "  ".join(f"{name} {measures['all'][name]:.2f} %" for name in self.shown)
            title = "" if view == "image" else f"{view}: "
            texts.append(f"{title}{values}  ({measures['all']['images']} images)")
        ignored = sum(bool(np.isnan(hits).all()) for hits in self.image_hits)
        if ignored:
            images = "1 image is" if ignored == 1 else f"{ignored} images are"
            texts.append(f"{images} ignored as a whole, not in the means")
        dice = self.mean()["Dice"]
        if not self.classes.several:
            return "; ".join([*texts, f"mean Dice of the masks {dice:.2f} %"])
        block = self.class_report()
        occurring = [name for name in self.classes.names if name not in block["absent"]]
        lowest = sorted((block["per_class"][name]["IoU"], name) for name in occurring)[:3]
        texts.append("lowest IoU: " + ", ".join(f"{name} {iou:.1f}" for iou, name in lowest))
        texts.append(f"mean Dice over image x class {dice:.2f} %")
        absent = [f"not in the ground truth: {', '.join(block['absent'])}"]
        return "; ".join(texts + absent * bool(block["absent"]))
