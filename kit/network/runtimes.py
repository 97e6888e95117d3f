"""model.onnx as a network: OpenVINO or onnxruntime, whichever is installed."""

import functools
import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kit.errors import UserError, reason_of

Run = Callable[[np.ndarray], np.ndarray]  # (N, C, H, W) float32 to (N, K, H, W) float32


def open_openvino(content: bytes, threads: int, half: bool) -> tuple[Run, dict[str, str]]:
    """The model on a CPU, and its metadata. `half`: it may compute in bf16."""
    import openvino

    model = openvino.Core().read_model(content)
    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # else all threads may get the same core
    }
    metadata = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}

    @functools.cache
    def request() -> Any:  # takes seconds, which the metadata need not wait for
        return openvino.Core().compile_model(model, "CPU", hints).create_infer_request()

    return lambda images: request().infer([images])[0].copy(), metadata


def open_onnxruntime(content: bytes, threads: int, half: bool) -> tuple[Run, dict[str, str]]:
    """The model on a GPU that onnxruntime has been built for, else a CPU, and its metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    providers = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(content, options, providers)
    name = session.get_inputs()[0].name
    metadata = session.get_modelmeta().custom_metadata_map
    return lambda images: session.run(None, {name: images})[0], metadata


# the faster one first (docs/benchmarks.md)
RUNTIMES = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}


def installed() -> list[str]:
    """The names of the `RUNTIMES` that are installed."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name)]


class OnnxNetwork(torch.nn.Module):
    """A model.onnx in the place of a network: (N, C, H, W) of 0..255 to logits (N, K, H, W).

    `predict.to_probabilities` makes of them the probabilities that the file gives; an image's
    presence is in these already. Raises UserError for a file that is none of `infer.py --export`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        where, names = f"--model {path}", installed()
        if not names:
            problem = "needs a library to run it, and there is none"
            raise UserError(where, problem, "pip install openvino, or pip install onnxruntime")
        try:
            self.file, self.runtime = path.read_bytes(), names[0]
            self.lock, self.opened = threading.Lock(), {}
            self.content: dict[str, Any] = json.loads(self.open(torch.get_num_threads())[1]["kit"])
        except Exception as error:  # the runtimes raise anything
            problem = f"is no model.onnx of the kit ({reason_of(error)})"
            raise UserError(where, problem, "infer.py --export onnx writes one") from None
        self.place = torch.nn.Parameter(torch.zeros(0), requires_grad=False)  # tells the device
        # as smp's networks say of which steps height and width must be
        self.requires_divisible_input_shape = True
        self.encoder = SimpleNamespace(output_stride=self.content["size_step"])

    def open(self, threads: int, half: bool = False) -> tuple[Run, dict[str, str]]:
        """The file in the runtime, for this thread, which may use so many cores.

        OpenVINO: a model of its own, since two threads in one wait for each other forever.
        """
        thread = threading.get_ident() if self.runtime == "openvino" else 0
        with self.lock:
            key = (threads, half, thread)
            if key not in self.opened:
                self.opened[key] = RUNTIMES[self.runtime](self.file, threads, half)
            return self.opened[key]

    def forward(self, images: torch.Tensor) -> Any:
        config = self.content["model"]
        run, _ = self.open(torch.get_num_threads(), torch.is_autocast_enabled("cpu"))
        parts = images.cpu().contiguous().split(self.content["batch"] or len(images))
        outputs = [torch.from_numpy(run(part.numpy())) for part in parts]
        probabilities = torch.cat(outputs).to(images.device)
        logits = probabilities.log() if config["exclusive"] else probabilities.logit()
        logits = logits * config["temperature"]
        sure = torch.full(logits.shape[:2], torch.inf, device=logits.device)
        return (logits, sure) if config["presence"] else logits
