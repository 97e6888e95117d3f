"""The trial step: which size, decoder and resolutions a network takes, before any image is read."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pandas as pd
import timm
import torch
from torch.func import functional_call

from kit.config import ModelConfig
from kit.data.images import item_places
from kit.errors import UserError, reason_of
from kit.network.encoders import automatic_decoder, input_channels, timm_name
from kit.network.model import BATCH_NORM, build_network, scale_input, size_step
from kit.training.loaders import images_per_step

STEPS = (16, 32, 64, 128)  # a refused size is rounded to multiples of these
LR, PRETRAINED_LR = 5e-4, 2e-3  # the latter for pretrained encoders with BatchNorm
Size = tuple[int, int]  # height, width


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
