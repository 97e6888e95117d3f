"""From images to probabilities and masks: TTA, tiles, ensembles, `postprocess`."""

import functools
import itertools
import json
import operator
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kit.config import TUNED, ModelConfig
from kit.data.blocks import shrink_of
from kit.data.images import (
    cut_tile,
    normalise,
    resize_image,
    restore,
    tile_corners,
    to_tensor,
)
from kit.data.rasters import Window, enlarge, reduce_values
from kit.data.readers import read_image
from kit.errors import UserError, first_five, reason_of
from kit.network.model import TrainedModel, autocast, load_model, resolve_precision

# --------------------------------------------------------------------------------------------------
#  Probabilities to masks
# --------------------------------------------------------------------------------------------------


def postprocess(prediction: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The mask of a prediction, see `to_prediction`, with the model's thresholds and areas.

    Planes, uint8 (K, h, w), become bool (K, h, w), see `plane_mask`. Exclusive classes: a label
    map, uint8 (h, w), of the most probable class.
    """
    if config.exclusive:
        return prediction[0]
    return np.stack([plane_mask(plane, config, k) for k, plane in enumerate(prediction)])


def plane_mask(plane: np.ndarray, config: ModelConfig, k: int) -> np.ndarray:
    """The mask, bool (h, w), of a class's probabilities, uint8 (h, w).

    From the threshold on; empty where too few pixels are sure; cleaned, without small components.
    """
    mask = plane >= level_of(config.thresholds[k])
    if config.presence_levels:
        sure = np.count_nonzero(plane >= level_of(config.presence_levels[k]))
        mask &= sure >= config.presence_areas[k]
    for step in steps_of(config, k):
        name, _, size = step.partition(" ")
        mask = STEPS[name](mask, int(size or 0)) if mask.any() else mask
    return remove_small(mask, config.areas[k])


def steps_of(config: ModelConfig, k: int) -> list[str]:
    """The steps that clean the masks of a class, such as ["fill", "open 3"]."""
    return config.plans[k].split(", ") if config.plans and config.plans[k] else []


def level_of(probability: float) -> int:
    """The lowest of the 256 levels that a probability takes in; k/255 takes in the level k."""
    return int(np.ceil(probability * 255 - 1e-6))


def change_shape(kind: int, mask: np.ndarray, size: int) -> np.ndarray:
    """OpenCV's opening or closing, with a disc of so many pixels."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.morphologyEx(mask.astype(np.uint8), kind, disc) == 1


def fill_holes(mask: np.ndarray, _: int) -> np.ndarray:
    """All that the outlines of the components enclose."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), outlines, -1, 1, cv2.FILLED) == 1


def keep_largest(mask: np.ndarray, _: int) -> np.ndarray:
    """The largest component alone."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


STEPS = {  # of `ModelConfig.plans`: from a mask, bool (h, w), and a size to a cleaner one
    "fill": fill_holes,
    "close": functools.partial(change_shape, cv2.MORPH_CLOSE),
    "open": functools.partial(change_shape, cv2.MORPH_OPEN),
    "largest": keep_largest,
}


def remove_small(mask: np.ndarray, min_pixels: int) -> np.ndarray:
    """A mask, bool (h, w), without its connected components of fewer than `min_pixels` pixels."""
    if min_pixels < 2 or not mask.any():
        return mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    large = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    return mask & large[labels]


def describe_masks(config: ModelConfig) -> str:
    """How `postprocess` makes masks, for people."""
    if config.exclusive:
        return "the most probable class"
    several, texts = config.classes.several, []
    for k, name in enumerate(config.class_names):
        threshold, area = config.thresholds[k], config.areas[k]
        texts.append(f"threshold {threshold:.3f}, minimum component area {area} pixels")
        if several:
            texts[-1] = f"{name} from {threshold:.3f}, {area} pixels"
        if config.presence_levels:
            sure = f"{config.presence_areas[k]} pixels reach {config.presence_levels[k]:.3f}"
            texts[-1] += f", empty unless {sure}"
        if config.plans and config.plans[k]:
            texts[-1] += f", cleaned: {config.plans[k]}"
    return f"thresholds and minimum areas: {first_five(texts)}" if several else texts[0]


# --------------------------------------------------------------------------------------------------
#  Logits to probabilities
# --------------------------------------------------------------------------------------------------


def to_probabilities(output: Any, config: ModelConfig) -> torch.Tensor:
    """What `model.build_network`'s network gives to probabilities (N, K, H, W) float32.

    Where it also tells whether an image has a class, this probability times a pixel's. The
    temperature softens them, so that 8 bits still tell nearly sure from sure. A threshold of
    0.5 gives the same mask with any temperature.
    """
    logits, *presence = output if config.presence else (output,)
    logits = logits.float() / config.temperature
    probabilities = logits.softmax(1) if config.exclusive else logits.sigmoid()
    for of_image in presence:
        probabilities *= of_image.float().sigmoid()[..., None, None]
    return probabilities


def to_prediction(probabilities: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Probabilities (K, h, w) as uint8 (K, h, w), rounded, as the KITTI Road measures take them.

    Of exclusive classes (2, h, w): the number of the most probable class, and its probability.
    """
    if not config.exclusive:
        return (probabilities * 255).round().byte()
    best, number = probabilities.max(0)
    return torch.stack([number.byte(), (best * 255).round().byte()])


def turned(images: torch.Tensor, symmetry: str, back: bool = False) -> torch.Tensor:
    """Images (..., H, W) under a symmetry of `ModelConfig.symmetries`, or `back` to their own."""
    turns = int(symmetry.strip("hv") or 0) // 90
    axes = [axis for name, axis in (("h", -1), ("v", -2)) if name in symmetry]
    if back:
        return images.flip(axes).rot90(-turns, (-2, -1))
    return images.rot90(turns, (-2, -1)).flip(axes)


def chosen_symmetries(config: ModelConfig, tta: str) -> tuple[str, ...]:
    """What `tta` averages over next to the image itself; auto is as trained."""
    if tta == "true":
        return config.symmetries or ("h",)
    return config.symmetries if tta == "auto" and config.tta else ()


@torch.inference_mode()
def predict_inputs(
    model: TrainedModel, images: torch.Tensor, symmetries: tuple[str, ...] = ()
) -> torch.Tensor:
    """(N, C, H, W) of 0..255 to probabilities (N, K, H, W) float32 on the model's device.

    They are the mean over the images and those under `symmetries`, see `turned`. Where the device's
    memory runs out, half of the images at a time. Raises UserError where it cannot hold one.
    """
    device, config = model.device, model.config
    try:
        inputs = normalise(images.to(device), config)
        with autocast(resolve_precision(config.precision, device.type), device.type):
            result = to_probabilities(model.network(inputs), config)
            for symmetry in symmetries:
                output = model.network(turned(inputs, symmetry))
                result.add_(turned(to_probabilities(output, config), symmetry, back=True))
        return result.div_(1 + len(symmetries)) if symmetries else result
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise UserError(
                f"the {device.type}'s memory",
                "cannot hold one image of {}x{}".format(*images.shape[2:]),
                "train with smaller --height and --width",
            ) from None
    print_once(f"out of memory with {len(images)} images at a time: continues with half of them")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return torch.cat([predict_inputs(model, half, symmetries) for half in images.tensor_split(2)])


@functools.cache
def print_once(text: str) -> None:
    """Print a line, the first time."""
    tqdm.write(text)


# Part of the probabilities of an image: its first class, its first row, and (k, n, w) float32.
# So that 150 classes of an image are never in memory at once.
Block = tuple[int, int, torch.Tensor]
CHANNELS = 16  # of a block


def class_blocks(
    probabilities: torch.Tensor, size: tuple[int, int], config: ModelConfig
) -> Iterator[Block]:
    """Probabilities of the network's size, (K, height, width), at the image's own, in blocks."""
    for channel in range(0, len(probabilities), CHANNELS):
        yield channel, 0, restore(probabilities[channel : channel + CHANNELS], size, config)


@torch.inference_mode()
def row_blocks(
    model: TrainedModel, image: np.ndarray, batch_size: int, symmetries: tuple[str, ...]
) -> Iterator[Block]:
    """A large image (h, w, C) in tiles that overlap by a quarter, blended: rows in blocks."""
    config, size = model.config, image.shape[:2]
    corners = tile_corners(size, config, overlap=0.25)
    rows, columns = (
        torch.hann_window(n + 2)[1:-1].clamp(min=1e-3) for n in (config.height, config.width)
    )
    window = torch.outer(rows, columns).to(model.device)
    top, total = 0, torch.zeros((len(config.class_names) + 1, 0, size[1]), device=model.device)
    for start in range(0, len(corners), batch_size):
        batch = corners[start : start + batch_size]
        missing = min(size[0], batch[-1][0] + config.height) - top - total.shape[1]
        total = F.pad(total, (0, 0, 0, missing))  # the last plane adds up the window
        tiles = torch.stack([to_tensor(cut_tile(image, corner, config)) for corner in batch])
        for (y, x), output in zip(batch, predict_inputs(model, tiles, symmetries), strict=True):
            region = total[:, y - top : y - top + config.height, x : x + config.width]
            height, width = region.shape[1:]
            inside = window[:height, :width]
            region[:-1] += output[:, :height, :width] * inside
            region[-1] += inside
        done = corners[start + batch_size][0] if start + batch_size < len(corners) else size[0]
        if done > top:
            finished = total[:, : done - top]
            yield 0, top, finished[:-1].div_(finished[-1])
            top, total = done, total[:, done - top :].clone()


def join(blocks: Iterable[Block]) -> Block:
    """All blocks of an image as one."""
    parts = list(blocks)
    return 0, 0, torch.cat([part for *_, part in parts], dim=0 if parts[-1][0] else 1)


def average(
    blocks: Iterable[tuple[Block, ...]], size: tuple[int, int], models: list[TrainedModel]
) -> np.ndarray:
    """The prediction, see `to_prediction`, of the weighted mean of the models' blocks."""
    config, result = models[0].config, None
    shares = [model.weight / models[0].weight for model in models]
    for (channel, row, total), *others in blocks:
        for (*_, other), share in zip(others, shares[1:], strict=True):
            total.add_(other, alpha=share)
        total = total.div_(sum(shares))
        if result is None:
            count = 2 if config.exclusive else len(config.class_names)
            result = total.new_zeros((count, *size), dtype=torch.uint8)
            best = total.new_zeros(size if config.exclusive else (0, 0))
        rows = slice(row, row + total.shape[1])
        if config.exclusive:
            value, number = total.max(0)
            higher = value > best[rows]
            result[0, rows][higher] = (number[higher] + channel).byte()
            best[rows][higher] = value[higher]
        else:
            result[channel : channel + len(total), rows] = to_prediction(total, config)
    if config.exclusive:
        result[1] = (best * 255).round().byte()
    return result.cpu().numpy()


@torch.inference_mode()
def predict_images(
    models: list[TrainedModel], images: list[np.ndarray], batch_size: int, tta: str = "auto"
) -> list[np.ndarray]:
    """Images (h, w, C) of any sizes to predictions, averaged over the models.

    A prediction is what `to_prediction` makes. All images are one batch; of a large one
    `batch_size` tiles. `tta`: see `chosen_symmetries`.
    """
    blocks: list[Any] = []  # of each model, of each image
    for model in models if images else ():
        config = model.config
        symmetries = chosen_symmetries(config, tta)
        if config.tiles:
            blocks.append([row_blocks(model, image, batch_size, symmetries) for image in images])
        else:
            inputs = torch.stack([to_tensor(resize_image(image, config)) for image in images])
            outputs = zip(predict_inputs(model, inputs, symmetries), images, strict=True)
            blocks.append([class_blocks(p, image.shape[:2], config) for p, image in outputs])
    tilings = {(m.config.height, m.config.width) if m.config.tiles else () for m in models}
    if len(tilings) > 1:  # their blocks differ
        blocks = [[[join(parts)] for parts in of_images] for of_images in blocks]
    return [
        average(zip(*parts, strict=True), image.shape[:2], models)
        for image, *parts in zip(images, *blocks, strict=True)
    ]


def predict_whole(
    models: list[TrainedModel], images: list[np.ndarray], batch_size: int, tta: str = "auto"
) -> list[np.ndarray]:
    """The same of images that are not reduced yet to the models' scale, at their own size."""
    return predict_reduced(models, images, batch_size, tta, shrink_of(models[0].config.scale))


def predict_reduced(
    models: list[TrainedModel], images: list[np.ndarray], batch_size: int, tta: str, shrink: int
) -> list[np.ndarray]:
    """The same of images that are reduced before, see `rasters.reduce_values`."""
    windows = [Window(0, 0, *image.shape[:2], image.shape[:2], shrink) for image in images]
    images = [reduce_values(image, shrink) for image in images]
    pairs = zip(predict_images(models, images, batch_size, tta), windows, strict=True)
    config = models[0].config
    return [enlarge_prediction(planes, window, config) for planes, window in pairs]


def enlarge_prediction(prediction: np.ndarray, window: Window, config: ModelConfig) -> np.ndarray:
    """A prediction of reduced pixels at the image's own resolution."""
    methods = [cv2.INTER_NEAREST] * config.exclusive + [cv2.INTER_LINEAR] * len(prediction)
    pairs = zip(prediction, methods, strict=False)
    return np.stack([enlarge(plane, window, method) for plane, method in pairs])


# --------------------------------------------------------------------------------------------------
#  Files to predictions
# --------------------------------------------------------------------------------------------------


def load_models(paths: Iterable[str], device: str) -> list[TrainedModel]:
    """Read and name the model files, and those in the folders named. Raises UserError.

    A folder must hold models of one split, not those of several commands. A blend.json stands
    alone.
    """
    models, paths = [], [*map(Path, paths)]
    for path in paths:
        if path.suffix == ".json" and len(paths) == 1:
            return load_blend(path, device)
        files = [path]
        if path.is_dir():
            files = sorted(path.rglob("model.pt")) or sorted(path.rglob("model.onnx"))
        if not files:
            raise UserError(f"--model {path}", "no model.pt in this folder", "train.py writes one")
        loaded = [load_model(file, device) for file in files]
        splits = {str([m.settings.get(k) for k in ("folds", "seed", "group")]) for m in loaded}
        mixed = path / "model.pt" in files and len(files) > 1
        if mixed or (len(splits) > 1 and all(file.parent.name[:4] == "fold" for file in files)):
            raise UserError(
                f"--model {path}",
                f"holds models of different splits: {first_five(files)}",
                "name the ones to use",
            )
        models += loaded
        print(f"model: {first_five(files)}")
    check_agreement([model.config for model in models])
    return models


def load_blend(path: Path, device: str) -> list[TrainedModel]:
    """The models of a blend.json, with its weights and what makes masks. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tuned = {name: tuple(content[name]) for name in TUNED if name in content}
        files = [path.parent / name for name in content["models"]]
        weights = dict(zip(files, content["weights"], strict=True))
        if not min(weights.values()) > 0:
            raise ValueError("a weight is not above 0")
        models = [load_model(file, device)._replace(weight=w) for file, w in weights.items()]
        models = [model._replace(config=replace(model.config, **tuned)) for model in models]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is no blend ({reason_of(error)})"
        raise UserError(f"--model {path}", problem, "train.py --compare writes one") from None
    print(f"model: blend of {first_five(f'{w:.2f} {file}' for file, w in weights.items())}")
    check_agreement([model.config for model in models])
    return models


MUST_AGREE = {  # in what models that are averaged must be alike: ModelConfig's fields, for people
    "class_names": "classes",
    "class_values": "values of the classes",
    "classes.kind": "kinds of classes",
    "target": "targets",
    "channels": "numbers of channels",
    "bands": "files of channels (--channels)",
    "neighbours": "neighbours (--neighbours)",
    "scale": "scales of the images (--scale)",
    "value_range": "ranges of values (--window)",
    "rle": "orders of RLE",
}


def check_agreement(configs: list[ModelConfig]) -> None:
    """Raise UserError for models whose average would mean nothing; it names both values."""
    for config, (name, title) in itertools.product(configs[1:], MUST_AGREE.items()):
        values = map(operator.attrgetter(name), (configs[0], config))
        lists = [value if isinstance(value, tuple) else (value,) for value in values]
        pairs = [
            pair for pair in itertools.zip_longest(*lists, fillvalue="none") if len({*pair}) > 1
        ]
        if pairs:
            texts = " and ".join(map(first_five, zip(*pairs, strict=True)))
            raise UserError(
                "--model", f"the models have different {title}, {texts}", "name those that agree"
            )


def ensemble_config(models: list[TrainedModel]) -> ModelConfig:
    """The settings of the first model, with the mean thresholds and areas of all.

    The areas are in pixels of the images themselves, not of reduced ones. What decides on empty
    masks, and what cleans them, stays where all models have it.
    """
    configs, shrink = [model.config for model in models], shrink_of(models[0].config.scale)
    changes: dict[str, Any] = {}
    for name in ("thresholds", "areas", "presence_levels", "presence_areas"):
        values = [getattr(config, name) for config in configs]
        mean = np.mean(values, axis=0) if all(values) else np.zeros(0)
        mean = (shrink**2 * mean).round().astype(int) if "areas" in name else mean
        changes[name] = tuple(mean.tolist())
    plans = {config.plans for config in configs}
    if len(plans) > 1:
        print("the models clean masks in different ways: they are not cleaned", flush=True)
    enlarged = [re.sub(r"\d+", lambda n: f"{int(n[0]) * shrink | 1}", plan) for plan in min(plans)]
    return replace(configs[0], **changes, plans=tuple(enlarged) if len(plans) == 1 else ())


def of_blocks(config: ModelConfig) -> ModelConfig:
    """The settings for a block of an image: without what only the whole image can tell."""
    if config.presence_levels or "largest" in " ".join(config.plans):
        print_once("blocks of a large image: no mask is emptied, none is cut to its largest part")
    plans = tuple(re.sub("(, )?largest", "", plan) for plan in config.plans)
    return replace(config, presence_levels=(), presence_areas=(), plans=plans)


def predict(
    models: list[TrainedModel],
    samples: pd.DataFrame,
    batch_size: int = 8,
    tta: str = "auto",
    failed: list[tuple[Any, UserError]] | None = None,
    pace: Any = None,
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Yield (sample, image (h, w, C), prediction) in the samples' order.

    Threads each take a batch from its files through the models: on a CPU one per core, so that no
    core waits for another after every layer; next to a GPU four, so that it never waits for files.
    Memory does not grow with the number of samples. An image that cannot be read raises UserError,
    or is added to `failed` with its sample. `pace`: a `Pace` where the time is limited.
    """
    rows, cores = list(samples.itertuples()), torch.get_num_threads()
    on_cpu = models[0].device.type == "cpu"
    workers = max(1, min(cores, batch_size, len(rows))) if on_cpu else min(4, os.cpu_count() or 1)
    size = batch_size // workers if on_cpu else batch_size
    one = any(model.config.tiles for model in models) or (pace and on_cpu)  # tiles are the batch
    step = 1 if one else size
    batches = [rows[start : start + step] for start in range(0, len(rows), step)]

    run = functools.partial(predict_batch, models, tta=tta)
    run = functools.partial(pace.predict_batch if pace else run, size=size)
    for predicted, errors in in_order(run, batches, workers, max(1, cores // workers)):
        if errors and failed is None:
            raise errors[0][1]
        if errors:
            failed.extend(errors)
        yield from predicted


BatchResult = tuple[list[tuple], list[tuple]]  # (sample, image, prediction); (sample, error)


def read_batch(batch: list, config: ModelConfig) -> BatchResult:
    """Read a batch of samples: pairs of a sample and its image; and the errors."""
    images, errors = [], []
    for row in batch:
        try:
            images.append((row, read_image(row.layers, config.channels, config.value_range)))
        except UserError as error:
            errors.append((row, error))
    return images, errors


def predict_batch(models: list[TrainedModel], batch: list, size: int, tta: str) -> BatchResult:
    """Read a batch of samples and predict what can be read; the results, and the errors."""
    images, errors = read_batch(batch, models[0].config)
    predictions = predict_images(models, [image for _, image in images], size, tta)
    results = [(*pair, prediction) for pair, prediction in zip(images, predictions, strict=True)]
    return results, errors


def in_order(run: Callable, batches: list, workers: int, threads: int) -> Iterator[Any]:
    """Call `run` for each batch in worker threads of so many torch threads; results in order.

    At most two batches per worker wait. After an error or Ctrl-C the rest is not waited for.
    """
    ahead: deque = deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        for batch in batches:
            ahead.append(pool.submit(run, batch))
            if len(ahead) == 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
