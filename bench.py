"""Measure the kit beside what a user would pick instead, on this machine, in one run.

    python bench.py train --data DIR              # images a second of training, beside the bare passes
    python bench.py infer --data DIR              # from files to masks
    python bench.py scale --data DIR              # over the number of pictures, their size, the batch
    python bench.py accuracy --data DIR --minutes 6.6

Every variant runs in a process of its own, in turn (A B C A B C), and the tables give medians and spreads. They are
printed and written to bench_NAME.json. `tutorial` is the loop of the KITTI Road tutorial with its pairing mended,
`example` that of smp's binary example, `bare` the forward and backward passes alone on a tensor that lies ready.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
HERE = Path(__file__).parent

# =====================================================================================================================
#  WHAT A USER WOULD PICK INSTEAD
# =====================================================================================================================


def tutorial_dataset(samples: Any, size: int, augment: bool) -> Any:
    """The tutorial's dataset: every item decoded, resized, normalised anew with OpenCV and albumentations."""
    import albumentations as A
    import cv2
    import torch
    from albumentations.pytorch import ToTensorV2

    class Roads(torch.utils.data.Dataset):
        def __init__(self) -> None:
            flip = [A.HorizontalFlip(p=0.5)] if augment else []
            self.rows = list(samples.itertuples())
            self.transform = A.Compose([A.Resize(size, size), *flip, A.Normalize(), ToTensorV2()])

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            image = cv2.cvtColor(cv2.imread(self.rows[index].image), cv2.COLOR_BGR2RGB)
            mask = (cv2.imread(self.rows[index].mask)[..., 0] > 0).astype("float32")
            pair = self.transform(image=image, mask=mask)
            return pair["image"], pair["mask"][None]

    return Roads()


def other_module(name: str) -> Any:
    """The LightningModule of the tutorial (BCE, AdamW 1e-3) or of smp's example (Dice, Adam 2e-4, its statistics)."""
    import pytorch_lightning as pl
    import segmentation_models_pytorch as smp
    import torch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = smp.Unet("resnet34", encoder_weights=None, classes=1)
            self.loss = smp.losses.DiceLoss("binary") if name == "example" else torch.nn.BCEWithLogitsLoss()

        def training_step(self, batch: Any, _: int) -> Any:
            logits = self.model(batch[0])
            if name == "example":
                smp.metrics.get_stats((logits.sigmoid() > 0.5).long(), batch[1].long(), mode="binary")
            value = self.loss(logits, batch[1])
            self.log("loss", value, prog_bar=True)
            return value

        def configure_optimizers(self) -> Any:
            if name == "example":
                return torch.optim.Adam(self.parameters(), lr=2e-4)
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


# =====================================================================================================================
#  VARIANTS: each runs in a process of its own and returns its numbers
# =====================================================================================================================


class Clock:
    """Wraps a loader: counts its pictures and the seconds that were waited for them, after the first batch."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.pictures, self.waited, self.started = loader, 0, 0.0, 0.0
        self.dataset, self.batch_size, self.sampler = loader.dataset, loader.batch_size, loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        batches = iter(self.loader)
        for number in range(len(self.loader)):
            before = time.perf_counter()
            batch = next(batches)
            if number == 1:
                self.started = before
            if number:
                self.waited += time.perf_counter() - before
                self.pictures += len(batch["image"] if isinstance(batch, dict) else batch[0])
            yield batch

    def numbers(self) -> dict[str, float]:
        """Pictures a second, and the share of the time that was waited."""
        seconds = time.perf_counter() - self.started
        return {"images/s": self.pictures / seconds, "waiting": self.waited / seconds}


def repeated(samples: Any, count: int) -> Any:
    """The samples over and over, `count` rows."""
    return samples.iloc[[index % len(samples) for index in range(count)]].reset_index(drop=True)


def settings(options: argparse.Namespace, **more: Any) -> Any:
    """The kit's settings at the bench's size."""
    import utils

    given = {"encoder_weights": "none", "height": options.size, "width": options.size, "top": 0.0, "tiles": "false",
             "grow": False, "tta": False, "mean": utils.IMAGENET_MEAN, "std": utils.IMAGENET_STD,
             "batch_size": options.batch, "data": options.data}  # fmt: skip
    return utils.Config(**given | more)


def train_variant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One epoch over `options.images` pictures."""
    import pytorch_lightning as pl
    import torch

    import train
    import utils

    samples = repeated(utils.find_samples(options.data, training=True), options.images).assign(fold=1)
    if name == "bare":
        return bare_passes(options, training=True)
    if name == "kit":
        cfg = settings(options)
        first = len(samples.image.unique())
        pairs = utils.read_all(samples.iloc[:first], cfg)
        loader, _ = train.loaders(samples.assign(fold=1), [pairs[k % first] for k in range(len(samples))], cfg)
        utils.reuse_memory()  # as train() does
        module = train.RoadModel(cfg, utils.build_model(cfg))
        module.lr = cfg.lr
        trainer = train.quiet_trainer(cfg, max_epochs=1, gradient_clip_val=1.0, enable_progress_bar=False)
    else:
        dataset = tutorial_dataset(samples, options.size, augment=name == "tutorial")
        loader = torch.utils.data.DataLoader(dataset, options.batch, shuffle=True, drop_last=True)
        module = other_module(name)
        trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
                             enable_progress_bar=False)  # fmt: skip
    clock = Clock(loader)
    trainer.fit(module, clock)
    return clock.numbers()


def bare_passes(options: argparse.Namespace, training: bool) -> dict[str, float]:
    """The passes alone: channels_last, the device's own precision. Also what a matrix multiplication would allow."""
    import contextlib

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import train
    import utils

    device = utils.best_device()
    utils.reuse_memory()
    cfg = settings(options)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(utils.precision(cfg, device))
    model = utils.build_model(cfg).to(device, memory_format=torch.channels_last).train(training)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    truth = torch.zeros(options.batch, 1, options.size, options.size, device=device)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    grad = contextlib.nullcontext() if training else torch.inference_mode()

    def step() -> None:
        with grad, torch.autocast(device, half, enabled=half is not None):
            logits = model(images)
        if training:
            train.loss(logits, truth, 1.0).backward()
            optimiser.step()
            optimiser.zero_grad()

    def seconds(work: Any) -> float:
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with FlopCounterMode(display=False) as counter:
        step()
    step()
    steps = max(1, options.images // options.batch - 1)
    rate = steps / seconds(lambda: [step() for _ in range(steps)])
    size = 16384 if device == "cuda" else 4096
    matrix = torch.randn(size, size, device=device, dtype=half or torch.float32)
    peak = 2 * size**3 / min(seconds(lambda: matrix @ matrix) for _ in range(4))
    flops = counter.get_total_flops() / options.batch
    return {"images/s": rate * options.batch, "GFLOP a picture": flops / 1e9, "matmul GFLOP/s": peak / 1e9,
            "share of it": flops * rate * options.batch / peak}  # fmt: skip


def infer_variant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """From files to mask files, comparisons off, no mirrored pictures."""
    import albumentations as A
    import cv2
    import torch

    import infer
    import utils

    if name == "bare":
        return bare_passes(options, training=False)
    samples = utils.find_samples(options.data, training=True)
    cfg = settings(options)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pictures").mkdir()
        for index in range(options.images):
            source = Path(samples.image[index % len(samples)]).resolve()
            (root / "pictures" / f"{index:06d}{source.suffix}").symlink_to(source)
        utils.save_model(root / "model.pt", utils.build_model(cfg), cfg, 0.5, {})
        if name == "scoring":
            return scoring(samples, options)
        if name == "tutorial":
            model = utils.build_model(cfg).eval()
            transform = A.Compose([A.Resize(options.size, options.size), A.Normalize()])
            (root / "masks").mkdir()
            started = time.perf_counter()
            for path in sorted((root / "pictures").iterdir()):
                image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
                tensor = torch.from_numpy(transform(image=image)["image"]).permute(2, 0, 1)[None]
                with torch.no_grad():
                    mask = (model(tensor).sigmoid()[0, 0] > 0.5).byte().numpy() * 255
                mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
                cv2.imwrite(str(root / "masks" / f"{path.stem}.png"), mask)
        else:
            flags = {"model": [str(root / "model.pt")], "data": str(root / "pictures"), "out": str(root / "out")}
            started = time.perf_counter()
            infer.infer(infer.Options(**flags, comparisons=False, batch_size=options.batch))
        return {"images/s": options.images / (time.perf_counter() - started)}


def scoring(samples: Any, options: argparse.Namespace) -> dict[str, float]:
    """The official measures in the camera's view alone, at the pictures' own size."""
    import numpy as np

    import utils

    scored = samples[samples["mask"] != ""]
    truths = [utils.read_sample(row)[1] for row in scored.itertuples()]
    maps = [np.random.default_rng(0).integers(0, 256, truth.shape, np.uint8) for truth in truths]
    board, started = utils.Scoreboard(), time.perf_counter()
    for index in range(options.images):
        counts = utils.pixel_counts(maps[index % len(maps)], truths[index % len(maps)])
        board.add("", {"image": counts})
    board.report()
    return {"images/s": options.images / (time.perf_counter() - started)}


def accuracy_variant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train for `options.minutes`, predict held-out streets, score with the official measures."""
    import infer
    import utils

    samples = utils.survey(utils.find_samples(options.data, training=True))
    held = utils.assign_folds(samples, utils.Config(folds=5, seed=options.seed)) == 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for part, rows in (("train", samples[~held]), ("test", samples[held])):
            for column, place in (("image", "image_2"), ("mask", "gt_image_2")):
                (Path(folder) / part / "training" / place).mkdir(parents=True)
                for path in rows[column]:
                    (Path(folder) / part / "training" / place / Path(path).name).symlink_to(Path(path).resolve())
        out = Path(folder) / "out"
        if name == "kit":
            flags = ("--data", f"{folder}/train", "--out", out, "--encoder_weights", "none", "--seed", options.seed,
                     "--max_minutes", options.minutes)  # fmt: skip
            subprocess.run([sys.executable, str(HERE / "train.py"), *map(str, flags)], check=True, stdout=sys.stderr)
            epochs = len((out / "metrics.csv").read_text().splitlines()) - 1
        else:
            epochs = tutorial_training(Path(folder) / "train", out, options)
        seconds = time.perf_counter() - started
        test = infer.Options(model=[str(out)], data=f"{folder}/test/training", out=f"{folder}/predictions")
        infer.infer(test)
        report = json.loads((Path(folder) / "predictions" / "metrics.json").read_text())["image"]
    worst = min(scores["MaxF"] for category, scores in report.items() if category != "all")
    return {m: report["all"][m] for m in ("MaxF", "AP", "IoU", "IoU50")} | {
        "worst category": worst, "epochs": epochs, "seconds": seconds}  # fmt: skip


def tutorial_training(data: Path, out: Path, options: argparse.Namespace) -> int:
    """The tutorial's recipe, 256x256, for as many epochs as the minutes hold; saved as a model.pt of the kit."""
    import torch

    import utils

    cfg = settings(argparse.Namespace(size=256, batch=8, data=str(data)))
    samples = utils.find_samples(str(data), training=True)
    torch.manual_seed(options.seed)
    loader = torch.utils.data.DataLoader(tutorial_dataset(samples, 256, augment=True), 8, shuffle=True)
    model = utils.build_model(cfg)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    started, epochs, over = time.perf_counter(), 0, False
    while not over:
        for images, masks in loader:
            torch.nn.functional.binary_cross_entropy_with_logits(model(images), masks).backward()
            optimiser.step()
            optimiser.zero_grad()
            over = time.perf_counter() - started > 60 * options.minutes
            if over:
                break
        epochs += 1
    out.mkdir()
    utils.save_model(out / "model.pt", model.eval(), cfg, 0.5, {})
    return epochs


# =====================================================================================================================
#  TABLES
# =====================================================================================================================

VARIANTS = {
    "train": ("tutorial", "example", "kit", "bare"),
    "infer": ("tutorial", "kit", "bare", "scoring"),
    "accuracy": ("tutorial", "kit"),
}


def in_turn(command: str, variants: Any, options: argparse.Namespace, **changes: Any) -> dict[str, dict[str, list]]:
    """Run the variants in processes, A B C A B C; {variant: {number: values}}."""
    numbers: dict[str, dict[str, list]] = {name: {} for name in variants}
    for round_number in range(options.rounds):
        for name in variants:
            given = vars(options) | changes | {"command": command, "variant": name, "seed": options.seed + round_number}
            flags = [
                part
                for key, value in given.items()
                if key not in ("command", "out")
                for part in (f"--{key}", str(value))
            ]
            done = subprocess.run([sys.executable, __file__, command, *flags], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{name} failed: see above")
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                numbers[name].setdefault(key, []).append(value)
    return numbers


def table(title: str, numbers: dict[str, dict[str, list]], reference: str | None) -> None:
    """Print medians with their spread; the ratio to the reference's images a second."""
    keys = list(dict.fromkeys(key for values in numbers.values() for key in values))
    print(f"\n{title}\n\n| | {' | '.join(keys)} |{' ratio |' if reference else ''}")
    print(f"| --- |{' --- |' * (len(keys) + bool(reference))}")
    for name, values in numbers.items():
        cells = []
        for key in keys:
            found = values.get(key)
            spread = f" ({min(found):.3g} to {max(found):.3g})" if found and len(found) > 1 else ""
            cells.append(f"{statistics.median(found):.4g}{spread}" if found else "")
        if reference:
            base = statistics.median(numbers[reference]["images/s"])
            cells.append(f"{statistics.median(values['images/s']) / base:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


def machine() -> str:
    """The machine in words."""
    import torch

    words = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return f"{platform.machine()}, {os.cpu_count()} cores, bf16 {'native' if native else 'not native'}, {words}, " \
           f"torch {torch.__version__}"  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "infer", "scale", "accuracy"])
    parser.add_argument("--data", default="demo/data", help="KITTI Road folder (scale and speed: any pictures)")
    parser.add_argument("--size", type=int, default=256, help="height and width of the input")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=48, help="pictures a run")
    parser.add_argument("--rounds", type=int, default=2, help="how often each variant runs")
    parser.add_argument("--minutes", type=float, default=6.6, help="accuracy: of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # set by in_turn: be one variant, print its numbers
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.variant:
        run = {"train": train_variant, "infer": infer_variant, "accuracy": accuracy_variant}[options.command]
        numbers = run(options.variant, options)
        numbers["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(numbers))
        return
    if options.command == "scale":
        results = {}
        for what, values in (("images", (24, 96)), ("size", (128, 256, 512)), ("batch", (1, 4, 16))):
            for value in values:
                results[f"{what} {value}"] = in_turn("infer", ["kit"], options, **{what: value})["kit"]
        table("Inference, from files to masks", results, None)
    else:
        results = in_turn(options.command, VARIANTS[options.command], options)
        titles = {"train": "Training", "infer": "Inference, from files to masks", "accuracy": "Held-out streets"}
        table(titles[options.command], results, None if options.command == "accuracy" else "tutorial")
    print(f"\n`python bench.py {' '.join(sys.argv[1:])}` on {machine()}")
    Path(f"bench_{options.command}.json").write_text(
        json.dumps({"machine": machine(), "numbers": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
