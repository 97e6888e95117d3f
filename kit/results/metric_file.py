"""The competition's own metric: a file with Kaggle's `score`, called on out-of-fold predictions."""

import functools
import importlib.util
import io
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.config import IGNORE, Classes, ModelConfig
from kit.data.masks import plane as plane_of
from kit.data.rle import rle_encode
from kit.errors import UserError, reason_of
from kit.results.metrics import at_thresholds
from kit.results.predict import level_of, plane_mask, postprocess
from kit.results.submissions import own_header

NAMES = ("auto", "maxf", "dice", "iou", "miou")  # of --metric, next to a file
IMAGES = 500  # that candidates are tried on: a metric is often a loop over rows in Python
GROUPS = 10  # of images where a score is not the mean of the images' own
LEVELS = (*range(1, 256, 14), 128)  # where a curve over the thresholds is measured first
MOST = 60  # levels of a curve


class MetricFile:
    """`score(solution, submission, row_id_column_name)` of a file; the larger the better."""

    def __init__(self, path: str) -> None:
        """Import it. Raises UserError where that fails, and for a file without `score`."""
        self.name, self.where = Path(path).name, f"--metric {path}"
        remedy = "name a file with Kaggle's score(solution, submission, row_id_column_name)"
        if not Path(path).is_file():
            raise UserError(self.where, "no such file", remedy)
        spec = importlib.util.spec_from_file_location("the_metric_file", path)
        module = sys.modules["the_metric_file"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            problem = f"cannot be imported ({type(error).__name__}: {reason_of(error)})"
            raise UserError(self.where, problem, "fix the file") from None
        self.function = getattr(module, "score", None)
        if not callable(self.function):
            raise UserError(self.where, "has no function score", remedy)

    def score(self, solution: pd.DataFrame, submission: pd.DataFrame) -> float:
        """Raises UserError with the words of what the function raises."""
        try:
            value = float(self.function(solution.copy(), submission.copy(), solution.columns[0]))
        except (Exception, SystemExit) as error:
            problem = f"raises {type(error).__name__}: {reason_of(error)}"
            raise UserError(self.where, problem, "fix its score") from None
        if not math.isfinite(value):
            raise UserError(self.where, f"its score is {value}", "fix its score")
        return value


@functools.cache
def find_metric(name: str) -> MetricFile | None:
    """The file that --metric names; None for a measure of the kit's own. Raises UserError."""
    if name in NAMES:
        return None
    if not name.endswith(".py"):
        raise UserError(f"--metric {name}", f"takes {', '.join(NAMES)} or a file.py")
    return MetricFile(name)


def try_out(metric: MetricFile | None, classes: Classes) -> None:
    """Before the training: score two small masks of each class, some empty. Raises UserError."""
    if metric:
        runs = [(name, value, "1 3") for name in "ab" for value in classes.values]
        solution = make_solution(runs, classes)
        metric.score(solution, with_masks(solution, ["2 2"] * len(classes.values)))


# --------------------------------------------------------------------------------------------------
#  Tables in the submission's form
# --------------------------------------------------------------------------------------------------


def make_solution(rows: Iterable[tuple[str, str, str]], classes: Classes) -> pd.DataFrame:
    """(id, value of the class, RLE) in the form of submission.csv, as pandas reads it from there.

    An empty mask is NaN. Of one class there is no column of classes.
    """
    *names, runs = own_header(classes)
    columns = [names[0], names[-1] if classes.several else "", runs]
    table = pd.DataFrame(list(rows), columns=columns)[[*names, runs]]
    return pd.read_csv(io.StringIO(table.to_csv(index=False))).astype({runs: object})


def with_masks(solution: pd.DataFrame, runs: Iterable[str]) -> pd.DataFrame:
    """The table with other masks; fewer than there are rows leave the rest empty."""
    padded = [text or np.nan for text in runs]
    padded += [np.nan] * (len(solution) - len(padded))
    column = pd.Series(padded, solution.index, object)
    return solution.assign(**{solution.columns[-1]: column})


def encode(mask: np.ndarray, ground_truth: np.ndarray, order: str) -> str:
    """The RLE of a mask, bool (h, w), without the ignored pixels of the ground truth, (h, w)."""
    return rle_encode(mask & (ground_truth != IGNORE), order)


def score_predictions(metric: MetricFile, predictions: list[Any], config: ModelConfig) -> float:
    """The score of the masks that `config` makes, over all images that are not ignored as a whole.

    `predictions`: of `tuning.Prediction`. Raises UserError.
    """
    rows, masks, classes = [], [], config.classes
    for prediction in predictions:
        mask, truth = postprocess(prediction.planes, config), prediction.ground_truth
        for k, value in enumerate(classes.values):
            target = plane_of(truth, k)
            if not (target == IGNORE).all():
                rows.append((prediction.sample.id, value, rle_encode(target == 1, config.rle)))
                masks.append(encode(plane_of(mask, k) == 1, target, config.rle))
    solution = make_solution(rows, classes)
    return metric.score(solution, with_masks(solution, masks))


# --------------------------------------------------------------------------------------------------
#  Values of candidates
# --------------------------------------------------------------------------------------------------


class FileJudge:
    """A `tuning.Judge` whose values are a file's.

    Where the score of all images is the mean of the scores of each alone, these are the values;
    else those of ten groups of images.
    """

    def __init__(
        self,
        judge: Any,
        metric: MetricFile,
        config: ModelConfig,
        choose: Callable[[np.ndarray], float],
    ) -> None:
        """`judge`: of the same images; `choose`: of the values of thresholds the one to take."""
        self.judge, self.metric_file, self.config, self.choose = judge, metric, config, choose
        self.metric, self.goal, self.counts = "dice", judge.goal, judge.counts
        self.in_blocks, self.loaded = judge.in_blocks, -1

    def load(self, k: int) -> None:
        """Prepare a class: its images, their ground truth as a table, and what the values are of.

        Of images in groups none is known to be empty by itself, as of images in blocks.
        """
        if self.loaded == k:
            return
        rows = [row for row in self.judge.load(k) if not (row.target == IGNORE).all()]
        chosen = np.linspace(0, len(rows) - 1, min(IMAGES, len(rows))).astype(int)
        self.rows, self.loaded, self.known = [rows[i] for i in chosen], k, {}
        value, order = self.config.class_values[k], self.config.rle
        names = [
            f"{row.name}-{n}" if self.in_blocks else row.name for n, row in enumerate(self.rows)
        ]
        truths = [rle_encode(row.target == 1, order) for row in self.rows]
        triples = [(name, value, runs) for name, runs in zip(names, truths, strict=True)]
        self.solution = make_solution(triples, self.config.classes)
        count = len(self.rows)
        self.groups = [[row] for row in range(count)]
        half = self.encoded(lambda plane: plane >= 128)
        whole = self.metric_file.score(self.solution, with_masks(self.solution, half))
        try:
            alone = abs(self.values(half).mean() - whole) <= 1e-9
        except UserError:  # of a metric that wants several rows
            alone = False
        if not alone:
            self.groups = [list(range(n, count, GROUPS)) for n in range(min(GROUPS, count))]
        self.in_blocks = self.judge.in_blocks or not alone

    def encoded(self, make: Callable[[np.ndarray], np.ndarray]) -> list[str]:
        """The RLE of what `make` makes of the planes, uint8 (h, w) to bool (h, w)."""
        return [encode(make(row.levels), row.target, self.config.rle) for row in self.rows]

    def values(self, runs: list[str]) -> np.ndarray:
        """The score of each group of images with these masks."""
        scores = []
        for rows in self.groups:
            key = (rows[0], *(runs[row] for row in rows))
            if key not in self.known:
                solution = self.solution.iloc[rows]
                submission = with_masks(solution, [runs[row] for row in rows])
                self.known[key] = self.metric_file.score(solution, submission)
            scores.append(self.known[key])
        return np.array(scores)

    def by_threshold(self, k: int) -> np.ndarray:
        """The values at each threshold, (n, 256); measured at some, and next to what is chosen."""
        self.load(k)
        measured: dict[int, np.ndarray] = {}
        wanted = set(LEVELS)
        while True:
            for level in sorted(wanted):
                measured[level] = self.values(self.encoded(lambda plane, at=level: plane >= at))
            levels = sorted(measured)
            values = np.stack([measured[level] for level in levels], 1)
            curves = np.stack([np.interp(np.arange(256), levels, row) for row in values])
            places = int(curves.mean(0).argmax()), level_of(self.choose(curves))
            near = {min(255, max(0, place + step)) for place in places for step in (-1, 0, 1)}
            wanted = near - measured.keys()
            if not wanted or len(measured) >= MOST:
                return curves

    def of_empty(self, k: int) -> np.ndarray:
        """The values of empty masks, (n,)."""
        self.load(k)
        return self.values([""] * len(self.rows))

    def pixels(self, k: int) -> np.ndarray:
        """How many pixels that count reach each of the 256 levels, (n, 256)."""
        self.load(k)
        counted = [row.levels[row.target != IGNORE] for row in self.rows]
        return np.stack([at_thresholds(np.bincount(p, minlength=256)) for p in counted])

    def of(self, config: ModelConfig, k: int) -> np.ndarray:
        """The values of the masks that `config` makes."""
        self.load(k)
        return self.values(self.encoded(lambda plane: plane_mask(plane, config, k)))
