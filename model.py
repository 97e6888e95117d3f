"""The network: its settings, sizes, device, EMA and BatchNorm, and model.pt."""

import ctypes
import dataclasses
import functools
import io
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import encoders
from utils import UserError, check_fields, reason_of, write_file

FORMAT = 2  # of model.pt
BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm  # private: the base class of BatchNorm1d to 3d


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All that inference needs to know about a network. Raises ValueError for impossible values."""

    arch: str = "Unet"  # an architecture of smp
    encoder: str = "resnet34"  # an encoder of smp
    decoder_channels: str = "1"  # a factor for smp's, or numbers of channels
    classes: int = 1  # [1..] channels of the logits
    height: int = 256  # [1..16384] pixels of the input, or of a tile
    width: int = 256  # [1..16384] as height
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # [-1..2] of red, green, blue in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # [0.001..10] as mean
    top: float = 0.0  # [0..0.9] share of the image's height that is cut off at the top
    tiles: bool = False  # cut the image into tiles instead of resizing it
    value_range: tuple[float, ...] = ()  # black and white where images have over 8 bits
    target: str = "road"  # what the mask means, for layouts with several targets
    rle: str = "columns"  # order of RLE in submission.csv: columns, rows (... from 0) or relative
    tta: bool = True  # average with the prediction of the horizontally flipped image
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"
    temperature: float = 3.0  # [0.01..100] logits are divided by it (Guo et al., ICML 2017)
    threshold: float = 0.5  # [0..1] a pixel is foreground from this probability on
    min_pixels: int = 0  # [0..1000000000] smaller components are removed from a mask
    class_names: tuple[str, ...] = ()  # of the channels; empty: one class
    class_values: tuple[str, ...] = ()  # of these classes in mask files or in a csv
    exclusive: bool = False  # a pixel has one class, the most probable; else each may be there
    thresholds: tuple[float, ...] = ()  # [0..1] of classes that may overlap
    areas: tuple[int, ...] = ()  # [0..1000000000] as min_pixels, of each class

    def __post_init__(self) -> None:
        try:
            check_fields(self)
            if (len(self.mean), len(self.std), len(self.value_range) % 2) != (3, 3, 0):
                raise ValueError("mean and std need three numbers each, value_range two or none")
            if self.class_names and len(self.class_names) != self.classes:
                raise ValueError(f"{self.classes} channels, but {len(self.class_names)} names")
        except UserError as error:
            raise ValueError(str(error)) from None

    def describe(self) -> str:
        """The network in a line for people."""
        top = f" below the upper {100 * self.top:.0f} %" if self.top else ""
        size = f"{self.height}x{self.width}{' in tiles' if self.tiles else top}"
        decoder = "" if self.decoder_channels == "1" else f" ({self.decoder_channels})"
        mean, std = (" ".join(f"{n:.3g}" for n in values) for values in (self.mean, self.std))
        statistics = f"mean {mean}, deviation {std}"
        return f"model: {self.arch}{decoder} {self.encoder}, input {size}, {statistics}"


class TrainedModel(NamedTuple):
    """A model from a model.pt, ready to predict."""

    network: torch.nn.Module
    config: ModelConfig
    settings: dict[str, Any]  # of the training, for people
    metrics: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


# --------------------------------------------------------------------------------------------------
#  Build
# --------------------------------------------------------------------------------------------------


def build_network(config: ModelConfig, weights: str = "none") -> torch.nn.Module:
    """Build the network: (N, 3, H, W) float32 to logits (N, classes, H, W).

    `weights`: "none" (for inference always), "imagenet" and the like (from the Hub or its cache),
    or a file for the encoder. Raises UserError for unknown names and weights that cannot be had.
    """
    network = encoders.build(config.arch, config.encoder, config.classes, config.decoder_channels)
    encoders.load_weights(network, config.arch, config.encoder, weights)
    return network


def size_step(network: torch.nn.Module) -> int:
    """Height and width must be multiples of this."""
    return network.encoder.output_stride if network.requires_divisible_input_shape else 1


def scale_input(config: ModelConfig, part: float, step: int) -> ModelConfig:
    """A part of height and width, in whole steps (of 16 where any size will do)."""
    step = 16 if step == 1 else step
    height, width = (step * round(part * n / step) for n in (config.height, config.width))
    return dataclasses.replace(config, height=max(32, height), width=max(32, width))


def fit_size(height: float, width: float, pixels: float) -> tuple[int, int]:
    """The size in steps of 32 that keeps the shape within so many pixels; not enlarged."""
    scale = min(1.0, math.sqrt(pixels / (height * width)))
    return tuple(max(32, 32 * round(length * scale / 32)) for length in (height, width))


def set_memory_format(network: torch.nn.Module, device: str) -> torch.nn.Module:
    """channels_last, up to five times faster; but not where it crashes on a CPU.

    There torch's backward pass of a 1x1 convolution with stride on few channels (of mobileone,
    repvgg, fastvit) corrupts the heap or never ends; with 16 channels it is fine.
    """
    crashes = device == "cpu" and any(
        isinstance(part, torch.nn.Conv2d)
        and part.kernel_size == (1, 1)
        and max(part.stride) > 1
        and part.in_channels < 16
        for part in network.modules()
    )
    if crashes:
        network.register_forward_pre_hook(make_contiguous)
        return network
    return network.to(memory_format=torch.channels_last)


def prepare_training(network: torch.nn.Module) -> torch.nn.Module:
    """Set the memory format; on a CPU let depthwise convolutions compute in float32.

    With a stride or over 3x3 pixels their backward pass in bf16 takes 3 to 15 times as long (oneDNN
    of torch 2.14): a step of EfficientNet-lite0 at 128x640, batch 8, took 614 ms instead of 867.
    """
    device = best_device()
    network = set_memory_format(network, device)
    if device != "cpu":
        return network
    for part in network.modules():
        depthwise = isinstance(part, torch.nn.Conv2d) and 1 < part.groups == part.in_channels
        if depthwise and (max(part.stride) > 1 or max(part.kernel_size) > 3):
            part.forward = functools.partial(in_float32, part.forward)
    return network


def in_float32(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call `forward` without autocast of the CPU; the output has the input's dtype."""
    with torch.autocast("cpu", enabled=False):  # the trial step's tensors are on "meta"
        return forward(x.float()).to(x.dtype)


def make_contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A forward pre-hook: the images without channels_last."""
    return tuple(images.contiguous() for images in inputs)


# --------------------------------------------------------------------------------------------------
#  Device
# --------------------------------------------------------------------------------------------------


def best_device() -> str:
    """The accelerator that torch finds ("cuda", "mps"), else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def check_gpu() -> None:
    """Raise UserError for a GPU that this torch has no kernels for, such as Kaggle's P100."""
    if not torch.cuda.is_available():  # true with a P100
        return
    built = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"]
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < min(built, default=0):
        remedy = "on Kaggle choose the accelerator GPU T4 x2"
        raise UserError(f"{torch.cuda.get_device_name()}: too old for this torch; {remedy}")


def prepare_device() -> None:
    """Before the first tensor. Raises UserError for a GPU that is too old."""
    check_gpu()
    reuse_memory()


def resolve_devices(wanted: int, device: str) -> int:
    """As many GPUs as there are, at most."""
    count = torch.cuda.device_count() if device == "cuda" else wanted
    if wanted > count:
        print(f"--devices {wanted}: there is only {count}, which is used", flush=True)
    return min(wanted, count)


def resolve_precision(wanted: str, device: str, training: bool = False) -> str:
    """The precision to compute in, in Lightning's words; auto is the fastest native one.

    Training does as told. Inference on a device without 16 bits ignores what a GPU was told.
    """
    if wanted == "32" or (wanted != "auto" and (training or device == "cuda")):
        return wanted
    if device == "cuda":  # a T4 only emulates bf16
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    return "bf16-mixed" if device == "cpu" and cpu_has_bf16() else "32"


def cpu_has_bf16() -> bool:
    """Whether the CPU computes bf16 natively; emulated, it took 16 times as long as float32."""
    # private: torch has no public question for it; without the function the answer is no
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def autocast(precision: str, device: str) -> torch.autocast:
    """The context that computes in a precision of Lightning's words."""
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device, half, enabled=half is not None)


def reuse_memory() -> None:
    """Keep freed memory for the next batch on a CPU with glibc, instead of fresh zeroed pages.

    A training step at 64x352, batch 4, took 250 ms instead of 295.
    """
    if best_device() == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_mmap_max, m_trim_threshold, m_arena_max = -4, -1, -8
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_arena_max, 1)):
            libc.mallopt(option, value)


# --------------------------------------------------------------------------------------------------
#  Weights in training: EMA and BatchNorm
# --------------------------------------------------------------------------------------------------


def make_ema(network: torch.nn.Module, decay: float) -> AveragedModel:
    """A copy with the EMA of the weights; faster at the start, to forget the first steps."""

    def update(average: list, weights: list, updates: torch.Tensor) -> None:
        steps = int(updates) + 1
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(average, weights, updates)

    return AveragedModel(network, multi_avg_fn=update).requires_grad_(False)


def reestimate_batch_norm(network: torch.nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set BatchNorm's statistics to their mean over large batches (N, 3, H, W), in place.

    Precise BN (Wu and Johnson, arXiv 2105.07576). The running statistics of small batches miss how
    images differ from batch to batch. torch's `update_bn` would also switch dropout on.
    """
    norms = [part for part in network.modules() if isinstance(part, BATCH_NORM)]
    if not norms:
        return
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the mean over all batches
    for images in batches:
        network(images)
    for norm in norms:
        norm.eval()


# --------------------------------------------------------------------------------------------------
#  model.pt
# --------------------------------------------------------------------------------------------------


def save_model(
    path: Path,
    network: torch.nn.Module,
    config: ModelConfig,
    settings: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write model.pt: built-in types and tensors only. `settings`: of the training, for people."""
    tensors = network.state_dict().items()
    content = {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "config": settings,
        "state_dict": {key: value.detach().cpu().contiguous() for key, value in tensors},
        "metrics": metrics,
    }
    buffer = io.BytesIO()  # on a full disk torch's own writing ends in an unclear error
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def read_checkpoint(path: Path, flag: str) -> dict[str, Any]:
    """Read a file of torch.save without running code in it. Raises UserError with the flag."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes it")
    try:
        encoders.check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise anything on a damaged file
        reason = f"damaged or not a model ({reason_of(error)}); train again"
        raise UserError(f"{flag} {path}: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: holds no model; train.py writes model.pt")
    return content


def load_model(path: Path, device: str) -> TrainedModel:
    """Read a model.pt and rebuild its network. Raises UserError for any other file."""
    content = read_checkpoint(path, "--model")
    if "pytorch-lightning_version" in content:
        remedy = "give the model.pt next to it"
        raise UserError(f"--model {path}: is a Lightning checkpoint, for --resume; {remedy}")
    if content.get("format") != FORMAT:
        found = content.get("format", "unknown")
        reason = f"not a model.pt of format {FORMAT} (found {found}); train again with this version"
        raise UserError(f"--model {path}: {reason}")
    try:
        config = ModelConfig(**content["model"])
        network = build_network(config)
        network.load_state_dict(content["state_dict"])
        metrics = dict(content["metrics"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        reason = f"damaged or from another version ({reason_of(error)}); train again"
        raise UserError(f"--model {path}: {reason}") from None
    network = network.eval().requires_grad_(False)
    network = set_memory_format(network, device).to(device)
    return TrainedModel(network, config, content.get("config", {}), metrics)
