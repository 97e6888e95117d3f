"""The scores of several classes: pooled over the images, and the mean over image and class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metrics
from classes import Classes
from metrics import EMPTY_SCORES, Evaluation, pixel_counts, ratio
from utils import write_file
from visualize import class_comparison, draw_confusion, draw_pr_curves


def make_evaluation(classes: Classes, empty_score: str = "1") -> Evaluation:
    """An evaluation of one class or of several."""
    if not classes.names:
        return Evaluation(empty_score)
    return ClassEvaluation(classes, empty_score)


class ClassEvaluation(Evaluation):
    """Adds up images of several classes; see `metrics.Evaluation`."""

    logged = ("mIoU", "mDice", "accuracy")

    def __init__(self, classes: Classes, empty_score: str = "1") -> None:
        super().__init__(empty_score)
        self.classes = classes
        count = len(classes.names)
        levels = () if classes.exclusive else (2, 256)
        self.levels = torch.zeros(count, *levels, dtype=torch.int64)  # of overlapping classes
        self.confusion = torch.zeros(count + 1, count + 1, dtype=torch.int64)  # of exclusive ones
        self.hits = torch.zeros(3, count, dtype=torch.int64)  # true, false positives, misses
        self.count_images = 0
        self.ious: list[float] = []  # of each image

    def count(self, prediction: torch.Tensor, ground_truth: torch.Tensor) -> None:
        """Add the pixels of an image; overlapping classes at the threshold 0.5."""
        mask = prediction[0] if self.classes.exclusive else prediction >= 128
        self.add_pixels(prediction, mask, ground_truth)

    def add_pixels(self, prediction: Any, mask: Any, ground_truth: Any) -> None:
        """Add an image: (2 or K, h, w) uint8, its mask, ground truth (h, w) or (h, w, K)."""
        prediction, mask = torch.as_tensor(prediction), torch.as_tensor(mask)
        target = torch.as_tensor(ground_truth)
        self.count_images += 1
        if self.classes.exclusive:
            own = len(self.confusion)
            counted = target < own - 1
            cells = target[counted].long() * own + mask[counted].long()
            counts = torch.bincount(cells, minlength=own * own).reshape(own, own).cpu()
            self.confusion += counts
            counts = counts[:-1, :-1]
            hits = counts.diagonal()
            self.hits += torch.stack([hits, counts.sum(0) - hits, counts.sum(1) - hits])
            return
        for k in range(len(self.classes.names)):
            known, one = target[..., k], mask[k]
            self.levels[k] += pixel_counts(prediction[k], known).cpu()
            kinds = (known == 1) & one, (known == 0) & one, (known == 1) & ~one
            self.hits[:, k] += torch.stack([kind.sum() for kind in kinds]).cpu()

    def add(self, sample: Any, prediction: Any, mask: np.ndarray, ground_truth: np.ndarray) -> None:
        """Add one image with its final mask: numbers (h, w), or bool (K, h, w)."""
        before = self.hits.clone()
        self.add_pixels(prediction, mask, ground_truth)
        hits, false, missed = (self.hits - before).numpy().astype(float)
        union = hits + false + missed
        both = np.stack([ratio(2 * hits, hits + union), ratio(hits, union)], 1)
        occurs = union > 0
        self.ious.append(float(both[occurs, 1].mean()) if occurs.any() else 1.0)
        both[~occurs] = EMPTY_SCORES[self.empty_score]
        self.masks += [tuple(row) for row in both.tolist()]

    @property
    def image_ious(self) -> list[float]:
        """The IoU of each image, the mean over its classes."""
        return self.ious

    def merge(self, other: ClassEvaluation) -> None:
        """Add what another process has evaluated."""
        self.masks += other.masks
        self.ious += other.ious
        self.levels += other.levels
        self.confusion += other.confusion
        self.hits += other.hits
        self.count_images += other.count_images

    def reduce(self, view: str, reduce: Callable, device: torch.device) -> None:
        """Sum over processes, with Lightning's `strategy.reduce`."""
        for name in ("levels", "confusion", "hits"):
            summed = reduce(getattr(self, name).to(device), reduce_op="sum")
            setattr(self, name, summed.cpu())

    def class_report(self) -> dict[str, Any]:
        """The block "classes": the means over classes that occur, and each class, in percent.

        A class without a pixel in the ground truth is left out of the means, and named.
        """
        hits, false, missed = self.hits.numpy().astype(float)
        columns = {
            "IoU": ratio(hits, hits + false + missed),
            "Dice": ratio(2 * hits, 2 * hits + false + missed),
            "precision": ratio(hits, hits + false),
            "recall": ratio(hits, hits + missed),
        }
        occurs = hits + missed > 0
        names = self.classes.names
        per_class = {
            name: {key: round(100 * float(values[k]), 4) for key, values in columns.items()}
            for k, name in enumerate(names)
        }
        means = {
            "mIoU": columns["IoU"][occurs].mean() if occurs.any() else 0.0,
            "mDice": columns["Dice"][occurs].mean() if occurs.any() else 0.0,
            "accuracy": self.accuracy(),
        }
        rounded = {name: round(100 * float(value), 4) for name, value in means.items()}
        absent = [name for name, there in zip(names, occurs, strict=True) if not there]
        return rounded | {"absent": absent, "per_class": per_class}

    def accuracy(self) -> float:
        """The part of the pixels that are right: of labels, or of each class's yes and no."""
        if self.classes.exclusive:
            known = self.confusion[:-1, :-1]
            return float(known.trace()) / max(1, int(known.sum()))
        wrong = int(self.hits[1:].sum())
        return 1 - wrong / max(1, int(self.levels.sum()))

    def report(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{"image": {"all" or class: measures}}; of overlapping classes those of one class, too."""
        block = self.class_report()
        means = {name: block[name] for name in self.logged}
        found = {"all": means | {"images": self.count_images}}
        if not self.classes.exclusive:
            pooled = metrics.scores(self.levels.sum(0).numpy())
            found["all"] = pooled | found["all"]
            for name, counts in zip(self.classes.names, self.levels.numpy(), strict=True):
                found[name] = metrics.scores(counts) | {"images": self.count_images}
        return {"image": found}

    def write(self, out: Path, threshold: Any) -> dict[str, Any]:
        """Write metrics.json, and confusion.png or pr_curve.png; returns the report."""
        report, block, names = self.report(), self.class_report(), self.classes.names
        thresholds = threshold and dict(zip(names, threshold, strict=True))
        content = {"threshold": thresholds, "mean": self.mean()} | report | {"classes": block}
        write_file(out / "metrics.json", json.dumps(content, indent=2) + "\n")
        if self.classes.exclusive:
            table = self.confusion[:-1, :-1].numpy()
            write_file(out / "confusion.png", lambda part: draw_confusion(table, names, part))
            return report
        counts = self.levels.numpy()
        curves = {
            name: (*metrics.precision_recall(one), report["image"][name])
            for name, one in zip(names, counts, strict=True)
        }
        write_file(out / "pr_curve.png", lambda part: draw_pr_curves(curves, part))
        return report

    def summary(self) -> str:
        """The pooled measures in one line for people."""
        block = self.class_report()
        values = "  ".join(f"{name} {block[name]:.2f} %" for name in self.logged)
        occurring = set(self.classes.names) - set(block["absent"])
        ious = {name: block["per_class"][name]["IoU"] for name in occurring}
        lowest = sorted(ious, key=lambda name: (ious[name], name))[:3]
        words = ", ".join(f"{name} {ious[name]:.1f}" for name in lowest)
        absent = f"; not in the ground truth: {', '.join(block['absent'])}" * bool(block["absent"])
        mean = f"mean Dice over image x class {self.mean()['Dice']:.2f} %"
        return f"{values}  ({self.count_images} images); lowest IoU: {words}; {mean}{absent}"

    def comparison(
        self, image: np.ndarray, ground_truth: np.ndarray | None, mask: np.ndarray, title: str
    ) -> np.ndarray:
        """The image, prediction, ground truth and errors, with a legend."""
        return class_comparison(image, ground_truth, mask, title, self.classes)
