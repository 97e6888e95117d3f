"""What makes masks of predictions, tuned on images that the model was not trained on."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kit.config import Classes, ModelConfig
from kit.data.images import decode_image, encode_image, to_picture
from kit.data.readers import read_image
from kit.network.model import TrainedModel
from kit.results.metrics import (
    EMPTY_SCORES,
    at_thresholds,
    count_hits,
    count_image,
    mask_scores,
    ratio,
    sum_by_image,
)
from kit.results.predict import postprocess, predict

MEMORY = 1 << 30  # bytes of predictions that stay decoded; further ones are kept as PNG


class Goal(NamedTuple):
    """What a model is tuned for."""

    metric: str  # maxf, dice, iou or miou
    min_pixels: int = -1  # the minimum component area; -1: tuned too, but not for maxf
    empty_score: str = "1"  # of a mask that is rightly empty, see `EMPTY_SCORES`


def goal_of(config: Any) -> Goal:
    """What train.py's settings of a fold ask for."""
    return Goal(config.metric, config.min_pixels, config.empty_score)


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
