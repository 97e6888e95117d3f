"""From images to probabilities and masks: horizontal-flip TTA, tiles, ensembles, `postprocess`."""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from images import cut_tile, normalise, preprocess, read_image, restore, tile_corners, to_tensor
from model import ModelConfig, TrainedModel, autocast, load_model, resolve_precision
from utils import UserError, first_five

# --------------------------------------------------------------------------------------------------
#  Models
# --------------------------------------------------------------------------------------------------


def load_models(paths: Iterable[str], device: str) -> list[TrainedModel]:
    """Read and name the model files, and those in the folders named. Raises UserError.

    A folder must hold models of one split, not those of several commands.
    """
    models = []
    for path in map(Path, paths):
        files = sorted(path.rglob("model.pt")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"--model {path}: no model.pt in this folder; train.py writes one")
        loaded = [load_model(file, device) for file in files]
        splits = {str([one.settings.get(k) for k in ("folds", "seed", "group")]) for one in loaded}
        mixed = path / "model.pt" in files and len(files) > 1
        if mixed or (len(splits) > 1 and all(file.parent.name[:4] == "fold" for file in files)):
            reason = f"holds models of different splits: {first_five(files)}"
            raise UserError(f"--model {path}: {reason}; name the ones to use")
        models += loaded
        print(f"model: {first_five(files)}")
    names = {one.config.class_names for one in models}
    if len(names) > 1:
        kinds = " and ".join(first_five(some) or "one class" for some in sorted(names))
        raise UserError(f"--model: the models have different classes, {kinds}; name those of one")
    if len({one.config.value_range for one in models}) > 1:
        reason = "were trained on images of different ranges (--window)"
        raise UserError(f"--model {first_five(paths)}: {reason}; predict with one of them")
    return models


# --------------------------------------------------------------------------------------------------
#  Probabilities to masks
# --------------------------------------------------------------------------------------------------


def postprocess(probability: np.ndarray, threshold: float, min_pixels: int) -> np.ndarray:
    """(h, w) uint8 probabilities to the mask, bool (h, w): threshold 0..1, no small components.

    The threshold k/255 takes in the level k, whatever rounding does.
    """
    mask = probability >= np.ceil(threshold * 255 - 1e-6)
    return remove_small(mask, min_pixels)


def make_mask(prediction: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The mask of a `to_prediction`, with the thresholds and areas of a model's settings.

    Bool (h, w); of overlapping classes bool (K, h, w), of exclusive ones their numbers (h, w).
    """
    if config.exclusive:
        return prediction[0]
    if not config.class_names:
        return postprocess(prediction, config.threshold, config.min_pixels)
    return np.stack(list(map(postprocess, prediction, *class_thresholds(config))))


def class_thresholds(config: ModelConfig) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The threshold and the minimum component area of each overlapping class."""
    count = len(config.class_names)
    thresholds = config.thresholds or (config.threshold,) * count
    return thresholds, config.areas or (config.min_pixels,) * count


def describe_masks(config: ModelConfig) -> tuple[str, Any]:
    """How `make_mask` makes them, for people; and the threshold, or that of each class."""
    if config.exclusive:
        return "the most probable class", None
    if not config.class_names:
        area = f"minimum component area {config.min_pixels} pixels"
        return f"threshold {config.threshold:.3f}, {area}", config.threshold
    thresholds, areas = class_thresholds(config)
    each = zip(config.class_names, thresholds, areas, strict=True)
    words = (f"{name} from {threshold:.3f}, {area} pixels" for name, threshold, area in each)
    return f"thresholds and minimum areas: {first_five(words)}", thresholds


def remove_small(mask: np.ndarray, min_pixels: int) -> np.ndarray:
    """A mask, bool (h, w), without its connected components of fewer than `min_pixels` pixels."""
    if min_pixels < 2 or not mask.any():
        return mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    large = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    return mask & large[labels]


# --------------------------------------------------------------------------------------------------
#  Logits to probabilities
# --------------------------------------------------------------------------------------------------


def to_probabilities(
    logits: torch.Tensor, temperature: float, exclusive: bool = False
) -> torch.Tensor:
    """(N, 1, H, W) logits to probabilities (N, H, W) float32; of K classes (N, K, H, W).

    The temperature softens them, so that 8 bits still tell nearly sure from sure. A threshold of
    0.5 gives the same mask with any temperature.
    """
    logits = logits.float() / temperature
    if exclusive:
        return logits.softmax(1)
    return logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.sigmoid()


def to_prediction(probability: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Probabilities (h, w) or (K, h, w) as uint8.

    Of exclusive classes two planes: the number of the most probable class, and its probability.
    """
    if not config.exclusive:
        return to_8bit(probability)
    best, number = probability.max(0)
    return torch.stack([number.byte(), to_8bit(best)])


def to_8bit(probability: torch.Tensor) -> torch.Tensor:
    """Probabilities 0..1 to uint8 0..255, rounded, as the KITTI Road measures take them."""
    return (probability * 255).round().byte()


@torch.inference_mode()
def predict_inputs(model: TrainedModel, images: torch.Tensor, tta: bool) -> torch.Tensor:
    """(N, 3, H, W) uint8 to probabilities (N, H, W) float32 on the model's device; see above.

    Where the device's memory runs out, half of the images at a time. Raises UserError where it
    cannot hold one.
    """
    device, config = model.device, model.config
    try:
        inputs = normalise(images.to(device), config)
        with autocast(resolve_precision(config.precision, device.type), device.type):
            how = config.temperature, config.exclusive
            result = to_probabilities(model.network(inputs), *how)
            if tta:
                flipped = model.network(inputs.flip(-1)).flip(-1)
                result = (result + to_probabilities(flipped, *how)) / 2
        return result
    except torch.OutOfMemoryError:
        if len(images) == 1:
            size = f"{images.shape[2]}x{images.shape[3]}"
            reason = f"the {device.type}'s memory cannot hold one image of {size}"
            raise UserError(f"{reason}; train with smaller --height and --width") from None
    print_once(f"out of memory with {len(images)} images at a time: continues with half of them")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    halves = [predict_inputs(model, half, tta) for half in images.tensor_split(2)]
    return torch.cat(halves)


@functools.cache
def print_once(text: str) -> None:
    """Print a line, the first time."""
    tqdm.write(text)


@torch.inference_mode()
def predict_tiles(
    model: TrainedModel, image: np.ndarray, batch_size: int, tta: bool
) -> torch.Tensor:
    """A large image (h, w, 3) uint8 in tiles that overlap by a quarter, blended: (h, w) float32.

    Of K classes (K, h, w).
    """
    config, size = model.config, image.shape[:2]
    planes = (config.classes,) if config.class_names else ()
    total = torch.zeros((*planes, *size), device=model.device)
    weights = torch.zeros(size, device=model.device)
    rows, columns = (
        torch.hann_window(n + 2)[1:-1].clamp(min=1e-3) for n in (config.height, config.width)
    )
    window = torch.outer(rows, columns).to(total)
    corners = tile_corners(size, config, overlap=0.25)
    for start in range(0, len(corners), batch_size):
        batch = corners[start : start + batch_size]
        tiles = torch.stack([to_tensor(cut_tile(image, corner, config)) for corner in batch])
        for (y, x), output in zip(batch, predict_inputs(model, tiles, tta), strict=True):
            region = total[..., y : y + config.height, x : x + config.width]
            height, width = region.shape[-2:]
            inside = window[:height, :width]
            region += output[..., :height, :width] * inside
            weights[y : y + config.height, x : x + config.width] += inside
    return total.div_(weights)


def predict_images(
    models: list[TrainedModel], images: list[np.ndarray], batch_size: int, tta: str = "auto"
) -> list[np.ndarray]:
    """Images (h, w, 3) uint8 of any sizes to probabilities (h, w) uint8, averaged over the models.

    Of several classes to what `to_prediction` makes of them. All images are one batch; of a large
    one `batch_size` tiles. `tta`: auto is as trained.
    """
    sums: list[Any] = [0] * len(images)  # stay on the device until they are 8-bit
    for model in models if images else ():
        flip = model.config.tta if tta == "auto" else tta == "true"
        if model.config.tiles:
            restored = [predict_tiles(model, image, batch_size, flip) for image in images]
        else:
            inputs = torch.stack([preprocess(image, model.config) for image in images])
            outputs = zip(predict_inputs(model, inputs, flip), images, strict=True)
            restored = [restore(out, image.shape[:2], model.config) for out, image in outputs]
        sums = [total + one for total, one in zip(sums, restored, strict=True)]
    averages = (to_prediction(total / len(models), models[0].config) for total in sums)
    return [average.cpu().numpy() for average in averages]


# --------------------------------------------------------------------------------------------------
#  Files to probabilities
# --------------------------------------------------------------------------------------------------


def predict(
    models: list[TrainedModel],
    samples: pd.DataFrame,
    batch_size: int = 8,
    tta: str = "auto",
    failed: list[tuple[Any, UserError]] | None = None,
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Yield (sample, image (h, w, 3) uint8, probability (h, w) uint8) in the samples' order.

    Threads each take a batch from its files through the models: on a CPU one per core, so that no
    core waits for another after every layer; next to a GPU four, so that it never waits for files.
    Memory does not grow with the number of samples. An image that cannot be read raises UserError,
    or is added to `failed` with its sample.
    """
    rows, cores = list(samples.itertuples()), torch.get_num_threads()
    on_cpu = models[0].device.type == "cpu"
    workers = max(1, min(cores, batch_size, len(rows))) if on_cpu else min(4, os.cpu_count() or 1)
    size = batch_size // workers if on_cpu else batch_size
    step = 1 if any(model.config.tiles for model in models) else size  # else tiles are the batch
    batches = [rows[start : start + step] for start in range(0, len(rows), step)]

    def run(batch: list) -> tuple[list, list]:
        return predict_batch(models, batch, size, tta)

    for predicted, errors in in_order(run, batches, workers, max(1, cores // workers)):
        if errors and failed is None:
            raise errors[0][1]
        if errors:
            failed.extend(errors)
        yield from predicted


def predict_batch(
    models: list[TrainedModel], batch: list, size: int, tta: str
) -> tuple[list[tuple], list[tuple]]:
    """Read a batch of samples and predict what can be read; the results, and the errors."""
    images, errors = [], []
    for row in batch:
        try:
            images.append((row, read_image(row.image, models[0].config.value_range)))
        except UserError as error:
            errors.append((row, error))
    probabilities = predict_images(models, [image for _, image in images], size, tta)
    predicted = [(*pair, one) for pair, one in zip(images, probabilities, strict=True)]
    return predicted, errors


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
