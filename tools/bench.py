"""Measure the kit compared with what a user would pick instead, on this machine, in one run.

    python tools/bench.py train --data DIR     # images per second of training, vs. the bare passes
    python tools/bench.py infer --data DIR     # from files to masks
    python tools/bench.py scale --data DIR     # over the number of images, their size, the batch
    python tools/bench.py accuracy --data DIR --minutes 6.6     # on a held-out fifth, vs. others
    python tools/bench.py field --data DIR,DIR,... --minutes 3  # the same on several kinds of data
    python tools/bench.py speedrun --data DIR  # accuracy after 0.5 to 6.6 minutes, with a plot
    python tools/bench.py field --data DIR --rivals ultralytics,nnunet  # also vs. these, rivals.py
    python tools/bench.py models               # encoders and architectures: work, time, memory
    python tools/bench.py sweep                # which pairs of them train, export and predict
    python tools/bench.py export               # which of these infer.py --export writes, and how

Every variant runs in a process of its own, in turn (A B C A B C); the tables give medians and
ranges. They are printed and written to bench_NAME.json. `tutorial` is the loop of the KITTI Road
tutorial with its pairing fixed, `example` that of smp's example at 320x320 (see peers.py), `bare`
the forward and backward passes alone, on a tensor in memory. A folder may be followed by the
foreground's values, as in `camvid:3`. `models`, `sweep`, `export` write docs/models.md, keep what
bench_NAME.json has: remove it to measure anew. `speedrun` resumes where the same call was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import field
import models
from reports import (
    HERE,
    SPEED,
    Numbers,
    in_turn,
    machine,
    print_table,
    seconds_of,
    this_call,
    write_report,
)

if TYPE_CHECKING:
    import pandas as pd
    import torch

    import train
    from kit.config import ModelConfig

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
HALF = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # Lightning's word to torch's type

# --------------------------------------------------------------------------------------------------
#  What the variants share
# --------------------------------------------------------------------------------------------------


class TimedLoader:
    """Wraps a loader: counts its images and the seconds spent waiting for them.

    From the second batch on, if there is one: the first pays for the start.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.images, self.waited, self.started = loader, 0, 0.0, 0.0
        self.dataset, self.sampler = loader.dataset, loader.sampler
        self.batch_size = loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        batches, first = iter(self.loader), min(1, len(self.loader) - 1)
        for number in range(len(self.loader)):
            before = time.perf_counter()
            batch = next(batches)
            if number == first:
                self.started = before
            if number >= first:
                self.waited += time.perf_counter() - before
                self.images += len(batch["image"] if isinstance(batch, dict) else batch[0])
            yield batch

    def numbers(self) -> dict[str, float]:
        """Images per second, and the share of the time that was spent waiting for them."""
        seconds = time.perf_counter() - self.started
        return {SPEED: self.images / seconds, "waiting": self.waited / seconds}


def find_samples(folder: str | Path) -> pd.DataFrame:
    """The samples of a folder of images with masks."""
    from kit.data import samples

    return samples.find_samples(str(folder), training=True).samples


def repeated(samples: pd.DataFrame, count: int) -> pd.DataFrame:
    """The samples over and over, `count` rows."""
    rows = [index % len(samples) for index in range(count)]
    return samples.iloc[rows].reset_index(drop=True)


def model_settings(size: int, **more: Any) -> ModelConfig:
    """The kit's model settings at the bench's size."""
    from kit.config import ModelConfig

    return ModelConfig(height=size, width=size, tta=False, **more)


def train_settings(options: argparse.Namespace) -> train.Config:
    """The kit's training settings at the bench's size, resolved for this machine."""
    import train
    from kit.network import model

    device = model.best_device()
    return train.Config(
        encoder_weights="none",
        height=options.size,
        width=options.size,
        top=0.0,
        tiles=False,
        grow=False,
        tta=False,
        batch_size=options.batch,
        precision=model.resolve_precision("auto", device, training=True),
        workers=4 * (device != "cpu"),
    )


# --------------------------------------------------------------------------------------------------
#  Variants: each runs in a process of its own and returns its numbers
# --------------------------------------------------------------------------------------------------


def train_variant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One epoch over `options.images` images."""
    import peers
    import pytorch_lightning as pl
    import torch

    if name == "bare":
        return bare_passes(options, training=True)
    samples = find_samples(options.data)
    if name == "kit":
        trainer, module, loader = kit_training(samples, options)
    else:
        samples, recipe = repeated(samples, options.images), peers.RECIPES[name]
        dataset = peers.resized_pairs(samples, options.size, recipe.flip)
        loader = torch.utils.data.DataLoader(dataset, options.batch, shuffle=True, drop_last=True)
        module = peers.PeerModule(name)
        trainer = pl.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    timed = TimedLoader(loader)
    trainer.fit(module, timed)
    return timed.numbers()


def kit_training(samples: pd.DataFrame, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Trainer, module and loader of the kit, with the images decoded, as `train.train` does."""
    import train
    from kit.config import Classes
    from kit.data.samples import decode_pairs, scan
    from kit.network import model

    config, model_config = train_settings(options), model_settings(options.size)
    samples = scan(samples[: options.images], Classes())
    samples = decode_pairs(samples, model_config, train.CACHE)
    samples = repeated(samples, options.images).assign(fold=config.fold + 1)  # none validates
    loader, _ = train.make_loaders(config, model_config, samples)
    model.reuse_memory()
    module = train.SegmentationModule(config, model_config)
    module.lr = config.lr
    return train.make_trainer(config, max_epochs=1), module, loader


def bare_passes(options: argparse.Namespace, training: bool) -> dict[str, float]:
    """The passes alone, in channels_last and the device's precision; and a matrix multiplication.

    The latter says what the device could do at best.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import train
    from kit.network import model

    device = model.best_device()
    model.reuse_memory()
    config, precision = train_settings(options), model.resolve_precision("auto", device)
    network = model.build_network(model_settings(options.size))
    network = network.to(device, memory_format=torch.channels_last).train(training)
    shape = (options.batch, 3, options.size, options.size)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    mask = torch.zeros(options.batch, 1, options.size, options.size, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    gradients = contextlib.nullcontext() if training else torch.inference_mode()

    def step() -> None:
        with gradients, model.autocast(precision, device):
            logits = network(images)
        if training:
            train.loss(logits, mask, config).backward()
            optimizer.step()
            optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    step()
    steps = max(1, options.images // options.batch - 1)
    rate = steps / seconds_of(lambda: [step() for _ in range(steps)], device)
    best = matrix_speed(device, getattr(torch, HALF.get(precision, "float32")))
    flops = counter.get_total_flops() / options.batch
    return {
        SPEED: rate * options.batch,
        "GFLOP per image": flops / 1e9,
        "matmul GFLOP/s": best / 1e9,
        "share of matmul": flops * rate * options.batch / best,
    }


def matrix_speed(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of the fastest of four multiplications of large matrices."""
    import torch

    size = 16384 if device == "cuda" else 4096
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_of(lambda: matrix @ matrix, device) for _ in range(4))


def infer_variant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """From files to mask files, without comparisons and without TTA."""
    import albumentations as A
    import torch

    import infer
    from kit.network import model

    if name == "bare":
        return bare_passes(options, training=False)
    samples = find_samples(options.data)
    if name == "scoring":
        return scoring(samples, options)
    config = model_settings(options.size)
    torch.manual_seed(0)
    network = model.build_network(config)
    transform = A.Compose([A.Resize(options.size, options.size), A.Normalize()])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for index in range(options.images):
            source = Path(samples.image[index % len(samples)]).resolve()
            (root / "images" / f"{index:06d}{source.suffix}").symlink_to(source)
        model.save_model(root / "model.pt", model.TrainedModel(network, config, {}, {}))
        started = time.perf_counter()
        if name == "tutorial":
            tutorial_inference(network.eval(), root, transform)
        else:
            paths = {"data": str(root / "images"), "out": str(root / "out")}
            flags = {"comparisons": False, "batch_size": options.batch}
            infer.infer(infer.Options(model=[str(root / "model.pt")], **paths, **flags))
        return {SPEED: options.images / (time.perf_counter() - started)}


def tutorial_inference(network: torch.nn.Module, root: Path, transform: Callable) -> None:
    """One image at a time, resized and normalised by `transform`."""
    import cv2
    import torch

    (root / "masks").mkdir()
    for path in sorted((root / "images").iterdir()):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        tensor = torch.from_numpy(transform(image=image)["image"]).permute(2, 0, 1)[None]
        with torch.no_grad():
            mask = (network(tensor).sigmoid()[0, 0] > 0.5).byte().numpy() * 255
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(root / "masks" / f"{path.stem}.png"), mask)


def scoring(samples: pd.DataFrame, options: argparse.Namespace) -> dict[str, float]:
    """The official measures in the camera's view alone, at the images' own size."""
    import numpy as np

    from kit.config import Classes
    from kit.data.samples import read_sample
    from kit.results import metrics

    targets = [read_sample(row)[1] for row in samples.itertuples()]
    rng = np.random.default_rng(0)
    probabilities = [rng.integers(0, 256, target.shape, np.uint8) for target in targets]
    evaluation, started = metrics.Evaluation(Classes()), time.perf_counter()
    for number in range(options.images):
        index = number % len(targets)
        evaluation.count(probabilities[index], targets[index])
    evaluation.report()
    return {SPEED: options.images / (time.perf_counter() - started)}


# --------------------------------------------------------------------------------------------------
#  Tables
# --------------------------------------------------------------------------------------------------

VARIANTS = {
    "train": ("tutorial", "example", "kit", "bare"),
    "infer": ("tutorial", "kit", "bare", "scoring"),
}
TITLES = {
    "train": "Training",
    "infer": "Inference, from files to masks",
    "scale": "Inference, from files to masks",
    "accuracy": "Held-out images",
    "field": "Held-out images of several kinds",
    "speedrun": "Held-out images, over the minutes of training",
}


def scale(options: argparse.Namespace) -> Numbers:
    """Inference with the kit, one option changed at a time."""
    results = {}
    for what, values in (("images", (24, 96)), ("size", (128, 256, 512)), ("batch", (1, 4, 16))):
        for value in values:
            changed = in_turn("infer", ("kit",), options, **{what: value})
            results[f"{what} {value}"] = changed["kit"]
    return results


def main() -> None:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("command", choices=[*TITLES, "models", "sweep", "export"])
    add("--data", default="demo/data", help="folder of images with masks; field, speedrun: several")
    add("--size", type=int, default=256, help="height and width of the input")
    add("--batch", type=int, default=8, help="images per step")
    add("--images", type=int, default=48, help="images per run")
    add("--rounds", type=int, default=2, help="how often each variant runs")
    add("--minutes", type=float, default=6.6, help="accuracy, field: of training; speedrun: most")
    add("--rivals", default="", help="accuracy, field, speedrun: ultralytics,nnunet or one of them")
    add("--encoder", default="resnet34", help="accuracy, field, speedrun")
    add("--weights", default="none", help="of the encoder, as --encoder_weights")
    add("--seed", type=int, default=0)
    add("--encoders", default=",".join(models.ENCODERS), help="models, sweep, export: with commas")
    add("--archs", default="", help="sweep, export: with commas; all")
    add("--variant", help=argparse.SUPPRESS)  # set by in_turn: be one variant, print its numbers
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from kit.errors import one_line_errors

    with one_line_errors():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Be one variant, or run the command."""
    if options.variant:
        variants = {"train": train_variant, "infer": infer_variant}
        variants["accuracy"] = field.accuracy_variant
        numbers = variants[options.command](options.variant, options)
        processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        peak = max(resource.getrusage(which).ru_maxrss for which in processes)
        numbers["peak GB"] = peak / 2**20
        print(json.dumps(numbers))
        return
    if options.command in ("models", "sweep", "export"):
        models.run(options)
        return
    several = {"scale": scale, "accuracy": field.accuracy, "field": field.field}
    several["speedrun"] = field.speedrun
    if options.command in several:
        results = several[options.command](options)
    else:
        results = in_turn(options.command, VARIANTS[options.command], options)
    speed = options.command in ("train", "infer")
    print_table(TITLES[options.command], results, "tutorial" if speed else None)
    print(f"\n`python tools/bench.py {this_call()}` on {machine()}")
    write_report(options.command, numbers=results)


if __name__ == "__main__":
    main()
