"""Encoders and decoders by name: what fits together, pretrained weights and their statistics."""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import logging
import os
import re
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import constants

from kit.errors import UserError, closest, first_five, reason_of

warnings.filterwarnings("ignore", module="segmentation_models_pytorch")  # remarks on old names

IMAGENET = (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)

# --------------------------------------------------------------------------------------------------
#  Names
# --------------------------------------------------------------------------------------------------

ARCHS = {name.lower(): getattr(smp, name) for name in smp.__all__ if name[0].isupper()}


def timm_name(encoder: str) -> str:
    """The name of timm's model behind an encoder; "" for an encoder of smp's own."""
    if encoder in smp.encoders.encoders:
        return ""
    if encoder.startswith("tu-"):
        return encoder[3:]
    if smp.encoders.is_equivalent_to_timm_universal(encoder):  # smp's older names
        return re.sub(
            r"^timm-(mobilenetv3)?", lambda old: "tf_" * bool(old[1]) + (old[1] or ""), encoder
        )
    return ""


def input_channels(network: torch.nn.Module) -> int:
    """The channels of an image that a network takes: those of its first convolution."""
    return next((weight.shape[1] for weight in network.parameters() if weight.dim() == 4), 3)


def check_names(arch: str, encoder: str) -> None:
    """Raise UserError with the closest names for one that there is not."""
    if arch.lower() not in ARCHS:
        names = [kind.__name__ for kind in ARCHS.values()]
        raise UserError(f"--arch {arch}", "unknown", closest(arch, names))
    of_smp, name = list(smp.encoders.encoders), timm_name(encoder)
    if encoder in of_smp:
        return
    if not (name and timm.is_model(name)):
        names = [*of_smp, *(f"tu-{other}" for other in timm.list_models())]
        raise UserError(f"--encoder {encoder}", "unknown", closest(encoder, names))
    base, _, tag = name.partition(".")
    tags = [f"tu-{other}" for other in timm.list_pretrained(f"{base}.*")]
    if tag and f"tu-{name}" not in tags:
        raise UserError(
            f"--encoder {encoder}",
            "timm knows no such weights",
            closest(encoder, tags) if tags else f"take tu-{base}",
        )


# --------------------------------------------------------------------------------------------------
#  Build
# --------------------------------------------------------------------------------------------------

# Names of smp's arguments that are numbers of channels in a decoder.
CHANNELS = (
    "decoder_channels", "decoder_pyramid_channels", "decoder_segmentation_channels",
    "psp_out_channels", "decoder_intermediate_channels", "decoder_fusion_channels",
)  # fmt: skip
LIGHT = 512  # an encoder whose deepest features have fewer channels: EfficientNet-B0, MiT-B0, ...
LARGEST_FACTOR = 4  # a single number up to it is a factor, above it a number of channels


def build(
    arch: str,
    encoder: str,
    classes: int,
    channels: str = "1",
    inputs: int = 3,
    presence: bool = False,
) -> torch.nn.Module:
    """Build smp's network without pretrained weights. Raises UserError.

    `inputs`: channels of an image; `presence`: with smp's head for classification, too.
    """
    check_names(arch, encoder)
    options = decoder_options(arch, channels)
    head = {"aux_params": {"classes": classes, "dropout": None}} if presence else {}
    create = functools.partial(
        smp.create_model, encoder_weights=None, in_channels=inputs, classes=classes, **head
    )
    try:
        return create(arch, encoder, **options)
    except Exception as error:  # smp and timm raise anything
        reason = reason_of(error)
    if options and can_build(arch, encoder):
        raise UserError(
            f"--decoder_channels {channels}",
            f"{arch} does not take it ({reason})",
            "take others, or 1",
        )
    vits = "the ViTs of timm, such as tu-vit_small_patch16_224"
    takes = vits if arch.lower() == "dpt" else "resnet34 and other CNNs"
    raise UserError(
        f"--arch {arch} --encoder {encoder}",
        f"do not fit together ({reason})",
        f"{arch} takes {takes}; docs/models.md lists pairs that fit",
    )


def can_build(arch: str, encoder: str) -> bool:
    """Whether smp builds an architecture around an encoder."""
    try:
        with torch.random.fork_rng(devices=[]):
            smp.create_model(arch, encoder, encoder_weights=None)
    except Exception as error:  # smp and timm raise anything
        logging.debug("%s with %s: %s", arch, encoder, error)
        return False
    return True


def automatic_decoder(arch: str, encoder: torch.nn.Module) -> str:
    """What "auto" stands for: half of Unet's channels, but 16 at least, next to a light encoder.

    There the decoder is most of the work; with half of it a step took two thirds of the time. On a
    CPU with several threads, BatchNorm of 8 channels takes three times as long as that of 16.
    """
    light = arch.lower() == "unet" and encoder.out_channels[-1] < LIGHT
    return "128,64,32,16,16" if light else "1"


def decoder_options(arch: str, text: str) -> dict[str, Any]:
    """smp's arguments for --decoder_channels: numbers of channels, or a factor for the defaults.

    Raises UserError for text that the architecture cannot take.
    """
    if text in ("1", "auto"):
        return {}
    kind, flag = ARCHS[arch.lower()], f"--decoder_channels {text}"
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {name: parameters[name].default for name in CHANNELS if name in parameters}
    if not defaults:
        raise UserError(flag, f"{kind.__name__}'s decoder follows the encoder", "take 1")
    flat = [
        n for value in defaults.values() for n in (value if isinstance(value, tuple) else [value])
    ]
    example = f"{','.join(map(str, flat))}, or a factor such as 0.5"
    channels = [number.strip() for number in text.split(",")]
    factor = float(text) if re.fullmatch(r"\d*\.?\d+", text) else 0.0
    if 0 < factor <= LARGEST_FACTOR:
        step = 32 if kind is smp.FPN else 8  # FPN's GroupNorm has 32 groups
        numbers = [max(step, step * round(factor * n / step)) for n in flat]
    elif len(channels) == len(flat) and all(re.fullmatch(r"[1-9]\d{0,3}", n) for n in channels):
        numbers = list(map(int, channels))
    else:
        raise UserError(flag, f"{kind.__name__} takes {example}")
    rest = iter(numbers)
    return {
        name: tuple(itertools.islice(rest, len(value))) if isinstance(value, tuple) else next(rest)
        for name, value in defaults.items()
    }


# --------------------------------------------------------------------------------------------------
#  Pretrained weights
# --------------------------------------------------------------------------------------------------

REMEDY = "--encoder_weights FILE (.safetensors or .pth), or --encoder_weights none (much weaker)"

# Mean and std of smp's own encoders that were not trained with ImageNet's, by the start of the
# name; for weights from a file. For those from the Hub, the Hub says it.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {
    "timm-tf_efficientnet_lite": HALF,
    "inception": HALF,
    "xception": HALF,
    "dpn": (constants.IMAGENET_DPN_MEAN, constants.IMAGENET_DPN_STD),
}


def weights_names(encoder: str) -> list[str]:
    """The names of the pretrained weights that the Hub has for an encoder."""
    name = timm_name(encoder)
    if name:
        return ["imagenet"] if timm.models.is_model_pretrained(name) else []
    return list(smp.encoders.encoders[encoder]["pretrained_settings"])


def check_weights(encoder: str, weights: str) -> None:
    """Raise UserError where --encoder_weights is neither a name that the Hub knows nor a file."""
    names = weights_names(encoder)
    if weights in ("none", *names) or Path(weights).is_file():
        return
    others = f"{encoder} has {', '.join(names)}" if names else f"{encoder} has none on the Hub"
    if timm_name(encoder) and names:
        others += " (name others in the encoder, as timm does: tu-NAME.TAG)"
    raise UserError(
        f"--encoder_weights {weights}",
        "not for this encoder" if weights == "imagenet" else "no such file",
        f"{others}; or {REMEDY}",
    )


def normalisation(arch: str, encoder: str, weights: str) -> dict[str, tuple[float, ...]]:
    """The mean and std that the encoder's pretrained weights were trained with; of 0..1.

    Raises UserError for names that there are not and for weights that cannot be had.
    """
    check_names(arch, encoder)
    check_weights(encoder, weights)
    name = timm_name(encoder)
    in_file = {} if weights in ("none", *weights_names(encoder)) else file_statistics(weights)
    if in_file:
        return in_file
    if weights == "none":
        mean, std = IMAGENET
    elif name:
        config = timm.get_pretrained_cfg(name)
        mean, std = (config.mean, config.std) if config else IMAGENET
    elif weights in weights_names(encoder):
        get = functools.partial(smp.encoders.get_preprocessing_params, encoder, weights)
        params = from_hub(encoder, get)
        mean, std = params["mean"], params["std"]
    else:
        start = next((start for start in STATISTICS if encoder.startswith(start)), "")
        mean, std = STATISTICS.get(start, IMAGENET)
    return {"mean": tuple(mean), "std": tuple(std)}


def load_weights(network: torch.nn.Module, arch: str, encoder: str, weights: str) -> None:
    """Load pretrained weights into the encoder as the architecture builds it. Raises UserError."""
    check_weights(encoder, weights)
    if weights in weights_names(encoder):
        load = functools.partial(smp.create_model, arch, encoder, encoder_weights=weights)
        state, own = from_hub(encoder, load).encoder.state_dict(), network.encoder.state_dict()
        network.encoder.load_state_dict({key: widen(state[key], own[key]) for key in own})
    elif weights != "none":
        network.encoder.load_state_dict(fit_weights(network.encoder, encoder, weights))


def widen(given: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A first convolution for 3 channels as one for others, as smp's `in_channels` does it.

    Channel c gets the weights of channel c % 3, times 3 over the number of channels; one channel
    gets the sum of the three. Any other tensor stays as it is.
    """
    fits = given.dim() == own.dim() == 4 and given.shape[1] == 3 and own.shape[1] != 3
    if not fits or (given.shape[0], *given.shape[2:]) != (own.shape[0], *own.shape[2:]):
        return given
    count = own.shape[1]
    if count == 1:
        return given.sum(1, keepdim=True)
    return given[:, [c % 3 for c in range(count)]] * (3 / count)


def plain_name(key: str) -> str:
    """A tensor's name without prefixes; timm's `features_only` turns `stages.0` to `stages_0`."""
    prefixes = r"^((module|model|encoder|_orig_mod|backbone|net|unet)\.)+"
    return re.sub(prefixes, "", key).replace(".", "_")


def fit_weights(module: torch.nn.Module, encoder: str, file: str) -> dict[str, torch.Tensor]:
    """The encoder's state dict from a file, by names without prefixes. Raises UserError.

    timm's classifier, which a ViT keeps, may be of other classes or absent: nothing uses it.
    """
    weights, initial = read_weights(file), module.state_dict()
    given = {plain_name(key): tensor for key, tensor in weights.items()}
    state, missing, wrong = {}, [], []
    unused = "|".join((*classifier_names(module), "num_batches_tracked$"))
    needed = [key for key in initial if not re.search(unused, plain_name(key))]
    check_unique(weights, given, set(map(plain_name, needed)), file)
    for key, tensor in initial.items():
        other = given.get(plain_name(key))
        other = other if other is None else widen(other, tensor)
        fits = other is not None and other.shape == tensor.shape
        state[key] = other if fits else tensor
        if not fits and key in needed:
            (missing if other is None else wrong).append(key)
    if missing or wrong:
        fitting = len(needed) - len(missing) - len(wrong)
        faults = [f"absent: {first_five(missing)}"] * bool(missing)
        faults += [f"of other shape: {first_five(wrong)}"] * bool(wrong)
        count = f"{fitting} of {len(needed)} tensors fit ({'; '.join(faults)})"
        raise UserError(
            f"--encoder_weights {file}",
            f"not the weights of {encoder}: {count}",
            "name its own file",
        )
    return state


def check_unique(
    weights: dict[str, torch.Tensor], given: dict[str, torch.Tensor], needed: set[str], file: str
) -> None:
    """Raise UserError where tensors of a file that differ have one name without prefixes.

    `given`: the last of each name; `needed`: the names that are looked at.
    """
    for key, tensor in weights.items():
        name = plain_name(key)
        if name in needed and not torch.equal(tensor, given[name]):
            other = next(k for k, t in weights.items() if t is given[name])
            raise UserError(
                f"--encoder_weights {file}",
                f"holds several networks: {key} and {other} are one name and differ",
                "save the one that is meant as a file of its own",
            )


def classifier_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Patterns of the names of a timm model's classifier."""
    config = getattr(getattr(module, "model", None), "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return tuple(f"^{plain_name(name)}_" for name in names)


def from_hub(encoder: str, load: Callable[[], Any]) -> Any:
    """What `load` takes from the Hugging Face Hub or its cache. Raises UserError."""
    hub_offline_unless_reachable()
    try:
        return load()
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        ways = f"internet (or HF_HUB_CACHE set to a copy of the Hub's cache), {REMEDY}"
        raise UserError(
            f"ImageNet weights for {encoder}",
            f"cannot be had ({reason_of(error)})",
            f"three ways out: {ways}",
        ) from None


def hub_offline_unless_reachable() -> None:
    """Where the Hub cannot be reached, use its cache alone: 0.6 s instead of 26 s of retries."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def flagged(init: str) -> Iterator[None]:
    """In the block errors of the file of weights name --init, where that flag has given it."""
    try:
        yield
    except UserError as error:
        if init and str(error.where).startswith("--encoder_weights"):
            raise UserError(f"--init {init}", error.problem, error.remedy) from None
        raise


def check_archive(path: Path) -> None:
    """Raise ValueError for a zip that is damaged or unpacks to more than its own size."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("unpacks to more than its size")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")


# Where checkpoints of other libraries keep their weights; the averaged ones first, as timm does.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model_state_dict", "model",
    "module",
)  # fmt: skip


def read_weights(file: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file, also below `WRAPPERS`. Raises UserError."""
    return find_tensors(read_file(file))


def find_tensors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The first tensors below `WRAPPERS`, or those of the content itself."""
    inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict)]
    tensors = {key: value for key, value in content.items() if torch.is_tensor(value)}
    return next(filter(None, map(find_tensors, inner)), tensors)


def read_file(file: str) -> dict[str, Any]:
    """What a .safetensors or .pth file holds, without running code in it. Raises UserError.

    The tensors and metadata of a .safetensors are `state_dict` and `pretrained_cfg`.
    """
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                described = (opened.metadata() or {}).get("pretrained_cfg", "{}")
            return {"state_dict": load_file(file), "pretrained_cfg": json.loads(described)}
        if zipfile.is_zipfile(file):  # torch's older files are not
            check_archive(Path(file))
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own settings
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise anything on a damaged file
        raise UserError(
            f"--encoder_weights {file}", f"cannot be read ({reason_of(error)})", "replace it"
        ) from None
    return content if isinstance(content, dict) else {}


def file_statistics(file: str) -> dict[str, tuple[float, ...]]:
    """The mean and std that a weights file was trained with; {} where it does not say.

    timm's `pretrained_cfg` in it, or in the config.json next to it; the settings in a model.pt; a
    file name that is one of timm's, such as tf_efficientnet_b0.ap_in1k. Raises UserError.
    """
    content, beside = read_file(file), Path(file).with_name("config.json")
    blocks = [content.get("pretrained_cfg"), content.get("model")]
    if file.endswith(".safetensors") and beside.is_file():
        with contextlib.suppress(ValueError, AttributeError):  # of another program
            blocks.append(json.loads(beside.read_bytes()).get("pretrained_cfg"))
    with contextlib.suppress(RuntimeError):  # timm's, for a tag that it does not know
        blocks.append(vars(timm.get_pretrained_cfg(Path(file).stem) or argparse.Namespace()))
    for block in blocks:
        if isinstance(block, dict) and {"mean", "std"} <= set(block):
            try:
                mean, std = (tuple(map(float, block[name])) for name in ("mean", "std"))
                in_limits = -1 <= min(mean) <= max(mean) <= 2 and 1e-3 <= min(std) <= max(std) <= 10
            except (TypeError, ValueError):
                mean, std, in_limits = (), (), False
            if not in_limits or (len(mean), len(std)) != (3, 3):
                raise UserError(
                    f"--encoder_weights {file}",
                    "its mean and std are none (three numbers each, of 0..1)",
                    "take them out of the file",
                )
            return {"mean": mean, "std": std}
    return {}
