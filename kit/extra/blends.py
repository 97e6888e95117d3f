"""Blends: weights of several models, from predictions of images that none of them was trained on.

`train.py --compare` writes blend.json for the best runs that have oof/ of the same images, and
`infer.py --model blend.json` predicts with it. Weights that are chosen on the images that they are
scored on look better than they are. So they are chosen on four fifths of the images, threshold
included, and scored on the rest, five times; equal weights stay unless the gain over them exceeds
two standard errors. The search over subsets and weights is that of Caruana et al., ICML 2004, on a
grid instead of one model after the other.
"""

import contextlib
import io
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from kit.config import TUNED, Classes, ModelConfig
from kit.data import samples
from kit.data.classes import mask_folders
from kit.data.images import decode_image
from kit.data.readers import in_parallel
from kit.errors import UserError
from kit.files import write_file
from kit.network.model import load_model
from kit.results.metrics import count_image
from kit.results.predict import describe_masks, level_of
from kit.results.tuning import (
    SURE,
    Prediction,
    choose_threshold,
    goal_of,
    scores_by_threshold,
    tune,
)

MODELS = 4  # runs that are blended at most, the best ones
STEPS = 4  # weights are multiples of a quarter, or equal
FOLDS = 5  # parts of the images, each scored with weights of the others
PIXELS = 1 << 18  # of a larger image every second, third, ... pixel along each axis counts
Weights = tuple[float, ...]


def blend(runs: list[Any], out: Path) -> None:
    """Choose the weights of runs, say what they bring, and write blend.json into `out`.

    `runs`: of `runs.read_run`, on the same images, the best first. Fewer than two with oof/ and
    model.pt are no blend.
    """
    runs = [run for run in runs if models_of(Path(run.name))][:MODELS]
    if len(runs) < 2:
        return
    settings, folders = runs[0].settings, [Path(run.name) for run in runs]
    try:
        table = read_samples(runs)
        values = score_weightings(folders, table, settings)
    except (UserError, OSError) as error:  # OSError: a file of oof/ is missing
        print(f"no blend: {error}")
        return
    groups = table.group.where(table.group != "", table.id)
    weights, text = choose(values, groups.factorize()[0] % FOLDS)
    tuned = tune_blend(folders, weights, table, settings)
    content = contents(folders, weights, tuned, out)
    write_file(out / "blend.json", f"{json.dumps(content, indent=2)}\n")
    names = ", ".join(f"{w:.2f} {folder}" for w, folder in zip(weights, folders, strict=True) if w)
    print(f"blend: {settings['metric']} on {len(table)} images: {text}")
    print(f"wrote {out / 'blend.json'}, for infer.py --model: {names}; {describe_masks(tuned)}")


def models_of(folder: Path) -> list[Path]:
    """The models of a run, one or that of each fold; none without predictions in oof/."""
    files = sorted(folder.glob("fold*/model.pt")) or sorted(folder.glob("model.pt"))
    return files if (folder / "oof").is_dir() else []


def read_samples(runs: list[Any]) -> pd.DataFrame:
    """The scored images with their masks, as the first run's settings read them. UserError."""
    settings, ids = runs[0].settings, runs[0].pixels.index.unique("id")
    if settings.get("exclusive"):
        problem = "oof/ does not tell how probable each is"
        remedy = "infer.py --model with several models averages them"
        raise UserError("classes that exclude each other", problem, remedy)
    if settings["scale"] != 1:
        problem, remedy = "oof/ is enlarged", "infer.py --model with several models averages them"
        raise UserError(f"--scale {settings['scale']}", problem, remedy)
    reading = {name: settings[name] for name in samples.LOADED}
    with contextlib.redirect_stdout(io.StringIO()):  # train.py has said it
        table = samples.load(settings["data"], **reading)[0].samples
    table = table[table.id.isin(ids)]
    if len(table) < len(ids):
        problem = f"lacks {len(ids) - len(table)} of the {len(ids)} images that were scored"
        raise UserError(f"--data {settings['data']}", problem, "put them back")
    return table


def weightings(models: int) -> list[Weights]:
    """Equal weights, then all multiples of 1 / `STEPS` that add up to 1."""
    grid = itertools.product(range(STEPS + 1), repeat=models)
    steps = [tuple(n / STEPS for n in point) for point in grid if sum(point) == STEPS]
    return list(dict.fromkeys([(1 / models,) * models, *steps]))


def read_planes(folders: list[Path], name: str, classes: Classes) -> np.ndarray:
    """The predictions of an image, float32 (runs, K, h, w) of 0..255."""
    places = [Path("oof", place, f"{name}.png") for place in mask_folders(classes)]
    files = [folder / place for folder in folders for place in places]
    planes = np.array([decode_image(file.read_bytes()) for file in files], np.float32)
    return planes.reshape(len(folders), len(places), *planes.shape[1:])


def mix(planes: np.ndarray, weights: Weights) -> np.ndarray:
    """The weighted mean of `read_planes`, uint8 (K, h, w)."""
    return np.rint(np.tensordot(weights, planes, 1)).astype(np.uint8)


def tune_blend(
    folders: list[Path], weights: Weights, table: pd.DataFrame, settings: dict[str, Any]
) -> ModelConfig:
    """The first model's settings with what makes masks of the blend's predictions."""
    config = load_model(models_of(folders[0])[0], "cpu").config

    def predict(sample: Any) -> Prediction:
        planes = mix(read_planes(folders, sample.id, config.classes), weights)
        return Prediction(sample, planes, config, decoded=False)

    predictions = in_parallel(predict, table.itertuples(), "blend")
    return tune(predictions, config, goal_of(SimpleNamespace(**settings)))


def score_weightings(
    folders: list[Path], table: pd.DataFrame, settings: dict[str, Any]
) -> dict[Weights, np.ndarray]:
    """{weights: the metric of each class and image at each threshold, float32 (K, n, 256)}."""
    names = tuple(settings["class_names"])
    classes = Classes(names, tuple(settings["class_values"]))
    tried = weightings(len(folders))

    def count(sample: Any) -> np.ndarray:  # (weightings, K, 2, 256) int32
        planes = read_planes(folders, sample.id, classes)
        target = sample.mask.read(planes.shape[2:])
        step = math.ceil(math.sqrt(max(1, target[0].size / PIXELS)))
        planes, target = planes[:, :, ::step, ::step], target[:, ::step, ::step]
        blends = (mix(planes, weights) for weights in tried)
        return np.stack([count_image(each, target, classes).counts.numpy() for each in blends])

    counts = np.array(in_parallel(count, table.itertuples(), "blends"), np.int32)
    metric = {"iou": "iou", "maxf": "maxf", "miou": "maxf"}.get(settings["metric"], "dice")
    empty = settings.get("empty_score", "1")
    return {
        weights: np.array(
            [scores_by_threshold(each, metric, empty) for each in counts[:, index].swapaxes(0, 1)],
            np.float32,
        )
        for index, weights in enumerate(tried)
    }


def best_levels(values: np.ndarray) -> list[float]:
    """The threshold of each class from values (K, n, 256)."""
    return [choose_threshold(of_class) for of_class in values]


def scores_at(values: np.ndarray, thresholds: list[float]) -> np.ndarray:
    """The mean over the classes at their thresholds of each image, (n,), from (K, n, 256)."""
    levels = map(level_of, thresholds)
    return np.mean([of_class[:, level] for of_class, level in zip(values, levels, strict=True)], 0)


def nested(values: dict[Weights, np.ndarray], parts: np.ndarray) -> np.ndarray:
    """The score of each image with the weights and thresholds that are best on the other parts."""
    scores = np.zeros(len(parts))
    for part in np.unique(parts):
        rest = {weights: v[:, parts != part] for weights, v in values.items()}
        levels = {weights: best_levels(v) for weights, v in rest.items()}
        best = max(rest, key=lambda weights: scores_at(rest[weights], levels[weights]).mean())
        scores[parts == part] = scores_at(values[best][:, parts == part], levels[best])
    return scores


def choose(values: dict[Weights, np.ndarray], parts: np.ndarray) -> tuple[Weights, str]:
    """The weights to take, and what they bring, for people. `parts`: of each image, (n,)."""
    equal, *_ = values
    single = {weights: v for weights, v in values.items() if max(weights) == 1}
    even, alone = nested({equal: values[equal]}, parts), nested(single, parts)
    gain = 100 * (nested(values, parts) - even)
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    better = bool(gain.mean() > SURE * error)
    at_all = {weights: scores_at(v, best_levels(v)).mean() for weights, v in values.items()}
    text = (
        f"{100 * even.mean():.2f} with equal weights, {100 * alone.mean():.2f} of the best alone; "
        f"chosen weights {gain.mean():+.2f} ± {error:.2f}: {'taken' if better else 'equal ones'}"
    )
    if not better and alone.mean() >= even.mean():
        text += "; the best alone is no worse, compare it with fewer or better ones"
    return (max(at_all, key=at_all.get) if better else equal), text


def contents(
    folders: list[Path], weights: Weights, tuned: ModelConfig, out: Path
) -> dict[str, Any]:
    """What blend.json holds; paths start from its folder. The folds of a run share its weight."""
    shares = {}
    for folder, weight in zip(folders, weights, strict=True):
        files = models_of(folder)
        shares |= {os.path.relpath(file, out): weight / len(files) for file in files if weight}
    masks = {name: getattr(tuned, name) for name in TUNED}
    return {"models": [*shares], "weights": [*shares.values()], **masks}
