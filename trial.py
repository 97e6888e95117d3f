"""The trial step: what a network can take, found out before data is decoded."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import timm
import torch
from torch.func import functional_call

from encoders import automatic_decoder, timm_name
from model import BATCH_NORM, ModelConfig, build_network, scale_input, size_step
from utils import UserError, reason_of

Size = tuple[int, int]  # height, width

# --------------------------------------------------------------------------------------------------
#  One step
# --------------------------------------------------------------------------------------------------


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
    images = torch.zeros(batch, 3, *size, device=device)
    training = network.training
    try:
        with torch.set_grad_enabled(backward):
            logits = functional_call(network.train(), copies, images)
    finally:
        network.train(training)
    if logits.shape[2:] != size:
        raise RuntimeError("its output is {}x{}".format(*logits.shape[2:]))
    if backward:
        logits.sum().backward()
    return [name for name in weights if backward and copies[name].grad is None]


def refusal(network: torch.nn.Module, batch: int, size: Size, backward: bool = False) -> str:
    """Why the network cannot train on so many images of a size; "" where it can."""
    try:
        trial_step(network, batch, size, backward)
    except Exception as error:  # layers raise anything
        return reason_of(error)
    return ""


# --------------------------------------------------------------------------------------------------
#  Sizes
# --------------------------------------------------------------------------------------------------

STEPS = (16, 32, 64, 128)  # a refused size is rounded to multiples of these


def nearest_size(
    network: torch.nn.Module, encoder: str, batch: int, size: Size, free: tuple[bool, bool]
) -> Size | None:
    """The nearest size that the network takes; what is not `free` stays. None: there is none.

    For an encoder that was made for one size it is that size.
    """
    config = timm.get_pretrained_cfg(timm_name(encoder)) if timm_name(encoder) else None
    own = tuple(config.input_size[1:]) if config else ()
    near = {own} if own else set()
    for step in sorted({*STEPS, *own, size_step(network)} - {1}):
        choices = []
        for length, may_change in zip(size, free, strict=True):
            rounded = {max(step, length // step * step), max(step, -(-length // step) * step)}
            choices.append(rounded if may_change else {length})
        near |= set(itertools.product(*choices))
    near = {
        one for one in near if all(f or a == b for f, a, b in zip(free, one, size, strict=True))
    }

    def distance(other: Size) -> tuple:
        height, width = (math.log(new / old) for new, old in zip(other, size, strict=True))
        changed = abs(height) + abs(width) + abs(height - width)
        own_first = other != own or not config.fixed_input_size
        return own_first, round(changed, 3), -other[0] * other[1]

    fitting = (one for one in sorted(near, key=distance) if not refusal(network, batch, one))
    return next(fitting, None)


def settle_size(
    network: torch.nn.Module,
    arch: str,
    encoder: str,
    size: Size,
    free: tuple[bool, bool],
    batch: int,
    one_image: tuple[str, str],
) -> Size:
    """The size to train at: the given one, or where it is refused and `free` the nearest.

    `one_image`: what makes a batch of one, and the remedy. Raises UserError with the nearest size.
    """
    reason, names = refusal(network, batch, size, backward=True), f"{arch} with {encoder}"
    if not reason:
        return size
    height, width = size
    one_is_too_few = batch == 1 and not refusal(network, 2, size)
    if one_is_too_few and refusal(network, 1, (2 * height, 2 * width)):  # no size helps
        found = nearest = None
    else:
        found = nearest_size(network, encoder, batch, size, free) if any(free) else None
        nearest = found or nearest_size(network, encoder, batch, size, (True, True))
    if found:
        taken = "{}x{}".format(*found)
        print(f"{names} cannot take {height}x{width} ({reason}): takes {taken}", flush=True)
        return found
    near = "--height {} --width {}".format(*nearest) if nearest else ""
    if one_is_too_few:
        cause, remedy = one_image
        remedy += f", or {near}" if near else ""
        what = f"{names} cannot learn from one image at a time ({reason})"
        raise UserError(f"{cause}: {what}; {remedy}")
    flags = f"--height {height} --width {width}"
    remedy = f"take {near}" if near else "take another --encoder or --arch"
    raise UserError(f"{flags}: not possible with {names} ({reason}); {remedy}")


# --------------------------------------------------------------------------------------------------
#  A training
# --------------------------------------------------------------------------------------------------


def images_per_step(batch_size: int, images: int, processes: int, parts: int = 1) -> int:
    """Of one process; `parts`: of a batch, for gradient accumulation. Raises UserError."""
    if images < processes:
        raise UserError(f"{processes} processes, but {images} training images: take fewer")
    return max(1, min(-(-batch_size // (parts * processes)), images // processes))


class Trial(NamedTuple):
    """What a network takes."""

    config: ModelConfig  # with a size that it takes
    resizes: bool  # whether it takes all resolutions of progressive resizing
    batch_norm: bool  # whether its encoder has any


def try_network(
    config: ModelConfig,
    free: tuple[bool, bool],
    resolutions: list[float],
    batch_size: int,
    images: int,
    processes: int,
) -> Trial:
    """Try the network as training will use it, from a random state of its own.

    `free`: whether height and width may change; `resolutions`: of progressive resizing. An "auto"
    decoder becomes numbers or a factor. Raises UserError.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_network(config)
        if config.decoder_channels == "auto":
            channels = automatic_decoder(config.arch, network.encoder)
            config = dataclasses.replace(config, decoder_channels=channels)
            network = build_network(config)
    batch_norm = any(isinstance(part, BATCH_NORM) for part in network.encoder.modules())
    step, names = size_step(network), f"{config.arch} with {config.encoder}"
    for flag, value, may_change in zip(
        ("height", "width"), (config.height, config.width), free, strict=True
    ):
        if value % step and not may_change:
            below, above = value // step * step, -(-value // step) * step
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(f"--{flag} {value}: {names} takes multiples of {step}; take {near}")
    batch = images_per_step(batch_size, images, processes)
    each = f" in each of {processes} processes" if processes > 1 else ""
    one_image = f"--batch_size {batch_size}{each}", f"take --batch_size {2 * processes} or more"
    if batch_size > processes:
        one_image = f"--data: one training image{each}", "add images"
    size, batch = (config.height, config.width), min(2, batch)  # two are as good as more
    size = settle_size(network, config.arch, config.encoder, size, free, batch, one_image)
    config = dataclasses.replace(config, height=size[0], width=size[1])
    for part in resolutions:
        smaller = scale_input(config, part, step)
        reason = refusal(network, batch, (smaller.height, smaller.width))
        if reason:
            what = f"{names} cannot take {smaller.height}x{smaller.width} ({reason})"
            print(f"--grow: {what}; progressive resizing is off", flush=True)
            return Trial(config, False, batch_norm)
    return Trial(config, True, batch_norm)


def check_batch(network: torch.nn.Module, config: ModelConfig, batch: int) -> None:
    """Raise UserError where memory leaves a batch of one, and the network cannot learn from it."""
    reason = refusal(network, batch, (config.height, config.width)) if batch == 1 else ""
    if reason:
        names = f"{config.arch} with {config.encoder}"
        remedy = "take smaller --height and --width, or a smaller --encoder"
        what = f"cannot hold 2 images, and {names} cannot learn from one at a time ({reason})"
        raise UserError(f"the device's memory {what}; {remedy}")


def freeze_unused(network: torch.nn.Module, config: ModelConfig) -> None:
    """Freeze what gets no gradient, or several processes would wait for it at each step."""
    unused = trial_step(network, 2, (config.height, config.width), backward=True)
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
