"""The network: its settings, sizes, device, EMA and BatchNorm, and model.pt."""

import ctypes
import dataclasses
import functools
import io
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kit.config import VERSION, ModelConfig
from kit.errors import UserError, first_five, reason_of
from kit.files import write_file
from kit.network import encoders
from kit.network.runtimes import OnnxNetwork

FORMAT = 3  # of model.pt
BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm  # private: the base class of BatchNorm1d to 3d


class TrainedModel(NamedTuple):
    """A model from a model.pt, ready to predict."""

    network: torch.nn.Module
    config: ModelConfig
    settings: dict[str, Any]  # of the training, for people
    metrics: dict[str, Any]
    seen: Sequence[str] = ()  # the images that it was trained on, see `extras.py`; (): unknown
    weight: float = 1.0  # in an average with other models

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


# --------------------------------------------------------------------------------------------------
#  Build
# --------------------------------------------------------------------------------------------------


def build_network(config: ModelConfig, weights: str = "none") -> torch.nn.Module:
    """Build the network: (N, C, H, W) float32 to logits (N, K, H, W) of K classes.

    With `presence` to these and the logits (N, K) of an image's having the classes.

    `weights`: "none" (for inference always), "imagenet" and the like (from the Hub or its cache),
    or a file for the encoder. Raises UserError for unknown names and weights that cannot be had.
    """
    count = len(config.class_names)
    options = config.decoder_channels, config.channels, config.presence > 0
    network = encoders.build(config.arch, config.encoder, count, *options)
    encoders.load_weights(network, config.arch, config.encoder, weights)
    return network


def start_network(config: ModelConfig, weights: str, init: str = "") -> torch.nn.Module:
    """`build_network` for a training; where `weights` are of an `init`, all that fits. UserError.

    The encoder must fit. Says what was taken over.
    """
    with encoders.flagged(init):
        network = build_network(config, weights)
        if init:
            print(take_over(network, config, weights))
    return network


def weights_file(init: str) -> str:
    """The file of weights that --init names: itself, or the one in a folder. Raises UserError."""
    path = Path(init)
    files = [path / "model.pt", path / "model.safetensors"] if path.is_dir() else [path]
    found = next(filter(Path.is_file, files), None)
    if not found:
        remedy = "name a model.pt, its folder, or a folder of smp's save_pretrained"
        raise UserError(f"--init {init}", "no weights there", remedy)
    return str(found)


def take_over(network: torch.nn.Module, config: ModelConfig, file: str) -> str:
    """Give a network the decoder of a file's network, and the head's rows of classes of its name.

    The encoder it has already (`encoders.load_weights`). Returns what was taken over, for people.
    """
    content = encoders.read_file(file)
    given, own = encoders.find_tensors(content), network.state_dict()
    described = content.get("model")  # of a file of another program it may be anything
    known = list(described.get("class_names", ())) if isinstance(described, dict) else []
    fits = {
        key: value
        for key, value in given.items()
        if key in own and value.shape == own[key].shape and not key.startswith("segmentation_head")
    }
    rows = [name for name in config.class_names if name in known]
    for key in ("segmentation_head.0.weight", "segmentation_head.0.bias"):
        if rows and key in given and given[key].shape[1:] == own[key].shape[1:]:
            fits[key] = own[key].clone()
            places = [config.class_names.index(name) for name in rows]
            fits[key][places] = given[key][[known.index(name) for name in rows]]
    network.load_state_dict(own | fits)
    decoder = [key for key in own if key.startswith("decoder.")]
    taken = sum(key in fits for key in decoder)
    head = first_five(rows) if "segmentation_head.0.weight" in fits else "no class"
    parts = f"{taken} of {len(decoder)} tensors of the decoder, {head} of the head"
    return f"init {file}: the encoder, {parts}"


def size_step(network: torch.nn.Module) -> int:
    """Height and width must be multiples of this."""
    return network.encoder.output_stride if network.requires_divisible_input_shape else 1


def scale_input(config: ModelConfig, scale: float, step: int) -> ModelConfig:
    """Height and width times a scale, in whole steps (of 16 where any size will do)."""
    step = 16 if step == 1 else step
    height, width = (step * round(scale * n / step) for n in (config.height, config.width))
    return dataclasses.replace(config, height=max(32, height), width=max(32, width))


def set_memory_format(network: torch.nn.Module, device: str) -> torch.nn.Module:
    """channels_last, up to five times faster; but not where it crashes on a CPU.

    There torch's backward pass of a 1x1 convolution with stride on few channels (of mobileone,
    repvgg, fastvit) corrupts the heap or never ends; with 16 channels it is fine.
    """
    crashes = device == "cpu" and any(
        isinstance(layer, torch.nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels < 16
        for layer in network.modules()
    )
    if crashes:
        network.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
        return network
    for weight in network.parameters():
        if weight.dim() == 4:  # of lambda layers some have 5
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return network


def prepare_training(network: torch.nn.Module) -> torch.nn.Module:
    """Set the memory format; on a CPU let depthwise convolutions compute in float32.

    With a stride or over 3x3 pixels their backward pass in bf16 takes 3 to 15 times as long (oneDNN
    of torch 2.14): a step of EfficientNet-lite0 at 128x640, batch 8, took 614 ms instead of 867.
    That of a Conv3d (lambda layers) gives random numbers and NaN.
    """
    device = best_device()
    network = set_memory_format(network, device)
    if device != "cpu":
        return network
    for layer in network.modules():
        depthwise = isinstance(layer, torch.nn.Conv2d) and 1 < layer.groups == layer.in_channels
        slow = depthwise and (max(layer.stride) > 1 or max(layer.kernel_size) > 3)
        if slow or isinstance(layer, torch.nn.Conv3d):
            layer.forward = functools.partial(in_float32, layer.forward)
    return network


def in_float32(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call `forward` without autocast of the CPU; the output has the input's dtype."""
    with torch.autocast("cpu", enabled=False):  # the trial step's tensors are on "meta"
        return forward(x.float()).to(x.dtype)


# --------------------------------------------------------------------------------------------------
#  Device
# --------------------------------------------------------------------------------------------------


def best_device() -> str:
    """The accelerator that torch finds ("cuda", "mps"), else "cpu"."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def check_gpu() -> None:
    """Raise UserError for a GPU that this torch has no kernels for, such as Kaggle's P100."""
    if not torch.cuda.is_available():  # true with a P100
        return
    built = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"]
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < min(built, default=0):
        raise UserError(
            torch.cuda.get_device_name(),
            "too old for this torch",
            "on Kaggle choose the accelerator GPU T4 x2",
        )


def prepare_device() -> None:
    """Before the first tensor. Raises UserError for a GPU that is too old."""
    check_gpu()
    reuse_memory()


def resolve_precision(precision: str, device: str, training: bool = False) -> str:
    """The precision to compute in, in Lightning's words; auto is the fastest native one.

    Training does as told. Inference on a device without 16 bits ignores what a GPU was told.
    """
    if precision == "32" or (precision != "auto" and (training or device == "cuda")):
        return precision
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
    """Set BatchNorm's statistics to their mean over large batches (N, C, H, W), in place.

    Precise BN (Wu and Johnson, arXiv 2105.07576). The running statistics of small batches miss how
    images differ from batch to batch. torch's `update_bn` would also switch dropout on.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, BATCH_NORM)]
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


def describe(trained: TrainedModel) -> dict[str, Any]:
    """All of a model but its weights, in built-in types."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dataclasses.asdict(trained.config),
        "config": trained.settings,
        "metrics": trained.metrics,
        "seen": list(trained.seen),
    }


def save_model(path: Path, trained: TrainedModel) -> None:
    """Write model.pt: built-in types and tensors only."""
    tensors = trained.network.state_dict().items()
    state = {key: value.detach().cpu().contiguous() for key, value in tensors}
    buffer = io.BytesIO()  # on a full disk torch's own writing ends in an unclear error
    torch.save(describe(trained) | {"state_dict": state}, buffer)
    write_file(path, buffer.getvalue())


def read_checkpoint(path: Path, flag: str) -> dict[str, Any]:
    """Read a file of torch.save without running code in it. Raises UserError with the flag."""
    if not path.is_file():
        raise UserError(f"{flag} {path}", "no such file", "train.py writes it")
    try:
        encoders.check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise anything on a damaged file
        raise UserError(
            f"{flag} {path}", f"damaged or not a model ({reason_of(error)})", "train again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}", "holds no model", "train.py writes model.pt")
    return content


def load_model(path: Path, device: str) -> TrainedModel:
    """Read a model.pt and rebuild its network; or a model.onnx. UserError for any other file."""
    if path.suffix == ".onnx":
        return load_onnx(path, device)
    where, content = f"--model {path}", read_checkpoint(path, "--model")
    if "pytorch-lightning_version" in content:
        raise UserError(
            where, "is a Lightning checkpoint, for --resume", "give the model.pt next to it"
        )
    if content.get("format") != FORMAT:
        raise UserError(
            where,
            f"not a model.pt of format {FORMAT} (it has {content.get('format', 'none')})",
            "train again with this version",
        )
    try:
        config = ModelConfig(**content["model"])
        network = build_network(config)
        network.load_state_dict(content["state_dict"])
        metrics, seen = dict(content["metrics"]), list(content.get("seen", ()))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(
            where, f"damaged or from another version ({reason_of(error)})", "train again"
        ) from None
    network = set_memory_format(network.eval().requires_grad_(False), device).to(device)
    return TrainedModel(network, config, content.get("config", {}), metrics, seen)


def load_onnx(path: Path, device: str) -> TrainedModel:
    """The model of a model.onnx, whose graph normalises: `config` has nothing left to do there."""
    network = OnnxNetwork(path)
    content = network.content
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content["model"].items()
    }
    config = ModelConfig(**settings)
    unchanged = {"mean": (0.0,) * config.channels, "std": (1 / 255,) * config.channels}
    config = dataclasses.replace(config, **unchanged)
    rest = content["config"], content["metrics"], content["seen"]
    return TrainedModel(network.to(device), config, *rest)
