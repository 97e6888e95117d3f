"""The table of runs: what differs between them, and whether the scores do, beyond chance.

    python train.py --compare out1 out2 "tries/*"

`scores.csv` of a run holds the pixels of each validation image, so that two runs on the same images
are compared image by image. That tells the chance of the images; the chance of a training, another
for each seed, is measured where runs differ in nothing but the seed, and added.
"""

import glob
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import studentized_range

from kit.config import TUNED
from kit.errors import UserError
from kit.extra.blends import blend
from kit.files import writable_folder, write_file
from kit.results.tuning import SURE

# settings that say where files are or how the machine is used
NOT_COMPARED = {
    "data", "out", "compare", "masks", "resume", "check", "workers", "devices", "precision",
    "mean", "std", "class_names", "class_values", "value_range", "metric",
    "config", "session_minutes", "cache", "show", "why", "epochs_done", "symmetries", "logger",
    *TUNED,
}  # fmt: skip
FOLLOW_FROM_SPLIT = {"top", "batch_size"}  # where they were automatic: another seed, another split
METRICS = {"dice": "Dice", "iou": "IoU", "miou": "IoU", "maxf": "F1"}


class Run(NamedTuple):
    """What a training left in its --out."""

    name: str
    settings: dict[str, Any]
    epochs: int
    minutes: float
    pixels: pd.DataFrame  # scores.csv: tp, fp, fn of each image and class


def read_run(folder: Path) -> Run:
    """A run from its files; of --fold all the settings are those of its first fold. UserError."""
    parts = sorted(folder.glob("fold*/config.json")) or [folder / "config.json"]
    try:
        settings = json.loads(parts[0].read_text())
        epochs = [pd.read_csv(part.with_name("metrics.csv")) for part in parts]
        pixels = pd.read_csv(folder / "scores.csv", dtype={"id": str, "class": str})
        pixels = pixels.set_index(["id", "class"])[["tp", "fp", "fn"]]
    except (OSError, ValueError, KeyError) as error:
        problem = f"is no finished run ({type(error).__name__}: {error})"
        raise UserError(f"--compare {folder}", problem, "name --out folders of train.py") from None
    seconds = sum(table.seconds.max() for table in epochs)
    most = max(int(table.epoch.max()) for table in epochs)
    return Run(str(folder), settings, most, seconds / 60, pixels)


def image_values(pixels: pd.DataFrame, metric: str) -> pd.Series:
    """A metric of each image, the mean over its classes, in percent.

    "F1" is the one over all pixels at once plus the image's part in it, to first order: the mean
    over images is the F1, their spread its error. An empty mask that is right counts 100.
    """
    tp, fp, fn = (pixels[name] for name in ("tp", "fp", "fn"))
    if metric == "F1":
        above, below = 2 * tp, 2 * tp + fp + fn
        pooled = above.sum() / max(1, below.sum())
        values = pooled + (above - pooled * below) / max(1e-9, below.mean())
    else:
        above, below = (tp, tp + fp + fn) if metric == "IoU" else (2 * tp, 2 * tp + fp + fn)
        values = (above / below).where(below > 0, 1.0)
    return 100 * values.groupby(level="id", sort=False).mean()


def standard_error(values: pd.Series) -> float:
    """Of a mean; of one value it is not known."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def differing(runs: list[Run]) -> list[str]:
    """The settings whose values are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    automatic = FOLLOW_FROM_SPLIT.intersection(*(run.settings.get("why", {}) for run in runs))
    return [
        name
        for name in names
        if name not in NOT_COMPARED | automatic
        and len({str(run.settings.get(name)) for run in runs}) > 1
    ]


def same_settings(run: Run, other: Run) -> bool:
    """Whether two runs differ in nothing but the seed."""
    return set(differing([run, other])) <= {"seed"}


def same_images(run: Run, other: Run) -> bool:
    """Whether two runs were scored on the same images with the same ground truth."""
    if set(run.pixels.index) != set(other.pixels.index):
        return False
    own, others = (p.tp + p.fn for p in (run.pixels, other.pixels.loc[run.pixels.index]))
    return bool((own == others).all())


def training_chance(runs: list[Run], metric: str) -> tuple[float, int]:
    """The standard deviation of a run's mean score over seeds, and its degrees of freedom.

    Pooled over the groups of runs on the same images that differ in nothing but the seed; without
    any 0 and 0. Few degrees of freedom make it larger, and many runs, of which the best was lucky:
    by Tukey's studentized range, for two runs Student's t.
    """
    groups: dict[int, dict[Any, float]] = {}  # {first run: {seed: mean score}}
    for run in runs:
        alike = (i for i, r in enumerate(runs) if same_settings(run, r) and same_images(run, r))
        means = groups.setdefault(next(alike), {})
        means.setdefault(run.settings.get("seed"), image_values(run.pixels, metric).mean())
    freedom = sum(len(means) - 1 for means in groups.values())
    squares = sum(len(means) * np.var(list(means.values())) for means in groups.values())
    if not freedom:
        return 0.0, 0
    sure = studentized_range.ppf(0.954, len(runs), freedom) / math.sqrt(2)
    return math.sqrt(squares / freedom) * float(sure) / SURE, freedom


def metric_of(runs: list[Run]) -> str:
    """The score of the table: the first run's metric."""
    return METRICS.get(runs[0].settings.get("metric", "dice"), "Dice")


def table_of(runs: list[Run], notes: dict[str, Any], chance: float = 0.0) -> pd.DataFrame:
    """One row for each run, the best first.

    `notes`: {run: its score on the leaderboard}; `chance`: see `training_chance`.
    """
    metric, rows = metric_of(runs), []
    values = {run.name: image_values(run.pixels, metric) for run in runs}
    ordered = sorted(runs, key=lambda run: -values[run.name].mean())
    for run in ordered:
        value = values[run.name]
        row = {"run": run.name} | {name: run.settings.get(name) for name in differing(runs)}
        row |= {"epochs": run.epochs, "minutes": round(run.minutes, 1), "images": len(value)}
        row |= {metric: round(value.mean(), 2), "error": round(standard_error(value), 2)}
        row["to the best"] = describe_difference(run, ordered[0], values, chance)
        rows.append(row | file_score(run) | {"leaderboard": notes.get(run.name, "")})
    return pd.DataFrame(rows)


def file_score(run: Run) -> dict[str, float]:
    """{name of the file of --metric: its score}, or {}."""
    path = Path(run.name, "metrics.json")
    block = json.loads(path.read_text()).get("metric") if path.is_file() else None
    return {block["name"]: round(block["score"], 6)} if block else {}


def describe_difference(run: Run, best: Run, values: dict[str, pd.Series], chance: float) -> str:
    """The mean difference with its standard error, or why it tells nothing.

    `values`: of each run by name, see `image_values`. The error is that over the images, and
    `chance`, see `training_chance`, of both runs.
    """
    if run is best:
        return "best"
    if not same_images(run, best):
        return "other images"
    difference = values[run.name] - values[best.name].loc[values[run.name].index]
    error = math.hypot(standard_error(difference), math.sqrt(2) * chance)
    text = f"{difference.mean():+.2f} ± {error:.2f}"
    if same_settings(run, best):
        same_seed = run.settings.get("seed") == best.settings.get("seed")
        return f"{'same settings' if same_seed else 'other seed'} ({text})"
    if not abs(difference.mean()) > SURE * error:  # also of one image
        return f"no difference ({text})"
    return text


def describe_chance(chance: float, freedom: int, table: pd.DataFrame) -> str:
    """How far the differences can be trusted, in a line; "" where there is none to trust."""
    if freedom:
        seeds = f"{freedom} repetition{'s' if freedom > 1 else ''} with another seed"
        return f"chance of a training: ± {chance:.2f}, from {seeds}, is part of each difference"
    told = table["to the best"].str.match(r"[-+]").any()
    again = "repeat the best with --seed 1 (and --fold all: on the same images)"
    return f"one seed each: {again} to tell a gain from chance" if told else ""


def read_notes(path: Path, runs: list[Run]) -> dict[str, Any]:
    """notes.csv, which is written with a line for each new run: {run: leaderboard}."""
    notes = {}
    if path.is_file():
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if list(table.columns) != ["run", "leaderboard"]:
            raise UserError(path, "its columns are not run,leaderboard", "mend its first line")
        notes = dict(zip(table.run, table.leaderboard, strict=True))
    missing = [run.name for run in runs if run.name not in notes]
    if missing:
        notes |= dict.fromkeys(missing, "")
        rows = pd.DataFrame({"run": notes.keys(), "leaderboard": notes.values()})
        write_file(path, rows.to_csv(index=False))
    return notes


def draw(table: pd.DataFrame, path: Path) -> None:
    """The scores with two standard errors, the best on top, as PNG."""
    metric = table.columns[list(table.columns).index("images") + 1]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(table)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(table))
    axes.errorbar(table[metric], rows, xerr=SURE * table.error, fmt="o", color="green", capsize=3)
    axes.set_yticks(rows, table.run)
    axes.invert_yaxis()
    axes.set(xlabel=f"{metric}, %, with two standard errors over images")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


def compare(patterns: list[str], out: str) -> pd.DataFrame:
    """Print the table of runs; write runs.csv, runs.png and notes.csv into `out`. UserError.

    `patterns`: folders, or patterns of them such as tries/*.
    """
    folders = {name: None for text in patterns for name in sorted(glob.glob(text)) or [text]}
    runs = [read_run(Path(name)) for name in folders if Path(name).is_dir() or len(folders) < 2]
    if len(runs) < 2:
        raise UserError("--compare", f"{len(runs)} runs", "name two folders or more")
    folder = writable_folder(out)
    chance, freedom = training_chance(runs, metric_of(runs))
    table = table_of(runs, read_notes(folder / "notes.csv", runs), chance)
    write_file(folder / "runs.csv", table.to_csv(index=False))
    write_file(folder / "runs.png", lambda path: draw(table, path))
    print(table.to_string(index=False))
    note = describe_chance(chance, freedom, table)
    if note:
        print(note)
    ordered = sorted(runs, key=lambda run: list(table.run).index(run.name))
    blend([run for run in ordered if same_images(run, ordered[0])], folder)
    print(f"wrote {folder / 'runs.csv'} and {folder / 'runs.png'}; leaderboard: notes.csv there")
    return table
