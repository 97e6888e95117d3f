"""Pseudo-labels: predictions of infer.py --save_probs true as further images to train on.

Confident pixels are labels, the others are ignored. Extras always train and never validate: their
fold is -1. A model that made them must not have seen the images that validate.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.config import IGNORE, Classes, ModelConfig
from kit.data.blocks import cut_into_blocks
from kit.data.classes import mask_folders, palette
from kit.data.folders import Collection
from kit.data.masks import LabelMap, MaskFile, Opener, Planes
from kit.data.rasters import Layer, reduce_mask
from kit.data.readers import open_image
from kit.data.samples import complete, scan
from kit.errors import UserError, first_five, reason_of
from kit.files import write_file

LIST = "probs.json"  # next to probs/: what was predicted, and by what
CONFIDENT = 0.9  # a pixel is labelled from this probability on, at temperature 1
AGAIN = "predict again with infer.py --save_probs true"
FOLD = -1  # of extras

# --------------------------------------------------------------------------------------------------
#  Written by infer.py
# --------------------------------------------------------------------------------------------------


def write_list(
    out: Path, samples: pd.DataFrame, config: ModelConfig, seen: Iterable[Iterable[str]]
) -> None:
    """Write the list of predicted images; `seen`: by each model, see `seen_images`."""
    images = {}
    for row in samples.itertuples():
        is_file = len(row.layers) == 1 and row.layers[0].page < 0
        images[row.id] = os.path.abspath(row.layers[0].path) if is_file else ""
    seen = [list(names) for names in seen]
    content = {
        "classes": config.classes,
        "thresholds": config.thresholds or (0.5,),
        "temperature": config.temperature,
        "seen": sorted(set().union(*seen)) if all(seen) else None,  # of old models none knows
        "images": images,
    }
    write_file(out / LIST, json.dumps(content, indent=1))


def image_digests(samples: pd.DataFrame) -> dict[str, str]:
    """{digest of id and mask: id} of samples of `scan`; 12 hexadecimal digits."""
    texts = {f"{row.id} {row.digest}": row.id for row in samples.itertuples()}
    return {sha256(text.encode()).hexdigest()[:12]: name for text, name in texts.items()}


def seen_images(samples: pd.DataFrame, fold: Any, extra: str) -> list[str]:
    """The digests of all images that train, and of those that the models behind --extra saw."""
    trains = samples[(samples.fold != fold) & (samples.fold != FOLD)]
    earlier = read_list(extra, fold)["seen"] if extra else []
    return sorted({*image_digests(trains), *earlier})


# --------------------------------------------------------------------------------------------------
#  Read by train.py --extra
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfidentPixels(MaskFile):
    """A file of 8-bit probabilities: what is neither foreground nor background is ignored."""

    low: int = 0  # background up to this level
    high: int = 255  # foreground from this level on

    def read(self, size: tuple[int, int], opener: Opener = open_image) -> np.ndarray:
        """(h, w) uint8 of 0, 1 and 255. Raises UserError."""
        size = (self.window.height, self.window.width) if self.window else size
        (levels,) = self.pixels(size, opener)
        mask = np.where(levels >= self.high, 1, np.where(levels <= self.low, 0, IGNORE))
        return reduce_mask(mask.astype(np.uint8), self.window)


@dataclass(frozen=True)
class ConfidentLabels:
    """A label map, ignored where its probabilities are not sure."""

    labels: LabelMap
    sure: ConfidentPixels

    @property
    def path(self) -> Path:
        """The file of the label map."""
        return self.labels.path

    source = path

    def read(
        self, size: tuple[int, int], opener: Opener = open_image, soft: bool = False
    ) -> np.ndarray:
        """(h, w) uint8: the number of the class, from 0; 255 ignored. Raises UserError."""
        labels = self.labels.read(size, opener)
        return np.where(self.sure.read(size, opener) == 1, labels, IGNORE).astype(np.uint8)


def confident_levels(threshold: float, temperature: float) -> tuple[int, int]:
    """The highest level of the background and the lowest of the foreground, 0..255.

    Probabilities p in files are sigmoid(logit / temperature); the threshold of these, where the
    model sees no difference, becomes 0.5. Of a softmax, where p is the most probable class's, this
    is a lower bound: exact where a single other class has the rest.
    """
    middle = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else 0.0
    step = math.log(CONFIDENT / (1 - CONFIDENT)) / temperature
    low, high = (255 / (1 + math.exp(-(middle + side * step))) for side in (-1, 1))
    return math.floor(low), math.ceil(high)


def read_list(extra: str, fold: Any) -> dict[str, Any]:
    """What `write_list` wrote in --extra, or in its folder of a fold; with `place`: the folder.

    Raises UserError where it is missing, or damaged.
    """
    own = Path(extra) / f"fold{fold}"
    place = own if own.is_dir() else Path(extra)
    try:
        content = json.loads((place / LIST).read_text(encoding="utf-8"))
        content["classes"] = Classes(*map(tuple, content["classes"][:2]), content["classes"][2])
        assert {"seen", "images", "temperature", "thresholds"} <= {*content}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
        problem = f"has no {LIST} ({reason_of(error)})"
        raise UserError(f"--extra {place}", problem, AGAIN) from None
    return content | {"place": place}


def add(
    collection: Collection, folds: list[int], extra: str, scale: float, opener: Opener = open_image
) -> dict[int, pd.DataFrame]:
    """{fold: the samples of `samples.load` with those of --extra}; they decide nothing else.

    Raises UserError, also where a model behind them has seen the images that validate.
    """
    samples = collection.samples
    if not extra:
        return dict.fromkeys(folds, samples)
    lists = {fold: read_list(extra, fold) for fold in folds}
    for fold, content in lists.items():
        check(content, collection, fold)
    tables = {}
    for fold, content in lists.items():
        rows = leave_out_own(mask_rows(content), samples, content["place"])
        rows = cut_into_blocks(complete(rows, samples.layers[0][0].channels), scale, reduced=True)
        rows = scan(rows, content["classes"], opener).assign(fold=FOLD, group="", why="--extra")
        share = f"{100 * rows.share.mean():.1f} % of their pixels "
        share += "labelled" if content["classes"].exclusive else "foreground"
        print(f"extra: {content['place']} · {len(rows)} images, {share}", flush=True)
        tables[fold] = pd.concat([samples, rows], ignore_index=True)
    return tables


def leave_out_own(rows: pd.DataFrame, samples: pd.DataFrame, place: Path) -> pd.DataFrame:
    """Without the images that are in the data, too, or copies of them. Raises UserError for all."""
    own = set(map(file_key, {layers[0].path for layers in samples.layers}))
    known = np.array([file_key(path) in own for path in rows.image])
    if known.all():
        raise UserError(f"--extra {place}", "all its images are in --data", "predict others")
    if known.any():
        print(f"extra: {known.sum()} of {len(rows)} images are in --data, left out", flush=True)
    return rows[~known].reset_index(drop=True)


def file_key(path: Path) -> tuple[int, int]:
    """A file's length and the checksum of its start: equal for copies."""
    with path.open("rb") as file:
        return os.path.getsize(path), zlib.crc32(file.read(1 << 16))


def check(content: dict[str, Any], collection: Collection, fold: int) -> None:
    """Raise UserError for extras that cannot train with this fold."""
    where, samples, images = f"--extra {content['place']}", collection.samples, content["images"]
    own, theirs = collection.classes, content["classes"]
    if (own.names, own.exclusive) != (theirs.names, theirs.exclusive):
        raise UserError(where, f"has {theirs.describe()}, --data has {own.describe()}", AGAIN)
    if not all(images.values()) or len(samples.layers[0]) > 1:
        problem = "an image of it, or of --data, is of several files or pages"
        raise UserError(where, problem, "extras are images of one file each")
    gone = [path for path in images.values() if not Path(path).is_file()]
    if gone or not images:
        problem = f"{len(gone)} of {len(images)} images are gone: {first_five(gone)}"
        raise UserError(where, problem, f"{AGAIN} where they are now")
    validates = image_digests(samples[samples.fold == fold])
    if content["seen"] is None:
        problem = "predicted by a model that does not know what it was trained on"
        raise UserError(where, problem, "train that again with this version")
    seen = [name for digest, name in validates.items() if digest in set(content["seen"])]
    if seen:
        problem = f"its models were trained on {len(seen)} of the {len(validates)} images that "
        problem += f"validate in fold {fold}: {first_five(seen)}"
        remedy = f"predict with the model of fold {fold} of the same --folds and --seed alone"
        raise UserError(where, problem, f"{remedy}, for --fold all into {{DIR}}/fold{fold}")


def mask_rows(content: dict[str, Any]) -> pd.DataFrame:
    """A row for each image, with its mask. Raises UserError where a file is missing."""
    place, classes, rows = content["place"], content["classes"], []
    levels = [confident_levels(t, content["temperature"]) for t in content["thresholds"]]
    for name, path in content["images"].items():
        files = [place / "probs" / folder / f"{name}.png" for folder in mask_folders(classes)]
        sure = [
            ConfidentPixels(file, low=low, high=high)
            for file, (low, high) in zip(files, levels, strict=True)
        ]
        mask = Planes(tuple(sure))
        if classes.exclusive:
            files.append(place / "masks" / f"{name}.png")
            labels = tuple(palette(classes)[0].tolist())
            mask = ConfidentLabels(LabelMap(MaskFile(files[-1]), "index", labels), sure[0])
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"--extra {place}", f"{missing[0]} is missing", AGAIN)
        image = Path(path)
        rows.append({"id": f"extra_{name}", "image": image, "layers": (Layer(image),)})
        rows[-1]["mask"] = mask
    return pd.DataFrame(rows)
