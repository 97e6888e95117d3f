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
import functools
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import field
from reports import (
    HERE,
    SPEED,
    Numbers,
    in_turn,
    load_report,
    machine,
    print_table,
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


def seconds_of(work: Callable, device: str) -> float:
    """How long a piece of work takes, on the device too."""
    import torch

    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
#  Encoders and architectures: docs/models.md
# --------------------------------------------------------------------------------------------------

ENCODERS = (  # one of each family of smp, and some of timm
    "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "timm-resnest14d",
    "timm-res2net50_26w_4s", "timm-regnetx_002", "timm-gernet_s", "se_resnet50",
    "timm-skresnet18", "densenet121", "inceptionresnetv2", "inceptionv4", "efficientnet-b0",
    "timm-efficientnet-b0", "timm-tf_efficientnet_lite0", "timm-mobilenetv3_small_100",
    "mobilenet_v2", "dpn68", "vgg11_bn", "xception", "mit_b0", "mobileone_s0",
    "tu-convnext_atto", "tu-convnextv2_atto", "tu-mobilenetv4_conv_small",
    "tu-tf_efficientnetv2_b0", "tu-swin_tiny_patch4_window7_224", "tu-swinv2_tiny_window8_256",
    "tu-maxvit_nano_rw_256", "tu-vit_tiny_patch16_224", "tu-vit_small_patch16_dinov3",
    "tu-hrnet_w18_small", "tu-fastvit_t8", "tu-mambaout_femto", "tu-repvgg_b0", "tu-hgnetv2_b0",
    "tu-edgenext_xx_small", "tu-pvt_v2_b0", "tu-poolformer_s12", "tu-rdnet_tiny", "tu-dla34",
    "tu-ghostnet_100", "tu-inception_next_atto",
)  # fmt: skip
SECONDS = 300  # a pair of the sweep may take


def archs() -> list[str]:
    """The names of smp's architectures."""
    from kit.network import encoders

    return [arch.__name__ for arch in encoders.ARCHS.values()]


def in_child(work: Callable[[], Any]) -> tuple[int, str]:
    """Call `work` in a child process; its exit status (minus a signal) and what it printed."""
    from kit.errors import one_line_errors

    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)  # ends it even within torch
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                with one_line_errors():
                    work()
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")


def draw_pairs(folder: Path) -> None:
    """Four small images, odd in height and width, whose lower half is the foreground."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    mask = np.zeros((70, 101), np.uint8)
    mask[35:] = 255
    for number in range(4):
        image = rng.integers(0, 255, (*mask.shape, 3), np.uint8)
        for name, pixels in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def train_and_predict(arch: str, encoder: str) -> None:
    """Two epochs on four images at automatic size, the export, and predictions with it."""
    import infer
    import train

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_pairs(root / "data")
        names = {"arch": arch, "encoder": encoder, "encoder_weights": "none"}
        paths = {"data": str(root / "data"), "out": str(root / "out")}
        train.train(train.Config(epochs=2, **names, **paths))
        options = {"model": [str(root / "out")], "data": str(root / "data" / "images")}
        infer.infer(infer.Options(out=str(root / "predictions"), **options))


def export_pair(arch: str, encoder: str) -> None:
    """model.onnx of an untrained network of the first size that it takes, and smp's folder.

    Compared with the network on noise.
    """
    import segmentation_models_pytorch as smp
    import torch

    from kit.config import ModelConfig
    from kit.data.images import normalise
    from kit.extra import export
    from kit.network import model
    from kit.training.trial import refusal

    network = model.build_network(ModelConfig(arch=arch, encoder=encoder))
    size = next(n for n in (96, 224, 256) if not refusal(network, 4, (n, n)))
    config = ModelConfig(arch=arch, encoder=encoder, height=size, width=size)
    noise = normalise(255 * torch.rand(4, 3, size, size), config)
    model.reestimate_batch_norm(network.eval(), [noise])  # else logits are 0, or 1e5
    network = model.set_memory_format(network.requires_grad_(False), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        models = [model.TrainedModel(network, config, {}, {})]
        export.export("smp", models, None, folder)
        difference = smp.from_pretrained(f"{folder}/smp").eval()(noise) - network(noise)
        assert difference.abs().max() < 1e-2
        export.export("onnx", models, None, folder)


def sweep(
    options: argparse.Namespace, name: str = "sweep", work: Callable = train_and_predict
) -> dict[str, str]:
    """{"Unet resnet18": "" where it runs, a refusal in one line, or how it failed}.

    Of `export` what model.onnx takes instead of "". Pairs that `sweep` refused are left out.
    """
    import infer  # once, before the children
    import train

    assert train and infer
    results = load_report(name).get("pairs", {})
    refused_before = load_report("sweep").get("pairs", {}) if name == "export" else {}
    for encoder in options.encoders.split(","):
        for arch in options.archs.split(",") if options.archs else archs():
            pair = f"{arch} {encoder}"
            if pair in results or refused_before.get(pair):
                continue
            status, text = in_child(functools.partial(work, arch, encoder))
            last = (text.strip().splitlines() or [""])[-1]
            refused = status == 2 and last.startswith("error: ")
            failed = f"FAILED with status {status}: {last}"
            done = last if name == "export" else ""
            results[pair] = done if status == 0 else last if refused else failed
            print(f"{pair}: {results[pair] or 'runs'}", flush=True)
            write_report(name, pairs=results)
    return results


def model_row(arch: str, encoder: str, options: argparse.Namespace) -> dict[str, Any]:
    """The measurements of one network, at the size that it takes."""
    import pandas as pd
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import train
    from kit.network import encoders, model
    from kit.training import trial

    device = model.best_device()
    settings = train.Config(encoder_weights="none", batch_size=options.batch, grow=True)
    config, scales = model_settings(options.size, arch=arch, encoder=encoder), (0.5, 0.75)
    images = pd.DataFrame(index=range(99))
    settings, config = trial.try_network(settings, config, images, (True, True), scales)
    network = model.build_network(config)
    size = config.height, config.width
    unused = trial.trial_step(network, 2, size, backward=True)
    parameters = sum(weight.numel() for weight in network.parameters())
    network = model.set_memory_format(network, device).to(device)
    batch = torch.randn(options.batch, 3, *size, device=device)
    batch = batch.to(memory_format=torch.channels_last)
    mask = torch.zeros(len(batch), 1, *size, device=device)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network.eval()(batch[:1])
        network(batch)
        predicting = median_seconds(lambda: network(batch), device, options.rounds)
    network.train()
    learn = lambda: train.loss(network(batch), mask, settings).backward()  # noqa: E731
    learn()
    learning = median_seconds(learn, device, options.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak
    return {
        "M parameters": round(parameters / 1e6, 1),
        "GMAC": round(counter.get_total_flops() / 2e9, 2),
        "ms training": round(1000 * learning / len(batch), 1),
        "ms inference": round(1000 * predicting / len(batch), 1),
        "peak GB": round(peak, 2),
        "size": "{}x{}".format(*size),
        "sizes": sizes_in_words(network, size) + ("" if settings.grow else "; no --grow"),
        "frozen in two processes": len(unused),
        "weights": ", ".join(encoders.weights_names(encoder)) or "none",
    }


def sizes_in_words(network: torch.nn.Module, size: tuple[int, int]) -> str:
    """The finest step of height and width at which the network takes the next size but one."""
    from kit.training.trial import refusal

    for step in (1, 2, 4, 8, 16, 32, 64, 128):
        height, width = (step * (length // step + 1) for length in size)
        if not refusal(network, 2, (height, width + 2 * step)):
            return "any" if step == 1 else f"multiples of {step}"
    return "this one"


def print_row(arch: str, encoder: str, options: argparse.Namespace) -> None:
    """`model_row` as JSON."""
    print(json.dumps(model_row(arch, encoder, options)))


def median_seconds(work: Callable, device: str, rounds: int) -> float:
    """The median time of a piece of work."""
    return statistics.median(seconds_of(work, device) for _ in range(rounds))


def measure_models(options: argparse.Namespace) -> dict[str, Any]:
    """{"Unet resnet18": measurements}, each in a process of its own."""
    import train  # once, before the children

    assert train
    pairs = [("Unet", encoder) for encoder in options.encoders.split(",")]
    pairs += [(arch, "resnet34") for arch in archs() if arch not in ("Unet", "DPT")]
    pairs.append(("DPT", "tu-vit_tiny_patch16_224"))
    rows = load_report("models").get("rows", {})
    for pair in pairs:
        name = " ".join(pair)
        if name in rows:
            continue
        status, text = in_child(functools.partial(print_row, *pair, options))
        last = (text.strip().splitlines() or [""])[-1]
        if status == 0:
            rows[name] = json.loads(last)
        print(f"{name}: {last}", flush=True)
        write_report("models", batch=options.batch, rows=rows)
    return rows


def write_models_page() -> None:
    """docs/models.md from bench_models.json and bench_sweep.json."""
    measured, swept = load_report("models"), load_report("sweep")
    lines = [
        "# Which encoder and architecture",
        "Written by `tools/bench.py models` and `tools/bench.py sweep`; every number is measured.",
    ]
    rows = measured.get("rows", {})
    if rows:
        lines += which_to_take(rows)
        columns = list(next(iter(rows.values())))
        lines += [
            "\n## Work, time and memory",
            f"Float32, no pretrained weights, ms per image in batches of {measured['batch']}.",
            "Times depend on what else the machine does: compare GMAC first.",
            f"`python tools/bench.py {measured['call']}` on {measured['machine']}.\n",
            f"| network | {' | '.join(columns)} |",
            f"| --- |{' --- |' * len(columns)}",
        ]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    pairs = swept.get("pairs", {})
    if pairs:
        names = list(dict.fromkeys(pair.split()[0] for pair in pairs))
        done = sum(not text for text in pairs.values())
        failed = sum(text.startswith("FAILED") for text in pairs.values())
        lines += [
            "\n## Which go together",
            "Two epochs on four images of 70x101 at automatic size, the export, predictions.",
            f"{len(pairs)} pairs tried on {swept['machine']}: {done} run,",
            f"{len(pairs) - done - failed} are refused in one line, {failed} fail.",
            "+ runs, - is refused, ! fails, blank: not tried.\n",
            f"| encoder | {' | '.join(names)} |",
            f"| --- |{' --- |' * len(names)}",
        ]
        for encoder in dict.fromkeys(pair.split()[1] for pair in pairs):
            texts = [pairs.get(f"{arch} {encoder}") for arch in names]
            signs = [sign_of(text) for text in texts]
            lines.append(f"| {encoder} | {' | '.join(signs)} |")
    lines += which_are_exported(load_report("export").get("pairs", {}))
    (HERE / "docs" / "models.md").write_text("\n".join(lines) + "\n")


def which_are_exported(pairs: dict[str, str]) -> list[str]:
    """What model.onnx of each architecture takes, and the largest difference."""
    if not pairs:
        return []
    texts = pairs.values()
    refused = [f"{pair} ({text})" for pair, text in pairs.items() if "wrote " not in text]
    of_any = sum("of any size" in text for text in texts)
    largest = max(float(text.rsplit(" is ", 1)[1]) for text in texts if " is " in text)
    fixed = {pair.split()[0] for pair, text in pairs.items() if "of any size" not in text}
    return [
        "\n## Which are exported",
        "`python tools/bench.py export`: `infer.py --export onnx` of untrained networks, compared",
        f"on noise. Of {len(pairs)} pairs {of_any} give a file that takes images of any",
        f"size (in the steps of the network), {len(pairs) - of_any - len(refused)} one of the size",
        f"of the training, {len(refused)} are refused{': ' * bool(refused)}{'; '.join(refused)}.",
        f"The largest difference of a probability is {largest:.1e}. One size: {sorted(fixed)}.",
    ]


def which_to_take(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The default's time in training, what is much faster, and what is much slower."""
    default = rows["Unet resnet34"]["ms training"]
    part = {name: row["ms training"] / default for name, row in rows.items()}
    fast = [name for name in sorted(part, key=part.get) if part[name] < 0.6][:6]
    slow = [name for name in sorted(part, key=part.get) if part[name] > 2]
    named = lambda names: ", ".join(f"{name} ({part[name]:.2g})" for name in names)  # noqa: E731
    return [
        "\nTo begin take the default, `--arch Unet --encoder resnet34`. Times of a training step,",
        f"as parts of the default's: the fastest are {named(fast)}.",
        f"More than twice as slow: {named(slow)}.",
    ]


def sign_of(text: str | None) -> str:
    """What became of a pair, in one sign."""
    if text is None:
        return " "
    return "+" if not text else "!" if text.startswith("FAILED") else "-"


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
    add("--encoders", default=",".join(ENCODERS), help="models, sweep, export: with commas")
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
        exports = functools.partial(sweep, name="export", work=export_pair)
        pages = {"models": measure_models, "sweep": sweep, "export": exports}
        pages[options.command](options)
        write_models_page()
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
