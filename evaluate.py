"""The end of a training: predict the validation images, tune what makes masks, score, export."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd

import metrics
import predict
import visualize
from class_metrics import make_evaluation
from classes import classes_of
from metrics import Prediction
from model import ModelConfig, TrainedModel, best_device, load_model, save_model
from utils import write_file


def evaluate_and_export(
    out: Path,
    validation: pd.DataFrame,
    rows: list[dict[str, float]],
    epoch: int,
    *wanted: Any,
) -> list[Prediction]:
    """Predict the validation images as infer.py will, tune, write scores, images and model.pt.

    `rows`: of metrics.csv; `epoch`: the one that is in model.pt; `wanted`: see `tune_and_score`.
    """
    trained = load_model(out / "model.pt", best_device())
    found = predict.predict([trained], validation)
    predictions = [metrics.store(sample, one, trained.config) for sample, _, one in found]
    tuned, report = tune_and_score(trained.config, predictions, out, "validation", *wanted)
    export(trained._replace(metrics=report), out, tuned)
    write_file(out / "curves.png", lambda part: visualize.draw_training_curves(rows, epoch, part))
    print(f"wrote {out / 'model.pt'}; look at {out / 'validation.jpg'} and {out / 'curves.png'}")
    return predictions


def tune_and_score(
    config: ModelConfig,
    predictions: list[Prediction],
    out: Path,
    title: str,
    metric: str,
    min_pixels: int,
    empty_score: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune the settings of a model that make masks, write the scores; returns both."""
    wanted = "maxf" if metric == "miou" else metric, min_pixels, predict.postprocess, empty_score
    classes, tuned = classes_of(config), {}
    if not classes.names:
        threshold, area = metrics.tune(predictions, *wanted)
        tuned = {"threshold": threshold, "min_pixels": area}
    elif not classes.exclusive:
        parts = [[one.part(k) for one in predictions] for k in range(len(classes.names))]
        pairs = [metrics.tune(part, *wanted) for part in parts]
        tuned = dict(zip(("thresholds", "areas"), zip(*pairs, strict=True), strict=True))
    config = dataclasses.replace(config, **tuned)
    words, threshold = predict.describe_masks(config)
    make_mask = functools.partial(predict.make_mask, config=config)
    evaluation = make_evaluation(classes, empty_score)
    how = evaluation, make_mask, words, threshold, title
    return tuned, metrics.write_validation(out, predictions, *how)


def export(trained: TrainedModel, out: Path, tuned: dict[str, Any]) -> None:
    """Write model.pt with tuned settings, thresholds and minimum areas, and config.json."""
    config = dataclasses.replace(trained.config, **tuned)
    save_model(out / "model.pt", trained.network, config, trained.settings, trained.metrics)
    everything = trained.settings | dataclasses.asdict(config)
    write_file(out / "config.json", json.dumps(everything, indent=2) + "\n")
