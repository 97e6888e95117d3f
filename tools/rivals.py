"""Programs that people take seriously, on the same split: each in an environment of its own.

A rival runs as `.venv-NAME/bin/python tools/rivals_NAME.py FOLDER MINUTES SEED`: it trains on what
`Rival.write` wrote to FOLDER and leaves there predicted/NUMBER.png of each test image, at its own
size (8-bit probabilities of one class, label maps of several), and numbers.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from reports import HERE

from kit.config import IGNORE, Classes
from kit.data.images import write_image
from kit.data.samples import find_samples, read_sample
from kit.errors import UserError
from kit.results.metrics import Evaluation

NUMBER = "{:06d}"  # of an image, its name for the rivals


class Split(NamedTuple):
    """What `peers.write_split` wrote."""

    classes: Classes
    train: pd.DataFrame
    test: pd.DataFrame


def load_split(root: Path) -> Split:
    """The samples of a split; the classes are those of the training masks."""
    train = find_samples(str(root / "train" / "training"), training=True)
    test = find_samples(str(root / "test" / "training"), classes=train.classes)
    return Split(train.classes, train.samples, test.samples)


# --------------------------------------------------------------------------------------------------
#  The rivals and their formats
# --------------------------------------------------------------------------------------------------


def write_pngs(
    samples: pd.DataFrame, images: Path, masks: Path | None, suffix: str = "", ignore: int = IGNORE
) -> bool:
    """Write images and masks as NUMBER.png; whether any pixel is ignored.

    Masks are label maps, of one class 0 and 1. `suffix`: of the images' names; `ignore`: the value
    of ignored pixels.
    """
    any_ignored = False
    for folder in filter(None, (images, masks)):
        folder.mkdir(parents=True)
    for number, row in enumerate(samples.itertuples()):
        image, mask = read_sample(row)
        write_image(images / f"{NUMBER.format(number)}{suffix}.png", image)
        if masks:
            mask = mask if mask.ndim == 2 else mask[0]
            any_ignored |= bool((mask == IGNORE).any())
            mask = np.where(mask == IGNORE, ignore, mask).astype(np.uint8)
            write_image(masks / f"{NUMBER.format(number)}.png", mask)
    return any_ignored


def write_ultralytics(split: Split, folder: Path) -> None:
    """A semantic dataset; every tenth training image is kept to choose the best epoch."""
    chosen = np.arange(len(split.train)) % 10 == 0
    for name, part in (("train", split.train[~chosen]), ("val", split.train[chosen])):
        write_pngs(part, folder / "images" / name, folder / "masks" / name)
    write_pngs(split.test, folder / "images" / "test", None)
    parts = {"train": "images/train", "val": "images/val", "masks_dir": "masks"}
    data = {"path": str(folder), **parts, "names": dict(enumerate(split.classes.names))}
    (folder / "data.yaml").write_text(json.dumps(data))  # JSON is YAML


def write_nnunet(split: Split, folder: Path) -> None:
    """A raw dataset of nnU-Net: class 0 is its background, the highest label is ignored."""
    dataset, names = folder / "raw" / "Dataset001_split", split.classes.names
    names = [str(number) for number in range(1, len(names))] or ["foreground"]
    labels = {name: number for number, name in enumerate(["background", *names])}
    folders = dataset / "imagesTr", dataset / "labelsTr"
    if write_pngs(split.train, *folders, suffix="_0000", ignore=len(labels)):
        labels["ignore"] = len(labels)
    write_pngs(split.test, folder / "test", None, suffix="_0000")
    content = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": labels}
    content |= {"numTraining": len(split.train), "file_ending": ".png"}
    (dataset / "dataset.json").write_text(json.dumps(content))


class Rival(NamedTuple):
    """A program: its package with the version that was tried, and how its data is written."""

    package: str
    write: Callable[[Split, Path], None]


RIVALS = {
    "ultralytics": Rival("ultralytics==8.4.190", write_ultralytics),
    "nnunet": Rival("nnunetv2==2.8.1", write_nnunet),
}

# --------------------------------------------------------------------------------------------------
#  Run and score
# --------------------------------------------------------------------------------------------------


def environment(name: str) -> Path:
    """The Python of .venv-NAME, which the first call makes. Raises UserError."""
    folder, package = HERE / f".venv-{name}", RIVALS[name].package
    python, finished = folder / "bin" / "python", folder / package
    if finished.exists():
        return python
    print(f"installing {package} into {folder} (minutes, several GB) ...", file=sys.stderr)
    pip = [python, "-m", "pip", "install", "--quiet", package]
    for command in ([sys.executable, "-m", "venv", "--clear", folder], pip):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr or done.stdout or "no reason given").strip().splitlines()[-1]
            problem = f"{package} could not be installed: {reason}"
            raise UserError(f"--rivals {name}", problem, "it needs the package index, and 6 GB")
    finished.touch()
    return python


def train_and_predict(
    name: str, split: Split, folder: Path, minutes: float, seed: int
) -> dict[str, float]:
    """Let a rival train for so many minutes and predict the test images; see the file's docstring.

    Returns its numbers: epochs, the seconds of all that precedes its predictions, and whether its
    weights were pretrained (1 or 0). Raises CalledProcessError.
    """
    RIVALS[name].write(split, folder)
    python, driver = environment(name), HERE / "tools" / f"rivals_{name}.py"
    command, home = [python, driver, folder, minutes, seed], python.parents[1]
    settings = os.environ | {"YOLO_CONFIG_DIR": str(home)}  # and there lie weights that it fetches
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr, cwd=home, env=settings)
    return json.loads((folder / "numbers.json").read_text())


def score(split: Split, predicted: Path) -> dict[str, Any]:
    """The kit's metrics.json of a rival's predictions, which is written next to them.

    Foreground are probabilities from 0.5 on.
    """
    evaluation = Evaluation(split.classes)
    for number, row in enumerate(split.test.itertuples()):
        file = predicted / f"{NUMBER.format(number)}.png"
        prediction = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        target = read_sample(row)[1]
        assert prediction.shape == target.shape[-2:], file
        mask = prediction if split.classes.exclusive else prediction[None] >= 128
        evaluation.add(row, prediction[None], mask, target)
    evaluation.write(predicted, () if split.classes.exclusive else (0.5,))
    return json.loads((predicted / "metrics.json").read_text())
