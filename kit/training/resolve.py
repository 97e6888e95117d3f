"""Resolve: every decision that follows from device and data, made once for each fold."""

import json
import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment

from kit.config import TUNED, Classes, ModelConfig, plane_settings, symmetries_to_try
from kit.data.blocks import is_part
from kit.data.folders import Collection
from kit.data.folds import describe_folds
from kit.data.images import shown_channels
from kit.data.readers import measure_statistics
from kit.data.samples import describe
from kit.errors import UserError, reason_of
from kit.network.encoders import (
    flagged,
    normalisation,
)
from kit.network.model import (
    best_device,
    resolve_precision,
    weights_file,
)
from kit.training import loggers, losses
from kit.training.trial import PRETRAINED_LR, try_network

# of an input, where neither the user nor the data ask for others
INPUT_PIXELS = {"cuda": 384 * 1248, "mps": 192 * 640, "cpu": 72 * 320, "cpu bf16": 112 * 352}
TILES_FROM = 2e6  # pixels of the median image
# Pixels of the input that the thinnest parts of masks need. Membranes of six pixels gained two
# points of Dice in tiles, over whole images in which they had three (docs/results.md).
THINNEST = 6.0
LARGER = 4.0  # times as many pixels as the device takes well
Size = tuple[int, int]  # height, width

# --------------------------------------------------------------------------------------------------
#  All decisions
# --------------------------------------------------------------------------------------------------


def resolve(
    config: Any, collection: Collection, fold: int | str, resolutions: tuple[tuple, ...]
) -> tuple[Any, ModelConfig]:
    """Make all decisions for one fold; only the learning rate may stay "auto". Raises UserError.

    `config` and `resolutions`: of train.py. Returns the settings and those of the model.
    """
    samples, classes, every = collection.samples, collection.classes, config.fold == "all"
    device, training = best_device(), samples[samples.fold != fold]
    check_moves(config, collection, fold)
    precision = resolve_precision(config.precision, device, training=True)
    config = follow_run(config) if fold == "none" else config
    if config.init:
        config = replace(config, encoder_weights=weights_file(config.init))
    pretrained = config.encoder_weights != "none"
    minutes = config.max_minutes / (samples.fold.nunique() if every else 1)
    default = INPUT_PIXELS["cpu bf16" if is_fast_cpu(device, precision) else device]
    larger = larger_input(device, minutes, pretrained, classes.exclusive)
    shape, small = resolve_input(config, collection, fold, default, larger * default)
    workers = 0 if device == "cpu" else min(4, os.cpu_count() or 1)  # a CPU is the network's
    weights = "inverse" if classes.exclusive else "none"  # mIoU counts rare classes like others
    resolved = replace(
        config,
        **shape,
        fold=fold,
        out=f"{config.out}/fold{fold}" if every else config.out,
        # of all folds the first one has started over for the others
        resume=config.resume if fold == samples.fold.min() or not every else "auto",
        max_minutes=minutes,
        rle=collection.rle,
        classes=",".join(classes.names) if classes.several else "one",
        channels=",".join(collection.bands) or named_channels(collection),
        class_weights=weights if config.class_weights == "auto" else config.class_weights,
        epochs=config.epochs or (0 if config.max_minutes else 40),
        batch_size=resolve_batch(config, device, precision, small, training, shape),
        grow=not pretrained if config.grow == "auto" else config.grow,
        flips="h" if config.flips == "auto" else config.flips,
        metric=collection.metric if config.metric == "auto" else config.metric,
        precision=precision,
        devices=resolve_devices(config.devices, device),
        workers=workers if config.workers < 0 else config.workers,
    )
    model_config = make_model_config(resolved, collection, config.precision)
    free, scales = (config.height == 0, config.width == 0), [scale for _, scale in resolutions]
    return try_network(resolved, model_config, training, free, scales)


def check_flags(config: Any) -> None:
    """Raise UserError for flags that do not go together, or need what is not installed."""
    losses.parse(config.loss, config.soft)
    loggers.check(config.logger)
    if config.fold == "all" and config.resume not in ("auto", "none"):
        raise UserError(f"--resume {config.resume}", "needs one --fold", "take auto")


def check_moves(config: Any, collection: Collection, fold: int) -> None:
    """Say where --positives changes nothing. Raises UserError for what the data does not allow."""
    if "," in config.stages and (not config.extra or config.epochs == 1):
        problem = "there is one epoch" if config.extra else "there are no extras"
        remedy = "give --epochs 2 or more" if config.extra else "name some with --extra"
        raise UserError(f"--stages {config.stages}", problem, f"{remedy}, or take mixed")
    for name in ("positives", "presence"):
        if getattr(config, name) and collection.classes.exclusive:
            problem, remedy = "no image is empty, each has some of the classes", "leave it out"
            raise UserError(f"--{name} {getattr(config, name)}", problem, remedy)
    if config.positives:
        filled = collection.samples.share[collection.samples.fold != fold] > 0
        if filled.nunique() == 1:
            which = "all images have" if filled.all() else "no image has"
            print(f"--positives: changes nothing, {which} foreground", flush=True)


def resolve_input(
    config: Any, collection: Collection, fold: int, default: float, at_least: float
) -> tuple[dict[str, Any], float]:
    """The input's height, width, top and tiles; and how many times it could be larger.

    `default`: pixels that the device takes well; `at_least`: unless the images are smaller.
    """
    samples = collection.samples
    tiles, pixels = resolve_detail(samples, config.tiles, default, config.height or config.width)
    pixels, top = max(pixels, at_least), resolve_top(config.top, tiles, collection, fold)
    median = samples.height.median() * (1 - top), samples.width.median()
    height, width = fit_size(*median, pixels)
    height, width = config.height or height, config.width or width
    shape = {"height": height, "width": width, "top": top, "tiles": tiles}
    return shape, pixels / (height * width)


def make_model_config(resolved: Any, collection: Collection, precision: str) -> ModelConfig:
    """The settings of the model; `precision`: the user's, which inference resolves by itself."""
    classes = collection.classes
    shared = {field.name for field in fields(ModelConfig)} & set(asdict(resolved))
    weights = "none" if resolved.check else resolved.encoder_weights
    with flagged(resolved.init):
        statistics = normalisation(resolved.arch, resolved.encoder, weights)
    settings = {name: getattr(resolved, name) for name in shared} | {
        "channels": collection.channels,
        "bands": collection.bands,
        "neighbours": collection.neighbours,
        "show": shown_channels(resolved.show, collection.channels),
        "precision": precision,
        "instances": collection.instances,
        "value_range": collection.value_range,
        "class_names": classes.names,
        "class_values": classes.values,
        "exclusive": classes.exclusive,
        **plane_settings(classes, area=max(0, resolved.min_pixels)),
        **(tuned_settings(resolved, classes) if resolved.fold == "none" else {}),
        **statistics,
    }
    if not is_rgb(collection):
        training = collection.samples[collection.samples.fold != resolved.fold]
        count, limits = collection.channels, collection.value_range
        settings |= measure_statistics(training.layers.tolist(), count, limits)
    return ModelConfig(**settings)


def read_run(path: str) -> dict[str, Any]:
    """The config.json of a run; without a path nothing."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def follow_run(config: Any) -> Any:
    """For --fold none as many epochs as the run of --config made, whose minutes they took."""
    run = read_run(config.config)
    epochs = config.epochs or run.get("epochs_done", 0)
    if not epochs:
        return config
    minutes = 0 if config.max_minutes == run.get("max_minutes") else config.max_minutes
    return replace(config, epochs=epochs, max_minutes=minutes)


def tuned_settings(resolved: Any, classes: Classes) -> dict[str, tuple]:
    """For --fold none what the run of --config found, see `TUNED`. Raises UserError.

    The user's --min_pixels counts more. Says what is taken over, or that there is nothing.
    """
    run, where = read_run(resolved.config), f"--config {resolved.config}"
    kinds = {"class_names": classes.names, "class_values": classes.values}
    kinds |= {"exclusive": classes.exclusive, **plane_settings(classes)}
    try:
        found = {name: tuple(run[name]) for name in (*TUNED, "symmetries") if name in run}
        ModelConfig(**kinds | found)
    except (TypeError, ValueError) as error:
        problem = f"does not fit {classes.describe()} ({reason_of(error)})"
        raise UserError(where, problem, "name the config.json of a run like this one") from None
    if resolved.min_pixels >= 0:
        found.pop("areas", None)
    own = {"class_names": list(classes.names), "scale": resolved.scale}
    other = [name for name, value in own.items() if found and run.get(name, value) != value]
    if other:
        problem = f"what its run found is of another {other[0]}: {run[other[0]]}"
        raise UserError(where, problem, "name the config.json of a run like this one")
    source = f"{', '.join(name for name in found if any(found[name]))} of {resolved.config}"
    if not found:
        source = "threshold 0.5, nothing tells a better one (--config out/config.json of a run)"
    epochs = f"epochs {resolved.epochs}" if resolved.epochs else f"minutes {resolved.max_minutes:g}"
    print(f"--fold none: {epochs}, {source}; no scores, no validation.jpg: nothing is held out")
    return found


def named_channels(collection: Collection) -> str:
    """The channels of a slice as --channels has them; rgb for colours, or three equal ones.

    Of 8 bits: albumentations changes colours in no other.
    """
    slices = 2 * len(collection.neighbours) + 1
    colours = is_rgb(collection) and not collection.value_range
    return "rgb" if colours else str(collection.channels // slices)


def is_rgb(collection: Collection) -> bool:
    """Whether the channels are red, green and blue, or three equal ones."""
    return collection.channels == 3 and not collection.neighbours and not collection.bands


def resolve_top(top: float | str, tiles: bool, collection: Collection, fold: int) -> float:
    """The share of the height that is cut off at the top; -1: down to the highest training mask.

    Tiles cover whole images. Raises UserError for a `top` of the user's with tiles.
    """
    if tiles and top not in ("auto", 0):
        raise UserError(
            f"--top {top}",
            "the images are cut into tiles, which cover all of their height",
            "take --tiles false, or leave --top out",
        )
    if tiles:
        return 0.0
    top = collection.top if top == "auto" else top
    if top >= 0:
        return top
    samples = collection.samples
    highest = float(samples.above[samples.fold != fold].min())
    return min(0.9, round(highest - 0.05, 2)) if 0.15 < highest < 1 else 0.0  # less is not worth it


def resolve_detail(
    samples: pd.DataFrame, tiles: bool | str, pixels: float, given: int
) -> tuple[bool, float]:
    """Whether images are cut into tiles, and the pixels of an input; the device likes `pixels`.

    Unless a height or width is `given`, the thinnest parts of the masks stay `THINNEST` pixels
    wide: by a larger input, or by tiles where it would be over `LARGER` times as large. Blocks are
    cut into tiles. `tiles`: the user's choice, or "auto".
    """
    area = float((samples.height * samples.width).median())
    outlined = samples.thickness[samples.thickness > 0]
    scale = min(1.0, THINNEST / outlined.median()) if len(outlined) and not given else 0.0
    needed = area * scale**2
    if tiles == "auto":
        cut = samples.block.map(is_part).any()
        tiles = bool(cut or area > TILES_FROM or needed > LARGER * pixels)
    return tiles, 2 * pixels if tiles else max(pixels, needed)


def fit_size(height: float, width: float, pixels: float) -> Size:
    """The size in steps of 32 that keeps the shape within so many pixels; not enlarged."""
    scale = min(1.0, math.sqrt(pixels / (height * width)))
    return tuple(max(32, 32 * round(length * scale / 32)) for length in (height, width))


# --------------------------------------------------------------------------------------------------
#  Reasons, for config.json
# --------------------------------------------------------------------------------------------------


def reasons(config: Any, resolved: Any, collection: Collection) -> dict[str, str]:
    """{setting: why it has its value}: what `resolve` chose, what the end tunes, the data."""
    samples, device = collection.samples, best_device()
    thin = samples.thickness[samples.thickness > 0].median()
    image = f"images of {samples.height.median():.0f}x{samples.width.median():.0f}"
    lr = "pretrained weights and BatchNorm" if resolved.lr == PRETRAINED_LR else "usual for AdamW"
    images = f"of {(samples.fold == resolved.fold).sum()} validation images"
    tuned = f"best {resolved.metric} {images}"
    if resolved.fold == "none":
        tuned = f"as in {resolved.config}" if resolved.config else "no image validates"
    texts = {
        "height": f"{image}, what this {device} and the minutes allow, the steps of the network",
        "width": "see height",
        "top": f"masks begin at {samples.above.min():.2f} of the height",
        "tiles": f"{image}, thinnest parts of masks {thin:.1f} pixels",
        "decoder_channels": "fewer next to a light encoder, else 1: smp's own",
        "epochs": tuned if resolved.fold == "none" else "40 where there are no minutes either",
        "batch_size": f"this {device}, the size of the input, the number of images",
        "lr": lr,
        "grow": "trained from scratch" if resolved.grow else "pretrained, or the network refuses",
        "class_weights": f"classes that {collection.classes.kind}",
        "metric": f"what {collection.name} is scored by",
        "precision": f"the fastest that this {device} computes",
    }
    texts = {k: text for k, text in texts.items() if getattr(config, k) != getattr(resolved, k)}
    length = resolved.tta, resolved.max_minutes, resolved.height, resolved.width
    tried = "those that gain beyond two errors, h unless it harms"
    texts["symmetries"] = f"{tuned}: {tried}" if symmetries_to_try(*length) else "h: none was tried"
    texts |= {"data": describe(collection).removeprefix("data: ")}
    texts |= {"fold": describe_folds(samples, resolved.fold)}
    if not collection.classes.exclusive:
        texts["thresholds"] = f"{tuned}, the nearest to 0.5 that is as good within two errors"
        if resolved.metric not in ("maxf", "miou"):
            names = [name for name in TUNED if name != "areas" or resolved.min_pixels < 0]
            texts = dict.fromkeys(names, f"{tuned}, kept where it gains beyond two errors") | texts
    return texts


# --------------------------------------------------------------------------------------------------
#  Defaults of the device
# --------------------------------------------------------------------------------------------------


def larger_input(device: str, minutes: float, pretrained: bool, exclusive: bool) -> float:
    """How many times the default pixels an input has; `minutes`: of the training, 0: no limit.

    On a CPU small inputs learn sooner. From ImageNet's weights twice the default was better than
    the default at 2 minutes, over five times was better than twice at 30 (docs/results.md).
    """
    if device == "cpu" and pretrained:
        return min(6.0, max(2.0, minutes / 5.5))
    return 2.0 if exclusive else 1.0


def is_fast_cpu(device: str, precision: str) -> bool:
    """Whether a CPU computes in bf16, three times as fast."""
    return device == "cpu" and precision == "bf16-mixed"


def resolve_batch(
    config: Any,
    device: str,
    precision: str,
    small: float,
    training: pd.DataFrame,
    shape: dict[str, Any],
) -> int:
    """--batch_size, or its default for these images.

    Few images, or tiles, make batches of 4: with twice the steps they learned more in the same
    epochs (docs/results.md). With --extra they are not few. On a CPU it is larger where inputs are
    small, `small` times under the default, but leaves an epoch a hundred steps.
    """
    if config.batch_size:
        return config.batch_size
    area = float((training.height * training.width).median())
    tiles = max(1.0, area / (shape["height"] * shape["width"])) if shape["tiles"] else 1.0
    count = round(tiles * len(training))
    fast, many = device != "cpu" or is_fast_cpu(device, precision), count >= 128 or config.extra
    size = 8 if fast and many else 4
    if device == "cpu":
        size *= max(1, min(round(small), 16 // size, count // 100 // size))
    return size


def resolve_devices(devices: int, device: str) -> int:
    """How many processes train together: torchrun's, else as many as there are GPUs, at most."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"])
    count = torch.cuda.device_count() if device == "cuda" else devices
    if devices > count:
        print(f"--devices {devices}: there is only {count}, which is used", flush=True)
    return min(devices, count)


def class_weights(table: pd.DataFrame, fold: int, kind: str) -> torch.Tensor | None:
    """A weight for each class in the loss, from the images that train; None for all alike.

    "inverse": one by the class's share of the pixels, which counts as a thousandth at least. The
    mean weight of a pixel is 1. A class without pixels has the weight 0.
    """
    if kind == "none":
        return None
    own = table[(table.fold != fold) & (table.fold >= 0)]  # extras lack their uncertain pixels
    share = np.array(own.shares.tolist()).mean(0)
    weight = np.where(share > 0, 1 / np.maximum(share, 1e-3), 0)
    mean = (weight * share).sum() / share.sum()
    return torch.tensor(weight / mean, dtype=torch.float32)
