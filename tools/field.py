"""Accuracy on held-out images after so many minutes: the kit, recipes of others, rivals."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reports import HERE, Numbers, in_turn, load_report, this_call, write_report

SYSTEMS = {  # that a command compares, and --rivals
    "accuracy": ("tutorial", "example", "kit"),
    "field": ("example", "example512", "kit"),
    "speedrun": ("tutorial", "example", "kit"),
}
MINUTES = (0.5, 1.0, 2.0, 4.0, 6.6, 15.0, 30.0)  # of the speed run, as far as --minutes goes

# --------------------------------------------------------------------------------------------------
#  One system, in a process of its own
# --------------------------------------------------------------------------------------------------


def accuracy_variant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train for `options.minutes` on four fifths, predict the fifth, score it."""
    import peers
    import rivals

    import infer

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        peers.write_split(options.data, root, options.seed)
        if name in rivals.RIVALS:
            split = rivals.load_split(root)
            how = root / "rival", options.minutes, options.seed
            numbers = rivals.train_and_predict(name, split, *how)
            return scores_of(rivals.score(split, root / "rival" / "predicted")) | numbers
        data, out, how = root / "train", root / "out", (options.encoder, options.weights)
        if name == "kit":
            epochs = train_kit(data, out, options)
        else:
            epochs = peers.train_peer(name, data, out, *how, options.minutes, options.seed)
        seconds = time.perf_counter() - started
        test, predictions = root / "test" / "training", root / "predictions"
        paths = {"data": str(test), "out": str(predictions)}
        infer.infer(infer.Options(model=[str(out)], **paths))
        report = json.loads((predictions / "metrics.json").read_text())
    return scores_of(report) | {"epochs": epochs, "seconds": seconds}


def scores_of(report: dict[str, Any]) -> dict[str, float]:
    """The scores of a metrics.json that the tables show."""
    blocks = report["image"]
    if "mIoU" in blocks["all"]:
        block = report["classes"]
        occurring = block["per_class"].keys() - set(block["absent"])
        lowest = min(block["per_class"][name]["IoU"] for name in occurring)
        return {key: blocks["all"][key] for key in ("mIoU", "accuracy")} | {"lowest IoU": lowest}
    scores = {key: blocks["all"][key] for key in ("MaxF", "AP", "IoU50")}
    worst = [one["MaxF"] for category, one in blocks.items() if category != "all"]
    scores |= {"worst category": min(worst)} if worst else {}
    return scores | {f"mean {key}": report["mean"][key] for key in ("Dice", "IoU")}


def train_kit(data: Path, out: Path, options: argparse.Namespace) -> int:
    """Train with the kit's command; returns the number of epochs."""
    flags = ["--encoder", options.encoder, "--encoder_weights", options.weights]
    flags += ["--seed", options.seed, "--max_minutes", options.minutes]
    command = [sys.executable, HERE / "train.py", "--data", data, "--out", out, *flags]
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    return len((out / "metrics.csv").read_text().splitlines()) - 1


# --------------------------------------------------------------------------------------------------
#  Systems compared
# --------------------------------------------------------------------------------------------------


def systems(options: argparse.Namespace) -> tuple[str, ...]:
    """The systems to compare; makes the environments of rivals. Raises UserError."""
    import rivals

    from kit.errors import UserError, closest

    names = options.rivals.split(",") if options.rivals else []
    for name in names:
        if name not in rivals.RIVALS:
            raise UserError(f"--rivals {name}", "is no rival", closest(name, rivals.RIVALS))
        rivals.environment(name)
    return (*SYSTEMS[options.command], *names)


def accuracy(options: argparse.Namespace) -> Numbers:
    """Accuracy on a folder."""
    return in_turn("accuracy", systems(options), options)


def field(options: argparse.Namespace) -> Numbers:
    """Accuracy on every folder."""
    results, names = {}, systems(options)
    for folder in options.data.split(","):
        for name, numbers in in_turn("accuracy", names, options, data=folder).items():
            results[f"{folder} {name}"] = numbers
    return results


def speedrun(options: argparse.Namespace) -> Numbers:
    """Accuracy over the minutes of training; the same call resumes where it was stopped."""
    names, folders = systems(options), options.data.split(",")
    minutes = [number for number in MINUTES if number <= options.minutes]
    rows = [(folder, name, m) for folder in folders for m in minutes for name in names]
    earlier = load_report("speedrun")
    results = earlier["numbers"] if earlier.get("call") == this_call() else {}
    if len(results) == len(rows):
        results = {}
    for row in rows[len(results) :]:
        folder, name, number = row
        numbers = in_turn("accuracy", (name,), options, data=folder, minutes=number)
        results[title(row)] = numbers[name]
        write_report("speedrun", numbers=results)
        draw_speedrun(results, rows)
    return results


def title(row: tuple[str, str, float]) -> str:
    """Folder, system and minutes of the speed run in words."""
    return "{} {} {:g}".format(*row)


def draw_speedrun(results: Numbers, rows: list[tuple[str, str, float]]) -> None:
    """docs/speedrun.png: a panel for each folder, a line for each system.

    The score is MaxF of the held-out images, of exclusive classes mIoU.
    """
    import matplotlib.figure

    folders, names, minutes = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    figure = matplotlib.figure.Figure((6 * len(folders), 3.4), layout="constrained")
    for axes, folder in zip(
        figure.subplots(1, len(folders), squeeze=False)[0], folders, strict=True
    ):
        score = "MaxF"
        for name in names:
            done = [m for m in minutes if title((folder, name, m)) in results]
            numbers = [results[title((folder, name, m))] for m in done]
            score = "mIoU" if numbers and "mIoU" in numbers[0] else score
            random = any(0 in n.get("pretrained", ()) for n in numbers)
            label = name + ", random weights" * random
            axes.plot(done, [statistics.median(n[score]) for n in numbers], "o-", label=label)
        axes.set(xlabel="minutes of training", ylabel=f"{score} of held-out images (%)")
        axes.set_title(Path(folder).name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(minutes, [f"{m:g}" for m in minutes])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(HERE / "docs" / "speedrun.png", dpi=110)
