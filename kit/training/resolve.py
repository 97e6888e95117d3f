"""Resolve: every decision that follows from device and data, made once for each fold.

The trial step finds out what a network takes, before any image is decoded.
"""

import itertools
import math
import os
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from torch.func import functional_call

from kit.config import ModelConfig, plane_settings
from kit.data.blocks import is_part
from kit.data.folders import Collection
from kit.data.images import item_places, shown_channels
from kit.data.readers import measure_statistics
from kit.errors import UserError, reason_of
from kit.network.encoders import (
    automatic_decoder,
    flagged,
    input_channels,
    normalisation,
    timm_name,
)
from kit.network.model import (
    BATCH_NORM,
    best_device,
    build_network,
    resolve_precision,
    scale_input,
    size_step,
    weights_file,
)

# of an input, where neither the user nor the data ask for others
INPUT_PIXELS = {"cuda": 384 * 1248, "mps": 192 * 640, "cpu": 72 * 320, "cpu bf16": 112 * 352}
TILES_FROM = 2e6  # pixels of the median image
THINNEST = 3.0  # pixels of the input that the thinnest parts of masks need
LARGER = 4.0  # times as many pixels as the device takes well
STEPS = (16, 32, 64, 128)  # a refused size is rounded to multiples of these
LR, PRETRAINED_LR = 5e-4, 2e-3  # the latter for pretrained encoders with BatchNorm
Size = tuple[int, int]  # height, width

# --------------------------------------------------------------------------------------------------
#  All decisions
# --------------------------------------------------------------------------------------------------


def resolve(
    config: Any, collection: Collection, fold: int, resolutions: tuple[tuple[float, float], ...]
) -> tuple[Any, ModelConfig]:
    """Make all decisions for one fold; only the learning rate may stay "auto". Raises UserError.

    `config` and `resolutions`: of train.py. Returns the settings and those of the model.
    """
    samples, classes, every = collection.samples, collection.classes, config.fold == "all"
    device, count = best_device(), int((collection.samples.fold != fold).sum())
    check_moves(config, collection, fold)
    precision = resolve_precision(config.precision, device, training=True)
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
        batch_size=config.batch_size or default_batch(device, precision, small, count),
        grow=not pretrained if config.grow == "auto" else config.grow,
        metric=collection.metric if config.metric == "auto" else config.metric,
        precision=precision,
        devices=resolve_devices(config.devices, device),
        workers=workers if config.workers < 0 else config.workers,
    )
    model_config = make_model_config(resolved, collection, config.precision)
    free = config.height == 0, config.width == 0
    scales = [scale for _, scale in resolutions]
    return try_network(resolved, model_config, samples[samples.fold != fold], free, scales)


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
    filled = collection.samples.share[collection.samples.fold != fold] > 0
    if config.positives and filled.nunique() == 1:
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
        **statistics,
    }
    if not is_rgb(collection):
        training = collection.samples[collection.samples.fold != resolved.fold]
        count, limits = collection.channels, collection.value_range
        settings |= measure_statistics(training.layers.tolist(), count, limits)
    return ModelConfig(**settings)


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


def default_batch(device: str, precision: str, small: float, count: int) -> int:
    """The default of --batch_size for so many training images.

    On a CPU it is larger where inputs are small, `small` times under the default, but leaves an
    epoch a hundred steps.
    """
    size = 8 if device != "cpu" or is_fast_cpu(device, precision) else 4
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


def images_per_step(batch_size: int, images: int, processes: int, parts: int = 1) -> int:
    """Of one process; `parts`: of a batch, for gradient accumulation. Raises UserError."""
    if images < processes:
        raise UserError(
            "--devices", f"{processes} processes, but {images} training images", "take fewer"
        )
    return max(1, min(-(-batch_size // (parts * processes)), images // processes))


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


# --------------------------------------------------------------------------------------------------
#  The trial step
# --------------------------------------------------------------------------------------------------


def try_network(
    resolved: Any,
    config: ModelConfig,
    training: pd.DataFrame,
    free: tuple[bool, bool],
    scales: list[float],
) -> tuple[Any, ModelConfig]:
    """Try the network as training will use it; settles size, decoder, learning rate and resizing.

    `training`: the samples to train on; `free`: whether height and width may change; `scales`: of
    progressive resizing. Random numbers are left as they are. Raises UserError.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_network(config)
        if config.decoder_channels == "auto":
            channels = automatic_decoder(config.arch, network.encoder)
            config = replace(config, decoder_channels=channels)
            network = build_network(config)
    batch_size, processes = resolved.batch_size, resolved.devices
    batch = min(2, images_per_step(batch_size, len(item_places(training, config)), processes))
    check_step(network, config, free, batch)
    size = settle_size(network, config, free, batch, batch_size, processes)
    if resolved.flips == "all":
        check_square(network, config.encoder, batch, size)
    config = replace(config, height=size[0], width=size[1])
    grow = resolved.grow
    if grow and not config.tiles:
        grow = takes_scales(network, config, scales, batch)
    norm = any(isinstance(layer, BATCH_NORM) for layer in network.encoder.modules())
    lr = PRETRAINED_LR if norm and resolved.encoder_weights != "none" else LR
    changes = {"height": size[0], "width": size[1], "decoder_channels": config.decoder_channels}
    return replace(resolved, **changes, grow=grow, lr=resolved.lr or lr), config


def check_step(
    network: torch.nn.Module, config: ModelConfig, free: tuple[bool, bool], batch: int
) -> None:
    """Raise UserError for a height or width of the user's that is no multiple of a step.

    It names those next to it that the network takes; where it takes none, `settle_size` speaks.
    """
    step, sizes = size_step(network), {"height": config.height, "width": config.width}
    for (flag, value), may_change in zip(sizes.items(), free, strict=True):
        around = (value // step * step, -(-value // step) * step)
        changed = {n: tuple((sizes | {flag: n}).values()) for n in around if n != value}
        near = [f"{n}" for n, size in changed.items() if n and not refusal(network, batch, size)]
        if near and not may_change:
            raise UserError(
                f"--{flag} {value}",
                f"{config.arch} with {config.encoder} takes multiples of {step}",
                f"take {' or '.join(near)}",
            )


def check_square(network: torch.nn.Module, encoder: str, batch: int, size: Size) -> None:
    """Raise UserError for a size that quarter turns would change; it names a square one."""
    if size[0] != size[1]:
        side = round(math.sqrt(size[0] * size[1]))
        nearest = nearest_size(network, encoder, batch, (side, side), (True, True))
        square = ", or --height {} --width {}".format(*nearest) if nearest else ""
        problem = "quarter turns need a square input, it is {}x{}".format(*size)
        raise UserError("--flips all", problem, f"take --flips hv{square}")


def takes_scales(
    network: torch.nn.Module, config: ModelConfig, scales: list[float], batch: int
) -> bool:
    """Whether a network takes all sizes of progressive resizing; says which one it refuses."""
    for scale in scales:
        smaller = scale_input(config, scale, size_step(network))
        reason = refusal(network, batch, (smaller.height, smaller.width))
        if reason:
            size = f"{smaller.height}x{smaller.width}"
            names = f"{config.arch} with {config.encoder}"
            print(f"--grow: {names} cannot take {size} ({reason}); off", flush=True)
            return False
    return True


def settle_size(
    network: torch.nn.Module,
    config: ModelConfig,
    free: tuple[bool, bool],
    batch: int,
    batch_size: int,
    processes: int,
) -> Size:
    """The size to train at: the given one, or where it is refused and `free` the nearest.

    `batch`: images of a step, two are as good as more. Raises UserError with the nearest size.
    """
    size, names = (config.height, config.width), f"{config.arch} with {config.encoder}"
    reason = refusal(network, batch, size, backward=True)
    if not reason:
        return size
    height, width = size
    too_few = batch == 1 and not refusal(network, 2, size)
    nearest = settled = None
    if not too_few or not refusal(network, 1, (2 * height, 2 * width)):  # else no size helps
        settled = nearest_size(network, config.encoder, batch, size, free) if any(free) else None
        nearest = settled or nearest_size(network, config.encoder, batch, size, (True, True))
    if settled:
        taken = "{}x{}".format(*settled)
        print(f"{names} cannot take {height}x{width} ({reason}): takes {taken}", flush=True)
        return settled
    flags = "--height {} --width {}".format(*nearest) if nearest else ""
    if too_few:
        raise one_image_error(f"{names} cannot learn", reason, flags, batch_size, processes)
    if not nearest:
        raise UserError(
            f"--arch {config.arch} --encoder {config.encoder}",
            f"do not fit together: {height}x{width} and the sizes near it fail ({reason})",
            "take another --encoder or --arch; docs/models.md lists pairs that fit",
        )
    problem = f"not possible with {names} ({reason})"
    raise UserError(f"--height {height} --width {width}", problem, f"take {flags}")


def one_image_error(
    names: str, reason: str, flags: str, batch_size: int, processes: int
) -> UserError:
    """The message for a network that cannot learn from one image at a time."""
    each = f" in each of {processes} processes" if processes > 1 else ""
    where, remedy = f"--batch_size {batch_size}{each}", f"take --batch_size {2 * processes} or more"
    if batch_size > processes:
        where, remedy = f"--data: one training image{each}", "add images"
    return UserError(
        where,
        f"{names} from one image at a time ({reason})",
        f"{remedy}, or {flags}" if flags else remedy,
    )


def nearest_size(
    network: torch.nn.Module, encoder: str, batch: int, size: Size, free: tuple[bool, bool]
) -> Size | None:
    """The nearest size that the network takes; what is not `free` stays. None: there is none.

    Tried are the size that the encoder was made for, and multiples of it, its step and `STEPS`.
    """
    pretrained = timm.get_pretrained_cfg(timm_name(encoder)) if timm_name(encoder) else None
    made_for = tuple(pretrained.input_size[1:]) if pretrained else ()
    candidates = {made_for} if made_for else set()
    for step in {*STEPS, *made_for, size_step(network)} - {1}:
        choices = []
        for length, may_change in zip(size, free, strict=True):
            rounded = {max(step, length // step * step), max(step, -(-length // step) * step)}
            choices.append(rounded if may_change else {length})
        candidates |= set(itertools.product(*choices))

    def allowed(other: Size) -> bool:
        return all(f or a == b for f, a, b in zip(free, other, size, strict=True))

    def distance(other: Size) -> tuple:
        height, width = (math.log(new / old) for new, old in zip(other, size, strict=True))
        changed = abs(height) + abs(width) + abs(height - width)
        fixed_first = other != made_for or not pretrained.fixed_input_size
        return fixed_first, round(changed, 3), -other[0] * other[1]

    ordered = sorted(filter(allowed, candidates), key=distance)
    return next((other for other in ordered if not refusal(network, batch, other)), None)


def refusal(network: torch.nn.Module, batch: int, size: Size, backward: bool = False) -> str:
    """Why the network cannot train on so many images of a size; "" where it can."""
    try:
        trial_step(network, batch, size, backward)
    except Exception as error:  # layers raise anything
        return reason_of(error)
    return ""


def trial_step(network: torch.nn.Module, batch: int, size: Size, backward: bool) -> list[str]:
    """Pass so many images through the network as training does. Raises what its layers raise.

    On meta tensors, which have a shape and no content. Returns the names of the parameters that get
    no gradient, where `backward`. Network and random state stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return trial_pass(network, batch, size, backward, "meta")
        except Exception as error:  # layers raise anything
            if "meta" not in str(error):
                raise
        return trial_pass(network, min(2, batch), size, backward, "cpu")  # wants real numbers


def trial_pass(
    network: torch.nn.Module, batch: int, size: Size, backward: bool, device: str
) -> list[str]:
    """`trial_step` on one device."""
    tensors = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    weights = [name for name, tensor in tensors.items() if tensor.requires_grad]
    copies = {
        name: torch.empty_like(tensor, device="meta")
        if device == "meta"
        else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    for name in weights:
        copies[name].requires_grad_()
    images = torch.zeros(batch, input_channels(network), *size, device=device)
    training = network.training
    try:
        with torch.set_grad_enabled(backward):
            output = functional_call(network.train(), copies, images)
    finally:
        network.train(training)
    logits, *presence = output if isinstance(output, tuple) else (output,)
    if logits.shape[2:] != size:
        raise RuntimeError("its output is {}x{}".format(*logits.shape[2:]))
    if backward:
        sum(part.sum() for part in (logits, *presence)).backward()
    return [name for name in weights if backward and copies[name].grad is None]


def check_batch(network: torch.nn.Module, config: ModelConfig, batch: int) -> None:
    """Raise UserError where memory leaves a batch of one, and the network cannot learn from it."""
    reason = refusal(network, batch, (config.height, config.width)) if batch == 1 else ""
    if reason:
        names = f"{config.arch} with {config.encoder}"
        raise UserError(
            "the device's memory",
            f"cannot hold 2 images, and {names} cannot learn from one at a time ({reason})",
            "take smaller --height and --width, or a smaller --encoder",
        )


def freeze_unused(network: torch.nn.Module, config: ModelConfig) -> None:
    """Freeze what gets no gradient, or several processes would wait for it at each step."""
    for name in trial_step(network, 2, (config.height, config.width), backward=True):
        network.get_parameter(name).requires_grad_(False)
