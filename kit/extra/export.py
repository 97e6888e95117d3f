"""infer.py --export: a model for elsewhere, as model.onnx, or as a folder for smp and the Hub."""

import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from kit.config import TUNED, ModelConfig
from kit.data.images import normalise, resize_image, to_tensor
from kit.errors import UserError, reason_of
from kit.files import writable_folder, write_file
from kit.network import runtimes
from kit.network.model import TrainedModel, build_network, describe, size_step
from kit.results.predict import describe_masks, read_batch, to_probabilities

OPSET = 18
IMAGES = 12  # that are compared
TOLERANCE = 1e-3  # of a probability
# the axes of the input that may have any length, as many as the network allows
AXES: list[dict[int, str]] = [{0: "batch", 2: "height", 3: "width"}, {0: "batch"}, {}]


def export(kind: str, models: list[TrainedModel], samples: pd.DataFrame | None, out: str) -> Path:
    """Write the model into `out` as `kind` (--export onnx or smp). Raises UserError.

    `samples`: images to compare on, or None. Returns the file or the folder.
    """
    flag, config = f"--export {kind}", models[0].config
    if len(models) > 1:
        problem = f"takes one model, --model names {len(models)}"
        raise UserError(flag, problem, "name one model.pt, and average what each file gives")
    if isinstance(models[0].network, runtimes.OnnxNetwork):
        raise UserError(flag, "takes a model.pt, not a model.onnx", "name the model.pt behind it")
    if config.tiles:
        size = f"{config.height}x{config.width}"
        tiles = f"tiles of {size} that overlap by a quarter, blended by a Hann window"
        problem = f"the model predicts {tiles}, which is more than a network"
        raise UserError(flag, problem, "predict with infer.py, or train with --tiles false")
    model = models[0]._replace(network=models[0].network.cpu())
    folder = writable_folder(out)
    if kind == "smp":
        return write_smp(model, writable_folder(folder / "smp"))
    return write_onnx(model, compared_images(config, samples), folder / "model.onnx")


def preprocessing(config: ModelConfig) -> dict[str, Any]:
    """What happens to an image before it is the input; for people and programs."""
    area = "area average where the image is larger in height and width, else bilinear"
    return {
        "channels": "red, green, blue" if config.rgb else config.channels,
        "files of the channels": config.bands,
        "slices before and after that are channels": config.neighbours,
        "values that become 0 and 255, of images of over 8 bits": config.value_range,
        "reduce the image to this scale": config.scale,
        "cut off this share of the height at the top": config.top,
        "resize to height": config.height,
        "resize to width": config.width,
        "resize by": f"{area} (OpenCV's INTER_AREA and INTER_LINEAR)",
        "layout": "float32 (N, C, height, width), 0 is black, 255 is white",
        "afterwards": "resize the probabilities (bilinear) to the image; 0 where it was cut off",
    }


# --------------------------------------------------------------------------------------------------
#  ONNX
# --------------------------------------------------------------------------------------------------


class Graph(torch.nn.Module):
    """(N, C, height, width) float32 of 0..255 to the kit's probabilities (N, K, height, width)."""

    def __init__(self, network: torch.nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return to_probabilities(self.network(normalise(images, self.config)), self.config)


def average_pool(maps: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """adaptive_avg_pool2d as products of matrices, which ONNX has; for maps of one size.

    The exporter of torch knows it only where `size`, the output's, divides that of the maps.
    """
    rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
    if rows == columns == 1:
        return maps.mean((2, 3), keepdim=True)
    return pooling_matrix(maps.shape[2], rows) @ maps @ pooling_matrix(maps.shape[3], columns).T


def pooling_matrix(length: int, count: int) -> torch.Tensor:
    """(count, length) float32: each row takes the mean of one of the pool's bins."""
    length = int(length)  # the exporter's sizes are tensors
    matrix = torch.zeros(count, length)
    for place in range(count):
        start, end = place * length // count, -(-(place + 1) * length // count)
        matrix[place, start:end] = 1 / (end - start)
    return matrix


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Let torch export what it can, without its warnings and the graph that it prints otherwise.

    A warning is of a number that became a constant; `check_shapes` finds those that matter.
    """
    sys.stdout.flush()
    stdout, own = os.dup(1), F.adaptive_avg_pool2d
    with open(os.devnull, "w") as nothing, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        F.adaptive_avg_pool2d = average_pool
        os.dup2(nothing.fileno(), 1)  # it is printed by C++
        try:
            yield
        finally:
            F.adaptive_avg_pool2d = own
            os.dup2(stdout, 1)
            os.close(stdout)


def compared_images(config: ModelConfig, samples: pd.DataFrame | None) -> torch.Tensor:
    """Up to `IMAGES` images as the network takes them, float32 (N, C, h, w); or two of noise."""
    if samples is None:
        return 255 * torch.rand(2, config.channels, config.height, config.width)
    pairs, errors = read_batch(list(samples[:IMAGES].itertuples()), config)
    for _, error in errors:
        raise error
    return torch.stack([to_tensor(resize_image(image, config)) for _, image in pairs]).float()


def write_onnx(model: TrainedModel, images: torch.Tensor, path: Path) -> Path:
    """Write a model.onnx that takes as many numbers and sizes of images as the network allows.

    `images`: to compare the kit's probabilities on. Raises UserError.
    """
    if not importlib.util.find_spec("onnx"):
        raise UserError("--export onnx", "needs onnx, which is not installed", "pip install onnx")
    names, graph = runtimes.installed(), Graph(model.network, model.config)
    name = names[-1] if names else ""  # onnxruntime before OpenVINO
    for axes in AXES if name else AXES[1:]:  # a free size is not promised unchecked
        try:
            content = graph_bytes(model, axes)
            if name:
                run, _ = runtimes.RUNTIMES[name](content, torch.get_num_threads(), False)
                check_shapes(graph, run, axes)
        except Exception as error:  # torch and the runtimes raise anything
            reason = reason_of(error)
            continue
        break
    else:
        problem = f"{model.config.arch} {model.config.encoder} cannot be written ({reason})"
        raise UserError("--export onnx", problem, "take --export smp")
    text = "NOT COMPARED with the kit's probabilities: pip install onnxruntime"
    if name:
        difference = largest_difference(graph, run, images.split(1))
        text = f"compared with the kit's probabilities on {len(images)} images by {name}"
        text += f", the largest difference is {difference:.1e}"
        if not difference <= TOLERANCE:
            raise UserError("--export onnx", f"is wrong: {text}", "take --export smp")
    write_file(path, content)
    print(f"wrote {path}: {shapes_in_words(model, axes)}; {text}", flush=True)
    return path


def shapes_in_words(model: TrainedModel, axes: dict[int, str]) -> str:
    """What the file takes."""
    step, config = size_step(model.network), model.config
    size = f"of {config.height}x{config.width}"
    if 2 in axes:
        size = "of any size" + f", in steps of {step}" * (step > 1)
    return f"{'any number of images' if axes else 'one image at a time,'} {size}"


def graph_bytes(model: TrainedModel, axes: dict[int, str]) -> bytes:
    """The file with its metadata. `axes`: of `AXES`. Raises anything."""
    import onnx

    config = model.config
    graph = Graph(model.network, config).eval()
    images = torch.zeros(2 if axes else 1, config.channels, config.height, config.width)
    names = {"input_names": ["image"], "output_names": ["probabilities"]}
    free = {"image": axes, "probabilities": axes}
    buffer = io.BytesIO()
    options = {"dynamic_axes": free, "opset_version": OPSET, "dynamo": False}
    with exporting():
        torch.onnx.export(graph, (images,), buffer, **names, **options)
    file = onnx.load_model_from_string(buffer.getvalue())
    own = {"batch": 0 if axes else 1, "size_step": size_step(model.network)}
    masks = {name: getattr(config, name) for name in TUNED}
    about = {
        "kit": describe(model) | own,  # all that infer.py --model model.onnx needs
        "takes": shapes_in_words(model, axes),
        "preprocessing": preprocessing(config),
        "classes": dict(zip(config.class_names, config.class_values, strict=True)),
        "postprocessing": {"in words": describe_masks(config), **masks},
        "symmetries of test-time augmentation": config.symmetries if config.tta else (),
    }
    texts = {name: json.dumps(value) for name, value in about.items()}
    onnx.helper.set_model_props(file, texts)
    return file.SerializeToString()


def check_shapes(graph: Graph, run: runtimes.Run, axes: dict[int, str]) -> None:
    """Raise an error where the file is wrong for shapes that its free axes promise."""
    config, step = graph.config, size_step(graph.network)
    shapes = [(2 if axes else 1, config.channels, config.height, config.width)]
    if 2 in axes:
        shapes.append((1, config.channels, config.height + step, config.width + 2 * step))
    difference = largest_difference(graph, run, (255 * torch.rand(shape) for shape in shapes))
    if not difference <= TOLERANCE:
        raise ValueError(f"differs by {difference:.1e}")


@torch.inference_mode()
def largest_difference(graph: Graph, run: runtimes.Run, batches: Iterable[torch.Tensor]) -> float:
    """Between the kit's probabilities, in float32, and those of the file."""
    differences = [(torch.from_numpy(run(x.numpy())) - graph(x)).abs().max() for x in batches]
    return float(max(differences))


# --------------------------------------------------------------------------------------------------
#  smp and the Hub
# --------------------------------------------------------------------------------------------------

CARD = """---
library_name: segmentation-models-pytorch
pipeline_tag: image-segmentation
tags:
- segmentation-models-pytorch
- image-segmentation
---
# {arch} with {encoder}

```python
import segmentation_models_pytorch as smp

model = smp.from_pretrained("FOLDER OR OWNER/NAME ON THE HUB").eval()
{output} = model((image - mean) / std)  # image: see below
```

Classes, in the order of the logits, and their values in mask files: {classes}.

Probabilities: {probabilities}. Masks: {masks}.

## Before the network

{steps}
- mean: {mean}
- std: {std}

## Scores

```json
{metrics}
```

The licence of the weights follows from those of the images and of the encoder's pretrained weights.
"""


def write_smp(model: TrainedModel, folder: Path) -> Path:
    """Write what smp's from_pretrained reads: config.json, model.safetensors, a model card."""
    config = model.config
    network = build_network(config)  # its tensors are contiguous, as safetensors needs them
    network.load_state_dict(model.network.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        network.save_pretrained(temporary)
        Path(temporary, "README.md").write_text(model_card(model), encoding="utf-8")
        for path in sorted(Path(temporary).iterdir()):
            write_file(folder / path.name, path.read_bytes())
    print(f"wrote {folder}: smp.from_pretrained({str(folder)!r}) reads it", flush=True)
    return folder


def model_card(model: TrainedModel) -> str:
    """README.md of the folder."""
    config = model.config
    pairs = zip(config.class_names, config.class_values, strict=True)
    function = "softmax" if config.exclusive else "sigmoid"
    steps = {name: value for name, value in preprocessing(config).items() if value not in ((), 0)}
    return CARD.format(
        arch=config.arch,
        encoder=config.encoder,
        classes=", ".join(f"{name} ({value})" for name, value in pairs),
        output="logits, presence" if config.presence else "logits",
        probabilities=f"{function}(logits / {config.temperature:g})"
        + " * sigmoid(presence), of an image" * (config.presence > 0),
        masks=describe_masks(config),
        steps="\n".join(f"- {name}: {value}" for name, value in steps.items()),
        mean=[255 * value for value in config.mean],
        std=[255 * value for value in config.std],
        metrics=json.dumps(model.metrics, indent=2),
    )
