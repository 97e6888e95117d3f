"""Scores: the KITTI Road measures, IoU and Dice; thresholds and areas; one evaluation for all.

Measures: Fritsch, Kuehnl, Geiger, ITSC 2013. Pixel counts are pooled over images.
"""

import functools
import json
import operator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from kit.config import IGNORE, Classes, ModelConfig
from kit.data.images import decode_image, each_plane, encode_image, to_picture, write_image
from kit.data.readers import read_image
from kit.files import write_file
from kit.network.model import TrainedModel, best_device, load_model, save_model
from kit.results import visualize
from kit.results.predict import describe_masks, postprocess, predict


class Goal(NamedTuple):
    """What a model is tuned for."""

    metric: str  # maxf, dice, iou or miou
    min_pixels: int = -1  # the minimum component area; -1: tuned too, but not for maxf
    empty_score: str = "1"  # of a mask that is rightly empty, see `EMPTY_SCORES`


EMPTY_SCORES = {"1": 1.0, "0": 0.0, "skip": np.nan}  # where neither mask has any foreground
MEMORY = 1 << 30  # bytes of predictions that stay decoded; further ones are kept as PNG

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
#  Validation images, predicted
# --------------------------------------------------------------------------------------------------


class Prediction:
    """One validation image, predicted by a model that was not trained on it."""

    def __init__(self, sample: Any, prediction: np.ndarray, config: ModelConfig, decoded: bool):
        """`prediction`: see `predict.to_prediction`. Unless `decoded` it is kept as PNG."""
        self.sample, self.config = sample, config
        self.size = prediction.shape[1:]
        self.arrays = (prediction, sample.mask.read(self.size)) if decoded else None
        self.pngs = [] if decoded else [encode_image(plane, ".png") for plane in prediction]

    @property
    def planes(self) -> np.ndarray:
        """The prediction, uint8 (K or 2, h, w)."""
        return self.arrays[0] if self.arrays else np.stack(list(map(decode_image, self.pngs)))

    @property
    def ground_truth(self) -> np.ndarray:
        """Planes (K, h, w) or a label map (h, w), uint8."""
        return self.arrays[1] if self.arrays else self.sample.mask.read(self.size)

    def counts(self, classes: Classes) -> np.ndarray:
        """See `Sums`."""
        return count_image(self.planes, self.ground_truth, classes).counts.numpy()

    @property
    def image(self) -> np.ndarray:
        """The image for people, (h, w, 3) uint8."""
        config = self.config
        pixels = read_image(self.sample.layers, config.channels, config.value_range)
        return to_picture(pixels, config)


def predict_validation(trained: TrainedModel, validation: pd.DataFrame) -> list[Prediction]:
    """Predict the validation images as infer.py will."""
    predictions, used = [], 0
    for sample, _, prediction in predict([trained], validation):
        used += 2 * prediction.nbytes  # with the ground truth
        predictions.append(Prediction(sample, prediction, trained.config, used < MEMORY))
    return predictions


# --------------------------------------------------------------------------------------------------
#  Choice of thresholds and minimum component areas
# --------------------------------------------------------------------------------------------------


def tune(predictions: list[Prediction], config: ModelConfig, goal: Goal) -> ModelConfig:
    """The model's settings with the thresholds and minimum areas that serve a metric best."""
    metric = "maxf" if goal.metric == "miou" else goal.metric
    if config.exclusive:
        return config
    ids = [prediction.sample.image_id for prediction in predictions]
    counted = [prediction.counts(config.classes) for prediction in predictions]
    counts = np.stack(sum_by_image(ids, counted))
    values = [scores_by_threshold(each, metric, goal.empty_score) for each in counts.swapaxes(0, 1)]
    area = (max(0, goal.min_pixels),) * len(values)
    config = replace(config, thresholds=tuple(map(choose_threshold, values)), areas=area)
    if metric == "maxf" or goal.min_pixels >= 0:
        return config
    pixels = np.median(np.sum(counted, axis=(2, 3)), axis=0)  # for each class
    areas = [tuple(map(int, pixels * share)) for share in (0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]
    hits = np.zeros((len(predictions), len(areas), 3, len(pixels)))
    for row, prediction in enumerate(predictions):
        planes, target = prediction.planes, prediction.ground_truth
        for column, area in enumerate(areas):
            mask = postprocess(planes, replace(config, areas=area))
            hits[row, column] = count_hits(mask, target)
    images = sum_by_image(ids, list(hits))
    measured = [[mask_scores(of_area, goal.empty_score) for of_area in image] for image in images]
    values = np.array(measured)[..., 1 if metric == "iou" else 0]
    best = [fill_nan(values[:, :, k]).mean(0).argmax() for k in range(len(pixels))]
    return replace(config, areas=tuple(areas[row][k] for k, row in enumerate(best)))


def fill_nan(values: np.ndarray) -> np.ndarray:
    """Values (n, m) with the mean of their column where they are NaN, which changes no mean."""
    missing = np.isnan(values)
    means = np.where(missing, 0, values).sum(0) / np.maximum((~missing).sum(0), 1)
    return np.where(missing, means, values)


def scores_by_threshold(counts: np.ndarray, metric: str, empty_score: str = "1") -> np.ndarray:
    """A metric of each of n images at each of the 256 thresholds, (n, 256), 0..1.

    `counts`: (n, 2, 256). "dice" and "iou" are the image's own; without foreground 0, or where none
    is found what `EMPTY_SCORES` says; of an ignored image the mean. "maxf" is the pooled F1 plus
    the image's part in it, to first order: the mean over images is the pooled F1, their spread its
    error.
    """
    fp, tp = at_thresholds(counts).transpose(1, 0, 2)
    union = fp + tp[:, :1]
    above, below = (tp, union) if metric == "iou" else (2 * tp, union + tp)
    if metric != "maxf":
        values = np.where(below > 0, ratio(above, below), EMPTY_SCORES[empty_score])
        values[~counts.any((1, 2))] = np.nan
        return fill_nan(values)
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
    error = worse.std(0, ddof=1) / np.sqrt(len(values))
    good = np.flatnonzero(worse.mean(0) <= 2 * error + 1e-12)
    level = good[np.abs(good - 128).argmin()]
    return max(0.0, float(level) - 0.5) / 255  # between two levels: 128 is the first from 0.5 on


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

    def write(self, out: Path, thresholds: tuple[float, ...]) -> dict[str, Any]:
        """Write metrics.json, scores.csv, pr_curve.png or confusion.png; returns the report."""
        report, names = self.report(), self.classes.names
        content = {"threshold": thresholds[0] if thresholds else None, "mean": self.mean()} | report
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


# --------------------------------------------------------------------------------------------------
#  The end of a training
# --------------------------------------------------------------------------------------------------


def evaluate_and_export(
    out: Path,
    validation: pd.DataFrame,
    rows: list[dict[str, float]],
    epoch: int,
    goal: Goal,
) -> list[Prediction]:
    """Predict the validation images, tune what makes masks, write scores, images and model.pt.

    `rows`: of metrics.csv; `epoch`: the one that is in model.pt.
    """
    trained = load_model(out / "model.pt", best_device())
    predictions = predict_validation(trained, validation)
    config = tune(predictions, trained.config, goal)
    report = write_validation(out, predictions, config, goal)
    export(trained._replace(config=config, metrics=report), out)
    write_file(out / "curves.png", lambda p: visualize.draw_training_curves(rows, epoch, p))
    print(f"wrote {out / 'model.pt'}; look at {out / 'validation.jpg'} and {out / 'curves.png'}")
    return predictions


def write_validation(
    out: Path,
    predictions: list[Prediction],
    config: ModelConfig,
    goal: Goal,
    title: str = "validation",
) -> dict[str, Any]:
    """Write metrics.json, its curves and validation.jpg; returns the report."""
    evaluation = Evaluation(config.classes, goal.empty_score)
    for prediction in predictions:
        planes = prediction.planes
        mask = postprocess(planes, config)
        evaluation.add(prediction.sample, planes, mask, prediction.ground_truth)
    ious = [evaluation.image_iou(hits) for hits in evaluation.image_hits]
    order = np.argsort(ious, kind="stable")
    order = [index for index in order if not np.isnan(evaluation.image_hits[index]).all()] or order
    rows = []
    for name, place in (("worst", 0), ("median", len(order) // 2), ("best", -1)):
        index = order[place]
        prediction = predictions[index]
        caption = f"{name}: {prediction.sample.id[:24]}, IoU {100 * ious[index]:.1f} %"
        mask, target = postprocess(prediction.planes, config), prediction.ground_truth
        rows.append(visualize.comparison(prediction.image, target, mask, caption, config.classes))
    write_image(out / "validation.jpg", visualize.stack(rows))
    print(f"{title}: {evaluation.summary()}, {describe_masks(config)}")
    return evaluation.write(out, config.thresholds)


def export(trained: TrainedModel, out: Path) -> None:
    """Write model.pt and config.json."""
    save_model(out / "model.pt", trained)
    content = json.dumps(asdict(trained.config) | trained.settings, indent=2)
    write_file(out / "config.json", f"{content}\n")


def evaluate_folds(
    out: Path, folds: list[int], predictions: list[Prediction], config: ModelConfig, goal: Goal
) -> None:
    """Tune over the out-of-fold predictions of all folds, write scores, give all models the same.

    `config`: of one of the models.
    """
    tuned = tune(predictions, config, goal)
    write_validation(out, predictions, tuned, goal, "out of fold")
    for folder in (out / f"fold{fold}" for fold in folds):
        trained = load_model(folder / "model.pt", "cpu")
        same = replace(trained.config, thresholds=tuned.thresholds, areas=tuned.areas)
        export(trained._replace(config=same), folder)
