"""What makes masks of predictions, tuned on images that the model was not trained on."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kit.config import Classes, ModelConfig, symmetries_to_try
from kit.data.images import decode_image, encode_image, to_picture
from kit.data.readers import read_image
from kit.network.model import TrainedModel
from kit.results.metric_file import FileJudge, MetricFile, find_metric
from kit.results.metrics import (
    EMPTY_SCORES,
    at_thresholds,
    count_hits,
    count_image,
    mask_scores,
    ratio,
    sum_by_image,
)
from kit.results.predict import level_of, plane_mask, predict, steps_of

MEMORY = 1 << 30  # bytes of predictions that stay decoded; further ones are kept as PNG


class Goal(NamedTuple):
    """What a model is tuned for."""

    metric: str  # maxf, dice, iou or miou
    min_pixels: int = -1  # the minimum component area; -1: tuned too, but not for maxf
    empty_score: str = "1"  # of a mask that is rightly empty, see `EMPTY_SCORES`
    symmetries: tuple[str, ...] = ()  # that are tried in TTA
    file: MetricFile | None = None  # the competition's own metric; what it cannot judge Dice does


def goal_of(config: Any) -> Goal:
    """What train.py's settings of a fold ask for."""
    names = symmetries_to_try(config.tta, config.max_minutes, config.height, config.width)
    file = find_metric(config.metric)
    metric = "dice" if file else config.metric
    return Goal(metric, config.min_pixels, config.empty_score, names, file)


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

    def plane(self, k: int) -> np.ndarray:
        """The probabilities of a class, uint8 (h, w)."""
        return self.arrays[0][k] if self.arrays else decode_image(self.pngs[k])

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
#  What candidates are judged by
# --------------------------------------------------------------------------------------------------


SURE = 2  # standard errors that a gain must have
PIXELS = 1 << 28  # of the images that cleaning is tried on


def gain_of(values: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """The mean gain of a candidate over the base, and its standard error; (n,) values of images."""
    gain = (values - base)[~np.isnan(values - base)]
    if len(gain) < 5:  # few images are luck
        return float(gain.mean()) if len(gain) else 0.0, math.inf
    return float(gain.mean()), float(gain.std(ddof=1) / math.sqrt(len(gain)))


def helps(values: np.ndarray, base: np.ndarray) -> bool:
    """Whether a candidate gains more than `SURE` standard errors on the same images."""
    gain, error = gain_of(values, base)
    return gain > max(SURE * error, 1e-12)


class ClassPlane(NamedTuple):
    """A class of an image, or block."""

    name: str  # of the image
    levels: np.ndarray  # probabilities, uint8 (h, w)
    target: np.ndarray  # ground truth, uint8 (h, w)
    highest: int  # of the levels
    missed: np.ndarray  # the hits of an empty mask, see `count_hits`


def class_plane(name: str, levels: np.ndarray, target: np.ndarray) -> ClassPlane:
    """With what follows from the arrays."""
    nothing = np.zeros((1, *levels.shape), bool)
    return ClassPlane(name, levels, target, int(levels.max()), count_hits(nothing, target[None]))


class Judge:
    """Scores of the images, for one class at a time, by Dice, IoU or F1."""

    def __init__(self, predictions: list[Prediction], config: ModelConfig, goal: Goal) -> None:
        self.predictions, self.goal = predictions, goal
        self.metric = "maxf" if goal.metric == "miou" else goal.metric
        self.ids = [prediction.sample.image_id for prediction in predictions]
        self.in_blocks = len(set(self.ids)) < len(self.ids)
        counts = [prediction.counts(config.classes) for prediction in predictions]
        self.counts = np.stack(sum_by_image(self.ids, counts))  # (n, K, 2, 256)
        self.loaded: tuple[int, list[ClassPlane]] = -1, []  # of a class

    def by_threshold(self, k: int) -> np.ndarray:
        """The values at each threshold, (n, 256), of masks that nothing else changes."""
        return scores_by_threshold(self.counts[:, k], self.metric, self.goal.empty_score)

    def of_empty(self, k: int) -> np.ndarray:
        """The values of empty masks, (n,)."""
        empty = self.counts[:, k, 1].sum(1) == 0
        return np.where(empty, EMPTY_SCORES[self.goal.empty_score], 0.0)

    def pixels(self, k: int) -> np.ndarray:
        """How many pixels reach each of the 256 levels, (n, 256)."""
        return at_thresholds(self.counts[:, k]).sum(1)

    def of(self, config: ModelConfig, k: int) -> np.ndarray:
        """The values of the masks that `config` makes, of as many images as `PIXELS` allows."""
        planes, level = self.load(k), level_of(config.thresholds[k])
        hits = [
            count_hits(plane_mask(plane.levels, config, k)[None], plane.target[None])
            if plane.highest >= level
            else plane.missed
            for plane in planes
        ]
        images = sum_by_image([plane.name for plane in planes], hits)
        column = 1 if self.metric == "iou" else 0
        return np.array([mask_scores(each, self.goal.empty_score)[0, column] for each in images])

    def load(self, k: int) -> list[ClassPlane]:
        """The class's planes and ground truths, of images spread evenly; of one class at a time."""
        if self.loaded[0] != k:
            names = list(dict.fromkeys(self.ids))
            pixels = sum(math.prod(prediction.size) for prediction in self.predictions)
            count = max(1, int(len(names) * min(1.0, PIXELS / pixels)))
            chosen = {names[int(i)] for i in np.linspace(0, len(names) - 1, count)}
            pairs = zip(self.ids, self.predictions, strict=True)
            kept = [(name, prediction) for name, prediction in pairs if name in chosen]
            planes = [(name, p.plane(k), p.ground_truth[k]) for name, p in kept]
            self.loaded = k, [class_plane(*plane) for plane in planes]
        return self.loaded[1]


# --------------------------------------------------------------------------------------------------
#  Choice of symmetries for TTA
# --------------------------------------------------------------------------------------------------

TRIED_ON = 32  # images


def choose_symmetries(
    trained: TrainedModel, validation: pd.DataFrame, goal: Goal
) -> tuple[ModelConfig, pd.DataFrame]:
    """The model's settings with the symmetries for TTA, and what each gains, in percent.

    Each is averaged with the image itself and compared with that alone. It is kept where it
    `helps`; the horizontal flip, which helps nearly everywhere, unless it harms. Where all that are
    kept are no better than the best of them, that one is taken.
    """
    config, ids = trained.config, validation.image_id.unique()
    chosen = ids[np.linspace(0, len(ids) - 1, min(TRIED_ON, len(ids))).astype(int)]
    images = validation[validation.image_id.isin(chosen)]

    def values(*symmetries: str) -> np.ndarray:
        settings = trained._replace(config=replace(config, symmetries=symmetries))
        return plain_values(predict_validation(settings, images), config.classes, goal)

    alone, tried = values(), {name: values(name) for name in goal.symmetries}
    kept = tuple(
        name
        for name, scores in tried.items()
        if (not helps(alone, scores) if name == "h" else helps(scores, alone))
    )
    best = max(kept, key=lambda name: tried[name].mean(), default="")
    if len(kept) > 1 and values(*kept).mean() <= tried[best].mean():
        kept = (best,)
    gains = [(name, *gain_of(scores, alone)) for name, scores in tried.items()]
    table = pd.DataFrame(gains, columns=["symmetry", "gain", "error"])
    table[["gain", "error"]] = (100 * table[["gain", "error"]]).round(4)
    return replace(config, symmetries=kept), table.assign(kept=table.symmetry.isin(kept))


def plain_values(predictions: list[Prediction], classes: Classes, goal: Goal) -> np.ndarray:
    """The mean score of each image over its classes, (n,), of masks from 0.5 on.

    MaxF is taken at the threshold that is best for these images.
    """
    metric = "maxf" if goal.metric == "miou" and not classes.exclusive else goal.metric
    sums = [count_image(p.planes, p.ground_truth, classes) for p in predictions]
    ids = [prediction.sample.image_id for prediction in predictions]
    if metric == "maxf":
        counts = np.stack(sum_by_image(ids, [each.counts.numpy() for each in sums]))
        values = [scores_by_threshold(of_class, metric) for of_class in counts.swapaxes(0, 1)]
        return np.mean([value[:, value.mean(0).argmax()] for value in values], axis=0)
    hits = sum_by_image(ids, [each.hits for each in sums])
    column = 0 if metric == "dice" else 1
    scores = np.stack([mask_scores(each, goal.empty_score)[:, column] for each in hits])
    if classes.several:  # an absent class that is not found says nothing
        scores = np.where([each.sum(0) > 0 for each in hits], scores, np.nan)
    return fill_nan(scores).mean(1)


# --------------------------------------------------------------------------------------------------
#  Choice of thresholds, of what an empty mask is, of what cleans masks
# --------------------------------------------------------------------------------------------------


CLEANING = (  # of each row one step at most
    ("fill",),
    ("close 3", "close 5", "close 9"),
    ("open 3", "open 5", "open 9"),
    ("largest",),
)
SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of an image's pixels, for minimum areas


def tune(predictions: list[Prediction], config: ModelConfig, goal: Goal) -> ModelConfig:
    """The model's settings with what makes the masks that serve a metric best.

    Thresholds are the nearest to 0.5 that are as good as the best; all else is kept only where it
    `helps`. MaxF is a measure of probabilities: for it the threshold alone is tuned.
    """
    if config.exclusive:
        return config
    judge: Any = Judge(predictions, config, goal)
    judge = FileJudge(judge, goal.file, config, choose_threshold) if goal.file else judge
    each = range(len(config.class_names))
    thresholds = tuple(choose_threshold(judge.by_threshold(k)) for k in each)
    config = replace(config, thresholds=thresholds, areas=(max(0, goal.min_pixels),) * len(each))
    if judge.metric == "maxf":
        return config
    for k in each:
        config = tune_presence(config, judge, k)
        config = tune_cleaning(config, judge, k)
    return config


def changed(config: ModelConfig, k: int, **values: Any) -> ModelConfig:
    """The settings with other values for one class."""
    defaults = {"presence_levels": 0.0, "presence_areas": 0, "plans": ""}
    changes = {}
    for name, value in values.items():
        old = getattr(config, name) or (defaults[name],) * len(config.class_names)
        changes[name] = (*old[:k], value, *old[k + 1 :])
    return replace(config, **changes)


def tune_presence(config: ModelConfig, judge: Judge, k: int) -> ModelConfig:
    """With the least pixels, and the probability that they reach, that a mask needs; if it helps.

    An image is scored with what the other half of the images chose, or many candidates would find
    a gain by luck.
    """
    values, empty, pixels = judge.by_threshold(k), judge.of_empty(k), judge.pixels(k)
    if judge.in_blocks or len(values) < 8 or not (empty > 0).any():
        return config
    half = np.random.default_rng(0).permutation(len(values)) % 2 == 0
    base, gated = np.zeros(len(values)), np.zeros(len(values))
    for others, own in ((half, ~half), (~half, half)):
        base[own] = values[own, level_of(choose_threshold(values[others]))]
        sure, area, low = best_presence(values[others], empty[others], pixels[others])
        there = pixels[own, sure] >= area
        gated[own] = np.where(there, values[own, low], empty[own])
    if not helps(gated, base):
        return config
    sure, area, low = best_presence(values, empty, pixels)
    level = {"thresholds": (low - 0.5) / 255, "presence_levels": (sure - 0.5) / 255}
    return changed(config, k, **level, presence_areas=area)


def best_presence(
    values: np.ndarray, empty: np.ndarray, pixels: np.ndarray
) -> tuple[int, int, int]:
    """The triple with the best mean: a level, the pixels that must reach it, the masks' level.

    `values` and `pixels` (n, 256): the images' scores, and pixels, at each level; `empty` (n,):
    their scores without a mask.
    """
    first = max(1, level_of(choose_threshold(values)))
    best, triple = -math.inf, (first, 0, first)
    image = np.median(pixels[:, 0])
    for sure in np.linspace(first, 250, 12).astype(int):
        for area in {1, *(int(image * share) for share in SHARES)}:
            gated = np.where(pixels[:, sure] >= area, values[:, first], empty).mean()
            if gated > best:
                best, triple = gated, (int(sure), area, first)
    sure, area, _ = triple
    there = pixels[:, [sure]] >= area
    low = max(1, level_of(choose_threshold(np.where(there, values, empty[:, None]))))
    return sure, area, low


def tune_cleaning(config: ModelConfig, judge: Judge, k: int) -> ModelConfig:
    """With the steps, and the minimum area of components, that help."""
    pixels = np.median(judge.counts[:, k].sum((1, 2)))
    families = [[("plans", step) for step in steps] for steps in CLEANING]
    if judge.in_blocks:  # none has the whole image
        families.pop()
    if judge.goal.min_pixels < 0:
        families.append([("areas", int(pixels * share)) for share in SHARES])
    base = judge.of(config, k)
    for family in families:
        tried = []
        for name, value in family:
            changes = {name: value if name == "areas" else ", ".join([*steps_of(config, k), value])}
            candidate = changed(config, k, **changes)
            tried.append((judge.of(candidate, k), candidate))
        values, candidate = max(tried, key=lambda pair: np.nanmean(pair[0]))
        if helps(values, base):
            base, config = values, candidate
    return config


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
