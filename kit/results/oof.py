"""The end of a training: the validation images predicted; scores, pictures, model.pt."""

import contextlib
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.config import TUNED, ModelConfig
from kit.data.blocks import is_part
from kit.data.classes import mask_folders, write_probabilities
from kit.data.images import write_image
from kit.data.names import MARKER
from kit.data.readers import in_parallel
from kit.errors import UserError
from kit.files import writable_folder, write_file
from kit.network.model import TrainedModel, best_device, load_model, save_model
from kit.results import visualize
from kit.results.metric_file import score_predictions
from kit.results.metrics import Evaluation
from kit.results.predict import (
    describe_masks,
    enlarge_prediction,
    ensemble_config,
    postprocess,
)
from kit.results.submissions import RleSubmission
from kit.results.tuning import (
    TRIED_ON,
    Goal,
    Prediction,
    choose_symmetries,
    predict_validation,
    tune,
)


def evaluate_and_export(
    out: Path,
    validation: pd.DataFrame,
    rows: list[dict[str, float]],
    epoch: int,
    goal: Goal,
) -> list[Prediction]:
    """Predict the validation images, tune what makes masks, write scores, images and model.pt.

    `rows`: of metrics.csv; `epoch`: the one that is in model.pt. Without validation images model.pt
    stays as it is.
    """
    trained = load_model(out / "model.pt", best_device())
    trained = trained._replace(settings=trained.settings | {"epochs_done": rows[-1]["epoch"]})
    if validation.empty:
        export(trained, out)
        print(f"wrote {out / 'model.pt'}, trained on all images: {describe_masks(trained.config)}")
        return []
    config = trained.config
    if goal.symmetries:
        config, table = choose_symmetries(trained, validation, goal)
        write_file(out / "symmetries.csv", table.to_csv(index=False))
        print(describe_symmetries(table))
    predictions = predict_validation(trained._replace(config=config), validation)
    config, scored, failure = tune_and_score(predictions, config, goal)
    report = write_validation(out, predictions, config, goal, scored)
    trained = trained._replace(config=config, metrics=report)
    export(trained, out)
    write_predictions(out, predictions, trained)
    write_file(out / "curves.png", lambda p: visualize.draw_training_curves(rows, epoch, p))
    print(f"wrote {out / 'model.pt'}; look at {out / 'validation.jpg'} and {out / 'curves.png'}")
    if failure:
        raise failure
    return predictions


Scored = tuple[ModelConfig, dict[str, Any], UserError | None]


def tune_and_score(predictions: list[Prediction], config: ModelConfig, goal: Goal) -> Scored:
    """The tuned settings, and of a file of --metric the block "metric" of metrics.json.

    Where the file fails they are tuned for Dice, and the error is returned, not to lose the model.
    """
    if not goal.file:
        return tune(predictions, config, goal), {}, None
    try:
        tuned = tune(predictions, config, goal)
        score = score_predictions(goal.file, predictions, tuned)
    except UserError as error:
        remedy = "model.pt is tuned for Dice; fix the file and run this again, nothing is lost"
        failure = UserError(error.where, error.problem, remedy)
        return tune(predictions, config, goal._replace(file=None)), {}, failure
    print(f"{goal.file.name}: {score:.6g}")
    return tuned, {"metric": {"name": goal.file.name, "score": score}}, None


def describe_symmetries(table: pd.DataFrame) -> str:
    """What each symmetry gained in TTA, and which are kept."""
    gains = [f"{row.symmetry} {row.gain:+.2f} ± {row.error:.2f}" for row in table.itertuples()]
    kept = " ".join(table.symmetry[table.kept]) or "none"
    if np.isinf(table.error).all():
        return f"TTA: {kept}; the validation images are too few to tell what others gain"
    return f"TTA: {kept}; each alone, on up to {TRIED_ON} images: {', '.join(gains)}"


def write_validation(
    out: Path,
    predictions: list[Prediction],
    config: ModelConfig,
    goal: Goal,
    further: dict[str, Any],
    title: str = "validation",
) -> dict[str, Any]:
    """Write metrics.json, with `further`, its curves and validation.jpg; returns the report."""
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
    return evaluation.write(out, config.thresholds, further)


def export(trained: TrainedModel, out: Path) -> None:
    """Write model.pt and config.json."""
    save_model(out / "model.pt", trained)
    content = json.dumps(asdict(trained.config) | trained.settings, indent=2)
    write_file(out / "config.json", f"{content}\n")


def write_predictions(out: Path, predictions: list[Prediction], trained: TrainedModel) -> None:
    """Write oof/ID.png, 8-bit probabilities, and oof.csv, the masks, as infer.py writes them.

    `trained`: a model with the thresholds and areas to use. Of images that are read in blocks there
    is neither.
    """
    if any(is_part(prediction.sample.block) for prediction in predictions):
        print("oof.csv and oof/: not written of images that are read in blocks")
        return
    config = ensemble_config([trained])  # areas in the images' own pixels
    classes = config.classes
    for folder in ("", *mask_folders(classes)):
        (writable_folder(out / "oof" / folder) / MARKER).touch()  # what is there is no data
    samples = pd.DataFrame({"id": [prediction.sample.id for prediction in predictions]})
    said = io.StringIO()  # of submissions, which this is not
    with contextlib.redirect_stdout(said):
        submission = RleSubmission(samples, classes, order=config.rle)

    def write(prediction: Prediction) -> None:
        planes, sample = prediction.planes, prediction.sample
        if sample.block:
            planes = enlarge_prediction(planes, sample.block, config)
        write_probabilities(out / "oof", sample.id, planes, classes)
        submission.add(sample, planes, postprocess(planes, config))

    in_parallel(write, predictions, "oof")
    with contextlib.redirect_stdout(said):
        submission.write(out, "oof.csv")


def evaluate_folds(
    out: Path, folds: list[int], predictions: list[Prediction], config: ModelConfig, goal: Goal
) -> None:
    """Tune over the out-of-fold predictions of all folds, write scores, give all models the same.

    `config`: of one of the models.
    """
    tuned, scored, failure = tune_and_score(predictions, config, goal)
    write_validation(out, predictions, tuned, goal, scored, "out of fold")
    for folder in (out / f"fold{fold}" for fold in folds):
        trained = load_model(folder / "model.pt", "cpu")
        same = replace(trained.config, **{name: getattr(tuned, name) for name in TUNED})
        trained = trained._replace(config=same)
        export(trained, folder)
    write_predictions(out, predictions, trained)
    if failure:
        raise failure
